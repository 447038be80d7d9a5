"""Prices of several budgets at once: the dual of the linear relaxation, through HiGHS."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorambo_alloc.caps import Row
from lorambo_alloc.hulls import Hulls, concave_hulls
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

_LARGE = 20_000  # steps; more are solved coarsely first
_BLOCK = 16
_MOST_WINDOWS = 8


@dataclass(frozen=True)
class DualPrices:
    """The linear relaxation's solution, to the tolerances of a floating-point solver.

    Attributes:
        prices: one a row, >= 0, in gain per unit of the row.
        ranks: int64 by layer: those that the solution takes in whole, rounded down.
    """

    prices: list[float]
    ranks: IntArray


def dual_prices(problem: Problem, rows: Sequence[Row], time_limit: float | None) -> DualPrices:
    """Solve the linear relaxation over the hulls of all variables.

    A large one is solved coarsely first, several steps of a hull at a time, and then with single
    steps near what that found, the rest held fixed, until no price calls for more. The prices are
    what certificates are made with, exactly; nothing else is taken on trust.

    Args:
        problem: any problem with gains.
        rows: the budgets to price.
        time_limit: seconds for HiGHS, in all its calls together, or None.

    References:
        Sinha and Zoltners 1979: the relaxation of a multiple choice takes steps along hulls.
    """
    hulls = concave_hulls(problem)
    hulls = hulls.select(hulls.gains > 0)
    steps = len(hulls.gains)
    if not steps or not rows:
        return DualPrices([0.0] * len(rows), whole_ranks(problem, hulls, np.ones(steps)))
    left = spendable(problem, rows)
    # HiGHS has returned wrong optima for gains of 1e-6 and smaller: scale to about 1 first.
    scale = float(hulls.gains.max())
    program = _Program(
        hulls.gains / scale,
        scaled_costs(problem, rows, hulls, left),
        np.array([float(budget > 0) for budget in left]),
        hulls.variables,
        None if time_limit is None else time.monotonic() + time_limit,
    )
    duals, shares = program.solve() if steps <= _LARGE else program.solve_near(program.coarse())
    prices = [float(dual) * scale / max(b, 1) for dual, b in zip(duals, left, strict=True)]
    return DualPrices(prices, whole_ranks(problem, hulls, shares))


class _Program:
    """The linear program over steps: maximise gains within shares of the budgets.

    Args:
        gains: one a step, descending within a variable.
        costs: sparse, one row a budget, one column a step.
        budgets: one a row.
        variables: one a step, ascending.
        deadline: `time.monotonic()` value at which HiGHS is to stop, or None.
    """

    def __init__(
        self,
        gains: FloatArray,
        costs: Any,
        budgets: FloatArray,
        variables: IntArray,
        deadline: float | None,
    ) -> None:
        self._gains = gains
        self._costs = costs.tocsc()
        self._budgets = budgets
        self._deadline = deadline
        first = np.flatnonzero(np.diff(variables, prepend=-1))
        self._first = np.repeat(first, np.diff(np.append(first, len(variables))))
        self._position = np.arange(len(variables)) - self._first

    def solve(self) -> tuple[FloatArray, FloatArray]:
        """Duals by row, and the share of each step that is taken."""
        return self._highs(self._gains, self._costs, self._budgets) or self._nothing()

    def coarse(self) -> IntArray:
        """How many steps of its variable are taken, about, for each step: solved by blocks."""
        block = self._position // _BLOCK
        starts = np.flatnonzero((block != np.roll(block, 1)) | (self._position == 0))
        gains = np.add.reduceat(self._gains, starts)
        _, shares = self._highs(gains, self._by_block(starts), self._budgets) or self._nothing()
        sizes = np.diff(np.append(starts, len(self._gains)))
        if len(shares) != len(sizes):
            return np.zeros_like(self._position)
        return self._per_variable(np.repeat(shares, sizes))

    def solve_near(self, taken: IntArray) -> tuple[FloatArray, FloatArray]:
        """As `solve`, with single steps near those counts; the others stay as they are there."""
        low, high = taken - _BLOCK, taken + _BLOCK
        result: tuple[FloatArray, FloatArray] | None = None
        for _ in range(_MOST_WINDOWS):
            if self._deadline is not None and time.monotonic() > self._deadline:
                break
            near = (low <= self._position) & (self._position <= high)
            fixed = self._position < low
            spent = np.asarray(self._costs[:, fixed].sum(axis=1)).ravel()
            found = self._highs(self._gains[near], self._costs[:, near], self._budgets - spent)
            if found is None:  # what is fixed may be too much already
                low -= 4 * _BLOCK
                continue
            duals, shares = found
            whole = fixed.astype(np.float64)
            whole[near] = shares
            result = duals, whole
            wanted = self._per_variable(self._gains > self._costs.T @ duals)
            if np.all((low <= wanted) & (wanted <= high)):
                break
            low, high = np.minimum(low, wanted - _BLOCK), np.maximum(high, wanted + _BLOCK)
        return result or self.solve()

    def _by_block(self, starts: IntArray) -> Any:
        """The columns of each block, summed up."""
        from scipy.sparse import csc_array

        blocks = np.zeros(len(self._gains), dtype=np.int64)
        blocks[starts[1:]] = 1
        columns = np.cumsum(blocks)
        size = len(self._gains)
        sums = csc_array((np.ones(size), (np.arange(size), columns)), shape=(size, len(starts)))
        return self._costs @ sums

    def _per_variable(self, shares: Any) -> IntArray:
        """The sum over its variable's steps, rounded, for each step."""
        starts = np.flatnonzero(self._position == 0)
        sums = np.add.reduceat(np.asarray(shares, dtype=np.float64), starts)
        return np.rint(np.repeat(sums, np.diff(np.append(starts, len(self._first))))).astype(
            np.int64
        )

    def _nothing(self) -> tuple[FloatArray, FloatArray]:
        return np.zeros(len(self._budgets)), np.zeros(len(self._gains))

    def _highs(
        self, gains: FloatArray, costs: Any, budgets: FloatArray
    ) -> tuple[FloatArray, FloatArray] | None:
        from scipy.optimize import linprog

        solve: Any = linprog
        options: dict[str, float] = {}
        if self._deadline is not None:
            options["time_limit"] = max(self._deadline - time.monotonic(), 0.01)
        result = solve(
            -gains, A_ub=costs, b_ub=budgets, bounds=(0.0, 1.0), method="highs", options=options
        )
        if result.x is None or result.status != 0:
            return None
        return np.maximum(-result.ineqlin.marginals, 0.0), result.x


