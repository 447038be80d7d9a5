"""Problem: limits, costs, budgets and ties, and what is refused."""

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from lorambo_alloc import (
    GainCurves,
    InfeasibleError,
    Problem,
    Spectra,
    allocate,
    uniform_rank,
)
from lorambo_alloc.testing import Instance, brute_force
from tests.checks import all_feasible, check_optimum
from tests.strategies import instances, random_ranks, seeds

SPECTRA = {"a": [3.0, 2.0, 1.0], "b": [2.5, 0.5]}


class TestForm:
    @pytest.mark.parametrize(
        ("keywords", "special"),
        [
            ({}, True),
            ({"min_rank": 1, "max_rank": {"a": 2}, "weights": [1.0, 2.0], "costs": [2, 3]}, True),
            ({"fixed_costs": [0, 0]}, True),
            ({"objective": "nuclear"}, True),
            ({"fixed_costs": [0, 1]}, False),
            ({"multiple_of": 2}, False),
            ({"allowed_ranks": {"a": [0, 1]}}, False),
            ({"tied": [["a", "b"]]}, False),
            ({"objective": "operator"}, False),
        ],
    )
    def test_which_problems_are_of_the_special_form(self, keywords, special):
        assert Problem(SPECTRA, 9, **keywords).concave_unit_steps is special

    def test_curves_of_the_special_form(self):
        assert Problem(GainCurves({"a": [0.0, 2.0, 3.0]}), 9).concave_unit_steps
        assert not Problem(GainCurves({"a": [0.0, 1.0, 3.0]}), 9).concave_unit_steps
        # 1 - 2^-60 is no double: the increments are not known exactly.
        assert not Problem(GainCurves({"a": [0.0, 2.0**-60, 1.0]}), 9).concave_unit_steps


