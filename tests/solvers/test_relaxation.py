"""The convex relaxation: its bound against brute force, and what rounding makes of it."""

import math
import re
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import GainCurves, Problem, allocate, solve
from lorambo_alloc.testing import (
    SMALL_FAMILIES,
    Instance,
    brute_force,
    power_law,
    small_instance,
)
from tests.checks import all_feasible, check_answer, check_optimum
from tests.strategies import capped, examples, instances, seeds

cp = pytest.importorskip("cvxpy", reason="the convex relaxation needs the extra `convex`")

from lorambo_alloc.solvers.relaxation import relax, solve_relaxation  # noqa: E402

SPECTRA = {"q": [3.0, 2.0], "v": [2.5, 2.0]}
PROBLEM = Problem(SPECTRA, 3)
FAMILIES = [family for family in SMALL_FAMILIES if family != "operator"]


def _vector(rank: Any) -> Any:
    return cp.hstack(list(rank.values()))


def _drawn(rng: np.random.Generator, kind: int, witness: Any) -> tuple[Any, Any]:
    """Constraints on a vector of ranks that a witness satisfies; and the same of whole numbers."""
    n, slack = len(witness), int(rng.integers(0, 3))
    row, scale = rng.integers(-3, 5, n), float(rng.choice([1.0, 2.0**-30, 2.0**40]))
    centre = rng.integers(0, 3, n)
    at = int(rng.integers(n))
    match kind:
        case 0:
            b = int(row @ witness) + slack
            return lambda r: [scale * (row @ r) <= scale * b], lambda x: row @ x <= b
        case 1:
            b = int(row @ witness) - slack
            return lambda r: [row @ r >= b], lambda x: row @ x >= b
        case 2:
            b = int(row @ witness)
            return lambda r: [scale * (row @ r) == scale * b], lambda x: row @ x == b
        case 3:
            rows = rng.integers(-3, 5, (3, n))
            bs = rows @ witness + rng.integers(0, 3, 3)
            return lambda r: [rows @ r <= bs], lambda x: np.all(rows @ x <= bs)
        case 4:
            b = int(((witness - centre) ** 2).sum()) + slack
            return (
                lambda r: [cp.sum_squares(r - centre) <= b],
                lambda x: ((x - centre) ** 2).sum() <= b,
            )
        case 5:
            b = int(np.abs(witness - centre).sum()) + slack
            return (
                lambda r: [cp.norm1(r - centre) <= b],
                lambda x: np.abs(x - centre).sum() <= b,
            )
        case 6:
            b = int(np.abs(witness - centre).max()) + slack
            return (
                lambda r: [cp.max(cp.abs(r - centre)) <= b],
                lambda x: np.abs(x - centre).max() <= b,
            )
        case 7:
            b = int(row @ witness) ** 2 // (int(witness[0]) + 1) + 1 + slack
            return (
                lambda r: [cp.quad_over_lin(cp.hstack([row @ r]), r[0] + 1) <= b],
                lambda x: int(row @ x) ** 2 <= b * (int(x[0]) + 1),
            )
        case 8:
            bs = witness**2 + rng.integers(0, 3, n)
            return lambda r: [cp.square(r) <= bs], lambda x: np.all(x**2 <= bs)
        case 9:
            b = max(int(witness[at]) - slack, 0)
            return lambda r: [cp.sqrt(r[at]) >= np.sqrt(b)], lambda x: x[at] >= b
        case _:
            b = max(int(witness[at]) - slack, 0)
            return lambda r: [cp.log(r[at] + 1) >= np.log(b + 1)], lambda x: x[at] >= b


