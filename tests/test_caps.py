"""Caps: budgets of groups, in their own units; what is refused, and by which name."""

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import InfeasibleError, Problem, allocate, solve, uniform_rank
from lorambo_alloc.caps import Cap, Row
from lorambo_alloc.testing import Instance
from tests.checks import all_feasible
from tests.strategies import capped, examples, instances

SPECTRA = {"q": [3.0, 2.0], "v": [2.5, 2.0], "o": [1.0, 0.5]}
KEYWORDS = {"costs": [4, 5, 6], "fixed_costs": [1, 0, 2]}


def problem_of(caps, budget=1000, **keywords) -> Problem:
    return Problem(SPECTRA, budget, caps=caps, **{**KEYWORDS, **keywords})


class TestRow:
    row = Row("stage", np.array([4, 0, 6]), np.array([1, 0, 2]), 30)

    def test_where(self):
        assert self.row.where == "cap 'stage'"
        assert Row("", self.row.costs, self.row.fixed_costs, 1).where == "budget"

    def test_layers_are_those_that_are_charged(self):
        assert self.row.layers.tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("group", "rank", "cost"),
        [([0], 1, 5), ([0], 3, 13), ([0], 0, 0), ([1], 2, 0), ([0, 2], 2, 23), ([], 1, 0)],
    )
    def test_cost_of_one_rank_in_a_group(self, group, rank, cost):
        assert self.row.cost_at(group, rank) == cost

    @pytest.mark.parametrize(
        ("ranks", "cost"), [([0, 9, 0], 0), ([1, 0, 0], 5), ([1, 1, 1], 13), ([2, 0, 3], 29)]
    )
    def test_cost_of_ranks(self, ranks, cost):
        assert self.row.cost_of(np.array(ranks)) == cost

    def test_costs_beyond_64_bits_are_exact(self):
        row = Row("", np.array([2**53, 2**53 - 1]), np.array([2**53, 0]), 1)
        ranks = np.array([2**12, 2**12 - 1])
        assert row.cost_of(ranks) == 2**65 + (2**53 - 1) * (2**12 - 1) + 2**53


