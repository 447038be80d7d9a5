"""What all objectives have in common: their oracles agree, and their ceilings are none too low."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.submodular import Cardinality, Coverage, Function, LogDet, Modular
from lorambo_alloc.submodular.objectives import finite, non_negative
from tests.strategies import examples
from tests.submodular import drawn, exact


@settings(max_examples=examples(2.0))
@given(drawn.objectives(), st.data())
def test_the_oracle_agrees_with_the_definition(f, data):
    order = data.draw(st.permutations(range(f.n)))
    state = f.start()
    assert (state.value, state.items) == (0.0, ())
    for size, item in enumerate(order):
        gains = state.gains()
        base = exact.value(f, tuple(order[:size]))
        for j in range(f.n):
            joined = exact.value(f, tuple(sorted({*order[:size], j})))
            if isinstance(f, LogDet):
                assert math.exp(2 * gains[j]) == pytest.approx(float(joined / base), rel=1e-9)
            else:
                assert gains[j] == pytest.approx(float(joined - base), rel=1e-8, abs=1e-9)
        some = np.array([item, order[0]])
        assert state.gains(some) == pytest.approx(gains[some], abs=0)
        frozen = state.copy()
        state.add(item)
        assert frozen.items == tuple(order[:size])
        assert frozen.gains() == pytest.approx(gains, abs=0)
        assert state.items == tuple(order[: size + 1])
        assert state.gains()[item] == 0
        assert state.value == pytest.approx(f.value(order[: size + 1]), rel=1e-9, abs=1e-9)
        frozen.add(item)
        assert frozen.gains() == pytest.approx(state.gains(), abs=0)
        assert frozen.value == state.value


@settings(max_examples=examples(2.0))
@given(drawn.objectives(), st.data())
def test_no_set_is_above_a_ceiling(f, data):
    items = data.draw(st.permutations(range(f.n)))[: data.draw(st.integers(0, f.n))]
    within = data.draw(drawn.constraints(f.n))
    for base, weights in f.ceilings(items, within):
        assert weights.min(initial=0.0) >= 0
        for other in exact.subsets(f.n):
            if isinstance(f, LogDet):
                bound = base + math.fsum(weights[list(other)])
                # 1/2 log det, from the exact determinant: math.log of a fraction's two halves.
                det = exact.value(f, other)
                log = 0.5 * (math.log(det.numerator) - math.log(det.denominator))
                assert log <= bound + 1e-14 * (1 + log)
            else:
                bound = Fraction(base) + sum(Fraction(float(weights[j])) for j in other)
                assert exact.value(f, other) <= bound


@given(drawn.submodular(), st.data())
def test_a_submodular_ceiling_is_tight_at_its_set(f, data):
    items = data.draw(st.permutations(range(f.n)))[: data.draw(st.integers(0, f.n))]
    ((base, weights),) = f.ceilings(items, Cardinality(1))
    assert base == pytest.approx(f.value(items), rel=1e-12, abs=1e-9)
    state = f.start()
    for item in items:
        state.add(item)
    assert weights == pytest.approx(state.gains(), rel=1e-9, abs=1e-9)
    value, sketched = f.sketch(state)
    assert (value, sketched.tolist()) == (state.value, state.gains().tolist())


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([3], r"^items: expected elements below 3, got 3$"),
        ([0, 0], r"^items: expected each element once, got \[0, 0\]$"),
        ([-1], r"^items: expected a whole number >= 0, got -1$"),
        ([0.5], r"^items: expected a whole number >= 0, got 0.5$"),
    ],
)
def test_items_must_be_elements(items, message):
    for f in [Modular([1, 2, 3]), LogDet(np.eye(3), 1.0), Function(3, len)]:
        with pytest.raises(ValueError, match=message):
            f.value(items)


def test_arrays_must_be_finite():
    assert finite([[1, 2]], "here", 2).dtype == np.float64
    array = np.ones(3)
    assert finite(array, "here", 1) is array
    # The sum overflows; no entry is at fault.
    assert finite([1e308, 1e308], "here", 1).tolist() == [1e308, 1e308]
    with pytest.raises(ValueError, match=r"^here: expected finite numbers, got nan at \[0, 1\]$"):
        finite([[1.0, math.nan]], "here", 2)
    with pytest.raises(ValueError, match=r"^here: expected finite numbers, got inf at \[1\]$"):
        finite([1.0, math.inf], "here", 1)
    with pytest.raises(ValueError, match=r"^here: expected 2 dimensions, got shape \(1,\)$"):
        finite([1.0], "here", 2)
    with pytest.raises(ValueError, match=r"^here: expected an array of real numbers: "):
        finite(["x"], "here", 1)


def test_weights_are_copied_and_not_negative():
    given_weights = np.array([1.0, 0.0])
    copied = non_negative(given_weights, "here")
    given_weights[0] = 5.0
    assert copied.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"^here: expected numbers >= 0, got -1.0 at 1$"):
        non_negative([0.0, -1.0, -2.0], "here")


def test_nothing_to_choose_from():
    for f in [Modular([]), Coverage([]), LogDet(np.zeros((0, 0)), 1.0), Function(0, len)]:
        assert f.n == 0
        assert f.value([]) == 0
        assert f.start().gains().tolist() == []
