"""The search for the best few moves against all of them, from no more than the present ranks."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.online.few_moves import filled_up
from lorambo_alloc.online.limited_search import limited_search
from tests.online.test_moves import every_move, situations


@given(
    situations(),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 2.0]),
    st.sampled_from([0.0, 0.7, 3.0]),
)
def test_whatever_the_prices_the_best_few_moves_are_found(situation, limit, price, move_price):
    rows, costs, now, _, budget = situation
    present = np.array(list(now.values()))
    budget = max(budget, int(present @ np.array(list(costs.values()))))
    problem = Problem(GainCurves.from_increments(rows), budget, costs=costs)
    found = limited_search(problem, present, limit, (price, move_price), present)
    assert found is not None
    problem.check(found)
    assert np.abs(found - present).sum() <= limit
    free = every_move(rows, costs, now, dict.fromkeys(rows, 0.0), budget)
    best = max(value for value, _, moved in free if moved <= limit)
    assert float(best - problem.value_of(found)) <= 1e-12
    # Steps and exchanges only go up, and fit; they need not find the best.
    filled = filled_up(problem, present, present, limit)
    problem.check(filled)
    assert np.abs(filled - present).sum() <= limit
    assert problem.value_of(present) <= problem.value_of(filled) <= best + Fraction(1, 10**12)


def test_tied_layers_and_multiples_move_together():
    rows = {"a": [1.0, 1.0, 1.0, 1.0], "b": [3.0, 0.0, 2.5, 0.0], "c": [3.0, 0.0, 2.5, 0.0]}
    problem = Problem(
        GainCurves.from_increments(rows), 8, costs=dict.fromkeys(rows, 1), multiple_of=2,
        tied=[["b", "c"]],
    )  # fmt: skip
    present = np.array([4, 2, 2])
    for limit, ranks in ((5, [4, 2, 2]), (8, [0, 4, 4])):
        found = limited_search(problem, present, limit, (0.0, 0.0), present)
        assert found is not None
        assert found.tolist() == ranks
