"""Side budgets: which way is taken, what it proves, and what it says when it is stopped."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorambo_alloc.solvers.integers as integers
import lorambo_alloc.solvers.side_budgets as module
from lorambo_alloc import Allocation, GainCurves, Problem, solve
from lorambo_alloc.caps import Cap
from lorambo_alloc.solvers.side_budgets import SideSearch, solve_side_budgets
from lorambo_alloc.testing import Instance, brute_force, power_law
from tests.checks import check_answer, check_optimum
from tests.strategies import capped, examples, instances, seeds


def staged(shape: str, stages: int, share: float = 0.9) -> Problem:
    """A model's layers on pipeline stages, each with its share of the parameters."""
    instance = power_law(shape)
    names = list(instance.spectra)
    own = instance.problem()
    caps = {}
    for k, part in enumerate(np.array_split(np.arange(len(names)), stages)):
        caps[f"stage{k}"] = (
            [names[i] for i in part],
            int(own.budget * share * (0.7 + 0.6 * (k % 2)) / stages),
        )
    return Problem(instance.spectra, instance.budget, **instance.keywords, caps=caps)


def layered(seed: int, layers: int = 24, ranks: int = 12) -> Problem:
    """Disjoint caps in their own units, under a budget that binds too."""
    rng = np.random.default_rng(seed)
    gains = -np.sort(-rng.random((layers, ranks)), axis=1)
    costs = rng.integers(1, 30, layers)
    caps = {}
    for n, part in enumerate(np.array_split(rng.permutation(layers), 3)):
        own = rng.integers(1, 30, len(part))
        budget = int(own.sum()) * ranks // 3
        caps[f"cap{n}"] = Cap([str(i) for i in part], budget, own.tolist())
    budget = int(costs.sum()) * ranks // 4
    return Problem(GainCurves.from_increments(gains), budget, costs=costs.tolist(), caps=caps)


SPECTRA = {"a": [3.0, 2.0], "b": [2.5, 2.0], "c": [1.0, 0.5]}


class TestWays:
    def method(self, budget, caps, **keywords) -> str:
        problem = Problem(SPECTRA, budget, caps=caps, **keywords)
        allocation = solve_side_budgets(problem)
        check_optimum(allocation, brute_force(problem)[0])
        return allocation.certificate.method

    def test_caps_that_cannot_bind_are_dropped(self):
        for caps in ({"x": (["a", "b"], 20)}, {"x": (["a", "b"], 6), "y": (["a"], 4)}):
            plain = Problem(SPECTRA, 5, costs=[1, 2, 3])
            assert self.method(5, caps, costs=[1, 2, 3]) == solve(plain).certificate.method

    def test_nothing_binds(self):
        assert self.method(12, {"x": (["a", "b"], 6)}, costs=[1, 2, 3]) != "side budgets"

    def test_nested_caps_of_equal_costs_are_greedy(self):
        assert self.method(4, {"x": (["a", "b"], 2)}) == "laminar greedy"

    @pytest.mark.parametrize(
        ("caps", "keywords"),
        [
            ({"x": (["a", "b"], 2), "y": (["b", "c"], 2)}, {}),
            ({"x": (["a", "b"], 3)}, {"costs": [2, 3, 1]}),
            ({"x": Cap(["a", "b"], 3, [2, 1])}, {}),
            ({"x": (["a", "b"], 2)}, {"multiple_of": 2}),
        ],
    )
    def test_all_else_is_searched(self, caps, keywords):
        assert self.method(4, caps, **keywords) == "side budgets"


@given(capped(instances(layers=4, ranks=3)), st.sampled_from([None, 0.0, 1e-3]))
@settings(max_examples=examples(2))
def test_certificates_hold_without_the_search_in_integers(instance: Instance, limit):
    """Small problems are closed in integers; here the bounds of prices and parts stand alone."""
    problem = instance.problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "_MAX_OPTIONS", 0)
        allocation = solve(problem, time_limit=limit)
    check_optimum(allocation, brute_force(problem)[0])


@given(seeds())
@settings(max_examples=examples(0.2))
def test_the_search_within_caps_is_proved_again(seed: int):
    problem = layered(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "_MAX_OPTIONS", 0)
        allocation = solve(problem)
    check_answer(allocation)
    certificate = allocation.certificate
    # Prices alone would leave a gap of about one gain a budget.
    assert certificate.relative_gap < 2e-2
    assert certificate.verify(problem, allocation.ranks).complete
    assert {name for name, _ in certificate.within} <= {row.name for row in problem.caps}


def test_searched_caps_prove_more_than_prices():
    problem = layered(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "_MAX_OPTIONS", 0)
        certificate = solve(problem).certificate
        search = SideSearch(problem, None)
        search.relax()
        priced = search.allocation("prices")
    assert priced.certificate.within == ()
    assert [name for name, _ in certificate.within] == ["cap0", "cap1", "cap2"]
    assert Fraction(certificate.upper_bound) < Fraction(priced.certificate.upper_bound)
    assert certificate.value >= priced.value
    check_answer(priced)


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return solve(staged("a", 32))


