from itertools import product
from math import gcd

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.finetune.exact_budget import nearest_exact, spend_exactly


@st.composite
def problems(draw: st.DrawFn):
    layers = draw(st.integers(1, 4))
    curves = {
        str(i): [0.0, *draw(st.lists(st.floats(-5, 5), min_size=1, max_size=4))]
        for i in range(layers)
    }
    costs = {name: draw(st.integers(1, 6)) for name in curves}
    return curves, costs, draw(st.integers(0, 40))


def every(curves, costs, budget):
    for ranks in product(*(range(len(curve)) for curve in curves.values())):
        found = dict(zip(curves, ranks, strict=True))
        if sum(costs[name] * rank for name, rank in found.items()) == budget:
            yield found


@given(problems())
def test_the_best_of_all_that_cost_exactly_the_budget(problem):
    curves, costs, budget = problem
    values = [sum(curves[n][r] for n, r in ranks.items()) for ranks in every(*problem)]
    if not values:
        with pytest.raises(ValueError, match="budget: expected one that ranks can cost exactly"):
            spend_exactly(curves, costs, budget)
        return
    ranks = spend_exactly(curves, costs, budget)
    assert sum(costs[name] * rank for name, rank in ranks.items()) == budget
    assert sum(curves[n][r] for n, r in ranks.items()) == pytest.approx(max(values), abs=1e-12)


@given(problems())
def test_nearest_ranks_cost_the_budget_and_no_nearer_ones_do(problem):
    curves, costs, budget = problem
    wanted = {name: len(curve) - 1 for name, curve in curves.items()}
    if budget % gcd(*costs.values()) or budget < 30:  # surely reachable from 30 on
        return
    ranks = nearest_exact(wanted, costs, budget)
    assert sum(costs[name] * rank for name, rank in ranks.items()) == budget
    moved = sum(costs[n] * abs(ranks[n] - wanted[n]) for n in ranks)
    reach = {name: np.zeros(9) for name in curves}
    for other in every(reach, costs, budget):
        assert moved <= sum(costs[n] * abs(other[n] - wanted[n]) for n in other)


def test_ranks_that_cost_the_budget_stay():
    ranks = {"q": 2, "v": 0, "o": 5}
    costs = {"q": 3, "v": 7, "o": 4}
    assert nearest_exact(ranks, costs, 26) == ranks


def test_a_layer_without_a_cost_is_named():
    with pytest.raises(ValueError, match="costs: expected one of layer 'v', got none"):
        spend_exactly({"q": [0, 1], "v": [0, 1]}, {"q": 1}, 1)


def test_values_and_costs_that_are_no_use_are_named():
    with pytest.raises(ValueError, match="curves: expected finite values of layer 'v'"):
        spend_exactly({"q": [0, 1], "v": [0, np.nan]}, {"q": 1, "v": 1}, 1)
    with pytest.raises(ValueError, match="costs: expected a positive one of 'v', got 0"):
        spend_exactly({"q": [0, 1], "v": [0, 1]}, {"q": 1, "v": 0}, 1)