class TestCosts:
    def test_from_shapes(self):
        shapes = {"b": (3, 2), "a": (4, 5)}
        assert Problem(SPECTRA, 9, shapes=shapes).costs.tolist() == [9, 5]
        assert Problem(SPECTRA, 9, shapes=[(4, 5), (3, 2)]).costs.tolist() == [9, 5]
        array: Any = np.array([(4, 5), (3, 2)])
        assert Problem(SPECTRA, 9, shapes=array).costs.tolist() == [9, 5]

    def test_costs_win_over_shapes_which_must_fit_all_the_same(self):
        shapes = {"a": (4, 5), "b": (3, 2)}
        assert Problem(SPECTRA, 9, shapes=shapes, costs=[7, 8]).costs.tolist() == [7, 8]
        with pytest.raises(ValueError, match="shapes: layer 'a': a 2 x 5 matrix has at most 2"):
            Problem(SPECTRA, 9, shapes={**shapes, "a": (2, 5)}, costs=[7, 8])

    def test_shapes_given_win_over_shapes_carried(self):
        carried = Spectra(SPECTRA, shapes={"a": (30, 30), "b": (30, 30)})
        assert Problem(carried, 9).costs.tolist() == [60, 60]
        assert Problem(carried, 9, shapes=[(4, 5), (3, 2)]).costs.tolist() == [9, 5]

    def test_shapes_for_gain_curves(self):
        curves = GainCurves({"a": [0.0, 2.0, 3.0]})
        # F(0), F(1), F(2): two ranks, which a matrix of two rows has.
        assert Problem(curves, 9, costs=[3]).costs.tolist() == [3]
        assert Problem(curves, 9, shapes={"a": (3, 5)}).costs.tolist() == [8]

    def test_neither(self):
        assert Problem(SPECTRA, 9).costs.tolist() == [1, 1]

    @pytest.mark.parametrize(
        "given", [{"b": 3, "a": 2}, [2, 3], (2, 3), np.array([2, 3]), [2.0, 3.0]]
    )
    def test_by_name_or_in_order(self, given):
        problem = Problem(SPECTRA, 9, costs=given, fixed_costs=given)
        assert problem.costs.tolist() == problem.fixed_costs.tolist() == [2, 3]
        assert problem.costs.dtype == np.int64

    @pytest.mark.parametrize(
        ("what", "costs", "expected"),
        [
            ("costs", {"a": 0, "b": 1}, "layer 'a': expected a whole number >= 1, got 0"),
            ("costs", {"a": 1, "b": -1}, "layer 'b': expected a whole number >= 1, got -1"),
            ("costs", {"a": 1, "b": 1.5}, "layer 'b': expected a whole number >= 1, got 1.5"),
            ("costs", {"a": True, "b": 1}, "layer 'a': expected a whole number >= 1, got True"),
            ("costs", {"a": math.nan, "b": 1}, "layer 'a': expected a whole number >= 1, got nan"),
            ("costs", {"a": math.inf, "b": 1}, "layer 'a': expected a whole number >= 1, got inf"),
            ("costs", {"a": "2", "b": 1}, "layer 'a': expected a whole number >= 1, got '2'"),
            (
                "costs",
                {"a": 1, "b": 2**53 + 1},
                "layer 'b': expected at most 2^53, got 9007199254740993",
            ),
            ("costs", {"a": 1}, "layer 'b' is missing"),
            ("costs", {"a": 1, "b": 2, "c": 3}, "layer 'c' is not among the spectra"),
            ("costs", [1], "expected 2 values, got 1"),
            ("costs", {1, 2}, "expected one value per layer, by name or in order, got {1, 2}"),
            ("costs", 5, "expected one value per layer, by name or in order, got 5"),
            ("costs", "ab", "expected one value per layer, by name or in order, got 'ab'"),
            ("fixed_costs", {"a": 0, "b": -1}, "layer 'b': expected a whole number >= 0, got -1"),
            ("fixed_costs", {"a": 0.5, "b": 1}, "layer 'a': expected a whole number >= 0, got 0.5"),
            ("fixed_costs", {"a": 1}, "layer 'b' is missing"),
            ("fixed_costs", [0, 2**53 + 1], "layer 'b': expected at most 2^53, got"),
            ("weights", {"a": -1.0, "b": 1}, "layer 'a': expected a finite weight >= 0, got -1.0"),
            (
                "weights",
                {"a": 1, "b": math.nan},
                "layer 'b': expected a finite weight >= 0, got nan",
            ),
            (
                "weights",
                {"a": 1, "b": math.inf},
                "layer 'b': expected a finite weight >= 0, got inf",
            ),
            (
                "weights",
                {"a": "1.5", "b": 1},
                "layer 'a': expected a finite weight >= 0, got '1.5'",
            ),
            ("weights", {"a": 1, "b": True}, "layer 'b': expected a finite weight >= 0, got True"),
            ("weights", [10**400, 1], "layer 'a': expected a finite weight >= 0, got 1000"),
            ("weights", [1j, 1], "layer 'a': expected a finite weight >= 0, got 1j"),
            ("weights", {"a": 1}, "layer 'b' is missing"),
            ("weights", [1.0], "expected 2 values, got 1"),
            ("weights", 2.0, "expected one value per layer, by name or in order, got 2.0"),
            (
                "shapes",
                {"a": (2, 5), "b": (5, 5)},
                "layer 'a': a 2 x 5 matrix has at most 2 singular",
            ),
            (
                "shapes",
                {"a": (5, 5), "b": (5, 1)},
                "layer 'b': a 5 x 1 matrix has at most 1 singular",
            ),
            ("shapes", {"a": (5, 5)}, "layer 'b' is missing"),
            (
                "shapes",
                {"a": (5, 5), "b": (5, 5), "c": (5, 5)},
                "layer 'c' is not among the spectra",
            ),
            (
                "shapes",
                {"a": (5, 5.5), "b": (5, 5)},
                "layer 'a': expected (d, k), two whole numbers from",
            ),
            (
                "shapes",
                [(5, math.inf), (5, 5)],
                "layer 'a': expected (d, k), two whole numbers from",
            ),
            ("shapes", [(5, 5)], "expected 2 values, got 1"),
            ("shapes", 5, "expected one value per layer, by name or in order, got 5"),
        ],
    )
    def test_what_is_refused(self, what, costs, expected):
        with pytest.raises(ValueError, match="^" + re.escape(f"{what}: {expected}")):
            Problem(SPECTRA, 9, **{what: costs})

    def test_weights(self):
        problem = Problem(SPECTRA, 9, weights={"b": 2.0, "a": 0.5})
        assert problem.weights is not None
        assert problem.weights.tolist() == [0.5, 2.0]
        assert problem.value_of(np.array([1, 1])) == 0.5 * 9.0 + 2 * 6.25

    @given(instances(), seeds())
    def test_cost_and_value_by_their_definitions(self, instance: Instance, seed):
        problem = instance.problem()
        ranks = random_ranks(problem, np.random.default_rng(seed))
        pairs = zip(
            problem.costs.tolist(), problem.fixed_costs.tolist(), ranks.tolist(), strict=True
        )
        assert problem.cost_of(ranks) == sum(c * r + (f if r else 0) for c, f, r in pairs)
        one_by_one = [problem.cost_at([i], r) for i, r in enumerate(ranks.tolist())]
        assert problem.cost_of(ranks) == sum(one_by_one)
        total = float(problem.value_of(ranks))
        approximate = sum(problem.curve(i)[r] for i, r in enumerate(ranks.tolist()))
        size = sum(abs(problem.curve(i)).max() for i in range(len(ranks)))
        assert abs(total - approximate) <= 1e-13 * size

    @given(instances(), seeds())
    def test_differences_of_values(self, instance: Instance, seed):
        problem = instance.problem()
        rng = np.random.default_rng(seed)
        a, b = random_ranks(problem, rng), random_ranks(problem, rng)
        assert problem.value_difference(a, b) == problem.value_of(a) - problem.value_of(b)


