"""Every solver against brute force: all families, all limits, all scales, 0 wrong values."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import allocate, solve
from lorambo_alloc.testing import (
    SMALL_FAMILIES,
    Instance,
    brute_force,
    brute_force_bottleneck,
    small_instance,
)
from tests.checks import check_answer, check_optimum
from tests.strategies import examples, finer_than_fixed_point, instances, seeds

GAINFUL = tuple(family for family in SMALL_FAMILIES if family != "operator")


def check_solvers(instance: Instance, *solvers: str) -> None:
    problem = instance.problem()
    optimum = brute_force(problem)[0]
    for solver in solvers:
        check_optimum(solve(problem, solver), optimum)


@given(instances())
@settings(max_examples=examples(3))
def test_any_problem(instance: Instance):
    check_solvers(instance, "auto", "water_filling")


@given(instances(concave=True, layers=5))
@settings(max_examples=examples(3))
def test_single_ranks_of_descending_gain(instance: Instance):
    assert instance.problem().concave_unit_steps
    check_solvers(instance, "auto", "water_filling")


@given(instances())
@settings(max_examples=examples(0.2))
def test_mixed_integer_program(instance: Instance):
    check_solvers(instance, "milp")


@pytest.mark.parametrize("limits", [False, True], ids=["free", "limits"])
@pytest.mark.parametrize("family", GAINFUL)
@given(seed=seeds())
@settings(max_examples=examples(0.2))
def test_family(family: str, limits: bool, seed: int):
    instance = small_instance(np.random.default_rng(seed), family, limits=limits)
    check_solvers(instance, "exact", "water_filling")


@pytest.mark.parametrize("family", GAINFUL)
@given(seed=seeds())
@settings(max_examples=examples(0.05))
def test_family_with_longer_curves(family: str, seed: int):
    instance = small_instance(np.random.default_rng(seed), family, layers=3, ranks=25)
    check_solvers(instance, "exact")


@given(instances())
@settings(max_examples=examples(0.5))
def test_no_time_at_all_still_gives_a_certified_answer(instance: Instance):
    allocation = solve(instance.problem(), time_limit=0.0)
    check_optimum(allocation, brute_force(instance.problem())[0])


# Seeds at which forgetting what rounding may hide overstates a bound.
@pytest.mark.parametrize("seed", [117, 299, 363, 396, 461, 638, 792, 838, 880, 908])
def test_gains_finer_than_the_fixed_point(seed: int):
    check_solvers(finer_than_fixed_point(seed), "exact", "water_filling")


@given(seed=seeds())
@settings(max_examples=examples(1))
def test_gains_finer_than_the_fixed_point_at_random(seed: int):
    check_solvers(finer_than_fixed_point(seed), "exact", "water_filling")


def check_bottleneck(problem: Any) -> None:
    allocation = solve(problem)
    check_answer(allocation)
    tails, _ = brute_force_bottleneck(problem)
    found = tuple(sorted(problem.tails(allocation.ranks).tolist(), reverse=True))
    assert found[0] == tails[0] == -allocation.value
    values = [tail for layer in range(len(tails)) for tail in _all_tails(problem, layer)]
    if len(set(values)) == len(values):
        assert found == tails


def _all_tails(problem: Any, layer: int) -> list[float]:
    """What the layer may discard, 0 at its end left out: layers that end there tie for good."""
    allowed = problem.allowed_ranks(layer)
    row = problem.curves[problem.names[layer]]
    weight = 1.0 if problem.weights is None else problem.weights[layer]
    return [float(row[r] * weight) for r in allowed.tolist() if r < len(row)]


@given(instances(objective="operator"))
@settings(max_examples=examples(1))
def test_bottleneck(instance: Instance):
    check_bottleneck(instance.problem())


@given(seed=seeds())
@settings(max_examples=examples(2))
def test_bottleneck_family(seed: int):
    instance = small_instance(np.random.default_rng(seed), "operator")
    check_bottleneck(instance.problem())


def test_brute_force_and_allocate_meet_on_an_example():
    spectra = {"a": [3.0, 2.0, 1.0], "b": [2.5, 0.5]}
    allocation = allocate(spectra, 44, costs={"a": 16, "b": 12})
    assert allocation.value == 9.0 + 4.0 + 6.25
    check_optimum(allocation, brute_force(allocation.problem)[0])