@settings(max_examples=examples(0.5))
@given(seeds())
def test_constraints_of_all_kinds(seed: int):
    rng = np.random.default_rng(seed)
    problem = small_instance(rng, FAMILIES[seed % len(FAMILIES)], layers=3, ranks=4).problem()
    feasible = list(all_feasible(problem))
    witness = feasible[rng.integers(len(feasible))]
    drawn = [_drawn(rng, int(rng.integers(11)), witness) for _ in range(rng.integers(1, 3))]

    def constraints(rank: Any) -> list[Any]:
        return [one for own, _ in drawn for one in own(_vector(rank))]

    satisfying = [x for x in feasible if all(holds(x) for _, holds in drawn)]
    optimum = max(problem.value_of(x) for x in satisfying)
    relaxed = relax(problem, constraints)
    assert Fraction(relaxed.upper_bound) >= optimum
    try:
        allocation = solve(problem, constraints=constraints)
    except ValueError as error:
        assert "rounding found no whole ranks" in str(error)  # noqa: PT017
        return
    assert all(holds(allocation.ranks) for _, holds in drawn)
    check_optimum(allocation, optimum)
    certificate = allocation.certificate
    assert certificate.side == relaxed.side
    assert certificate.upper_bound == pytest.approx(relaxed.upper_bound, rel=1e-12) or (
        certificate.gap == 0
    )


@settings(max_examples=examples(0.5))
@given(instances(layers=3, ranks=4))
def test_without_constraints(instance: Instance):
    problem = instance.problem()
    allocation = solve_relaxation(problem)
    check_optimum(allocation, brute_force(problem)[0])
    assert allocation.certificate.side is None
    relaxed = relax(problem)
    assert relaxed.upper_bound == pytest.approx(allocation.certificate.upper_bound, rel=1e-15)
    # What the solver reached is no more than the bound at its prices.
    slack = 1e-6 * max(abs(relaxed.objective), abs(relaxed.upper_bound), 2.0**-900)
    assert relaxed.objective <= relaxed.upper_bound + slack


@settings(max_examples=examples(0.5))
@given(capped(instances(layers=3, ranks=3)))
def test_with_caps(instance: Instance):
    problem = instance.problem()
    allocation = solve_relaxation(problem)
    check_optimum(allocation, brute_force(problem)[0])
    assert len(allocation.certificate.cap_prices) == len(problem.caps)


@settings(max_examples=examples(0.5))
@given(instances(layers=4, ranks=5, concave=True))
def test_agrees_with_water_filling(instance: Instance):
    problem = instance.problem()
    relaxed = relax(problem)
    filled = solve(problem, "water_filling")
    bound = filled.certificate.verify(problem, filled.ranks).price_bound
    # HiGHS's duals are right to 1e-7 of the largest gain, a step.
    assert relaxed.upper_bound == pytest.approx(float(bound), rel=4e-6, abs=2.0**-900)


@pytest.mark.parametrize("family", ["power_law", "ties", "nuclear", "subset_sum", "proportional"])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_closely_where_gains_are_of_one_size(family: str, seed: int):
    rng = np.random.default_rng(seed)
    problem = small_instance(rng, family, layers=6, ranks=6, limits=False).problem()
    filled = solve(problem, "water_filling")
    bound = filled.certificate.verify(problem, filled.ranks).price_bound
    assert relax(problem).upper_bound == pytest.approx(float(bound), rel=1e-9)


@pytest.mark.parametrize("shape", ["a", "b"])
def test_agrees_with_the_bound_of_the_exact_solver(shape: str):
    problem = power_law(shape).problem()
    exact = solve(problem)
    bound = exact.certificate.verify(problem, exact.ranks).price_bound
    relaxed = relax(problem)
    assert relaxed.upper_bound == pytest.approx(float(bound), rel=1e-9)
    assert relaxed.objective == pytest.approx(float(bound), rel=1e-9)
    assert relaxed.prices[0] == pytest.approx(exact.certificate.price, rel=1e-6)
    assert float(problem.costs @ relaxed.ranks) == pytest.approx(problem.budget, rel=1e-9)