class TestStages:
    def test_the_gap_is_small_and_proved_again(self, allocation):
        check_answer(allocation)
        certificate = allocation.certificate
        assert certificate.method == "side budgets"
        assert certificate.relative_gap < 1e-6
        verification = certificate.verify(allocation.problem, allocation.ranks)
        assert verification.complete
        assert verification.value <= Fraction(certificate.upper_bound)

    def test_caps_are_spent_or_free(self, allocation):
        problem = allocation.problem
        prices, costs = allocation.cap_prices, allocation.cap_costs
        assert list(prices) == list(costs) == [row.name for row in problem.caps]
        for row in problem.caps:
            assert costs[row.name] <= row.budget
            if prices[row.name] > 0:
                assert costs[row.name] > 0.9 * row.budget

    def test_a_price_of_the_budget_across_the_stages(self):
        # Here the stages' caps alone do not imply the budget.
        allocation = solve(staged("a", 4, share=1.3))
        check_answer(allocation)
        certificate = allocation.certificate
        assert certificate.price > 0
        assert certificate.relative_gap < 1e-4


class TestTime:
    @pytest.mark.parametrize("limit", [None, 0.0, 12.5])
    def test_an_ordinary_problem_gets_it_too(self, monkeypatch, limit):
        seen = []
        real = module.solve_exact

        def solve_exact(problem, time_limit):
            seen.append(time_limit)
            return real(problem, time_limit)

        monkeypatch.setattr(module, "solve_exact", solve_exact)
        solve_side_budgets(Problem(SPECTRA, 3, costs=[1, 2, 3], caps={"x": (["a"], 9)}), limit)
        assert seen == [limit]

    @pytest.mark.parametrize("limit", [0.0, 1e-3, 0.02])
    def test_a_stopped_search_states_a_gap(self, limit):
        problem = staged("a", 8)
        allocation = solve(problem, time_limit=limit)
        check_answer(allocation)
        assert math.isfinite(allocation.certificate.upper_bound)
        full = solve(problem)
        assert full.value <= allocation.certificate.upper_bound
        assert allocation.value <= full.certificate.upper_bound

    def test_no_time_leaves_the_prices_alone(self):
        allocation = solve(layered(0), time_limit=0.0)
        assert allocation.certificate.within == ()
        assert allocation.certificate.gap > 0

    def test_the_clock_is_looked_at_between_parts(self, monkeypatch):
        problem = layered(1)
        calls = []
        real = module.best_part

        def counted(*arguments, **keywords):
            calls.append(arguments[2].name)
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, "best_part", counted)
        now = [0.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        search = SideSearch(problem, 1.0)
        search.relax()
        now[0] = 2.0
        search.search_parts()
        search.improve()
        search.settle_in_integers()
        assert calls == []
        assert not search._closed  # pyright: ignore[reportPrivateUsage]
        now[0] = 1.0
        search.search_parts()
        assert calls[:3] == ["cap0", "cap1", "cap2"]
        check_answer(search.allocation("stopped"))

    def test_parts_get_the_time_that_is_left(self, monkeypatch):
        problem = layered(1)
        limits = []
        real = module.best_part

        def seen(*arguments, **keywords):
            limits.append([*arguments, *keywords.values()][-1])
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, "best_part", seen)
        monkeypatch.setattr(module.time, "monotonic", lambda: 5.0)
        search = SideSearch(problem, 2.0)
        search.relax()
        search.search_parts()
        search.improve()
        assert set(limits) == {2.0}
        limits.clear()
        search = SideSearch(problem, None)
        search.relax()
        search.search_parts()
        search.improve()
        assert set(limits) == {None}


class TestSearchedCaps:
    """Which caps are searched: priced ones first, small ones first, none that share a variable."""

    def homes(self, problem: Problem) -> list[str]:
        search = SideSearch(problem, None)
        search.relax()
        search.search_parts()
        return sorted(search._homes)  # pyright: ignore[reportPrivateUsage]

    curves = GainCurves.from_increments(
        {"a": [9.0, 7.0], "b": [8.0, 6.0], "c": [5.0, 4.0], "d": [3.0, 2.0]}
    )

    def test_small_caps_go_before_large_ones(self):
        caps = {
            "large": Cap(["a", "b", "c"], 8, [2, 3, 2]),
            "small": Cap(["a", "b"], 4, [3, 2]),
            "apart": Cap(["d"], 1, [1]),
        }
        assert self.homes(Problem(self.curves, 99, caps=caps)) == ["apart", "small"]

    def test_priced_caps_go_before_others(self):
        # "free" may bind, but not where a and b are held down.
        caps = {
            "free": Cap(["b", "c"], 11, [2, 4]),
            "priced": Cap(["a", "b", "d"], 5, [3, 4, 2]),
        }
        assert self.homes(Problem(self.curves, 99, caps=caps)) == ["priced"]

    def test_tied_layers_join_caps(self):
        caps = {"x": Cap(["a"], 1, [1]), "y": Cap(["b"], 1, [1]), "z": Cap(["c"], 1, [1])}
        problem = Problem(self.curves, 99, caps=caps, tied=[["a", "b"]])
        homes = self.homes(problem)
        assert "z" in homes
        assert len(homes) == 2

    def test_caps_whose_tied_layers_cost_too_much_together(self):
        edge = 1 << 53
        caps = {"x": Cap(["a", "b"], 2 * edge, [edge, edge]), "y": Cap(["c", "d"], 3, [1, 2])}
        problem = Problem(self.curves, 99, caps=caps, tied=[["a", "b"]])
        assert self.homes(problem) == ["y"]
        allocation = solve(problem)
        check_optimum(allocation, brute_force(problem)[0])


