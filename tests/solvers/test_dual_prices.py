"""Prices of several budgets: near the best bound, and harmless where HiGHS fails."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from scipy.sparse import csr_array

import lorambo_alloc.solvers.dual_prices as module
from lorambo_alloc import GainCurves, Problem, solve
from lorambo_alloc.caps import Cap
from lorambo_alloc.hulls import concave_hulls
from lorambo_alloc.solvers.dual_prices import dual_prices, scaled_costs, whole_ranks
from lorambo_alloc.testing import Instance, brute_force, power_law
from lorambo_alloc.verification import SCALE, Charges, integer, responses
from tests.strategies import capped, examples, instances, seeds


def bound(problem: Problem, prices) -> Fraction:
    charges = Charges.of(problem, prices)
    units = sum(response.best for response in responses(problem, problem.lower, charges))
    for price, row in zip(prices, problem.rows, strict=True):
        units += integer(price) * row.budget
    return Fraction(units, SCALE)


@given(capped(instances(layers=4, ranks=3)))
@settings(max_examples=examples(1))
def test_prices_and_ranks_of_any_problem(instance: Instance):
    problem = instance.problem()
    found = dual_prices(problem, problem.rows, None)
    assert len(found.prices) == len(problem.rows)
    assert all(0 <= price < np.inf for price in found.prices)
    problem.limits.check(found.ranks)
    assert bound(problem, found.prices) >= brute_force(problem)[0]


def layered(seed: int, layers: int = 30, ranks: int = 40) -> Problem:
    """Descending gains under a budget and crossing caps, all of them tight."""
    rng = np.random.default_rng(seed)
    gains = -np.sort(-rng.random((layers, ranks)), axis=1)
    costs = rng.integers(1, 9, layers)
    caps = {}
    for n in range(4):
        members = rng.permutation(layers)[: layers // 2]
        own = rng.integers(1, 9, len(members))
        caps[f"cap{n}"] = Cap([str(i) for i in members], int(own.sum()) * ranks // 4, own.tolist())
    curves = GainCurves.from_increments(gains)
    return Problem(curves, int(costs.sum()) * ranks // 4, costs=costs.tolist(), caps=caps)


def linear_optimum(problem: Problem) -> float:
    """The linear relaxation of descending gains, written down here once more."""
    assert problem.gains is not None
    gains = np.concatenate([problem.gains.row(i) for i in range(len(problem.names))])
    owner = np.repeat(np.arange(len(problem.names)), problem.max_lengths)
    result: Any = scipy.optimize.linprog(
        -gains,
        A_ub=np.array([row.costs[owner] for row in problem.rows], dtype=float),
        b_ub=np.array([row.budget for row in problem.rows], dtype=float),
        bounds=(0.0, 1.0),
    )
    return -float(result.fun)


@given(seeds())
@settings(max_examples=examples(0.1))
def test_the_bound_at_the_prices_is_the_linear_optimum(seed: int):
    problem = layered(seed)
    found = dual_prices(problem, problem.rows, None)
    assert float(bound(problem, found.prices)) == pytest.approx(linear_optimum(problem), rel=1e-9)


@given(seeds())
@settings(max_examples=examples(0.1))
def test_a_large_one_is_solved_near_a_coarse_one(seed: int):
    problem = layered(seed, layers=20, ranks=120)
    expected = dual_prices(problem, problem.rows, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LARGE", 100)
        found = dual_prices(problem, problem.rows, None)
    assert float(bound(problem, found.prices)) == pytest.approx(linear_optimum(problem), rel=1e-7)
    values = [float(problem.value_of(own.ranks)) for own in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=0.05)


def test_one_budget_has_the_price_of_water_filling():
    problem = power_law("a").problem()
    found = dual_prices(problem, problem.rows, None)
    expected = solve(problem, "water_filling").certificate.price
    assert found.prices == pytest.approx([expected], rel=1e-6)
    assert problem.fits(found.ranks)


class TestExamples:
    def test_two_budgets(self):
        # x keeps 9 and refuses 5 (worth 5 to it); all keep 9, 4 and 3, and refuse 2.
        curves = GainCurves.from_increments({"a": [9.0, 5.0], "b": [4.0], "c": [3.0, 2.0]})
        problem = Problem(curves, 4, costs=[1, 1, 2], caps={"x": Cap(["a"], 10, [10])})
        found = dual_prices(problem, problem.rows, None)
        assert found.ranks.tolist() == [1, 1, 1]
        assert float(bound(problem, found.prices)) == pytest.approx(16.0, rel=1e-9)
        assert found.prices[1] > 0

    def test_only_the_rows_that_are_asked_for(self):
        spectra = {"a": [3.0, 2.0], "b": [1.0]}
        problem = Problem(spectra, 5, costs=[2, 3], caps={"x": (["a"], 2)})
        # All of a, and a third of b for the unit that is left.
        found = dual_prices(problem, problem.rows[:1], None)
        assert found.prices == pytest.approx([1 / 3])
        assert found.ranks.tolist() == [2, 0]
        everything = dual_prices(problem, [], None)
        assert (everything.prices, everything.ranks.tolist()) == ([], [2, 1])

    def test_nothing_to_gain(self):
        problem = Problem({"a": [0.0, 0.0]}, 1, caps={"x": (["a"], 1)})
        found = dual_prices(problem, problem.rows, None)
        assert (found.prices, found.ranks.tolist()) == ([0.0, 0.0], [0])

    def test_a_budget_that_the_least_ranks_use_up(self):
        problem = Problem({"a": [3.0, 2.0], "b": [1.0]}, 9, caps={"x": (["a"], 1)}, min_rank=1)
        found = dual_prices(problem, problem.rows, None)
        assert found.ranks.tolist() == [1, 1]
        # Nothing is left of x, and a step in it costs at least one unit.
        assert bound(problem, found.prices) == 9 + 1

    @pytest.mark.parametrize("exponent", [-940, -30, 0, 900])
    def test_gains_of_any_scale(self, exponent):
        rows = [[9.0, 5.0], [4.0], [3.0, 2.0]]
        curves = GainCurves.from_increments([[g * 2.0**exponent for g in row] for row in rows])
        problem = Problem(curves, 4, costs=[1, 1, 2], caps={"x": (["0"], 1)})
        found = dual_prices(problem, problem.rows, None)
        assert found.ranks.tolist() == [1, 1, 1]
        assert float(bound(problem, found.prices)) == pytest.approx(16.0 * 2.0**exponent, rel=1e-9)


class TestLimits:
    problem = Problem({"a": [3.0, 2.0], "b": [2.5]}, 2, caps={"x": (["a"], 1)})

    def answers(self, monkeypatch, result) -> list[dict]:
        seen: list[dict] = []

        def linprog(*arguments, **keywords):
            seen.append(keywords)
            return result

        monkeypatch.setattr(scipy.optimize, "linprog", linprog)
        return seen

    @pytest.mark.parametrize("x", [None, np.ones(3)])
    @pytest.mark.parametrize("large", [1, 20_000])
    def test_without_a_solution_prices_are_0_and_ranks_are_the_least(self, monkeypatch, x, large):
        self.answers(monkeypatch, SimpleNamespace(x=x, status=1))
        monkeypatch.setattr(module, "_LARGE", large)
        found = dual_prices(self.problem, self.problem.rows, 1.0)
        assert (found.prices, found.ranks.tolist()) == ([0.0, 0.0], [0, 0])

    @pytest.mark.parametrize("limit", [None, 3.0, 0.0])
    def test_the_time_limit_is_passed_on(self, monkeypatch, limit):
        seen = self.answers(monkeypatch, SimpleNamespace(x=None, status=1))
        monkeypatch.setattr(module.time, "monotonic", lambda: 7.0)
        dual_prices(self.problem, self.problem.rows, limit)
        passed = {} if limit is None else {"time_limit": max(limit, 0.01)}
        assert [keywords["options"] for keywords in seen] == [passed]

    def test_all_calls_together_have_the_time(self, monkeypatch):
        """A coarse solution that fails is followed by windows, which end with the time."""
        seen = self.answers(monkeypatch, SimpleNamespace(x=None, status=1))
        monkeypatch.setattr(module, "_LARGE", 1)
        now = iter([0.0, *np.arange(0.0, 99.0, 0.5)])
        monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
        dual_prices(self.problem, self.problem.rows, 2.0)
        limits = [keywords["options"]["time_limit"] for keywords in seen]
        assert limits == sorted(limits, reverse=True)
        assert limits[0] == 2.0
        assert len(limits) < 5

    def test_negative_duals_are_none(self, monkeypatch):
        marginals = SimpleNamespace(marginals=np.array([-0.5, 1e-12]))
        self.answers(monkeypatch, SimpleNamespace(x=np.ones(3), status=0, ineqlin=marginals))
        found = dual_prices(self.problem, self.problem.rows, None)
        # Duals are per share of what is left, in units of the largest gain.
        assert found.prices == [0.5 * 9.0 / 2, 0.0]
        assert found.ranks.tolist() == [2, 1]


def test_shares_of_what_is_left():
    curves = GainCurves.from_increments({"a": [9.0, 5.0], "b": [4.0], "c": [3.0]})
    problem = Problem(
        curves,
        20,
        costs=[4, 5, 6],
        fixed_costs=[3, 0, 1],
        caps={"x": Cap(["a", "c"], 5, [2, 3])},
        tied=[["b", "c"]],
    )
    hulls = concave_hulls(problem)
    shares = scaled_costs(problem, problem.rows, hulls, [10, 0]).toarray()
    steps = list(
        zip(hulls.variables.tolist(), hulls.low.tolist(), hulls.high.tolist(), strict=True)
    )
    assert steps == [(0, 0, 1), (0, 1, 2), (1, 0, 1)]
    assert shares.tolist() == [[0.7, 0.4, 1.2], [2.0, 2.0, 3.0]]


def test_whole_steps_are_taken_in_order():
    curves = GainCurves.from_increments({"a": [9.0, 5.0, 1.0], "b": [4.0], "c": [3.0, 2.0]})
    problem = Problem(curves, 9, min_rank={"c": 1})
    hulls = concave_hulls(problem)
    assert hulls.variables.tolist() == [0, 0, 0, 1, 2]
    for shares, ranks in (
        ([1.0, 1.0, 0.5, 0.9, 1.0], [2, 0, 2]),
        ([1.0, 0.0, 0.0, 1.0, 0.0], [1, 1, 1]),
        ([0.0, 1.0, 0.0, 1.0 - 1e-7, 0.0], [1, 1, 1]),
        ([0.0] * 5, [0, 0, 1]),
        ([1.0] * 5, [3, 1, 2]),
    ):
        assert whole_ranks(problem, hulls, np.array(shares)).tolist() == ranks


class TestWindows:
    """Single steps near a guess: the guess may be anything, the solution is the same."""

    def program(self, seed: int, share: float) -> Any:
        rng = np.random.default_rng(seed)
        gains = -np.sort(-rng.random((4, 150)), axis=1)
        variables = np.repeat(np.arange(4), 150)
        costs = np.stack([np.repeat(rng.integers(1, 9, 4), 150) for _ in range(2)]).astype(float)
        budgets = share * costs.sum(axis=1)
        matrix = csr_array(costs / budgets[:, None])
        return module._Program(gains.ravel(), matrix, np.ones(2), variables, None)  # pyright: ignore[reportPrivateUsage]

    @pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
    @pytest.mark.parametrize("guess", [0, 40, 75, 150])
    def test_any_guess_leads_to_the_solution(self, share, guess):
        program = self.program(guess, share)
        gains, costs = program._gains, program._costs
        value = gains @ program.solve()[1]
        duals, shares = program.solve_near(np.full(600, guess))
        # Prices need not be unique; the bound that they give is.
        assert gains @ shares == pytest.approx(value, rel=1e-9)
        assert duals.sum() + np.maximum(gains - costs.T @ duals, 0).sum() == pytest.approx(value)
        assert np.all(costs @ shares <= 1 + 1e-9)

    @pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
    def test_the_coarse_guess_is_near(self, share):
        program = self.program(1, share)
        taken = program.coarse()
        wanted = program.solve()[1].reshape(4, 150).sum(axis=1)
        assert taken.reshape(4, 150).std(axis=1).tolist() == [0.0] * 4
        assert np.all(np.abs(taken[::150] - wanted) <= 17)

    def test_a_good_guess_takes_one_window(self, monkeypatch):
        program = self.program(1, 0.3)
        taken = program.coarse()
        sizes = []
        real = scipy.optimize.linprog

        def linprog(gains, **keywords):
            sizes.append(len(gains))
            return real(gains, **keywords)

        monkeypatch.setattr(scipy.optimize, "linprog", linprog)
        program.solve_near(taken)
        assert len(sizes) == 1
        assert sizes[0] <= 4 * 33

    def test_variables_of_different_length(self):
        gains = np.concatenate([np.arange(40.0, 0, -1), [50.0], np.arange(30.0, 0, -1)])
        variables = np.array([0] * 40 + [2] + [3] * 30)
        matrix = csr_array(np.full((1, 71), 1 / 20))
        program: Any = module._Program(gains, matrix, np.ones(1), variables, None)  # pyright: ignore[reportPrivateUsage]
        duals, shares = program.solve()
        # 50, then 40 to 31 of the first, then 30 of both until 20 are taken.
        assert shares.sum() == pytest.approx(20.0)
        assert program.solve_near(program.coarse())[0] == pytest.approx(duals, rel=1e-6)
        by_variable = program.coarse()
        assert by_variable[:40].tolist() == [by_variable[0]] * 40
        assert by_variable[41:].tolist() == [by_variable[41]] * 30
        assert by_variable[0] + by_variable[40] + by_variable[41] == pytest.approx(20, abs=1)