def test_duals_of_linear_constraints_make_the_bound_tight():
    # At most one rank of q beside two of v: 9 + 6.25 + 4, and the constraint is worth 4 a rank.
    relaxed = relax(Problem(SPECTRA, 9), lambda rank: [rank["q"] <= 1])
    assert relaxed.ranks == pytest.approx([1.0, 2.0])
    assert relaxed.objective == pytest.approx(19.25)
    assert 19.25 <= relaxed.upper_bound < 19.25 + 1e-7
    assert relaxed.prices == (0.0,)
    assert relaxed.side is not None
    assert relaxed.side[0] == pytest.approx((4.0, 0.0))
    assert relaxed.side[1] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("constraints", "ranks", "bound"),
    [
        (lambda r: [r["q"] + 2 * r["v"] <= 3], [2.0, 0.5], 16.125),
        (lambda r: [r["q"] == r["v"]], [1.5, 1.5], 9 + 2 + 6.25 + 2),
        (lambda r: [-r["v"] == -0.5], [2.0, 0.5], 13 + 3.125),
        (lambda r: [cp.square(r["q"]) + cp.square(r["v"] - 2) <= 0.25], [0.5, 2.0], 14.75),
        (lambda r: [cp.norm(_vector(r)) <= 1], [0.82, 0.57], math.hypot(9, 6.25)),
        (lambda r: [cp.quad_over_lin(r["q"], r["v"] + 1) <= 1 / 3], [1.0, 2.0], 19.25),
        (lambda r: [np.array([2.0, 4.0]) >= r["q"] + np.array([1.0, 3.0])], [1.0, 2.0], 19.25),
    ],
)
def test_bounds_by_hand(constraints, ranks, bound):
    relaxed = relax(PROBLEM, constraints)
    assert relaxed.ranks == pytest.approx(ranks, abs=0.006)
    assert bound - 1e-9 <= relaxed.upper_bound < bound + 1e-5


def test_steps_of_tied_layers_and_fixed_costs():
    problem = Problem(
        [[3.0, 1.0], [2.0, 1.0], [1.0, 1.0]],
        12,
        costs=[1, 2, 3],
        fixed_costs=[0, 1, 2],
        tied=[["0", "2"]],
        min_rank={"1": 1},
    )
    relaxed = relax(problem, lambda rank: [rank["0"] + rank["1"] <= 2.5])
    assert relaxed.ranks[0] == relaxed.ranks[2]
    assert relaxed["0"] + relaxed["1"] == pytest.approx(2.5)
    allocation = solve_relaxation(problem, None, lambda rank: [rank["0"] + rank["1"] <= 2.5])
    assert allocation.ranks.tolist() == [1, 1, 1]
    check_answer(allocation)


def test_losses_are_taken_only_where_constraints_ask_for_them():
    curves = GainCurves.from_increments({"a": [2.0, -1.0, -2.0], "b": [-1.0]})
    problem = Problem(curves, 9)
    assert relax(problem).ranks == pytest.approx([1.0, 0.0])
    relaxed = relax(problem, lambda rank: [rank["a"] + rank["b"] >= 2.5])
    assert relaxed.objective == pytest.approx(2 - 1.5)
    assert relaxed.ranks.sum() == pytest.approx(2.5)
    allocation = solve(problem, constraints=lambda rank: [rank["a"] + rank["b"] >= 2.5])
    check_optimum(allocation, Fraction(0))


@pytest.mark.parametrize("scale", [2.0**-470, 2.0**470])
def test_scales(scale: float):
    spectra = {name: [scale * x for x in row] for name, row in SPECTRA.items()}
    relaxed = relax(Problem(spectra, 3), lambda rank: [rank["q"] + 2 * rank["v"] <= 3])
    assert relaxed.upper_bound / scale**2 == pytest.approx(16.125)
    assert relaxed.objective / scale**2 == pytest.approx(16.125)


