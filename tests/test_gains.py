"""Gains of single ranks: computed where they are asked for, always the same double."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, allocate, log, schatten
from lorambo_alloc.arithmetic import exact_sum
from lorambo_alloc.arrays import first_ascent
from lorambo_alloc.gains import Gains
from lorambo_alloc.objectives import parse_objective
from lorambo_alloc.testing import brute_force
from tests.checks import check_optimum
from tests.strategies import seeds

SPECTRA = {"a": [5.0, 3.0, 1.0], "b": [4.0], "c": [2.0, 1.0]}


def gains_of(objective="frobenius", weights=None, spectra=SPECTRA) -> Gains:
    gains = Problem(spectra, 1, objective=objective, weights=weights).gains
    assert gains is not None
    return gains


@pytest.mark.parametrize("weights", [None, [0.7, 0.0, 3.0]])
@pytest.mark.parametrize("objective", ["frobenius", "nuclear", schatten(1.5), log(0.3)])
def test_at_row_and_selected_agree(objective, weights):
    gains = gains_of(objective, weights)
    factors = [1.0] * 3 if weights is None else weights
    for i, (sigma, factor) in enumerate(zip(SPECTRA.values(), factors, strict=True)):
        row = parse_objective(objective).gains(np.array(sigma)) * factor
        assert gains.row(i).tolist() == row.tolist()
        ranks = np.arange(1, len(sigma) + 1)
        assert gains.at(np.full(len(sigma), i), ranks).tolist() == row.tolist()
    rows, ranks, values = gains.selected(np.array([1, 0, 2]), np.array([3, 1, 1]))
    assert rows.tolist() == [0, 0, 1]
    assert ranks.tolist() == [2, 3, 1]
    assert values.tolist() == [*gains.row(0)[1:], gains.row(1)[0]]


def test_nothing_selected():
    gains = gains_of()
    rows, ranks, values = gains.selected(np.array([1, 1, 1]), np.array([0, 1, 1]))
    assert len(rows) == len(ranks) == len(values) == 0


@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 0.0]])
@pytest.mark.parametrize("upper", [[3, 1, 2], [2, 0, 1], [0, 0, 0]])
@pytest.mark.parametrize("objective", ["frobenius", "nuclear"])
def test_positive_sum(objective, upper, weights):
    gains = gains_of(objective, weights)
    expected = sum(float(gains.row(i)[:r].sum()) for i, r in enumerate(upper))
    assert gains.positive_sum(np.array(upper)) == pytest.approx(expected, rel=1e-12)


def test_positive_sum_leaves_negative_gains_out():
    gains = Problem(GainCurves.from_increments({"a": [3.0, -1.0], "b": [-2.0]}), 1).gains
    assert gains is not None
    assert gains.positive_sum(np.array([2, 1])) == 3.0


def test_positive_sum_over_many_layers():
    # More layers than one chunk holds.
    layers = 70_000
    gains = gains_of(spectra=np.full((layers, 2), 2.0))
    assert gains.positive_sum(np.full(layers, 2)) == 8.0 * layers
    assert gains.positive_sum(np.full(layers, 1)) == 4.0 * layers


@given(seeds(), st.sampled_from([schatten(0.3), schatten(1.7), schatten(3), log(0.37)]))
def test_gains_descend_even_where_pow_and_log_round_badly(seed, objective):
    rng = np.random.default_rng(seed)
    # Neighbouring doubles: the exact function ascends by less than an ulp.
    start = rng.uniform(0.5, 2.0)
    sigma = -np.sort(-(start + rng.integers(0, 40, 200) * np.spacing(start)))
    gains = gains_of(objective, spectra={"a": sigma})
    assert first_ascent(gains.layers) is None
    exact = objective.gains(sigma)
    assert gains.row(0) == pytest.approx(exact, rel=1e-15)


def test_float32_spectra_are_squared_in_doubles():
    value = np.float32(1.1)
    gains = gains_of(spectra={"a": np.array([value])})
    assert gains.row(0)[0] == float(value) ** 2


def test_overflow_names_the_layer():
    with pytest.raises(ValueError, match=r"layer 'b': a gain overflows .*1e\+200.*scale down"):
        Problem({"a": [1.0], "b": [1e200]}, 1)
    with pytest.raises(ValueError, match="layer 'b': a gain overflows"):
        Problem({"a": [1.0], "b": [1e150]}, 1, weights=[1.0, 1e100])
    with pytest.raises(ValueError, match="layer 'b': expected gains that sum to at most"):
        Problem({"a": [1e150], "b": [1e154] * 10}, 1)


def test_underflow_names_the_layer_and_looks_at_what_counts():
    with pytest.raises(ValueError, match="layer 'b': the gain of 1e-170 underflows; scale up"):
        Problem({"a": [1e-180], "b": [1e-170]}, 1)
    with pytest.raises(ValueError, match="layer 'b': the gain of 1e-170 underflows"):
        Problem({"a": [1.0], "b": [1e-170]}, 1, weights=[0.0, 1.0])
    # One layer with normal gains is enough.
    assert allocate({"a": [1.0], "b": [1e-200]}, 1).ranks.tolist() == [1, 0]


def test_weight_0_on_the_largest_layer_is_no_underflow():
    allocation = allocate({"a": [1e100], "b": [1.0]}, 1, weights=[0.0, 1.0])
    assert allocation.ranks.tolist() == [0, 1]
    check_optimum(allocation, Fraction(1))


def test_zero_weights_and_zero_spectra_are_no_underflow():
    for problem in (
        Problem({"a": [1.0], "b": [2.0]}, 1, weights=[0.0, 0.0]),
        Problem({"a": [0.0], "b": [0.0, 0.0]}, 1),
    ):
        assert brute_force(problem)[0] == 0


def test_value_is_the_sum_of_rounded_products():
    problem = Problem({"a": [0.1, 0.1]}, 2, weights=[0.3])
    gain = 0.3 * (0.1 * 0.1)
    assert problem.value_of(np.array([2])) == exact_sum(np.array([gain, gain]))
