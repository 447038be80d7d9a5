"""Small problems in integers of any length, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, solve
from lorambo_alloc.solvers.integers import best_in_integers
from lorambo_alloc.testing import SMALL_FAMILIES, brute_force, small_instance

FAMILIES = [family for family in SMALL_FAMILIES if family != "operator"]


@given(st.integers(0, 2**32 - 1), st.sampled_from(FAMILIES), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_is_optimal_at_any_price(seed, family, factor):
    problem = small_instance(np.random.default_rng(seed), family).problem()
    quick = solve(problem, "water_filling")
    ranks = best_in_integers(problem, factor * quick.certificate.price, quick.ranks)
    assert ranks is not None
    problem.check(ranks)
    assert problem.value_of(ranks) == brute_force(problem)[0]


def test_keeps_what_is_optimal_already():
    problem = Problem({"a": [3.0, 1.0], "b": [2.0]}, 2)
    ranks = solve(problem).ranks
    assert best_in_integers(problem, 1.0, ranks) is ranks


def test_too_many_options_are_left_alone():
    problem = Problem(np.ones((65, 64)), 100)
    assert best_in_integers(problem, 1.0, problem.lower) is None


def test_too_long_a_search_is_given_up():
    rng = np.random.default_rng(0)
    costs = rng.integers(10**8, 10**9, 60)
    problem = Problem(
        GainCurves.from_increments(costs[:, None].astype(float)),
        int(costs.sum()) // 2,
        costs=costs.tolist(),
    )
    assert best_in_integers(problem, 1.0, problem.lower) is None
    assert best_in_integers(problem, 1.0, problem.lower, deadline=0.0) is None


@pytest.mark.parametrize("fixed", [None, [2**53 - 1, 0, 0, 0]])
def test_costs_and_scales_beyond_64_bits(fixed):
    n = 2**53
    increments = {
        "a": [9007199.25474099] * 4,
        "b": [9007199.254740994] * 3 + [9007199.254740993],
        "c": [1e-9, 2e-9, 1e-9, 2e-9],
        "d": [0.0, 1e-9],
    }
    problem = Problem(
        GainCurves.from_increments(increments),
        72057594037927942,
        costs=[n - 1, n, 2, 1],
        fixed_costs=fixed,
    )
    allocation = solve(problem)
    assert allocation.certificate.status == "optimal_exact"
    assert problem.value_of(allocation.ranks) == brute_force(problem)[0]