class TestRounding:
    def test_down_then_up(self):
        allocation = allocate(SPECTRA, 3, constraints=lambda r: [r["q"] + 2 * r["v"] <= 3])
        assert allocation.ranks.tolist() == [2, 0]
        certificate = allocation.certificate
        assert certificate.method.startswith("relaxation (HiGHS through cvxpy ")
        assert (certificate.status, certificate.value) == ("gap_certified", 13.0)
        assert certificate.gap == pytest.approx(3.125)
        assert certificate.upper_bound == pytest.approx(16.125)

    def test_an_interior_point_where_a_constraint_is_curved(self):
        allocation = allocate(SPECTRA, 3, constraints=lambda r: [cp.norm(_vector(r)) <= 2.3])
        assert sorted(allocation.ranks.tolist()) == [1, 2]
        assert allocation.certificate.method.startswith("relaxation (Clarabel through cvxpy ")
        check_optimum(allocation, Fraction("19.25"))

    def test_to_allowed_ranks(self):
        problem = Problem(np.tile([3.0, 2.0, 1.5, 1.0], (2, 1)), 7, multiple_of=2, min_rank=2)
        allocation = solve_relaxation(problem)
        assert sorted(allocation.ranks.tolist()) == [2, 4]
        check_optimum(allocation, brute_force(problem)[0])

    def test_repairs(self):
        # Rounding 1.5 and 1.5 down breaks the lower limit on their sum.
        constraints = lambda r: [r["q"] == r["v"], r["q"] + r["v"] >= 1.9]  # noqa: E731
        allocation = allocate(SPECTRA, 3, constraints=constraints)
        assert allocation.ranks.tolist() == [1, 1]
        with pytest.raises(ValueError, match="rounding found no whole ranks"):
            allocate(SPECTRA, 3, constraints=lambda r: [r["q"] == 0.5])

    def test_out_of_a_domain(self):
        # At the roots' and logarithms' edge, warnings would be errors here.
        for constraints in (
            lambda r: [cp.log(r["q"]) >= -0.5],
            lambda r: [cp.log(r["q"]) + r["v"] >= 0.1],
            lambda r: [cp.sqrt(r["q"] - 0.5) >= 0.1],
        ):
            allocation = allocate({"q": [1.0, 0.9], "v": [5.0, 4.0]}, 2, constraints=constraints)
            assert allocation.ranks.tolist() == [1, 1]
            check_answer(allocation)


class TestEdges:
    @pytest.mark.parametrize("constraints", [None, lambda rank: []])
    def test_no_layers(self, constraints):
        relaxed = relax(Problem({}, 3), constraints)
        assert (len(relaxed.ranks), relaxed.upper_bound, relaxed.side) == (0, 0.0, None)
        check_optimum(solve_relaxation(Problem({}, 3), None, constraints), Fraction(0))

    @pytest.mark.parametrize("budget", [0, 1, 2, 9])
    def test_one_layer(self, budget):
        allocation = allocate({"q": [3.0, 2.0]}, budget, constraints=lambda r: [r["q"] <= 1.5])
        assert allocation["q"] == min(budget, 1)
        check_answer(allocation)

    def test_nothing_to_gain(self):
        allocation = allocate({"q": [0.0], "v": [0.0]}, 2, constraints=lambda r: [r["q"] <= 1])
        assert allocation.value == 0
        relaxed = relax(Problem({"q": [0.0]}, 2))
        assert (relaxed.objective, relaxed.upper_bound) == (0.0, 0.0)

    def test_minimum_ranks_count(self):
        relaxed = relax(Problem(SPECTRA, 3, min_rank=1))
        assert relaxed.ranks.sum() == pytest.approx(3.0)
        assert relaxed.objective == pytest.approx(19.25)
        assert relaxed.upper_bound == pytest.approx(19.25)


