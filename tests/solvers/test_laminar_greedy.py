"""Greedy on nested caps of equal costs: exact, and proved by exchanges or by its prices."""

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import GainCurves, Problem, solve
from lorambo_alloc.caps import Cap
from lorambo_alloc.solvers.laminar_greedy import solve_laminar
from lorambo_alloc.testing import Instance, brute_force
from tests.checks import check_optimum
from tests.strategies import capped, examples, instances, laminar

CURVES = GainCurves.from_increments(
    {"a": [9.0, 7.0, 5.0], "b": [8.0, 6.0], "c": [4.0, 3.0], "d": [2.0, 1.0]}
)


@given(laminar())
@settings(max_examples=examples(2))
def test_it_is_exact(instance: Instance):
    problem = instance.problem()
    allocation = solve_laminar(problem)
    assert allocation is not None
    optimum = brute_force(problem)[0]
    check_optimum(allocation, optimum)
    assert problem.value_of(allocation.ranks) == optimum
    certificate = allocation.certificate
    assert (certificate.status, certificate.method) == ("optimal_exact", "laminar greedy")
    assert certificate.verify(problem, allocation.ranks).proof in ("price", "exchange")


@given(laminar())
@settings(max_examples=examples(0.5))
def test_the_front_door_leads_to_an_exact_answer(instance: Instance):
    problem = instance.problem()
    allocation = solve(problem)
    assert allocation.certificate.status == "optimal_exact"
    assert problem.value_of(allocation.ranks) == brute_force(problem)[0]


@given(capped(instances(layers=4, ranks=4, concave=True), own_units=False))
@settings(max_examples=examples(0.5))
def test_what_is_no_laminar_matroid_is_left_alone(instance: Instance):
    problem = instance.problem()
    allocation = solve_laminar(problem)
    if allocation is not None:
        assert problem.value_of(allocation.ranks) == brute_force(problem)[0]


class TestPrices:
    """What one more unit of a set is worth, beyond what the sets round it charge."""

    def allocation(self, budget, caps, **keywords):
        allocation = solve_laminar(Problem(CURVES, budget, caps=caps, **keywords))
        assert allocation is not None
        return allocation

    def test_nested(self):
        # The inner set keeps 9 and 8 and refuses 7; all together keep 9, 8, 4 and refuse 3.
        allocation = self.allocation(3, {"ab": (["a", "b"], 2)})
        assert dict(allocation) == {"a": 1, "b": 1, "c": 1, "d": 0}
        assert allocation.certificate.price == 3.0
        assert allocation.cap_prices == {"ab": 4.0}
        proof = allocation.certificate.verify(allocation.problem, allocation.ranks).proof
        assert proof == "price"

    def test_in_units_of_the_costs(self):
        caps = {"ab": Cap(["a", "b"], 25, [10, 10])}
        allocation = self.allocation(7, caps, costs=[2, 2, 2, 2])
        assert dict(allocation) == {"a": 1, "b": 1, "c": 1, "d": 0}
        assert allocation.certificate.price == 1.5
        assert allocation.cap_prices == {"ab": 0.4}

    def test_an_inner_set_that_refuses_less_than_the_outer_one_is_free(self):
        allocation = self.allocation(4, {"cd": (["c", "d"], 1), "ab": (["a", "b"], 4)})
        assert dict(allocation) == {"a": 2, "b": 2, "c": 0, "d": 0}
        assert allocation.certificate.price == 4.0
        assert allocation.cap_prices == {"cd": 0.0, "ab": 1.0}

    def test_loose_budgets_are_free(self):
        allocation = self.allocation(9, {"ab": (["a", "b"], 4), "cd": (["c", "d"], 9)})
        assert dict(allocation) == {"a": 2, "b": 2, "c": 2, "d": 2}
        assert allocation.certificate.price == 0.0
        assert allocation.cap_prices == {"ab": 5.0, "cd": 0.0}

    def test_a_set_that_refuses_only_what_is_worth_nothing_is_free(self):
        curves = GainCurves.from_increments({"a": [2.0, 0.0], "b": [1.0, 1.0]})
        allocation = solve_laminar(Problem(curves, 2, caps={"a": (["a"], 1)}))
        assert allocation is not None
        assert dict(allocation) == {"a": 1, "b": 1}
        assert allocation.certificate.price == 1.0
        assert allocation.cap_prices == {"a": 0.0}
        alone = solve_laminar(Problem(curves, 9, caps={"a": (["a"], 1)}))
        assert alone is not None
        assert alone.cap_prices == {"a": 0.0}

    def test_three_levels(self):
        caps = {"abc": (["a", "b", "c"], 3), "a": (["a"], 1), "ab": (["a", "b"], 2)}
        allocation = self.allocation(4, caps)
        assert dict(allocation) == {"a": 1, "b": 1, "c": 1, "d": 1}
        # a refuses 7, ab refuses 6, abc 3, and all together 1.
        assert allocation.certificate.price == 1.0
        assert allocation.cap_prices == {"abc": 2.0, "a": 1.0, "ab": 3.0}

    def test_forced_ranks_take_room_first(self):
        allocation = self.allocation(5, {"ab": (["a", "b"], 2)}, min_rank={"d": 2, "b": 1})
        assert dict(allocation) == {"a": 1, "b": 1, "c": 1, "d": 2}
        assert allocation.certificate.price == 3.0
        assert allocation.cap_prices == {"ab": 4.0}

    def test_losses_are_not_taken(self):
        curves = GainCurves.from_increments({"a": [2.0, 0.0, -1.0], "b": [-3.0]})
        allocation = solve_laminar(Problem(curves, 3, caps={"a": (["a"], 2)}))
        assert allocation is not None
        assert dict(allocation) == {"a": 1, "b": 0}
        assert allocation.value == 2.0

    def test_forced_losses(self):
        curves = GainCurves.from_increments({"a": [2.0, 1.0], "b": [-3.0]})
        problem = Problem(curves, 2, caps={"a": (["a"], 1)}, min_rank={"b": 1})
        allocation = solve_laminar(problem)
        assert allocation is not None
        assert dict(allocation) == {"a": 1, "b": 1}
        assert allocation.value == -1.0


def test_ties_keep_the_order_of_layers_and_ranks():
    problem = Problem(np.ones((4, 3)), 5, caps={"x": (["1", "2"], 2)})
    allocation = solve_laminar(problem)
    assert allocation is not None
    assert allocation.ranks.tolist() == [3, 2, 0, 0]


@pytest.mark.parametrize(
    "caps",
    [
        {"x": (["a", "b"], 2), "y": (["b", "c"], 2)},
        {"x": Cap(["a", "b"], 4, [2, 3])},
    ],
)
def test_none(caps):
    assert solve_laminar(Problem(CURVES, 5, caps=caps)) is None