class TestBudget:
    @pytest.mark.parametrize("budget", [3, 3.0, np.int64(3), np.float64(3), np.array(3)])
    def test_whole_numbers_of_any_type(self, budget):
        problem = Problem(SPECTRA, budget)
        assert problem.budget == 3
        assert type(problem.budget) is int

    @pytest.mark.parametrize(
        "budget", [-1, 1.5, math.nan, math.inf, -math.inf, "3", None, True, [3], np.array([3]), 1j]
    )
    def test_what_is_no_budget(self, budget):
        expected = "budget: expected a whole number >= 0, got " + re.escape(repr(budget))
        with pytest.raises(ValueError, match=expected):
            Problem(SPECTRA, budget)

    @pytest.mark.parametrize("budget", [5, 6, 10**9, 2**53, 2**70, 10**400])
    def test_beyond_everything(self, budget):
        allocation = allocate(SPECTRA, budget)
        assert allocation.ranks.tolist() == [3, 2]
        assert allocation.certificate.status == "optimal_exact"
        assert allocation.budget == budget
        assert allocation.problem.spendable == 5
        check_optimum(allocation, brute_force(allocation.problem)[0])

    def test_nothing(self):
        allocation = allocate(SPECTRA, 0)
        assert allocation.ranks.tolist() == [0, 0]
        assert (allocation.value, allocation.cost) == (0.0, 0)
        assert allocation.certificate.status == "optimal_exact"
        check_optimum(allocation, brute_force(allocation.problem)[0])

    @pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9, 1.0])
    def test_costs_and_budgets_up_to_2_53(self, share):
        costs = [2**53, 2**53 - 1, 2**53 - 9]
        spectra = [[3.0, 2.0, 1.5], [2.9, 2.1], [2.95, 2.05, 0.1, 0.0]]
        budget = int(share * 9 * 2**53)
        allocation = allocate(spectra, budget, costs=costs, fixed_costs=[2**53, 0, 1])
        check_optimum(allocation, brute_force(allocation.problem)[0])
        assert allocation.certificate.relative_gap < 1e-12

    def test_a_budget_that_64_bits_could_not_add(self):
        many = {f"layer{i}": np.ones(600) for i in range(2)}
        assert allocate(many, 2**62 - 1, costs=[2**53, 2**53]).cost == 511 * 2**53
        with pytest.raises(
            ValueError, match=r"budget: expected .* below 2\^62, got 46116860184273879"
        ):
            allocate(many, 2**62, costs=[2**53, 2**53])

    @pytest.mark.parametrize(
        ("limits", "minimum"),
        [
            ({"min_rank": 1}, 3 + 5),
            ({"min_rank": {"a": 3}}, 9),
            ({"min_rank": {"a": 1, "b": 1}, "multiple_of": 2}, 6 + 10),
            ({"allowed_ranks": [2, 1]}, 3 + 5),
            ({"tied": [["a", "b"]], "min_rank": {"b": 1}}, 3 + 5),
            ({"min_rank": 1, "fixed_costs": [10, 100]}, 3 + 5 + 110),
        ],
    )
    @pytest.mark.parametrize("objective", ["frobenius", "operator"])
    def test_infeasible_says_the_smallest_feasible_budget(self, limits, minimum, objective):
        keywords = {"costs": [3, 5], "objective": objective, **limits}
        expected = (
            f"cost {minimum}, more than the budget {minimum - 1}.*feasible budget is {minimum}"
        )
        with pytest.raises(InfeasibleError, match=expected) as caught:
            allocate(SPECTRA, minimum - 1, **keywords)
        assert caught.value.minimum_budget == minimum
        assert isinstance(caught.value, ValueError)
        assert allocate(SPECTRA, minimum, **keywords).cost == minimum

    def test_infeasible_beyond_64_bits(self):
        many = np.ones((2000, 1))
        with pytest.raises(InfeasibleError) as caught:
            allocate(many, 0, costs=[2**53] * 2000, min_rank=1)
        assert caught.value.minimum_budget == 2000 * 2**53

    def test_uniform(self):
        assert Problem(SPECTRA, uniform_rank(2), costs=[3, 5]).budget == 16


