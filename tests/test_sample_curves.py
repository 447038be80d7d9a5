"""Samples side by side: their values, their weighted means, and what rounding hides in them."""

from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import given, settings

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.sample_curves import SampleCurves
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
    assert curves.problems == tuple(problems)
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
