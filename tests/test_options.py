"""The multiple-choice view: every allowed rank with its cost and its value."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.arithmetic import to_fixed
from lorambo_alloc.options import attainable_gain, option_table
from lorambo_alloc.testing import Instance
from tests.checks import all_feasible
from tests.strategies import instances


def exact_value(problem: Problem, layers: tuple[int, ...], rank: int) -> Fraction:
    ranks = np.zeros(len(problem.names), dtype=np.int64)
    ranks[list(layers)] = rank
    return problem.value_of(ranks)


@given(instances())
def test_options_are_the_allowed_ranks_with_cost_and_value(instance: Instance):
    problem = instance.problem()
    table = option_table(problem)
    assert table.members == problem.variables
    for v, layers in enumerate(table.members):
        part = slice(table.offsets[v], table.offsets[v + 1])
        ranks, costs, values = table.ranks[part], table.costs[part], table.values[part]
        allowed = problem.allowed_ranks(layers[0]).tolist()
        for rank in allowed:
            cost = problem.cost_at(layers, rank)
            assert (rank in ranks) == (rank == allowed[0] or cost <= problem.spendable)
        for rank, cost, value in zip(ranks.tolist(), costs.tolist(), values.tolist(), strict=True):
            assert cost == problem.cost_at(layers, rank)
            exact = exact_value(problem, layers, rank)
            assert abs(Fraction(value) - exact) <= Fraction(float(table.value_errors[v]))


@given(instances())
def test_one_option_a_variable_makes_a_rank_vector(instance: Instance):
    problem = instance.problem()
    table = option_table(problem)
    for positions in (table.offsets[:-1], table.offsets[1:] - 1):
        ranks = table.ranks_of(positions)
        for layers, rank in zip(table.members, table.ranks[positions].tolist(), strict=True):
            assert ranks[list(layers)].tolist() == [rank] * len(layers)


@given(instances())
def test_fixed_values(instance: Instance):
    problem = instance.problem()
    table = option_table(problem)
    for v, layers in enumerate(table.members):
        positions = np.arange(table.offsets[v], table.offsets[v + 1])
        exact = [exact_value(problem, layers, r) for r in table.ranks[positions].tolist()]
        exponent = table.last_bit(v, positions)
        if any(exact):
            unit = Fraction(2) ** exponent
            fixed, low = table.fixed_values(v, positions, exponent)
            assert low == 0
            differences = [int(f - fixed[0]) % 2**64 for f in fixed]
            assert differences == [int((e - exact[0]) / unit) % 2**64 for e in exact]
        # A coarse unit: too low by no more than it says.
        largest = max(map(abs, exact))
        if largest > 0:
            exponent = int(np.frexp(float(largest))[1]) - 3
            unit = Fraction(2) ** exponent
            fixed, low = table.fixed_values(v, positions, exponent)
            for units, value in zip(fixed.tolist(), exact, strict=True):
                assert 0 <= value / unit - units <= low


@given(instances())
def test_the_exactly_best_option_is_the_first_of_the_best(instance: Instance):
    problem = instance.problem()
    table = option_table(problem)
    for v, layers in enumerate(table.members):
        positions = np.arange(table.offsets[v], table.offsets[v + 1])
        exact = [exact_value(problem, layers, r) for r in table.ranks[positions].tolist()]
        assert table.exactly_best(v, positions) == positions[exact.index(max(exact))]


def test_options_beyond_the_budget_are_left_out_but_for_the_cheapest():
    problem = Problem({"a": [3.0, 2.0, 1.0]}, 4, costs=[2], multiple_of=2)
    assert option_table(problem).ranks.tolist() == [0, 2]
    problem = Problem({"a": [3.0, 2.0], "b": [1.0, 1.0]}, 3, costs=[2, 1], allowed_ranks=[1, 2])
    assert option_table(problem).ranks.tolist() == [1, 1, 2]


def test_no_layers():
    table = option_table(Problem({}, 5))
    assert len(table.ranks) == len(table.costs) == len(table.values) == len(table.members) == 0


def test_last_bit_sees_the_terms_and_not_their_sum():
    # 0.5 + 0.5 is a whole number; its terms are not.
    curves = GainCurves.from_increments({"a": [0.5, 0.5]})
    table = option_table(Problem(curves, 4, multiple_of=2))
    assert table.last_bit(0, np.array([0, 1])) == -1
    curve = GainCurves({"a": [0.0, 2.0**-60, 1.0]})
    table = option_table(Problem(curve, 4))
    assert table.last_bit(0, np.array([0, 1, 2])) == -60
    assert table.last_bit(0, np.array([0, 2])) == 0


def test_inexact_terms_are_counted():
    curves = GainCurves.from_increments({"a": [1.5, 1.25]})
    table = option_table(Problem(curves, 4, multiple_of=2))
    fixed, low = table.fixed_values(0, np.array([0, 1]), 0)
    assert (fixed.tolist(), low) == ([0, 2], 2)
    assert to_fixed(np.array([1.5, 1.25]), 0)[0].tolist() == [1, 1]


@given(instances(layers=3, ranks=4))
def test_attainable_gain_is_the_value_at_any_budget(instance: Instance):
    keywords = dict(instance.keywords)
    spectra, top = instance.spectra, instance.problem()
    unlimited = Problem(spectra, top.cost_of(top.upper), **keywords)
    best = max(unlimited.value_of(ranks) for ranks in all_feasible(unlimited))
    assert attainable_gain(top) == pytest.approx(float(best), rel=1e-12, abs=1e-12)


def test_attainable_gain_of_the_operator_norm():
    problem = Problem({"a": [3.0, 2.0], "b": [2.5, 0.5]}, 1, objective="operator", max_rank=1)
    assert attainable_gain(problem) == 3.0 - 2.0
    assert attainable_gain(Problem({}, 1, objective="operator")) == 0.0