class TestCheck:
    @pytest.mark.parametrize(
        ("ranks", "limits", "expected"),
        [
            ([1], {}, "expected 2 whole numbers, got int64 of shape"),
            ([[1, 1]], {}, "expected 2 whole numbers, got int64 of shape"),
            ([1.0, 1.0], {}, "expected 2 whole numbers, got float64 of shape"),
            ([True, True], {}, "expected 2 whole numbers, got bool"),
            ([-1, 0], {}, "layer 'a': rank -1 is not allowed"),
            ([0, 3], {}, "layer 'b': rank 3 is not allowed"),
            ([0, 1], {"min_rank": {"a": 1}}, "layer 'a': rank 0 is not allowed"),
            ([0, 2], {"max_rank": 1}, "layer 'b': rank 2 is not allowed"),
            ([2, 1], {"multiple_of": 2}, "layer 'b': rank 1 is not allowed"),
            ([0, 1], {"allowed_ranks": {"b": [0, 2]}}, "layer 'b': rank 1 is not allowed"),
            ([1, 2], {"tied": [["a", "b"]]}, "tied layers 'a', ... differ in rank"),
            ([3, 2], {}, "the ranks cost 5, more than the budget 4"),
        ],
    )
    def test_refuses(self, ranks, limits, expected):
        with pytest.raises(ValueError, match=re.escape(expected)):
            Problem(SPECTRA, 4, **limits).check(np.array(ranks))

    @pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint16])
    def test_accepts(self, dtype):
        Problem(SPECTRA, 4).check(np.array([2, 2], dtype=dtype))

    @given(instances(layers=3, ranks=4))
    def test_agrees_with_the_definition(self, instance: Instance):
        problem = instance.problem()
        feasible = {tuple(ranks.tolist()) for ranks in all_feasible(problem)}
        tops = [len(problem.curves[name]) + 1 for name in problem.names]
        for ranks in np.ndindex(*tops):
            try:
                problem.check(np.array(ranks))
                accepted = True
            except ValueError:
                accepted = False
            assert accepted == (ranks in feasible)


