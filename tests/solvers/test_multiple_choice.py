"""Any curve, any limit: the price, and the options near it."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.options import option_table
from lorambo_alloc.solvers.core import Price
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm
from lorambo_alloc.testing import Instance, non_concave
from tests.checks import all_feasible
from tests.strategies import examples, instances

MANY = 1 << 59


def scores(problem: Problem, form: MultipleChoiceForm, price: Fraction) -> list[list[Fraction]]:
    """Exact score of every option of every variable: value less price times reduced cost."""
    table = option_table(problem)
    result = []
    for v, layers in enumerate(table.members):
        row = []
        for rank in table.ranks[table.offsets[v] : table.offsets[v + 1]].tolist():
            ranks = np.zeros(len(problem.names), dtype=np.int64)
            ranks[list(layers)] = rank
            row.append(problem.value_of(ranks) - price * problem.cost_of(ranks) / form.unit)
        result.append(row)
    return result


@given(instances())
@settings(max_examples=examples(1))
def test_relaxation(instance: Instance):
    problem = instance.problem()
    form = MultipleChoiceForm(problem)
    relaxed = form.relax()
    problem.check(relaxed.ranks)
    problem.check(relaxed.feasible)
    assert problem.value_of(relaxed.feasible) >= problem.value_of(relaxed.ranks)
    if relaxed.price == 0:
        best = max(problem.value_of(ranks) for ranks in all_feasible(problem))
        assert problem.value_of(relaxed.ranks) == best
        return
    # Best responses, to rounding.
    size = sum(float(np.abs(problem.curve(i)).sum()) for i in range(len(problem.names)))
    every = scores(problem, form, Fraction(relaxed.price))
    table = option_table(problem)
    for v, row in enumerate(every):
        mine = int(relaxed.ranks[table.members[v][0]])
        at = table.ranks[table.offsets[v] : table.offsets[v + 1]].tolist().index(mine)
        slack = Fraction(size) * len(every) / 2**40 + Fraction(2.0**-1000)
        assert row[at] >= max(row) - slack


@pytest.mark.parametrize("budget", range(15))
def test_a_relaxation_of_ties_is_filled_up(budget):
    # Every unit of cost gains 2: all prices but 2 take nothing or everything.
    curves = GainCurves({"a": [0.0, 12.0], "b": [0.0, 10.0], "c": [0.0, 6.0]})
    problem = Problem(curves, budget, costs=[6, 5, 3])
    relaxed = MultipleChoiceForm(problem).relax()
    spent = problem.cost_of(relaxed.feasible)
    assert problem.value_of(relaxed.feasible) == 2 * spent
    assert spent <= budget
    # Whatever still fits has been taken.
    open_ = problem.costs[relaxed.feasible == 0]
    assert budget - spent < min(open_.tolist(), default=99)


def test_what_fits_to_the_last_unit_is_taken():
    # d is worth more than the price; of the ties, only b fits beside it, and fills the budget.
    curves = GainCurves({"a": [0.0, 12.0], "b": [0.0, 10.0], "d": [0.0, 100.0]})
    problem = Problem(curves, 9, costs=[6, 5, 4])
    relaxed = MultipleChoiceForm(problem).relax()
    assert relaxed.ranks.tolist() == [0, 0, 1]
    assert relaxed.feasible.tolist() == [0, 1, 1]


def test_costs_beyond_the_cheapest_are_reduced():
    # Ranks 1 and 3 of cost 6 each: what can be added costs 12 and 8.
    problem = Problem([[3.0, 2.0, 1.0], [2.0, 1.0]], 40, costs=[6, 8], allowed_ranks={"0": [1, 3]})
    assert MultipleChoiceForm(problem).unit == 4
    assert MultipleChoiceForm(Problem({}, 3)).unit == 1
    assert MultipleChoiceForm(Problem([[1.0]], 9, costs=[3], allowed_ranks=[1])).unit == 1


@given(instances(), st.floats(0.0, 1.0))
@settings(max_examples=examples(0.5))
def test_options_within_a_window(instance: Instance, share):
    problem = instance.problem()
    form = MultipleChoiceForm(problem)
    relaxed = form.relax()
    if relaxed.price == 0:
        return
    every = scores(problem, form, Fraction(relaxed.price))
    table = option_table(problem)
    window = share * float(max(max(row) - min(row) for row in every))
    items = form.within(relaxed.price, relaxed.ranks, window)
    found = set(items.positions.tolist())
    for v, row in enumerate(every):
        start = int(table.offsets[v])
        mine = int(relaxed.ranks[table.members[v][0]])
        at = table.ranks[start : start + len(row)].tolist().index(mine)
        near = {start + n for n, score in enumerate(row) if row[at] - score <= Fraction(window)}
        if len(near | {start + at}) > 1:
            assert near | {start + at} <= found
    reach = form.reach(items, relaxed.price, relaxed.ranks)
    for position in found:
        v = int(np.searchsorted(table.offsets, position, side="right")) - 1
        row = every[v]
        start = int(table.offsets[v])
        mine = int(relaxed.ranks[table.members[v][0]])
        at = table.ranks[start : start + len(row)].tolist().index(mine)
        assert abs(row[at] - row[position - start]) <= Fraction(reach)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 4, 16, 64])
@pytest.mark.parametrize("share", [0.02, 0.3, math.inf])
def test_no_other_option_is_nearer(seed, count, share):
    problem = non_concave(12, 14, seed).problem()
    form = MultipleChoiceForm(problem)
    relaxed = form.relax()
    assert relaxed.price > 0
    every = scores(problem, form, Fraction(relaxed.price))
    table = option_table(problem)
    window = share * float(max(max(row) - min(row) for row in every))
    items, beyond = form.nearest(relaxed.price, relaxed.ranks, count, window)
    found = set(items.positions.tolist())
    assert len(found) <= count + len(table.members)
    variables = np.searchsorted(table.offsets, items.positions, side="right") - 1
    assert items.variables.tolist() == variables.tolist()
    others, kept = [], []
    for v, row in enumerate(every):
        start = int(table.offsets[v])
        mine = int(relaxed.ranks[table.members[v][0]])
        at = table.ranks[start : start + len(row)].tolist().index(mine)
        for n, score in enumerate(row):
            if n != at:
                (kept if start + n in found else others).append(float(row[at] - score))
        # Where any option of a variable is kept, so is the one to compare it with.
        mentioned = {start + n for n in range(len(row))} & found
        assert not mentioned or start + at in mentioned
    slack = 1e-9 * max(map(abs, [*others, *kept]))
    assert min(others, default=math.inf) >= beyond - slack
    assert beyond >= min(others, default=math.inf) - slack
    assert max(kept, default=-math.inf) <= min(window, beyond) + slack


@given(instances())
@settings(max_examples=examples(1))
def test_penalties_of_the_core_are_exact(instance: Instance):
    problem = instance.problem()
    form = MultipleChoiceForm(problem)
    relaxed = form.relax()
    if relaxed.price == 0:
        return
    price = relaxed.price
    everything = 4 * sum(float(np.abs(problem.curve(i)).sum()) for i in range(len(problem.names)))
    window = everything + price * float(problem.spendable)
    items = form.within(price, relaxed.ranks, window)
    reach = max(form.reach(items, price, relaxed.ranks), window)
    fixed = Price.of(price, reach, form.last_bit(items))
    core = form.core(items, fixed, relaxed.ranks, MANY)
    unit = Fraction(2) ** fixed.exponent

    def score(ranks: np.ndarray) -> Fraction:
        return problem.value_of(ranks) - Fraction(fixed.value) * problem.cost_of(ranks) / form.unit

    base = score(core.ranks)
    for n, group in enumerate(core.classes):
        for option in range(len(group.moves)):
            choices = [option + 1 if k == n else 0 for k in range(len(core.classes))]
            moved = form.apply(core, choices)
            cost = problem.cost_of(moved) - problem.cost_of(core.ranks)
            assert cost == group.moves[option] * form.unit
            lost = (base - score(moved)) / unit
            assert lost >= -core.low
            assert abs(lost - int(group.penalties[option])) <= core.low


def test_a_price_of_real_size():
    problem = non_concave(60, 32).problem()
    form = MultipleChoiceForm(problem)
    relaxed = form.relax()
    assert relaxed.price > 0
    # Two neighbouring vertices of the hull enclose the budget: little is left over.
    left = problem.spendable - problem.cost_of(relaxed.feasible)
    assert 0 <= left <= 32 * int(problem.costs.max())
    assert problem.value_of(relaxed.feasible) >= problem.value_of(relaxed.ranks)
