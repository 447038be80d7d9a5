"""The mixed-integer program: a cross-check that is not believed either."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize

from lorambo_alloc import GainCurves, Problem, solve
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
