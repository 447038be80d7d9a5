"""GoRA and the square-root rule against a divisor method in rationals."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.baselines import gora, square_root
from tests.strategies import examples, seeds

FLAT = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 8}


def divisor_method(problem: Problem, breaks) -> list[int]:
    """Ranks at the largest scale that fits, in rationals; breaks(i, n): the n-th allowed rank's."""
    points = {breaks(i, n) for i in range(len(problem.names)) for n in range(1, 9)}
    best = [0] * len(problem.names)
    for scale in sorted(points - {None}):
        ranks = [
            sum(1 for n in range(1, 9) if (at := breaks(i, n)) is not None and at <= scale)
            for i in range(len(problem.names))
        ]
        if problem.cost_of(np.array(ranks)) > problem.budget:
            break
        best = ranks
    return best


# Powers of two, whose ties are ties in doubles too, or numbers that have none.
roots = st.one_of(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0]), min_size=3, max_size=3),
    seeds().map(lambda seed: np.random.default_rng(seed).uniform(0.1, 9.0, 3).tolist()),
)
unit_costs = st.lists(st.sampled_from([1, 4, 16]), min_size=3, max_size=3)


@settings(max_examples=examples(1))
@given(roots, unit_costs, st.integers(0, 170))
def test_gora_rounds_shares_down(importance, costs, budget):
    problem = Problem(FLAT, budget, costs=costs)

    def breaks(i: int, n: int):
        return n * costs[i] / Fraction(importance[i]) if importance[i] else None

    assert gora(problem, importance=importance).ranks.tolist() == divisor_method(problem, breaks)


@settings(max_examples=examples(1))
@given(roots, unit_costs, st.integers(0, 170))
def test_square_root_rounds_to_the_nearest(root, costs, budget):
    problem = Problem(FLAT, budget, costs=costs)

    def breaks(i: int, n: int):
        return (2 * n - 1) * math.isqrt(costs[i]) / Fraction(root[i]) if root[i] else None

    ranks = square_root(problem, sensitivity=[value**2 for value in root]).ranks.tolist()
    assert ranks == divisor_method(problem, breaks)


def test_gora_in_numbers():
    # Shares 1 : 2 : 4 of the budget, over costs 4, 8 and 2: scales 1/4, 1/4 and 2 a rank.
    problem = Problem(FLAT, 56, costs=[4, 8, 2])
    importance = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert dict(gora(problem, importance=importance)) == {"a": 3, "b": 3, "c": 8}
    # Over the roots 2, 2 sqrt 2 and sqrt 2.
    ranks = gora(problem, importance=importance, features="sqrt").ranks.tolist()
    assert ranks == [2, 4, 8]
    assert gora(problem, importance=[0.0, 0.0, 1.0]).ranks.tolist() == [0, 0, 8]
    assert gora(problem, importance=[0.0, 0.0, 0.0]).ranks.tolist() == [0, 0, 0]
    assert gora(problem, importance=[1.0, 2.0, 0.0]).ranks.tolist() == [4, 4, 0]
    assert gora(problem, importance=[1.0, 2.0, 0.0], fill=True).ranks.tolist() == [6, 4, 0]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, [0, 0, 0]),
        (1, [1, 0, 0]),
        (4, [1, 0, 0]),
        (5, [1, 1, 0]),
        (6, [2, 1, 0]),
        (21, [2, 1, 0]),
        (22, [2, 1, 1]),
        (23, [3, 1, 1]),
        (26, [3, 1, 1]),
        (27, [3, 2, 1]),
        (167, [8, 8, 7]),
        (168, [8, 8, 8]),
    ],
)
def test_square_root_in_numbers(budget, expected):
    # sqrt(s / c) is 1, 1/2 and 1/4; n ranks are reached at n - 1/2 over that.
    problem = Problem(FLAT, budget, costs=[1, 4, 16])
    assert square_root(problem, sensitivity=[1.0, 1.0, 1.0]).ranks.tolist() == expected


def test_gora_and_square_root_stand_ins():
    # Mean gains 5 and 3, whole gains 10 and 12.
    curves = GainCurves.from_increments({"a": [9.0, 1.0], "b": [3.0, 3.0, 3.0, 3.0]})
    assert dict(gora(Problem(curves, 1))) == {"a": 1, "b": 0}
    assert dict(square_root(Problem(curves, 1))) == {"a": 0, "b": 1}


def test_steps_are_rounded_down_by_gora_and_to_the_nearest_by_the_square_root():
    spectra = {"a": [1.0] * 16, "b": [1.0] * 16}
    problem = Problem(spectra, 16, multiple_of=8)
    # gora: b reaches 8 when a has 8 / 0.9 = 8.9, rounded down to 8.
    assert gora(problem, importance=[1.0, 0.9]).ranks.tolist() == [8, 8]
    assert gora(problem, importance=[1.0, 0.4]).ranks.tolist() == [16, 0]
    # square root: a is nearer to 16 than to 8 from 12 on, b nearer to 8 than to 0 from 4 on.
    assert square_root(problem, sensitivity=[1.0, 0.12]).ranks.tolist() == [8, 8]
    assert square_root(problem, sensitivity=[1.0, 0.11]).ranks.tolist() == [16, 0]


@pytest.mark.parametrize("features", ["log1p", None, 1])
def test_gora_refuses_features(features):
    with pytest.raises(ValueError, match=r"^features: expected 'linear' or 'sqrt', got "):
        gora(Problem(FLAT, 9), features=features)


def test_importance_too_small_to_count():
    # 2 / 5e-324 overflows: such a layer is never given a rank.
    assert gora(Problem(FLAT, 30), importance=[1.0, 5e-324, 1.0]).ranks.tolist() == [8, 0, 8]
    problem = Problem(FLAT, 30, costs=[1, 2**53, 1])
    assert square_root(problem, sensitivity=[1.0, 5e-324, 1.0]).ranks.tolist() == [8, 0, 8]
