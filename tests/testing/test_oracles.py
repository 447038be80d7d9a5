"""The oracles against each other, and against answers worked out by hand."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.testing import Instance, brute_force, brute_force_bottleneck, dynamic_program
from tests.checks import all_feasible
from tests.strategies import examples, instances


@given(instances())
@settings(max_examples=examples(0.5))
def test_brute_force_is_the_maximum_over_all_feasible_ranks(instance: Instance):
    problem = instance.problem()
    value, ranks = brute_force(problem)
    problem.check(ranks)
    assert problem.value_of(ranks) == value
    assert value == max(problem.value_of(other) for other in all_feasible(problem))


@given(instances())
@settings(max_examples=examples(0.5))
def test_the_dynamic_program_agrees(instance: Instance):
    problem = instance.problem()
    if problem.spendable <= 10_000:  # else the table is too large, unless the costs share a divisor
        assert dynamic_program(problem) == brute_force(problem)[0]


@given(instances(objective="operator"))
@settings(max_examples=examples(0.5))
def test_the_bottleneck_is_the_least_vector(instance: Instance):
    problem = instance.problem()
    tails, ranks = brute_force_bottleneck(problem)
    problem.check(ranks)
    every = [
        tuple(sorted(problem.tails(other).tolist(), reverse=True))
        for other in all_feasible(problem)
    ]
    assert tails == min(every)
    assert tuple(sorted(problem.tails(ranks).tolist(), reverse=True)) == tails


def test_by_hand():
    problem = Problem({"a": [3.0, 1.0], "b": [2.0]}, 5, costs=[3, 2])
    assert brute_force(problem)[0] == dynamic_program(problem) == 13
    assert brute_force(Problem({}, 3))[0] == dynamic_program(Problem({}, 3)) == 0
    bottleneck = Problem({"a": [3.0, 1.0], "b": [2.0]}, 2, objective="operator")
    tails, ranks = brute_force_bottleneck(bottleneck)
    assert (tails, ranks.tolist()) == ((1.0, 0.0), [1, 1])


def test_costs_are_divided_by_what_they_share():
    problem = Problem([[3.0, 1.0], [2.0]], 5 * 10**9 + 1, costs=[3 * 10**9, 2 * 10**9])
    assert dynamic_program(problem) == 13


@pytest.mark.parametrize("scale", [2.0**-400, 1.0, 2.0**400])
def test_gains_that_64_bits_do_not_hold(scale):
    curves = GainCurves.from_increments({"a": [scale, scale * 2.0**-70], "b": [scale * 0.75]})
    problem = Problem(curves, 3, costs=[1, 2])
    expected = Fraction(scale) * (1 + Fraction(3, 4))
    assert dynamic_program(problem) == brute_force(problem)[0] == expected


def test_forced_losses():
    curves = GainCurves.from_increments({"a": [-5.0, -5.0], "b": [1.0]})
    problem = Problem(curves, 3, min_rank={"a": 1})
    assert dynamic_program(problem) == brute_force(problem)[0] == -4


@pytest.mark.parametrize("oracle", [brute_force, brute_force_bottleneck])
def test_too_many_combinations(oracle):
    objective = "operator" if oracle is brute_force_bottleneck else "frobenius"
    problem = Problem(np.ones((3, 9)), 5, objective=objective)
    with pytest.raises(
        ValueError, match="at most 999 combinations of ranks to enumerate, got 1,000"
    ):
        oracle(problem, most=999)
    assert oracle(problem, most=1000)


def test_too_large_a_table():
    problem = Problem(np.ones((3, 9)), 5)
    with pytest.raises(ValueError, match="at most 179 table updates, got 180"):
        dynamic_program(problem, most=179)
    assert dynamic_program(problem, most=180) == 5


def infeasible(objective: str) -> Problem:
    problem = Problem({"a": [1.0]}, 1, objective=objective, min_rank=1)
    problem.budget = 0
    problem.rows = (dataclasses.replace(problem.rows[0], budget=0),)
    return problem


def test_nothing_fits():
    for oracle in (brute_force, dynamic_program):
        with pytest.raises(ValueError, match="no combination of ranks fits in the budget of 0"):
            oracle(infeasible("frobenius"))
    with pytest.raises(ValueError, match="no combination of ranks fits in the budget of 0"):
        brute_force_bottleneck(infeasible("operator"))
