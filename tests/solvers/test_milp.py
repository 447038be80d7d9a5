"""The mixed-integer program: a cross-check that is not believed either."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize

from lorambo_alloc import GainCurves, Problem, solve
from lorambo_alloc.caps import Cap
from lorambo_alloc.testing import brute_force
from tests.checks import check_answer, check_optimum

CURVES = GainCurves({"a": [0.0, 6.0, 6.5], "b": [0.0, 5.0, 9.0], "c": [0.0, 5.5]})


@pytest.fixture
def problem() -> Problem:
    return Problem(CURVES, 16, costs=[6, 5, 5], fixed_costs=[1, 0, 0])


def test_it_finds_the_optimum(problem):
    optimum, _ = brute_force(problem)
    allocation = solve(problem, "milp")
    check_optimum(allocation, optimum)
    assert problem.value_of(allocation.ranks) == optimum
    assert allocation.certificate.method == "milp"


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1.0, 1e9, 1e200])
def test_gains_are_scaled_first(scale):
    curves = GainCurves({name: row * scale for name, row in CURVES.items()})
    problem = Problem(curves, 16, costs=[6, 5, 5], fixed_costs=[1, 0, 0])
    assert problem.value_of(solve(problem, "milp").ranks) == brute_force(problem)[0]


def answers(monkeypatch, x) -> None:
    def milp(*arguments, **keywords):
        return SimpleNamespace(x=x, status=0)

    monkeypatch.setattr(scipy.optimize, "milp", milp)


@pytest.mark.parametrize(
    "x",
    [None, np.ones(8), np.zeros(8), np.full(8, 0.5), np.array([0, 0, 1, 0, 0, 1, 0, 1.0])],
    ids=["none", "all", "nothing", "halves", "over the budget"],
)
def test_a_wrong_answer_is_not_taken(problem, monkeypatch, x):
    answers(monkeypatch, x)
    allocation = solve(problem, "milp")
    check_optimum(allocation, brute_force(problem)[0])


def test_a_right_answer_is_taken(problem, monkeypatch):
    _, best = brute_force(problem)
    x = np.zeros(8)
    x[[best[0], 3 + best[1], 6 + best[2]]] = 1.0
    answers(monkeypatch, x)
    allocation = solve(problem, "milp")
    check_answer(allocation)
    assert problem.value_of(allocation.ranks) == problem.value_of(best)


def test_the_time_limit_reaches_the_solver(problem, monkeypatch):
    seen = {}
    real = scipy.optimize.milp

    def milp(*arguments, **keywords):
        seen.update(keywords["options"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(scipy.optimize, "milp", milp)
    solve(problem, "milp", time_limit=12.5)
    assert seen == {"mip_rel_gap": 0.0, "time_limit": 12.5}
    seen.clear()
    solve(problem, "milp")
    assert seen["mip_rel_gap"] == 0.0
    assert seen.get("time_limit", math.inf) == math.inf


def test_nothing_to_solve():
    for spectra, value in (({}, 0.0), ({"a": [2.0]}, 4.0)):
        allocation = solve(Problem(spectra, 4), "milp")
        assert allocation.value == value
        assert allocation.certificate.method == "milp"


CAPS = {"x": Cap(["a", "b"], 9, [4, 5]), "y": (["b", "c"], 5)}


class TestCaps:
    @pytest.fixture
    def capped_problem(self) -> Problem:
        return Problem(CURVES, 16, costs=[6, 5, 5], fixed_costs=[1, 0, 0], caps=CAPS)

    def test_it_finds_the_optimum(self, capped_problem):
        optimum, _ = brute_force(capped_problem)
        allocation = solve(capped_problem, "milp")
        check_optimum(allocation, optimum)
        assert capped_problem.value_of(allocation.ranks) == optimum
        assert allocation.certificate.method == "milp"
        assert len(allocation.certificate.cap_prices) == 2
        assert allocation.certificate.within == ()

    @pytest.mark.parametrize(
        "x",
        [None, np.ones(8), np.zeros(8), np.array([0, 1, 0, 0, 0, 1, 0, 1.0])],
        ids=["none", "all", "nothing", "over a cap"],
    )
    def test_a_wrong_answer_is_not_taken(self, capped_problem, monkeypatch, x):
        answers(monkeypatch, x)
        allocation = solve(capped_problem, "milp")
        check_optimum(allocation, brute_force(capped_problem)[0])

    def test_a_right_answer_is_taken(self, monkeypatch):
        # Filling up takes a, which leaves no room for the better pair.
        curves = GainCurves({"a": [0.0, 6.0], "b": [0.0, 5.0], "c": [0.0, 5.0]})
        caps = {"x": Cap(["a", "b", "c"], 10, [6, 5, 5])}
        problem = Problem(curves, 99, caps=caps)
        answers(monkeypatch, np.array([1, 0, 0, 1, 0, 1.0]))
        allocation = solve(problem, "milp")
        assert dict(allocation) == {"a": 0, "b": 1, "c": 1}
        check_answer(allocation)

    def test_each_row_has_its_shares(self, capped_problem, monkeypatch):
        seen = []

        def milp(*arguments, constraints, **keywords):
            seen.extend(constraints)
            return SimpleNamespace(x=None, status=1)

        monkeypatch.setattr(scipy.optimize, "milp", milp)
        solve(capped_problem, "milp")
        choose, budgets = seen
        assert choose.A.toarray().tolist() == [
            [1, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 1],
        ]
        assert budgets.A == pytest.approx(
            np.array(
                [
                    [0, 7, 13, 0, 5, 10, 0, 5],
                    [0, 4, 8, 0, 5, 10, 0, 0],
                    [0, 0, 0, 0, 5, 10, 0, 5],
                ]
            )
            / np.array([[16], [9], [5]])
        )
        assert np.all(budgets.ub == 1.0)

    def test_a_cap_of_nothing_and_caps_without_end(self):
        problem = Problem(CURVES, 10**400, caps={"x": (["a"], 0), "y": (["b", "c"], 10**400)})
        allocation = solve(problem, "milp")
        assert dict(allocation) == {"a": 0, "b": 2, "c": 1}
        check_answer(allocation)