class TestParsing:
    def test_none(self):
        for caps in (None, {}):
            problem = problem_of(caps)
            assert problem.caps == ()
            assert [row.name for row in problem.rows] == [""]

    def test_in_the_units_of_the_problem(self):
        (row,) = problem_of({"stage": (["o", "q"], 50)}).caps
        assert (row.name, row.budget) == ("stage", 50)
        assert row.costs.tolist() == [4, 0, 6]
        assert row.fixed_costs.tolist() == [1, 0, 2]
        assert row.costs.dtype == row.fixed_costs.dtype == np.int64

    @pytest.mark.parametrize("costs", [[7, 8], {"q": 8, "o": 7}, (7, 8), np.array([7, 8])])
    def test_in_its_own_units(self, costs):
        (row,) = problem_of({"device": Cap(["o", "q"], 50, costs)}).caps
        assert row.costs.tolist() == [8, 0, 7]
        assert row.fixed_costs.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("fixed", [[9, 0], {"q": 0, "o": 9}])
    def test_with_its_own_fixed_costs(self, fixed):
        (row,) = problem_of({"device": Cap(["o", "q"], 50, [7, 8], fixed)}).caps
        assert row.fixed_costs.tolist() == [0, 0, 9]
        assert row.cost_of(np.array([1, 1, 1])) == 24

    def test_uniform_rank_is_what_it_would_cost_the_group(self):
        caps = {
            "own": Cap(["q", "o"], uniform_rank(3)),
            "bytes": Cap(["q", "v"], uniform_rank(2), [10, 20], [5, 0]),
            "none": Cap(["v"], uniform_rank(0)),
        }
        assert [row.budget for row in problem_of(caps).caps] == [3 * 10 + 3, 65, 0]

    def test_order_and_rows(self):
        problem = problem_of({"b": (["q"], 40), "a": (("v", "o"), 30)})
        assert [row.name for row in problem.rows] == ["", "b", "a"]
        assert problem.rows[1:] == problem.caps
        assert problem.rows[0].budget == problem.budget == 1000
        assert problem.rows[0].costs.tolist() == [4, 5, 6]
        assert problem.rows[0].fixed_costs.tolist() == [1, 0, 2]

    def test_a_budget_that_numpy_made(self):
        (row,) = problem_of({"a": (np.array(["q", "v"]).tolist(), np.int64(40))}).caps
        assert row.budget == 40
        assert type(row.budget) is int

    @pytest.mark.parametrize(
        ("caps", "expected"),
        [
            ([("a", 1)], r"caps: expected a mapping of name to Cap, got \[\('a', 1\)\]"),
            ("abc", "caps: expected a mapping of name to Cap, got 'abc'"),
            ({"": (["q"], 1)}, "caps: expected names that are non-empty strings, got ''"),
            ({3: (["q"], 1)}, "caps: expected names that are non-empty strings, got 3"),
            ({"a": 3}, r"cap 'a': expected a Cap or \(layers, budget\), got 3"),
            (
                {"a": (["q"], 1, 2)},
                r"cap 'a': expected a Cap or \(layers, budget\), got \(\['q'\], 1",
            ),
            ({"a": (["q"],)}, r"cap 'a': expected a Cap or \(layers, budget\)"),
            ({"a": [["q"], 1]}, r"cap 'a': expected a Cap or \(layers, budget\)"),
            ({"a": ("q", 1)}, "cap 'a': expected a list of layer names, got 'q'"),
            ({"a": (7, 1)}, "cap 'a': expected a list of layer names, got 7"),
            ({"a": (["q", "z"], 1)}, "cap 'a': layer 'z' is not among the spectra"),
            ({"a": ([0], 1)}, "cap 'a': layer 0 is not among the spectra"),
            ({"a": ([["q"]], 1)}, r"cap 'a': layer \['q'\] is not among the spectra"),
            ({"a": ([], 1)}, r"cap 'a': expected one or more different layers, got \[\]"),
            (
                {"a": (["q", "v", "q"], 1)},
                r"cap 'a': expected one or more different layers, got \['q', 'v', 'q'\]",
            ),
            (
                {"a": Cap(["q"], 9, fixed_costs=[1])},
                "cap 'a': fixed_costs need costs in the same units beside them",
            ),
            ({"a": Cap(["q"], 9, [0])}, "cap 'a': costs: layer 'q': expected a whole number >= 1"),
            ({"a": Cap(["q"], 9, [1, 2])}, "cap 'a': costs: expected 1 values, got 2"),
            ({"a": Cap(["q"], 9, {"v": 1})}, "cap 'a': costs: layer 'v' is not among"),
            ({"a": Cap(["q", "v"], 9, {"v": 1})}, "cap 'a': costs: layer 'q' is missing"),
            (
                {"a": Cap(["q"], 9, [1], [-1])},
                "cap 'a': fixed_costs: layer 'q': expected a whole number >= 0, got -1",
            ),
            ({"a": Cap(["q"], 9, [1 << 54])}, "cap 'a': costs: layer 'q': expected at most"),
            ({"a": (["q"], -1)}, "cap 'a': budget: expected a whole number >= 0, got -1"),
            ({"a": (["q"], 1.5)}, "cap 'a': budget: expected a whole number >= 0, got 1.5"),
            ({"b": (["q"], 9), "a": (["q"], None)}, "cap 'a': budget"),
        ],
    )
    def test_refused(self, caps, expected):
        with pytest.raises(ValueError, match=f"^{expected}"):
            problem_of(caps)

    def test_costs_of_1_and_fixed_costs_of_0_will_do(self):
        (row,) = problem_of({"a": Cap(["q"], 0, [1], [0])}).caps
        assert (row.costs.tolist(), row.budget) == ([1, 0, 0], 0)


