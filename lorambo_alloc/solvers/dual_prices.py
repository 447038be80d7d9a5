"""Prices of several budgets at once: the dual of the linear relaxation, through HiGHS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorambo_alloc.caps import Row
from lorambo_alloc.hulls import Hulls, concave_hulls
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem


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

    The prices are what certificates are made with, exactly; nothing else is taken on trust.

    Args:
        problem: any problem with gains.
        rows: the budgets to price.
        time_limit: seconds for HiGHS, or None.

    References:
        Sinha and Zoltners 1979: the relaxation of a multiple choice takes steps along hulls.
    """
    from scipy.optimize import linprog

    hulls = concave_hulls(problem)
    hulls = hulls.select(hulls.gains > 0)
    if not len(hulls.gains) or not rows:
        return DualPrices([0.0] * len(rows), whole_ranks(problem, hulls, np.ones(len(hulls.gains))))
    left = [row.budget - row.cost_of(problem.lower) for row in rows]
    # HiGHS has returned wrong optima for gains of 1e-6 and smaller: scale to about 1 first.
    scale = float(hulls.gains.max())
    solve: Any = linprog
    result = solve(
        -hulls.gains / scale,
        A_ub=scaled_costs(problem, rows, hulls, left),
        b_ub=np.array([float(budget > 0) for budget in left]),
        bounds=(0.0, 1.0),
        method="highs",
        options={} if time_limit is None else {"time_limit": max(time_limit, 0.01)},
    )
    if result.x is None or result.status != 0:
        return DualPrices([0.0] * len(rows), problem.lower.copy())
    duals = np.maximum(-result.ineqlin.marginals, 0.0) * scale
    prices = [float(dual) / max(budget, 1) for dual, budget in zip(duals, left, strict=True)]
    return DualPrices(prices, whole_ranks(problem, hulls, result.x))


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
