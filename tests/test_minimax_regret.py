"""The search for little worst regret: the rounding of mixtures, ties, and what is proved."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import GainCurves, stability
from lorambo_alloc.minimax_regret import minimize_worst_regret, round_mixture
from tests.strategies import examples, seeds
from tests.test_sample_curves import curves_of


def round_to(mixed: list[float], budget: int, **keywords: Any) -> list[list[int]]:
    rows = [[5.0, 4.0, 3.0, 2.0], [4.5, 3.5, 2.5, 1.5]]
    curves, _ = curves_of([GainCurves.from_increments(rows)] * 2, budget, **keywords)
    return round_mixture(np.array(mixed), curves.mean(np.ones(2)), curves, None).tolist()


def test_mixtures_are_rounded_to_their_neighbours():
    assert round_to([0.5, 2.5], 3) == [[1, 2]]
    assert round_to([0.0, 3.0], 3) == [[0, 3]]
    assert round_to([3.0 - 1e-12, 1e-12], 3) == [[3, 0]]
    assert round_to([3.0 + 1e-12, 1.0 - 1e-12], 6) == [[3, 1]]
    assert round_to([4.0, 4.0], 8) == [[4, 4]]
    assert round_to([1.0, 2.5], 8) == [[1, 3]]
    assert round_to([1.5, 2.5], 8) == [[2, 3]]
    assert round_to([1.5, 2.5], 8, multiple_of=2) == [[2, 4]]
    assert round_to([1.5, 2.5], 4, multiple_of=2) == [[2, 2]]
    assert round_to([1.5, 1.5], 4, tied=[("0", "1")]) == [[2, 2]]
    assert round_to([2.5, 3.5], 8, allowed_ranks={"0": [0, 2, 3], "1": [1, 4]}) == [[3, 4]]


def test_mixtures_of_fixed_costs_may_not_fit():
    # Half of (2, 0) and half of (0, 2): neither fixed cost is paid in full.
    assert round_to([1.0, 1.0], 7, fixed_costs=[5, 5]) == []


def test_given_ranks_win_ties_and_bounds_are_exact():
    samples = [[[2.0], [1.0]], [[1.0], [2.0]]]
    curves, problems = curves_of(samples, 1, objective="nuclear")
    optima = [(Fraction(2), Fraction(2))] * 2
    for first in ([1, 0], [0, 1]):
        given_ranks = [np.array(first), np.array([0, 0])]
        ranks, bound = minimize_worst_regret(curves, optima, [1.0, 1.0], given_ranks, 10)
        assert ranks.tolist() == first
        assert float(bound) == pytest.approx(0.5)
        assert bound <= Fraction(1, 2)
    _, halved = minimize_worst_regret(curves, optima, [2.0, 2.0], [np.array([1, 0])], 10)
    assert float(halved) == pytest.approx(0.25)
    # Bounds on the optima, not the optima: what is proved rests on the lower ones.
    loose = [(Fraction(3, 2), Fraction(5, 2))] * 2
    _, bound = minimize_worst_regret(curves, loose, [1.0, 1.0], [np.array([1, 0])], 10)
    assert bound == 0
    assert len(problems) == 2


def test_what_rounding_hides_is_compared_exactly():
    # Beside 2^100 doubles see neither the 8 nor the 1 that the samples lose with v or w.
    rows = [{"q": 2.0**100, "v": 8.0, "w": 0.0}, {"q": 2.0**100, "v": 0.0, "w": 1.0}]
    samples = [GainCurves.from_increments({n: [g] for n, g in row.items()}) for row in rows]
    curves, problems = curves_of(samples, 2)
    own = [p.value_of(np.array(r)) for p, r in zip(problems, ([1, 1, 0], [1, 0, 1]), strict=True)]
    optima = [(value, value) for value in own]
    listed = [np.array([1, 0, 1]), np.array([1, 1, 0])]
    for candidates in (listed, listed[::-1]):
        ranks, bound = minimize_worst_regret(curves, optima, [1.0, 1.0], candidates, 10)
        assert ranks.tolist() == [1, 1, 0]
        assert bound <= 1


@given(seeds())
@settings(max_examples=examples(0.5))
def test_no_scale_makes_the_robust_ranks_worse_than_the_average(seed: int):
    rng = np.random.default_rng(seed)
    samples = [
        GainCurves.from_increments(
            [rng.normal(0, 1, 3) * 10.0 ** rng.integers(-60, 60) for _ in range(3)]
        )
        for _ in range(3)
    ]
    found = stability(samples, int(rng.integers(1, 9)), iterations=4)
    assert found.worst_regret <= max(found.losses)