class TestFeasibility:
    def test_minimum_ranks_beyond_a_cap(self):
        message = (
            "cap 'a': the minimum ranks cost 13, more than the budget 12; the smallest feasible "
            "budget is 13"
        )
        with pytest.raises(InfeasibleError, match=f"^{message}$") as caught:
            problem_of(
                {"b": (["v"], 20), "a": (["q"], 12)}, min_rank={"q": 2}, fixed_costs=[5, 0, 0]
            )
        assert caught.value.minimum_budget == 13
        problem_of({"a": (["q"], 13)}, min_rank={"q": 2}, fixed_costs=[5, 0, 0])

    def test_a_cap_keeps_its_budget_where_the_problem_gets_another(self):
        problem = problem_of({"a": (["q"], 9)}).with_budget(20)
        assert [row.budget for row in problem.rows] == [20, 9]

    @pytest.mark.parametrize(
        ("ranks", "fits"), [([2, 0, 0], True), ([2, 1, 0], False), ([0, 1, 1], True)]
    )
    def test_fits_and_check(self, ranks, fits):
        problem = problem_of({"a": (["q", "v"], 13)}, budget=14)
        assert problem.fits(np.array(ranks)) == fits
        if fits:
            problem.check(np.array(ranks))
        else:
            with pytest.raises(
                ValueError, match=r"^cap 'a': the ranks cost 14, more than the budget 13$"
            ):
                problem.check(np.array(ranks))

    def test_the_problem_s_own_budget_is_checked_too(self):
        problem = problem_of({"a": (["q", "v"], 99)}, budget=8)
        assert not problem.fits(np.array([2, 0, 0]))
        with pytest.raises(ValueError, match=r"^the ranks cost 9, more than the budget 8$"):
            problem.check(np.array([2, 0, 0]))

    def test_costs_beyond_62_bits(self):
        spectra = {"a": np.ones(600)}
        caps = {"wide": Cap(["a"], 1 << 62, [1 << 53])}
        with pytest.raises(
            ValueError, match=r"^cap 'wide': expected a budget, or a cost of .* below 2\^62"
        ):
            Problem(spectra, 5, caps=caps)
        Problem(spectra, 5, caps=caps, max_rank=511)


@given(capped(instances(layers=3, ranks=3)))
@settings(max_examples=examples(0.5))
def test_fits_is_what_the_definition_says(instance: Instance):
    problem = instance.problem()
    caps = instance.keywords["caps"]
    feasible = [ranks.tolist() for ranks in all_feasible(problem)]
    assert problem.lower.tolist() in feasible
    for ranks in feasible:
        by_name = dict(zip(problem.names, ranks, strict=True))
        for cap in caps.values():
            own = {name: i for i, name in enumerate(problem.names)}
            costs = cap.costs or [int(problem.costs[own[name]]) for name in cap.layers]
            fixed = cap.fixed_costs
            if cap.costs is None:
                fixed = [int(problem.fixed_costs[own[name]]) for name in cap.layers]
            total = sum(c * by_name[n] for c, n in zip(costs, cap.layers, strict=True))
            for f, name in zip(fixed or [0] * len(costs), cap.layers, strict=True):
                total += f if by_name[name] else 0
            assert total <= cap.budget


class TestSolvers:
    @pytest.mark.parametrize("method", ["water_filling", "bottleneck"])
    def test_solvers_that_take_none(self, method):
        objective = "operator" if method == "bottleneck" else "frobenius"
        known = "'exact', 'side_budgets', 'relaxation', 'greedy', 'milp'"
        with pytest.raises(ValueError, match=f"method '{method}' takes no caps; .* {known}"):
            allocate(SPECTRA, 3, caps={"a": (["q"], 1)}, method=method, objective=objective)

    def test_operator_takes_none(self):
        with pytest.raises(ValueError, match="method 'bottleneck' takes no caps"):
            allocate(SPECTRA, 3, caps={"a": (["q"], 1)}, objective="operator")

    @pytest.mark.parametrize("method", ["auto", "exact", "side_budgets"])
    def test_the_names_that_lead_to_side_budgets(self, method):
        problem = problem_of({"a": (["q", "v"], 10), "b": (["v", "o"], 11)}, budget=15)
        assert solve(problem, method).certificate.method == "side budgets"
