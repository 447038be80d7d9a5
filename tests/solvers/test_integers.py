"""The core program in integers of any length, for what 64 bits do not hold."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import Problem, solve
from lorambo_alloc.solvers.integers import best_in_integers
from lorambo_alloc.testing import Instance, brute_force, proportional_large_costs
from tests.checks import all_feasible
from tests.strategies import capped, examples, finer_than_fixed_point, instances, seeds

prices = st.one_of(st.just(0.0), st.floats(1e-9, 1e3), st.floats(1e-320, 1e-300))


@given(instances(), prices, st.data())
@settings(max_examples=examples(1))
def test_the_optimum_is_found_at_any_price(instance: Instance, price: float, data):
    problem = instance.problem()
    start = data.draw(st.sampled_from(list(all_feasible(problem))))
    before = start.copy()
    ranks = best_in_integers(problem, problem.rows, [price], start)
    assert ranks is not None
    problem.check(ranks)
    assert problem.value_of(ranks) == brute_force(problem)[0]
    assert np.array_equal(start, before)


@given(seeds(), prices)
@settings(max_examples=examples(0.5))
def test_gains_finer_than_the_fixed_point(seed: int, price: float):
    problem = finer_than_fixed_point(seed).problem()
    ranks = best_in_integers(problem, problem.rows, [price], problem.lower)
    assert ranks is not None
    assert problem.value_of(ranks) == brute_force(problem)[0]


def test_an_optimum_is_given_back():
    problem = Problem({"a": [2.0, 1.0], "b": [1.5]}, 2)
    optimum = brute_force(problem)[1]
    ranks = best_in_integers(problem, problem.rows, [1.0], optimum)
    assert ranks is not None
    assert ranks.tolist() == optimum.tolist()


def test_no_layers():
    ranks = best_in_integers(
        Problem({}, 3), Problem({}, 3).rows, [1.0], np.zeros(0, dtype=np.int64)
    )
    assert ranks is not None
    assert len(ranks) == 0


def test_no_time():
    problem = Problem({"a": [2.0, 1.0], "b": [1.5]}, 2)
    assert (
        best_in_integers(problem, problem.rows, [0.1], problem.lower, time.monotonic() - 1) is None
    )
    assert (
        best_in_integers(problem, problem.rows, [0.1], problem.lower, time.monotonic() + 999)
        is not None
    )


@pytest.mark.parametrize("ranks", [62, 63])
def test_too_many_options(ranks):
    # 65 layers with 63 or 64 ranks to choose from: 4,095 options, or more than it takes.
    problem = Problem(np.ones((65, ranks)), 10)
    found = best_in_integers(problem, problem.rows, [1.0], problem.lower)
    assert (found is None) == (ranks == 63)
    if found is not None:
        assert problem.value_of(found) == 10


def test_too_many_states():
    problem = proportional_large_costs(30, 6).problem()
    price = solve(problem, "water_filling").certificate.price
    start = time.monotonic()
    assert best_in_integers(problem, problem.rows, [price], problem.lower) is None
    assert time.monotonic() - start < 60


@given(capped(instances(layers=4, ranks=3)), st.data())
@settings(max_examples=examples(2))
def test_several_budgets(instance: Instance, data):
    problem = instance.problem()
    n = len(problem.rows)
    drawn = data.draw(st.lists(prices, min_size=n, max_size=n))
    start = data.draw(st.sampled_from(list(all_feasible(problem))))
    ranks = best_in_integers(problem, problem.rows, drawn, start)
    assert ranks is not None
    problem.check(ranks)
    optimum = brute_force(problem)[0]
    assert problem.value_of(ranks) == optimum
    if problem.value_of(start) == optimum:
        assert ranks.tolist() == start.tolist()


@given(capped(instances(layers=3, ranks=3)))
@settings(max_examples=examples(0.5))
def test_budgets_that_cannot_bind_may_be_left_out(instance: Instance):
    problem = instance.problem()
    rows = [row for row in problem.rows if row.cost_of(problem.upper) > row.budget]
    if rows:
        ranks = best_in_integers(problem, rows, [0.5] * len(rows), problem.lower)
        assert ranks is not None
        assert problem.value_of(ranks) == brute_force(problem)[0]