class TestTimeLimits:
    def test_small_ones_are_settled(self):
        assert allocate(SPECTRA, 3, method="relaxation", time_limit=0).value == 19.25

    @pytest.mark.parametrize("curved", [False, True])
    def test_what_there_is_when_the_time_is_over(self, curved, monkeypatch):
        rows = np.sort(np.random.default_rng(0).random((20, 16)))[:, ::-1]
        problem = Problem(rows, 500, costs=[*range(3, 23)])

        def constraints(rank: Any) -> list[Any]:
            return [cp.norm(_vector(rank)) <= 9] if curved else []

        options: list[dict[str, Any]] = []
        true_solve = cp.Problem.solve

        def hurried(self: Any, **given_options: Any) -> Any:
            options.append(dict(given_options))
            if curved:
                return true_solve(self, solver=cp.CLARABEL, time_limit=1e-9)
            return true_solve(self, solver=cp.SCIPY, scipy_options={"time_limit": 1e-9})

        monkeypatch.setattr(cp.Problem, "solve", hurried)
        allocation = solve(problem, "relaxation", time_limit=0, constraints=constraints)
        assert re.search("no solution|stopped early", allocation.certificate.method)
        expected = {"time_limit": 0.1} if curved else {"scipy_options": {"time_limit": 0.1}}
        assert options == [{"solver": cp.CLARABEL if curved else cp.SCIPY, **expected}]
        value = check_answer(allocation)
        # Whatever the solver has, no bound is above what the limits allow at any budget.
        assert allocation.certificate.upper_bound <= (rows**2).sum() * (1 + 1e-12)
        assert np.linalg.norm(allocation.ranks) <= 9 + 1e-9 or not curved
        monkeypatch.undo()
        assert value <= Fraction(solve(problem).certificate.upper_bound)
        solve(Problem(SPECTRA, 3), "relaxation", time_limit=5.0)

    @pytest.mark.parametrize(("budget", "norm"), [(500, 9), (5000, 60)])
    def test_prices_of_an_unfinished_solution_are_worth_more_than_none(
        self, budget, norm, monkeypatch
    ):
        rows = np.sort(np.random.default_rng(0).random((20, 16)))[:, ::-1]
        problem = Problem(rows, budget, costs=[*range(3, 23)])
        true_solve = cp.Problem.solve
        monkeypatch.setattr(
            cp.Problem, "solve", lambda self, **_: true_solve(self, solver=cp.CLARABEL, max_iter=0)
        )
        relaxed = relax(problem, lambda rank: [cp.norm(_vector(rank)) <= norm])
        assert relaxed.solver.endswith("stopped early")
        everything = float((rows**2).sum())
        if budget == 500:
            assert relaxed.upper_bound < 0.6 * everything
            assert relaxed.prices[0] > 0
        else:
            assert relaxed.upper_bound == pytest.approx(everything, rel=1e-12)
            assert (relaxed.prices, relaxed.side) == ((0.0,), ((0.0,) * 20, 0.0))


class TestRefuses:
    def test_operator(self):
        expected = "^objective: the relaxation needs gains that add up; 'operator' has none$"
        with pytest.raises(ValueError, match=expected):
            relax(Problem(SPECTRA, 3, objective="operator"))

    @pytest.mark.parametrize(
        ("constraints", "solver"),
        [
            (lambda r: [r["q"] >= 3], "HiGHS"),
            (lambda r: [r["q"] + r["v"] >= 3.5], "HiGHS"),
            (lambda r: [cp.Constant(3) <= 2], "HiGHS"),
            (lambda r: [cp.square(r["q"]) <= -1], "Clarabel"),
        ],
    )
    def test_what_no_ranks_satisfy(self, constraints, solver):
        expected = (
            r"^constraints: no ranks within the limits and the budget satisfy them \("
            f"{solver} through cvxpy {re.escape(cp.__version__)}, infeasible\\)$"
        )
        with pytest.raises(ValueError, match=expected):
            relax(PROBLEM, constraints)

    def test_constraints_that_are_none(self):
        with pytest.raises(ValueError, match=r"^constraints: expected a list of cvxpy constraints"):
            relax(PROBLEM, cast(Any, lambda r: None))


def test_repr():
    lines = repr(relax(PROBLEM, lambda rank: [rank["q"] + 2 * rank["v"] <= 3])).split("\n")
    assert lines[0] == "Relaxation of 2 layers, 2.50 ranks in all, at most 2.00 in one"
    expected = (
        rf"upper bound 16\.125\d*, price 0 \(HiGHS through cvxpy {re.escape(cp.__version__)}\)"
    )
    assert re.fullmatch(expected, lines[1])