def spendable(problem: Problem, rows: Sequence[Row]) -> list[int]:
    """By row, what can be spent of it beyond what the least ranks cost."""
    return [
        min(row.budget, row.cost_of(problem.upper)) - row.cost_of(problem.lower) for row in rows
    ]


def scaled_costs(problem: Problem, rows: Sequence[Row], hulls: Hulls, left: Sequence[int]) -> Any:
    """What each step costs in each row, as shares of what is left of it: a sparse matrix."""
    from scipy.sparse import csr_array

    groups = problem.variables
    entries: list[FloatArray] = []
    columns: list[IntArray] = []
    starts = [0]
    for row, budget in zip(rows, left, strict=True):
        unit = np.array([float(sum(int(row.costs[i]) for i in group)) for group in groups])
        fixed = np.array([float(sum(int(row.fixed_costs[i]) for i in group)) for group in groups])
        inside = np.flatnonzero(unit[hulls.variables])
        v = hulls.variables[inside]
        low, high = hulls.low[inside], hulls.high[inside]
        costs = unit[v] * (high - low) + fixed[v] * (low == 0)
        entries.append(costs / max(budget, 1))
        columns.append(inside)
        starts.append(starts[-1] + len(inside))
    shape = (len(rows), len(hulls.gains))
    return csr_array((np.concatenate(entries), np.concatenate(columns), starts), shape=shape)


def whole_ranks(problem: Problem, hulls: Hulls, shares: FloatArray) -> IntArray:
    """The ranks that whole steps reach, step by step within each variable."""
    whole = shares > 1 - 1e-6
    ranks = problem.lower.copy()
    reached = np.zeros(len(problem.variables), dtype=np.int64)
    np.add.at(reached, hulls.variables, np.where(whole, 1, 0))
    first = np.searchsorted(hulls.variables, np.arange(len(reached)))
    for v, group in enumerate(problem.variables):
        if reached[v]:
            ranks[list(group)] = hulls.high[first[v] + reached[v] - 1]
    return ranks
