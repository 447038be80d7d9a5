"""The convex relaxation, through cvxpy: continuous ranks, prices, and constraints of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.caps import Constraints
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.hulls import Hulls, concave_hulls
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.dual_prices import scaled_costs
from lorambo_alloc.solvers.filling import Filling
from lorambo_alloc.verification import SCALE, Charges, integer, responses

_TOLERANCE = 1e-9  # of the caller's constraints, at whole ranks
_MARGIN = 2.0**-40  # for the rounding of gradients, as a share of what they sum up
_MOST_MOVES = 1000


@dataclass(frozen=True, repr=False)
class Relaxation:
    """Continuous ranks on the concave hulls, and the prices that go with them.

    Attributes:
        problem: what was relaxed.
        ranks: float64 by layer.
        objective: the solver's own optimal value; a figure to look at, not a bound.
        upper_bound: the Lagrangian at the prices, in exact arithmetic, rounded up: no whole ranks
            within budgets and constraints have a greater value.
        prices: gain per unit of the budget and of each cap.
        side: the caller's constraints as the prices see them: a charge per rank of each layer, and
            what those of any ranks that satisfy the constraints sum up to at most. None without.
        solver: which solver cvxpy used.
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
    gradient, which cvxpy supplies in doubles; a margin of 2^-40 covers their rounding.

    Args:
        problem: any problem with gains.
        constraints: from a mapping of layer name to the cvxpy expression of its rank, to a list of
            cvxpy constraints (inequalities and equalities, convex by cvxpy's rules) in the ranks
            alone.
        time_limit: seconds for the solver, or None.

    Raises:
        ImportError: cvxpy is missing: `pip install 'lorambo-alloc[convex]'`.
        ValueError: a constraint is not of this form, or no ranks satisfy them all.

    References:
        Boyd and Vandenberghe, Convex Optimization, sections 5.1 and 5.9.

    Example:
        >>> problem = Problem({"q": [3.0, 2.0], "v": [2.5, 2.0]}, 3)
        >>> relaxed = relax(problem, lambda rank: [2 * rank["q"] + rank["v"] <= 3])
        >>> relaxed.ranks.round(6).tolist(), round(relaxed.upper_bound, 6)
        ([0.5, 2.0], 14.75)
    """
    cp = _cvxpy()
    hulls = concave_hulls(problem)
    if constraints is None:
        hulls = hulls.select(hulls.gains > 0)
    scale = float(np.max(np.abs(hulls.gains), initial=0.0)) or 1.0
    steps = cp.Variable(max(len(hulls.gains), 1), bounds=[0.0, 1.0])
    gains = np.zeros(steps.size)
    gains[: len(hulls.gains)] = hulls.gains / scale
    left = [row.budget - row.cost_of(problem.lower) for row in problem.rows]
    budgets: list[Any] = []
    if len(hulls.gains):
        shares = scaled_costs(problem, problem.rows, hulls, left)
        budgets.append(shares @ steps <= np.array([float(budget > 0) for budget in left]))
    rank = cp.Variable(len(problem.names))
    own = _own_constraints(cp, problem, constraints, rank)
    links = [rank == problem.lower + _rank_matrix(problem, hulls, steps.size) @ steps]
    model = cp.Problem(cp.Maximize(gains @ steps), [*budgets, *(links if own else []), *own])
    solver = _solve(cp, model, time_limit)
    reached = problem.lower + _rank_matrix(problem, hulls, steps.size) @ steps.value
    duals = np.zeros(len(problem.rows))
    if budgets:
        duals = np.maximum(np.atleast_1d(budgets[0].dual_value), 0.0) * scale
    prices = tuple(float(dual) / max(b, 1) for dual, b in zip(duals, left, strict=True))
    side = _tangent(problem, own, rank, scale) if own else None
    return Relaxation(
        problem,
        np.asarray(reached, dtype=np.float64),
        float(model.value) * scale + float(problem.value_of(problem.lower)),
        round_up(_lagrangian(problem, prices, side)),
        prices,
        side,
        solver,
    )


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
    relaxed = relax(problem, constraints, time_limit)
    checker = _Checker(problem, constraints)
    filling = Filling(problem, problem.rows, relaxed.prices)
    ranks = filling.repaired(_rounded_down(problem, relaxed.ranks))
    if constraints is not None:
        ranks = checker.repaired(ranks)
    ranks = filling.filled(ranks, checker.accepts if constraints is not None else None)
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


def _own_constraints(
    cp: Any, problem: Problem, constraints: Constraints | None, rank: Any
) -> list[Any]:
    """The caller's constraints, checked."""
    if constraints is None:
        return []
    named = {name: rank[i] for i, name in enumerate(problem.names)}
    own: Any = constraints(named)
    if not isinstance(own, (list, tuple)):
        raise ValueError(f"constraints: expected a list of cvxpy constraints, got {own!r}")
    kinds = (cp.constraints.Inequality, cp.constraints.Zero, cp.constraints.Equality)
    for n, constraint in enumerate(cast(Sequence[Any], own)):
        where = f"constraints: number {n + 1} ({constraint})"
        if not isinstance(constraint, kinds):
            raise ValueError(f"{where}: expected an inequality or equality of cvxpy expressions")
        if not constraint.is_dcp():
            raise ValueError(f"{where}: expected a convex one, by cvxpy's rules")
        foreign = [v for v in constraint.variables() if v.id != rank.id]
        if foreign:
            raise ValueError(f"{where}: expected the ranks as its only variables, got {foreign}")
    return list(cast(Sequence[Any], own))


def _solve(cp: Any, model: Any, time_limit: float | None) -> str:
    """Solve with a simplex where all is linear, else with an interior point; the solver's name."""
    linear = model.is_lp()
    solver = cp.SCIPY if linear else cp.CLARABEL
    options: dict[str, Any] = {}
    if time_limit is not None:
        limit = max(time_limit, 0.1)
        options = {"scipy_options": {"time_limit": limit}} if linear else {"time_limit": limit}
    try:
        model.solve(solver=solver, **options)
    except cp.SolverError as error:
        raise ValueError(f"constraints: {solver} found no solution: {error}") from error
    if model.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise ValueError(
            f"constraints: no ranks within the limits and the budget satisfy them ({solver} says "
            f"{model.status})"
        )
    return (
        f"HiGHS through cvxpy {cp.__version__}"
        if linear
        else f"{solver.title()} through cvxpy {cp.__version__}"
    )


def _tangent(
    problem: Problem, own: list[Any], rank: Any, scale: float
) -> tuple[tuple[float, ...], float]:
    """All constraints, weighted by their duals, as one linear inequality at the solution."""
    weights = np.zeros(len(problem.names))
    limit = margin = 0.0
    for constraint in own:
        dual = np.atleast_1d(constraint.dual_value).ravel(order="F") * scale
        if not _is_equality(constraint):
            dual = np.maximum(dual, 0.0)
        gradient = constraint.expr.grad.get(rank)
        if gradient is None:
            if not constraint.variables():
                continue
            raise ValueError(f"constraints: {constraint} has no gradient at the solution")
        slopes = np.asarray(gradient @ dual).ravel()
        value = np.atleast_1d(constraint.expr.value).ravel(order="F")
        weights += slopes
        limit += float(slopes @ rank.value) - float(dual @ value)
        margin += float(np.abs(slopes) @ np.abs(rank.value)) + float(np.abs(dual) @ np.abs(value))
        margin += float(np.abs(slopes) @ problem.upper)
    return tuple(weights.tolist()), limit + _MARGIN * margin


def _is_equality(constraint: Any) -> bool:
    return type(constraint).__name__ in ("Equality", "Zero")


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
        at = int(np.searchsorted(allowed, ranks[group[0]] + 1e-6, side="right")) - 1
        result[list(group)] = allowed[max(at, 0)]
    return result


class _Checker:
    """The caller's constraints at whole ranks."""

    def __init__(self, problem: Problem, constraints: Constraints | None) -> None:
        self._problem = problem
        if constraints is None:
            return
        cp = _cvxpy()
        self._rank = cp.Variable(len(problem.names))
        own = _own_constraints(cp, problem, constraints, self._rank)
        self._curved = [constraint for constraint in own if not constraint.expr.is_affine()]
        # Linear constraints are checked by one product instead of one by one.
        self._rank.value = np.zeros(len(problem.names))
        rows: list[FloatArray] = []
        offsets: list[FloatArray] = []
        both: list[FloatArray] = []
        for constraint in own:
            if not constraint.expr.is_affine():
                continue
            offset = np.atleast_1d(constraint.expr.value).ravel(order="F")
            gradient = constraint.expr.grad.get(self._rank)
            dense = np.zeros((len(offset), len(problem.names)))
            if gradient is not None:
                dense = np.asarray(gradient.todense()).T
            rows.append(dense)
            offsets.append(offset)
            both.append(np.full(len(offset), float(_is_equality(constraint))))
        self._matrix = np.concatenate([np.zeros((0, len(problem.names))), *rows])
        self._offset = np.concatenate([np.zeros(0), *offsets])
        self._both = np.concatenate([np.zeros(0), *both])

    def violation(self, ranks: IntArray) -> float:
        """By how much the constraints are broken, summed up."""
        values = self._matrix @ ranks + self._offset
        broken = np.maximum(values, 0.0) + self._both * np.maximum(-values, 0.0)
        total = float(broken[broken > _TOLERANCE].sum())
        if self._curved:
            self._rank.value = ranks.astype(np.float64)
            for constraint in self._curved:
                own = float(np.sum(np.asarray(constraint.violation())))
                total += own if own > _TOLERANCE else 0.0
        return total

    def accepts(self, ranks: IntArray) -> bool:
        """Whether whole ranks satisfy all constraints."""
        return self.violation(ranks) == 0

    def repaired(self, ranks: IntArray) -> IntArray:
        """Move single variables by single steps until the constraints hold."""
        problem = self._problem
        broken = self.violation(ranks)
        for _ in range(_MOST_MOVES):
            if not broken:
                return ranks
            best: tuple[float, IntArray] | None = None
            for group in problem.variables:
                allowed = problem.allowed_ranks(group[0]).tolist()
                at = allowed.index(int(ranks[group[0]]))
                for rank in [*allowed[max(at - 1, 0) : at], *allowed[at + 1 : at + 2]]:
                    moved = ranks.copy()
                    moved[list(group)] = rank
                    left = self.violation(moved)
                    if left < (best[0] if best else broken) and problem.fits(moved):
                        best = left, moved
            if best is None:
                break
            broken, ranks = best
        if broken:
            raise ValueError(
                "constraints: rounding found no whole ranks that satisfy them; `relax` has the "
                "continuous ones"
            )
        return ranks
