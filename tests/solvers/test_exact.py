"""The exact solver: what it finds, what it proves, and what it says when it stops."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lorambo_alloc import GainCurves, Problem, allocate, solve
from lorambo_alloc.solvers.exact import solve_exact
from lorambo_alloc.testing import (
    HARD_FAMILIES,
    brute_force,
    dynamic_program,
    multiples_of_8,
    non_concave,
    power_law,
)
from tests.checks import check_answer, check_optimum


@pytest.mark.parametrize("shape", ["a", "b"])
def test_real_shapes_are_proven(shape):
    allocation = power_law(shape).allocate()
    check_answer(allocation)
    assert allocation.certificate.status in ("optimal_exact", "optimal_within_rounding")
    assert allocation.certificate.relative_gap < 1e-12


def test_multiples_are_proven():
    allocation = multiples_of_8().allocate()
    check_answer(allocation)
    assert allocation.certificate.status in ("optimal_exact", "optimal_within_rounding")
    assert not np.any(allocation.ranks % 8)


def test_curves_of_any_form_are_proven():
    allocation = non_concave(60, 32).allocate()
    check_answer(allocation)
    assert allocation.certificate.status in ("optimal_exact", "optimal_within_rounding")


@pytest.mark.parametrize("family", HARD_FAMILIES)
@pytest.mark.parametrize("size", [(8, 6), (20, 12)])
def test_hard_families(family, size):
    instance = HARD_FAMILIES[family](*size)
    allocation = instance.allocate(time_limit=3.0)
    check_answer(allocation)
    assert allocation.certificate.relative_gap < 1e-3


@pytest.mark.parametrize("family", [f for f in HARD_FAMILIES if f != "proportional_large_costs"])
@pytest.mark.parametrize("seed", range(3))
def test_hard_families_against_a_full_dynamic_program(family, seed):
    instance = HARD_FAMILIES[family](6, 5, seed)
    problem = instance.problem()
    check_optimum(solve(problem), dynamic_program(problem))


def test_time_is_up_before_it_starts():
    problem = HARD_FAMILIES["strongly_correlated_linear"](30, 20).problem()
    stopped = solve_exact(problem, time_limit=0.0)
    check_answer(stopped)
    assert stopped.certificate.status == "gap_certified"
    assert stopped.certificate.gap > 0


def test_a_price_that_gives_up_bits_moves_the_best_responses():
    n = 2**53
    gains = {"a": [n - 3.0], "b": [n - 1.0, n - 1.0], "c": [n - 6.0], "d": [float(n), float(n)]}
    costs = {"a": n - 2, "b": n, "c": n - 5, "d": n}
    for budget in (36304452848324140, 3 * n, 3 * n - 7, 4 * n + 11, n):
        allocation = allocate(GainCurves.from_increments(gains), budget, costs=costs)
        check_optimum(allocation, brute_force(allocation.problem)[0])


@pytest.mark.parametrize("seed", range(150))
def test_costs_that_leave_gains_no_bits(seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 5))
    top = int(rng.choice([2**53, 10**9, 2**40]))
    costs = (top - rng.integers(0, 9, layers)).tolist()
    rows = [-np.sort(-(rng.integers(1, 4, 3) * float(c) - rng.integers(0, 9, 3))) for c in costs]
    step = 2 if seed % 3 == 0 else 1
    budget = int(rng.uniform(0, 3) * sum(costs))
    problem = Problem(GainCurves.from_increments(rows), budget, costs=costs, multiple_of=step)
    optimum, _ = brute_force(problem)
    check_optimum(solve(problem), optimum)
    check_optimum(solve(problem, "water_filling"), optimum)
    check_optimum(solve(problem, time_limit=0.0), optimum)


def test_gains_beyond_the_reach_of_the_fixed_point():
    spectra = {
        "a": [3.4395525670743494e-136, 7.637340908749012e-152],
        "b": [7.956566520223349e-140, 6.256509672447191e-148],
    }
    costs = [900000000, 929276235]
    allocation = allocate(spectra, 2_758_552_470, allowed_ranks=[1, 2], costs=costs)
    check_optimum(allocation, brute_force(allocation.problem)[0])


def test_a_price_that_underflows_is_not_a_price_of_nothing():
    curves = GainCurves.from_increments({"a": [1.0], "b": [5e-324, 5e-324], "c": [1e-323, 1e-323]})
    costs = [10, 4096, 4096]
    for budget in (10 + 4096, 10 + 2 * 4096, 10 + 3 * 4096):
        for method in ("exact", "water_filling"):
            allocation = allocate(curves, budget, costs=costs, method=method)
            check_optimum(allocation, brute_force(allocation.problem)[0])


def test_the_number_of_ranks_is_priced_where_gains_follow_the_costs():
    costs = [7, 11, 13, 17, 19, 23]
    curves = GainCurves.from_increments({f"{c}": [c + 3.0] * 6 for c in costs})
    for budget in (200, 210, 299):
        allocation = allocate(curves, budget, costs=costs)
        check_optimum(allocation, dynamic_program(allocation.problem))
        assert allocation.certificate.status == "optimal_exact"


def test_certificates_carry_the_price_per_unit_of_cost():
    # Costs share the divisor 6; the price is per unit, not per 6 units.
    spectra = {"a": [4.0, 2.0], "b": [3.0]}
    allocation = allocate(spectra, 6, costs=[6, 6])
    assert allocation.certificate.price == 9.0 / 6
    check_answer(allocation)
    general = allocate(spectra, 6, costs=[6, 6], allowed_ranks=[0, 1, 2])
    assert 9.0 / 6 <= general.certificate.price <= 16.0 / 6
    assert allocate(spectra, 10**9, costs=[6, 6]).certificate.price == 0.0


def test_ranks_of_a_gap_at_the_end_of_what_doubles_hold():
    curves = GainCurves.from_increments({"a": [2.0**400, 2.0**-400], "b": [2.0**399, 2.0**-401]})
    for budget in range(9):
        allocation = allocate(curves, budget, costs=[2, 3])
        optimum, _ = brute_force(allocation.problem)
        check_optimum(allocation, optimum)
        assert allocation.certificate.gap <= float(optimum) * Fraction(1, 2**40)


@pytest.mark.parametrize("family", ["strongly_correlated_linear", "inverse_strongly_correlated"])
@pytest.mark.parametrize("size", [(150, 4), (40, 20)])
def test_two_prices_prove_what_a_search_does_not(family, size):
    allocation = HARD_FAMILIES[family](*size).allocate()
    certificate = allocation.certificate
    assert certificate.status == "optimal_exact"
    assert certificate.cut is not None
    verification = certificate.verify(allocation.problem, allocation.ranks, effort=0)
    assert verification.proof == "two prices"
    assert verification.value == allocation.problem.value_of(allocation.ranks)


@pytest.mark.parametrize("size", [(30, 6), (150, 4)])
@pytest.mark.parametrize("family", [f for f in HARD_FAMILIES if f != "proportional_large_costs"])
def test_hard_families_are_proven(family, size):
    allocation = HARD_FAMILIES[family](*size).allocate()
    check_answer(allocation)
    assert allocation.certificate.status == "optimal_exact"


def test_a_penalty_far_above_the_price_is_rounded_down():
    # gain - price * cost rounds by an ulp of the gain, which is more than one of price * cost.
    p = 1 + 3 * 2.0**-52
    fillers = {f"filler{i}": [64 * p - 10.0 - i / 64] for i in range(63)}
    increments = {"big": [1e6], "a": [31.875], "b": [32 * p], **fillers}
    costs = {"big": 1000, "a": 1, "b": 32, **dict.fromkeys(fillers, 64)}
    allocation = solve(Problem(GainCurves.from_increments(increments), 1032, costs=costs))
    assert allocation.certificate.status == "optimal_exact"
    assert allocation.certificate.verify(allocation.problem, allocation.ranks).complete


def test_a_generous_time_limit_changes_nothing():
    problem = HARD_FAMILIES["strongly_correlated_concave"](20, 12).problem()
    assert solve_exact(problem, time_limit=0.0).certificate.status == "gap_certified"
    patient = solve_exact(problem, time_limit=1e6)
    assert patient.certificate.status == "optimal_exact"
    assert patient.certificate == solve_exact(problem).certificate


def test_what_no_fixed_point_holds_is_settled_in_integers():
    n = 2**53
    curves = GainCurves.from_increments(
        {
            "a": [9007199.25474099] * 4,
            "b": [9007199.254740994] * 3 + [9007199.254740993],
            "c": [1e-9, 2e-9, 1e-9, 2e-9],
            "d": [0.0, 1e-9],
        }
    )
    keywords: dict[str, Any] = {"costs": [n - 1, n, 2, 1], "fixed_costs": [n - 1, 0, 0, 0]}
    allocation = allocate(curves, 72057594037927942, **keywords)
    check_optimum(allocation, brute_force(allocation.problem)[0])
    assert allocation.certificate.status == "optimal_exact"
