"""The convex relaxation, through cvxpy: continuous ranks, prices, and constraints of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.caps import Constraints
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.hulls import Hulls, concave_hulls
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.dual_prices import scaled_costs, spendable
from lorambo_alloc.solvers.filling import Filling
from lorambo_alloc.solvers.own_constraints import OwnConstraints
from lorambo_alloc.verification import SCALE, Charges, integer, responses

_INFEASIBLE, _STOPPED = "infeasible", "stopped early"


@dataclass(frozen=True, repr=False)
class Relaxation:
    """Continuous ranks on the concave hulls, and the prices that go with them.

    Attributes:
        problem: what was relaxed.
        ranks: float64 by layer.
        objective: the value of the solver's own solution; a figure to look at, not a bound.
        upper_bound: the Lagrangian at the prices, in exact arithmetic, rounded up: no whole ranks
            within budgets and constraints have a greater value.
        prices: gain per unit of the budget and of each cap.
        side: the caller's constraints as the prices see them: a charge per rank of each layer, and
            what those of any ranks that satisfy the constraints sum up to at most. None without.
        solver: which solver cvxpy used, and whether it came to an end.
    """

    problem: Problem
    ranks: FloatArray
    objective: float
    upper_bound: float
    prices: tuple[float, ...]
    side: tuple[tuple[float, ...], float] | None
    solver: str

    def __getitem__(self, name: str) -> float:
        return float(self.ranks[self.problem.names.index(name)])

    def __repr__(self) -> str:
        return (
            f"Relaxation of {len(self.ranks)} layers, {self.ranks.sum():.2f} ranks in all, at most "
            f"{self.ranks.max(initial=0):.2f} in one\n"
            f"upper bound {self.upper_bound:.10g}, price {self.prices[0]:.4g} ({self.solver})"
        )


def relax(
    problem: Problem, constraints: Constraints | None = None, time_limit: float | None = None
) -> Relaxation:
    """Solve the convex relaxation, with further convex constraints if wanted.

    Each variable may take steps along its concave hull in part, so the objective is concave and the
    relaxation a linear program until the constraints say otherwise. An interior-point value is no
    bound; the Lagrangian at its dual prices is, whatever the solver's accuracy.

    A constraint g(r) <= 0 with dual y enters the Lagrangian by its tangent at the solution: g is
    convex, so ranks that satisfy it also satisfy y g(r*) + y g'(r*) (r - r*) <= 0. That needs its
    gradient, which cvxpy supplies in doubles; a margin of 2^-40 covers their rounding, and the
    tolerance of 1e-9 within which constraints are said to hold is added. At a kink of g (a norm of
    order 1, a maximum, an absolute value) there are many tangents, and cvxpy's may leave the bound
    valid but loose: write the linear pieces out instead, which stay tight.

    Args:
        problem: any problem with gains.
        constraints: from a mapping of layer name to the cvxpy expression of its rank, to a list of
            cvxpy constraints (inequalities and equalities, convex by cvxpy's rules) in the ranks
            alone.
        time_limit: seconds for the solver, or None.

    Raises:
        ImportError: cvxpy is missing: `pip install 'lorambo-alloc[convex]'`.
        ValueError: a constraint is not of this form or has no gradient in cvxpy, the solver finds
            that no ranks satisfy them all, or the objective is `operator`.

    References:
        Boyd and Vandenberghe, Convex Optimization, sections 5.1 and 5.9.

    Example:
        >>> problem = Problem({"q": [3.0, 2.0], "v": [2.5, 2.0]}, 3)
        >>> relaxed = relax(problem, lambda rank: [rank["q"] + 2 * rank["v"] <= 3])
        >>> relaxed.ranks.round(6).tolist(), round(relaxed.upper_bound, 6)
        ([2.0, 0.5], 16.125)
    """
    cp = _cvxpy()
    return _relaxed(cp, problem, OwnConstraints(cp, problem, constraints), time_limit)


def solve_relaxation(
    problem: Problem, time_limit: float | None = None, constraints: Constraints | None = None
) -> Allocation:
    """Round the relaxation to whole ranks, and state what that loses against its bound.

    Ranks are rounded down to allowed ones, then raised again where budgets and constraints let
    them, the best gain per priced cost first.

    Args:
        problem: any problem with gains.
        time_limit: seconds for the solver, or None.
        constraints: as `relax` takes them.

    Raises:
        ImportError: cvxpy is missing.
        ValueError: as `relax`; or rounding found no whole ranks that satisfy the constraints.
    """
    cp = _cvxpy()
    own = OwnConstraints(cp, problem, constraints)
    relaxed = _relaxed(cp, problem, own, time_limit)
    filling = Filling(problem, problem.rows, relaxed.prices)
    ranks = own.repaired(filling.repaired(_rounded_down(problem, relaxed.ranks)))
    ranks = filling.filled(ranks, own.accepts if len(own) else None)
    value = problem.value_of(ranks)
    gap = max(_lagrangian(problem, relaxed.prices, relaxed.side) - value, Fraction(0))
    certificate = Certificate.of(
        value,
        gap,
        relaxed.prices[0],
        f"relaxation ({relaxed.solver})",
        closed=False,
        cap_prices=relaxed.prices[1:],
        side=relaxed.side,
    )
    return Allocation(problem, ranks, certificate)


def _cvxpy() -> Any:
    try:
        import cvxpy
    except ImportError as error:
        raise ImportError(
            "the convex relaxation needs cvxpy: pip install 'lorambo-alloc[convex]'"
        ) from error
    return cvxpy


def _relaxed(
    cp: Any, problem: Problem, own: OwnConstraints, time_limit: float | None
) -> Relaxation:
    if problem.objective.kind == "operator":
        raise ValueError("objective: the relaxation needs gains that add up; 'operator' has none")
    hulls = concave_hulls(problem)
    if not len(own):
        hulls = hulls.select(hulls.gains > 0)
    scale = float(np.max(np.abs(hulls.gains), initial=0.0)) or 1.0
    steps = cp.Variable(max(len(hulls.gains), 1), bounds=[0.0, 1.0])
    gains = np.zeros(steps.size)
    gains[: len(hulls.gains)] = hulls.gains / scale
    left = spendable(problem, problem.rows)
    budgets: list[Any] = []
    largest = np.ones(len(left))
    if len(hulls.gains):
        shares = scaled_costs(problem, problem.rows, hulls, left)
        # Where a step costs far more than is left, HiGHS finds what is feasible infeasible.
        largest = np.maximum(shares.max(axis=1).toarray().ravel(), 1.0)
        room = np.array([float(budget > 0) for budget in left]) / largest
        budgets.append(shares.multiply(1 / largest[:, None]).tocsr() @ steps <= room)
    matrix = _rank_matrix(problem, hulls, steps.size)
    links = [own.rank == problem.lower + matrix @ steps] if len(own) else []
    limits = [*budgets, *links, *own.conditions]
    solver = _solve(cp, lambda: cp.Problem(cp.Maximize(gains @ steps), limits), time_limit)
    if solver.endswith(_INFEASIBLE) and len(own):
        raise ValueError(
            f"constraints: no ranks within the limits and the budget satisfy them ({solver})"
        )
    taken = np.zeros(steps.size) if steps.value is None else np.clip(steps.value, 0.0, 1.0)
    duals = np.zeros(len(problem.rows))
    if budgets and budgets[0].dual_value is not None:
        duals = np.maximum(np.atleast_1d(budgets[0].dual_value), 0.0) / largest * scale
    prices = tuple(float(dual) / max(b, 1) for dual, b in zip(duals, left, strict=True))
    side = own.consequence(scale) if len(own) else None
    bound = _lagrangian(problem, prices, side)
    if solver.endswith(_STOPPED):
        free = (0.0,) * len(prices), side and ((0.0,) * len(problem.names), 0.0)
        if (least := _lagrangian(problem, *free)) < bound:
            bound, (prices, side) = least, free
    return Relaxation(
        problem,
        np.asarray(problem.lower + matrix @ taken, dtype=np.float64),
        float(gains @ taken) * scale + float(problem.value_of(problem.lower)),
        round_up(bound),
        prices,
        side,
        solver,
    )


def _rank_matrix(problem: Problem, hulls: Hulls, columns: int) -> Any:
    """From steps taken to ranks gained: one column a step, one row a layer."""
    from scipy.sparse import csr_array

    layers: list[IntArray] = []
    steps: list[IntArray] = []
    own: IntArray
    if problem.groups:
        bounds = np.searchsorted(hulls.variables, np.arange(len(problem.variables) + 1))
        for v, group in enumerate(problem.variables):
            own = np.arange(bounds[v], bounds[v + 1], dtype=np.int64)
            for i in group:
                layers.append(np.full(len(own), i, dtype=np.int64))
                steps.append(own)
    else:
        layers, steps = [hulls.variables], [np.arange(len(hulls.variables))]
    columns_of = np.concatenate([np.zeros(0, dtype=np.int64), *steps])
    widths = (hulls.high - hulls.low)[columns_of].astype(np.float64)
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *layers])
    return csr_array((widths, (rows, columns_of)), shape=(len(problem.names), columns))


def _solve(cp: Any, model: Callable[[], Any], time_limit: float | None) -> str:
    """Solve with a simplex where all is linear, else with an interior point; the solver's name.

    Whatever it has when the time is over is used, if only to round it: no bound rests on it.
    """
    with warnings.catch_warnings():
        # That a solution may be inaccurate, or an expression slow to compile.
        warnings.simplefilter("ignore", UserWarning)
        problem = model()
        linear = problem.is_lp()
        options: dict[str, Any] = {} if time_limit is None else {"time_limit": max(time_limit, 0.1)}
        if linear:
            options = {"scipy_options": options} if options else {}
        name = f"{'HiGHS' if linear else 'Clarabel'} through cvxpy {cp.__version__}"
        try:
            problem.solve(solver=cp.SCIPY if linear else cp.CLARABEL, **options)
        except cp.SolverError:
            return f"{name}, no solution"
    if problem.status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE):
        return f"{name}, {_INFEASIBLE}"
    return name if problem.status == cp.OPTIMAL else f"{name}, {_STOPPED}"


def _lagrangian(
    problem: Problem, prices: tuple[float, ...], side: tuple[tuple[float, ...], float] | None
) -> Fraction:
    """The bound at the prices, exactly."""
    weights, limit = side if side is not None else ((), 0.0)
    charges = Charges.of(problem, prices, weights=weights)
    units = sum(response.best for response in responses(problem, problem.lower, charges))
    for price, row in zip(prices, problem.rows, strict=True):
        units += integer(price) * row.budget
    return Fraction(units + integer(limit), SCALE)


def _rounded_down(problem: Problem, ranks: FloatArray) -> IntArray:
    """The greatest allowed ranks that are not above the continuous ones."""
    result = problem.lower.copy()
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0])
        at = int(allowed.searchsorted(float(ranks[group[0]]) + 1e-6, side="right")) - 1
        result[list(group)] = allowed[max(at, 0)]
    return result
