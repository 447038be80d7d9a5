"""A price on the number of ranks."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.solvers.cardinality import (
    cardinality_cut,
    fewest_ranks,
    most_ranks,
    swaps_at_limit,
)
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.testing import brute_force, dynamic_program
from tests.strategies import examples

sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=4)


def counts(costs, room):
    """Number and cost of every choice of ranks."""
    for ranks in np.ndindex(*(room + 1)):
        yield sum(ranks), int(np.dot(costs, ranks))


@given(sizes, st.integers(0, 60))
def test_limits_on_the_number_of_ranks(drawn, budget):
    costs, room = (np.array([pair[k] for pair in drawn]) for k in (0, 1))
    every = list(counts(costs, room))
    assert most_ranks(costs, room, budget) == max(n for n, cost in every if cost <= budget)
    enough = [n for n, cost in every if cost >= budget]
    if enough:
        assert fewest_ranks(costs, room, budget) == min(enough)


@given(sizes, st.integers(0, 80), st.integers(-3, 4), st.integers(0, 6))
@settings(max_examples=examples(1))
def test_a_cut_holds(drawn, budget, more, waste):
    costs = [cost for cost, _ in drawn]
    gains = {f"{i}": [float(c + more)] * (r + 1) for i, (c, r) in enumerate(drawn)}
    problem = Problem(GainCurves.from_increments(gains), budget, costs=costs)
    form = ConcaveForm(problem)
    cut = cardinality_cut(form, waste)
    if cut is None:
        return
    optimum, ranks = brute_force(problem)
    # It binds those that leave over at most `waste` (in reduced units).
    left = (problem.spendable - problem.cost_of(ranks)) // form.unit
    if left <= waste or cut.rank_price >= 0:
        assert optimum <= cut.bound


def test_a_cut_is_sharper_than_the_price_alone():
    costs = [7, 11, 13, 17, 19, 23]
    curves = GainCurves.from_increments({f"{c}": [c + 3.0] * 6 for c in costs})
    sharper = 0
    for budget in range(100, 300, 7):
        problem = Problem(curves, budget, costs=costs)
        form = ConcaveForm(problem)
        cut = cardinality_cut(form, 0)
        if cut is not None:
            plain = form.bound(form.relax(), 0.0)
            assert float(cut.bound - plain) <= 1e-12 * float(plain)
            sharper += cut.bound < plain - 1
            assert dynamic_program(problem) <= cut.bound or cut.rank_price < 0
    assert sharper > 10


def test_where_more_ranks_fit_than_are_taken_there_is_no_cut():
    # The best responses take the dear layer; more of the cheap ones would fit.
    curves = GainCurves.from_increments({"dear": [100.0], "cheap": [1.0] * 10})
    problem = Problem(curves, 10, costs=[10, 1])
    assert cardinality_cut(ConcaveForm(problem), 10) is None


def test_the_bound_is_exact_where_all_is_priced():
    # Gain 3 a rank whatever it costs: 4 ranks fit.
    curves = GainCurves.from_increments({"a": [3.0] * 4, "b": [3.0] * 4})
    problem = Problem(curves, 11, costs=[2, 5])
    cut = cardinality_cut(ConcaveForm(problem), 0)
    assert brute_force(problem)[0] == 12
    assert cut is None or cut.bound >= 12
    assert cut is None or cut.bound <= Fraction(66, 5)


@pytest.mark.parametrize("gain", [3, -2])
@pytest.mark.parametrize("seed", range(12))
def test_swaps_keep_the_number_of_ranks_and_spend_the_budget(gain, seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(40, 400, 30)
    gains = np.repeat((costs + gain)[:, None].astype(float), 6, axis=1)
    budget = int(rng.uniform(0.2, 0.8) * 6 * int(costs.sum()))
    least = {"0": 2, "5": 1}
    problem = Problem(
        GainCurves.from_increments(gains), budget, costs=costs.tolist(), min_rank=least
    )
    form = ConcaveForm(problem)
    cut = cardinality_cut(form, 20)
    swapped = None if cut is None else swaps_at_limit(form, cut)
    if cut is None or swapped is None:
        return
    assert (cut.rank_price > 0) == (gain > 0)
    problem.check(swapped)
    assert int(np.sum(swapped - problem.lower)) == cut.ranks
    # All ranks are worth the same at the two prices, so that only unspent budget is lost.
    left = budget - problem.cost_of(swapped)
    assert problem.value_of(swapped) == budget - left + gain * int(swapped.sum())
    assert left <= 9


def test_swaps_are_found_where_they_are_needed():
    best = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        costs = rng.integers(40, 400, 30)
        gains = np.repeat((costs + 3)[:, None].astype(float), 6, axis=1)
        problem = Problem(
            GainCurves.from_increments(gains), 3 * int(costs.sum()), costs=costs.tolist()
        )
        form = ConcaveForm(problem)
        cut = cardinality_cut(form, 20)
        assert cut is not None
        swapped = swaps_at_limit(form, cut)
        if swapped is not None:
            value = problem.value_of(swapped)
            assert value <= cut.bound
            best += float(cut.bound - value) < 1e-6 * float(value)
    assert best >= 6
