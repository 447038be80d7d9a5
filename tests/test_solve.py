"""Which solver, and for how long."""

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lorambo_alloc import Allocation, Problem, allocate, solve
from lorambo_alloc.solve import SOLVERS
from lorambo_alloc.testing import brute_force, strongly_correlated_linear
from tests.checks import check_answer, check_optimum

SPECTRA = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}
KNOWN = [
    "auto",
    "exact",
    "water_filling",
    "bottleneck",
    "side_budgets",
    "relaxation",
    "greedy",
    "milp",
]


def test_auto_takes_the_exact_solver_or_the_bottleneck():
    concave = solve(Problem(SPECTRA, 3))
    general = solve(Problem(SPECTRA, 3, multiple_of=2))
    bottleneck = solve(Problem(SPECTRA, 3, objective="operator"))
    methods = [a.certificate.method for a in (concave, general, bottleneck)]
    assert len(set(methods)) == 3
    assert methods[0] == solve(Problem(SPECTRA, 3), "exact").certificate.method
    assert methods[1] == solve(Problem(SPECTRA, 3, multiple_of=2), "exact").certificate.method
    assert "leximax" in methods[2]


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "bottleneck"])
@pytest.mark.parametrize("keywords", [{}, {"multiple_of": 2}, {"objective": "nuclear"}])
def test_every_solver_by_name(solver, keywords):
    if solver == "relaxation":
        pytest.importorskip("cvxpy", reason="the convex relaxation needs the extra `convex`")
    problem = Problem(SPECTRA, 3, costs=[2, 1], **keywords)
    if solver == "greedy" and "multiple_of" in keywords:
        with pytest.raises(ValueError, match="'greedy' needs single ranks of descending gain"):
            solve(problem, solver)
        return
    allocation = solve(problem, solver)
    assert isinstance(allocation, Allocation)
    assert allocation.problem is problem
    check_optimum(allocation, brute_force(problem)[0])


def test_names_of_the_simple_solvers():
    assert solve(Problem(SPECTRA, 3), "milp").certificate.method == "milp"
    assert solve(Problem(SPECTRA, 3), "water_filling").certificate.method == "water-filling"


@pytest.mark.parametrize("bad", ["foo", "Exact", "", None, 3, ["exact"], b"exact"])
def test_unknown_solvers_list_the_known_ones(bad):
    expected = f"method: expected one of {', '.join(map(repr, KNOWN))}, got {bad!r}"
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        allocate(SPECTRA, 3, method=bad)
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        solve(Problem(SPECTRA, 3), bad)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "bottleneck"])
def test_only_the_bottleneck_takes_operator(solver):
    expected = f"method {solver!r} does not fit objective 'operator'"
    with pytest.raises(ValueError, match=expected):
        allocate(SPECTRA, 3, objective="operator", method=solver)
    assert allocate(SPECTRA, 3, objective="operator", method="bottleneck").value == -1.0


def test_the_bottleneck_takes_nothing_else():
    expected = "method 'bottleneck' does not fit objective 'frobenius'"
    with pytest.raises(ValueError, match=expected):
        allocate(SPECTRA, 3, method="bottleneck")


@pytest.mark.parametrize("bad", [-1, -1e-9, math.nan, "1", True, [1], 1j, 10**400])
def test_what_is_no_time_limit(bad):
    with pytest.raises(ValueError, match=r"^time_limit: expected seconds >= 0 or None, got "):
        allocate(SPECTRA, 3, time_limit=bad)


@pytest.mark.parametrize("limit", [0, 0.0, 1, 2.5, np.float32(1.0), math.inf, None])
def test_time_limits(limit):
    check_answer(allocate(SPECTRA, 3, time_limit=limit))


@pytest.mark.parametrize("method", ["auto", "milp"])
def test_a_time_limit_is_kept(method):
    problem = strongly_correlated_linear(60, 40).problem()
    start = time.monotonic()
    allocation = solve(problem, method, time_limit=0.2)
    # Wide: the machine may be slow, the limit is for the search alone, and HiGHS looks rarely.
    assert time.monotonic() - start < 20
    check_answer(allocation)
    assert allocation.certificate.relative_gap < 0.5


class TestCaps:
    CAPS = {"x": (["q"], 2)}  # noqa: RUF012

    def test_auto_and_exact_take_the_solver_of_side_budgets(self):
        for solver in ("auto", "exact", "side_budgets"):
            allocation = solve(Problem(SPECTRA, 4, caps=self.CAPS), solver)
            assert allocation.ranks.tolist() == [2, 2]
            check_optimum(allocation, brute_force(allocation.problem)[0])

    def test_solvers_without_caps_say_which_have_them(self):
        expected = (
            "method 'water_filling' takes no caps; those that do are 'exact', 'side_budgets', "
            "'relaxation', 'greedy', 'milp'"
        )
        with pytest.raises(ValueError, match="^" + re.escape(expected) + "$"):
            solve(Problem(SPECTRA, 4, caps=self.CAPS), "water_filling")

    @pytest.mark.parametrize("solver", ["greedy", "milp"])
    def test_the_others_take_them(self, solver):
        allocation = solve(Problem(SPECTRA, 4, caps=self.CAPS), solver)
        check_optimum(allocation, brute_force(allocation.problem)[0])


class TestConstraints:
    def test_auto_takes_the_relaxation(self):
        pytest.importorskip("cvxpy", reason="the convex relaxation needs the extra `convex`")
        allocation = solve(Problem(SPECTRA, 4), constraints=lambda rank: [rank["q"] <= 1])
        assert allocation.ranks.tolist() == [1, 2]
        assert allocation.certificate.method.startswith("relaxation (HiGHS")

    @pytest.mark.parametrize(
        "solver", [s for s in SOLVERS if s not in ("relaxation", "bottleneck")]
    )
    def test_no_other_solver_takes_them(self, solver):
        expected = f"^method '{solver}' takes no constraints; 'relaxation' does$"
        with pytest.raises(ValueError, match=expected):
            solve(Problem(SPECTRA, 4), solver, constraints=lambda rank: [])

    def test_nor_does_the_bottleneck(self):
        expected = "^method 'bottleneck' takes no constraints; 'relaxation' does$"
        with pytest.raises(ValueError, match=expected):
            solve(Problem(SPECTRA, 4, objective="operator"), constraints=lambda rank: [])

    @pytest.mark.parametrize("constraints", [None, lambda rank: []])
    def test_without_cvxpy_the_message_says_what_to_install(self, constraints, monkeypatch):
        monkeypatch.setitem(sys.modules, "cvxpy", None)
        expected = "the convex relaxation needs cvxpy: pip install 'lorambo-alloc[convex]'"
        with pytest.raises(ImportError, match="^" + re.escape(expected) + "$"):
            allocate(SPECTRA, 4, method="relaxation", constraints=constraints)


def test_importing_the_solvers_imports_no_heavy_package():
    program = (
        "import sys, importlib\n"
        "from lorambo_alloc.solve import SOLVERS\n"
        "for module, _ in SOLVERS.values(): importlib.import_module(module)\n"
        "heavy = {'cvxpy', 'torch', 'scipy.optimize', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
