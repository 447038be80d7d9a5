"""Weighted means of samples, what rounding hides in them, and the rounding of mixtures."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.minimax_regret import SampleCurves, minimize_worst_regret, round_mixture
from lorambo_alloc.testing import Instance
from tests.strategies import examples, instances, random_ranks, seeds
from tests.test_stability import samples_of


def curves_of(
    samples: list[Any], budget: int, **keywords: Any
) -> tuple[SampleCurves, list[Problem]]:
    problems = [Problem(sample, budget, **keywords) for sample in samples]
    same = {k: v for k, v in keywords.items() if k not in ("objective", "weights")}
    return SampleCurves(problems, same), problems


@given(instances(), seeds())
@settings(max_examples=examples(0.5))
def test_values_and_means(instance: Instance, seed: int):
    rng = np.random.default_rng(seed)
    curves, problems = curves_of(samples_of(instance, seed), instance.budget, **instance.keywords)
    vectors = np.array([random_ranks(problems[0], rng) for _ in range(40)])
    units = [Fraction(2) ** int(e) for e in curves.exponents]
    values = curves.values(vectors)
    assert values.shape == (40, 3)
    weights = rng.choice([0.0, 0.3, 1.0, 2.0], 3)
    means = curves.mean(weights), curves.mean(weights, exponent=3)
    assert means[1].exponent == 3
    sizes = [
        sum(Fraction(float(np.abs(np.diff(p.curve(i))).sum())) for i in range(len(p.names)))
        for p in problems
    ]
    total = sum(
        (Fraction(w) * s / u for w, s, u in zip(weights, sizes, units, strict=True)), Fraction(0)
    )
    for mean in means:
        assert total * Fraction(2) ** -51 <= mean.error * (1 + Fraction(1, 1000))
        assert mean.error <= total * Fraction(2) ** -40 + Fraction(2) ** -1040
        problem = curves.problem(mean.curves)
        for ranks, row in zip(vectors, values, strict=True):
            exact = [p.value_of(ranks) / u for p, u in zip(problems, units, strict=True)]
            for truth, figure, size, unit in zip(exact, row, sizes, units, strict=True):
                off = abs(truth - Fraction(float(figure)))
                assert off <= size / unit * Fraction(2) ** -45 + Fraction(2) ** -1060
            weighted = sum(
                (Fraction(w) * v for w, v in zip(weights, exact, strict=True)), Fraction(0)
            )
            stated = problem.value_of(ranks) * Fraction(2) ** mean.exponent
            assert abs(weighted - stated) <= mean.error


def test_forms_of_the_matrix():
    by_rank = [GainCurves.from_increments([[3.0, 1.0], [2.0]])] * 2
    rising = [*by_rank[:1], GainCurves.from_increments([[1.0, 3.0], [2.0]])]
    for samples, concave in ((by_rank, True), (rising, False)):
        curves, _ = curves_of(samples, 2)
        problem = curves.problem(curves.mean(np.array([0.1, 0.3])).curves)
        assert problem.concave_unit_steps is concave


def test_the_mean_is_in_units_of_its_greatest_entry():
    curves, _ = curves_of([[[12.0, 5.0]], [[3.0, 3.0]]], 2, objective="nuclear")
    assert curves.exponents.tolist() == [4, 2]
    assert curves.values(np.array([[1], [2]])).tolist() == [[12 / 16, 3 / 4], [17 / 16, 6 / 4]]
    mean = curves.mean(np.array([1.0, 0.25]))
    assert mean.exponent == 0
    assert mean.curves["0"].tolist() == [0.0, 0.9375, 1.4375]
    mean = curves.mean(np.array([8.0, 8.0]))
    assert mean.exponent == 4
    assert mean.curves["0"].tolist() == [0.0, 0.75, 1.28125]


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