def test_tails():
    problem = Problem(SPECTRA, 4, objective="operator", weights=[2.0, 1.0])
    assert problem.tails(np.array([0, 0])).tolist() == [6.0, 2.5]
    assert problem.tails(np.array([3, 1])).tolist() == [0.0, 0.5]
    assert problem.value_of(np.array([1, 0])) == -4
    assert problem.value_of(np.array([3, 2])) == 0


def test_operator_overflow_names_the_layer():
    with pytest.raises(ValueError, match="layer 'b': weight times singular value overflows"):
        Problem({"a": [1.0], "b": [1e300]}, 1, weights=[1, 1e300], objective="operator")


class TestWithBudget:
    @given(instances(layers=3, ranks=4), seeds())
    def test_is_the_problem_of_that_budget(self, instance: Instance, seed: int):
        problem = instance.problem()
        budget = instance.budget + int(np.random.default_rng(seed).integers(0, 50))
        other = problem.with_budget(budget)
        fresh = Problem(instance.spectra, budget, **instance.keywords)
        assert (other.budget, other.spendable) == (fresh.budget, fresh.spendable)
        assert [row.budget for row in other.rows] == [row.budget for row in fresh.rows]
        assert brute_force(other)[0] == brute_force(fresh)[0]
        assert (problem.budget, problem.rows[0].budget) == (instance.budget, instance.budget)

    def test_the_caps_stay(self):
        problem = Problem(SPECTRA, 9, caps={"x": (["a"], 2)})
        other = problem.with_budget(5)
        assert [(row.name, row.budget) for row in other.rows] == [("", 5), ("x", 2)]
        assert other.names is problem.names
        assert other.gains is problem.gains

    def test_uniform(self):
        assert Problem(SPECTRA, 9, costs=[3, 5]).with_budget(uniform_rank(2)).budget == 16

    @pytest.mark.parametrize("bad", [-1, 1.5, "9", None, True])
    def test_what_is_no_budget(self, bad):
        with pytest.raises(ValueError, match=r"^budget: expected a whole number"):
            Problem(SPECTRA, 9).with_budget(bad)

    def test_too_little(self):
        problem = Problem(SPECTRA, 9, costs=[3, 5], min_rank=1)
        assert problem.with_budget(8).budget == 8
        with pytest.raises(InfeasibleError, match="the minimum ranks cost 8") as caught:
            problem.with_budget(7)
        assert caught.value.minimum_budget == 8

    def test_too_much(self):
        problem = Problem(np.ones((600, 1)), 9, costs=[2**53] * 600)
        assert problem.with_budget(2**62 - 1).spendable == 2**62 - 1
        with pytest.raises(ValueError, match=r"below 2\^62"):
            problem.with_budget(2**62)


@given(instances(layers=3, ranks=4), seeds())
def test_fits_is_the_budget_and_the_caps_alone(instance: Instance, seed: int):
    rng = np.random.default_rng(seed)
    plain = instance.problem()
    room = {"x": ([plain.names[-1]], int(plain.cost_at([-1], int(plain.lower[-1]))) + 7)}
    problem = Problem(instance.spectra, instance.budget, **instance.keywords, caps=room)
    ranks = random_ranks(problem, rng)
    last = problem.cost_at([-1], int(ranks[-1]))
    fits = problem.cost_of(ranks) <= problem.budget and last <= problem.caps[0].budget
    assert problem.fits(ranks) == fits
