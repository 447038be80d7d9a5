"""Water-filling: quick, feasible, and within one step of the bound."""

import numpy as np
import pytest

from lorambo_alloc import Problem, solve
from lorambo_alloc.testing import HARD_FAMILIES, Instance, multiples_of_8, non_concave, power_law
from tests.checks import check_answer

REAL = [power_law("a"), multiples_of_8(), non_concave(60, 32)]


@pytest.mark.parametrize("instance", REAL, ids=lambda instance: instance.name)
def test_the_gap_of_real_shapes_is_small(instance: Instance):
    problem = instance.problem()
    allocation = solve(problem, "water_filling")
    check_answer(allocation)
    assert allocation.certificate.method == "water-filling"
    assert 0 <= allocation.certificate.relative_gap < 1e-2
    exact = solve(problem)
    assert exact.value >= allocation.value
    assert exact.certificate.upper_bound <= allocation.certificate.upper_bound


@pytest.mark.parametrize("family", HARD_FAMILIES)
def test_hard_families(family):
    problem = HARD_FAMILIES[family](20, 12).problem()
    allocation = solve(problem, "water_filling")
    check_answer(allocation)
    # It loses at most the gain of one more rank.
    assert problem.gains is not None
    most = max(float(problem.gains.row(i).max()) for i in range(len(problem.names)))
    assert allocation.certificate.gap <= most


@pytest.mark.parametrize("seed", range(5))
def test_equal_costs_are_optimal(seed):
    values = -np.sort(-np.random.default_rng(seed).random((30, 20)), axis=1)
    problem = Problem(values, 7 * 211, costs=[7] * 30)
    allocation = solve(problem, "water_filling")
    assert allocation.certificate.status != "gap_certified"
    best = np.sort((values**2).ravel())[::-1][:211]
    assert float(allocation.value) == pytest.approx(float(best.sum()), rel=1e-12)
