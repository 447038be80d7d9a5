"""Greedy repairs: what they return fits, and no single step up is left that fits and gains."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.caps import Cap
from lorambo_alloc.solvers.filling import Filling
from lorambo_alloc.testing import Instance
from tests.strategies import capped, examples, instances, random_ranks, seeds

prices = st.one_of(st.just(0.0), st.floats(1e-6, 1e3), st.floats(1e-300, 1e-200))


def filling(problem: Problem, own_prices=None) -> Filling:
    return Filling(problem, problem.rows, own_prices or [1.0] * len(problem.rows))


@given(capped(instances(layers=4, ranks=4)), seeds(), st.data())
@settings(max_examples=examples(1))
def test_any_ranks_are_made_to_fit(instance: Instance, seed: int, data):
    problem = instance.problem()
    drawn = data.draw(st.lists(prices, min_size=len(problem.rows), max_size=len(problem.rows)))
    own = filling(problem, drawn)
    start = random_ranks(problem, np.random.default_rng(seed))
    before = start.copy()
    repaired = own.repaired(start)
    assert start.tolist() == before.tolist()
    problem.check(repaired)
    assert np.all(repaired <= start)
    if problem.fits(start):
        assert repaired.tolist() == start.tolist()
    filled = own.filled(repaired)
    problem.check(filled)
    assert np.all(filled >= repaired)
    assert problem.value_difference(filled, repaired) >= 0
    # No step up to a neighbouring rank fits and gains (to rounding).
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0]).tolist()
        at = allowed.index(int(filled[group[0]]))
        for rank in allowed[at + 1 : at + 8]:
            after = filled.copy()
            after[list(group)] = rank
            if not problem.fits(after):
                break
            values = [sum(float(problem.curve(i)[r[i]]) for i in group) for r in (filled, after)]
            assert values[1] <= values[0]


class TestRepaired:
    def test_it_steps_down_where_least_is_lost_per_cost(self):
        curves = GainCurves.from_increments({"a": [9.0, 4.0], "b": [8.0, 3.0], "c": [7.0]})
        problem = Problem(curves, 10, costs=[2, 1, 4])
        # Per cost: a 2, b 3, c 7/4; the dearest loses least.
        assert filling(problem).repaired(np.array([2, 2, 1])).tolist() == [2, 2, 1]
        problem = problem.with_budget(9)
        assert filling(problem).repaired(np.array([2, 2, 1])).tolist() == [2, 2, 0]
        problem = problem.with_budget(5)
        assert filling(problem).repaired(np.array([2, 2, 1])).tolist() == [1, 2, 0]
        problem = problem.with_budget(3)
        assert filling(problem).repaired(np.array([2, 2, 1])).tolist() == [1, 1, 0]
        problem = problem.with_budget(0)
        assert filling(problem).repaired(np.array([2, 2, 1])).tolist() == [0, 0, 0]

    def test_steps_count_in_the_row_that_is_exceeded(self):
        curves = GainCurves.from_increments({"a": [4.0], "b": [5.0], "c": [0.1]})
        caps = {"x": Cap(["a", "b"], 10, [2, 10])}
        problem = Problem(curves, 99, costs=[10, 1, 1], caps=caps)
        # Per unit of the cap, b loses less than a; c is not in it.
        assert filling(problem).repaired(np.array([1, 1, 1])).tolist() == [1, 0, 1]

    def test_the_least_ranks_stay(self):
        problem = Problem({"a": [3.0, 2.0], "b": [1.0, 0.5]}, 3, min_rank={"b": 2})
        assert filling(problem).repaired(np.array([2, 2])).tolist() == [1, 2]

    def test_lists_and_ties(self):
        spectra = {"a": np.ones(6), "b": np.ones(6), "c": 9 * np.ones(6)}
        problem = Problem(spectra, 10, tied=[["a", "b"]], allowed_ranks=[0, 1, 4, 6])
        assert filling(problem).repaired(np.array([6, 6, 6])).tolist() == [1, 1, 6]

    def test_fixed_costs_are_freed_with_the_last_rank(self):
        curves = GainCurves.from_increments({"a": [3.0, 3.0], "b": [2.0, 2.0]})
        problem = Problem(curves, 10, costs=[1, 1], fixed_costs=[9, 0])
        # Down from 13: the first steps free 1 each, the last of a frees 10 for 3.
        assert filling(problem).repaired(np.array([2, 2])).tolist() == [1, 0]
        problem = problem.with_budget(9)
        assert filling(problem).repaired(np.array([2, 0])).tolist() == [0, 0]


class TestFilled:
    def test_the_best_gain_per_cost_first(self):
        curves = GainCurves.from_increments({"a": [9.0, 4.0], "b": [8.0, 3.0], "c": [7.0]})
        problem = Problem(curves, 5, costs=[2, 1, 4])
        nothing = np.zeros(3, dtype=np.int64)
        assert filling(problem).filled(nothing).tolist() == [1, 2, 0]
        assert nothing.tolist() == [0, 0, 0]
        assert filling(problem.with_budget(1)).filled(nothing).tolist() == [0, 1, 0]
        assert filling(problem.with_budget(99)).filled(nothing).tolist() == [2, 2, 1]

    def test_prices_say_what_is_scarce(self):
        curves = GainCurves.from_increments({"a": [6.0], "b": [5.0]})
        caps = {"x": Cap(["a", "b"], 9, [9, 1])}
        problem = Problem(curves, 9, costs=[1, 9], caps=caps)
        nothing = np.zeros(2, dtype=np.int64)
        assert filling(problem, [1.0, 0.0]).filled(nothing).tolist() == [1, 0]
        assert filling(problem, [0.0, 1.0]).filled(nothing).tolist() == [0, 1]

    def test_a_budget_without_a_price_hardly_counts(self):
        curves = GainCurves.from_increments({"a": [6.0], "b": [10.0]})
        problem = Problem(curves, 2, costs=[1, 2], caps={"x": Cap(["a", "b"], 90, [90, 1])})
        nothing = np.zeros(2, dtype=np.int64)
        assert filling(problem, [1.0, 0.0]).filled(nothing).tolist() == [1, 0]

    def test_free_steps_prefer_cheap_layers(self):
        curves = GainCurves.from_increments({"a": [6.0], "b": [5.0]})
        problem = Problem(curves, 3, costs=[3, 2])
        nothing = np.zeros(2, dtype=np.int64)
        assert filling(problem, [0.0]).filled(nothing).tolist() == [0, 1]

    def test_a_step_may_skip_ranks_that_lose(self):
        dip = GainCurves.from_increments({"a": [-1.0] * 7 + [9.0]})
        assert filling(Problem(dip, 8)).filled(np.array([0])).tolist() == [8]
        deep = GainCurves.from_increments({"a": [-1.0] * 8 + [20.0]})
        assert filling(Problem(deep, 9)).filled(np.array([0])).tolist() == [0]

    def test_steps_that_gain_nothing_are_not_taken(self):
        flat = GainCurves.from_increments({"a": [0.0, 0.0], "b": [-1.0]})
        assert filling(Problem(flat, 9)).filled(np.array([0, 0])).tolist() == [0, 0]

    def test_a_step_that_no_longer_fits_makes_way_for_one_that_does(self):
        # a's best step is to rank 2 until b has taken its share.
        curves = GainCurves.from_increments({"a": [1.0, 5.0], "b": [9.0]})
        problem = Problem(curves, 3, costs=[1, 2])
        assert filling(problem).filled(np.array([0, 0])).tolist() == [1, 1]

    def test_further_conditions(self):
        problem = Problem({"a": [3.0, 2.0], "b": [2.5, 1.0]}, 4)
        seen = []

        def accepts(ranks):
            seen.append(ranks.tolist())
            return ranks[0] <= 1

        assert filling(problem).filled(np.array([0, 0]), accepts).tolist() == [1, 2]
        assert seen == [[1, 0], [1, 1], [2, 1], [1, 2]]

    def test_without_budgets_everything_that_gains_is_taken(self):
        problem = Problem({"a": [3.0, 2.0], "b": [0.0]}, 4)
        assert Filling(problem, [], []).filled(np.array([0, 0])).tolist() == [2, 0]

    def test_tied_layers_count_together(self):
        curves = GainCurves.from_increments({"a": [2.0], "b": [2.0], "c": [3.5]})
        problem = Problem(curves, 2, tied=[["a", "b"]])
        assert filling(problem).filled(np.array([0, 0, 0])).tolist() == [0, 0, 1]
        cheap = Problem(curves, 2, tied=[["a", "b"]], costs=[1, 1, 2])
        assert filling(cheap).filled(np.array([0, 0, 0])).tolist() == [1, 1, 0]