class TestImprovement:
    def test_offers_must_fit_and_be_better(self):
        problem = Problem({"a": [3.0, 2.0], "b": [2.5]}, 2, caps={"x": (["a"], 1)})
        search = SideSearch(problem, None)
        assert search.offer(np.array([0, 1]))
        assert search.ranks.tolist() == [0, 1]
        assert not search.offer(np.array([0, 1]))
        assert not search.offer(np.array([0, 0]))
        assert not search.offer(np.array([2, 0]))  # beyond the cap
        assert search.offer(np.array([1, 1]))
        assert search.ranks.tolist() == [1, 1]

    @given(seeds())
    @settings(max_examples=examples(0.2))
    def test_parts_only_help(self, seed: int):
        search = SideSearch(layered(seed), None)
        search.relax()
        values = [search.allocation("").value]
        search.search_parts()
        values.append(search.allocation("").value)
        search.improve()
        values.append(search.allocation("").value)
        assert values == sorted(values)

    def test_what_is_left_for_a_part(self):
        curves = GainCurves.from_increments({"a": [3.0, 2.0], "b": [2.5, 1.0], "c": [1.0, 1.0]})
        caps = {"x": (["a", "b"], 20), "own": Cap(["a", "b"], 9, [9, 4])}
        problem = Problem(curves, 25, costs=[4, 5, 6], fixed_costs=[1, 0, 2], caps=caps)
        search = SideSearch(problem, None)
        search.ranks = np.array([1, 1, 1])
        own, x, units = problem.rows
        room = search._room  # pyright: ignore[reportPrivateUsage]
        # c takes 8 of 25; the cap on a and b allows all that it has: 17 of 20.
        assert room([(0,), (1,)], x) == 17
        assert room([(0,), (1,)], own) == 17
        assert room([(0,)], x) == 12
        assert room([(0,), (1,)], units) == 9
        search.ranks = np.array([1, 1, 0])
        assert room([(0,), (1,)], x) == 20
        assert room([(0,), (1,), (2,)], own) == 25

    def test_when_a_cap_is_tight(self):
        problem = Problem(
            {"a": [1.0] * 9, "b": [1.0] * 9}, 99, caps={"x": Cap(["a", "b"], 20, [3, 5])}
        )
        search = SideSearch(problem, None)
        tight = search._tight  # pyright: ignore[reportPrivateUsage]
        for ranks, expected in (([5, 0], False), ([2, 2], True), ([0, 3], False), ([0, 4], True)):
            search.ranks = np.array(ranks)
            assert tight(problem.caps[0]) == expected


def test_an_answer_closed_in_integers_is_exact():
    curves = GainCurves({"a": [0.0, 6.0], "b": [0.0, 5.0], "c": [0.0, 5.5]})
    caps = {"x": Cap(["a", "b"], 6, [6, 5]), "y": Cap(["b", "c"], 6, [5, 6])}
    problem = Problem(curves, 16, costs=[6, 5, 5], caps=caps)
    allocation = solve(problem)
    check_optimum(allocation, brute_force(problem)[0])
    assert allocation.certificate.status == "optimal_exact"
    assert allocation.certificate.within == ()
    assert dict(allocation) == {"a": 1, "b": 0, "c": 1}


def test_a_bound_that_is_met_needs_no_search_in_integers(monkeypatch):
    def unwanted(*arguments):
        raise AssertionError

    monkeypatch.setattr(module, "best_in_integers", unwanted)
    allocation = solve(staged("a", 4))
    assert allocation.certificate.status == "optimal_exact"
    assert [slack for _, slack in allocation.certificate.within] == [0.0] * 4
    check_answer(allocation)


def test_the_certificate_names_what_was_priced_and_searched():
    allocation = solve(staged("a", 3, share=1.2))
    problem, certificate = allocation.problem, allocation.certificate
    assert certificate.price > 0
    assert [price > 0 for price in certificate.cap_prices] == [True, False, True]
    assert [name for name, _ in certificate.within] == ["stage0", "stage1", "stage2"]
    assert certificate.verify(problem, allocation.ranks).proof == "search"
    # Without the searches, the prices alone do not carry the claim.
    stripped = dataclasses.replace(certificate, within=())
    assert stripped.verify(problem, allocation.ranks, effort=0).proof == "unfinished"
