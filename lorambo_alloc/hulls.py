"""The concave hull of every variable's options: the steps that a relaxation may take in part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.options import option_table
from lorambo_alloc.problem import Problem


@dataclass(frozen=True)
class Hulls:
    """Steps along the upper hulls of gain over cost, variable by variable, steepest first.

    Attributes:
        variables: which variable (`problem.variables`) each step belongs to, int64 ascending.
        low: the rank that the step starts at.
        high: the rank that it leads to.
        gains: what it gains, to rounding.
        error: a bound on the rounding of all of a variable's gains together, summed over the
            variables.
    """

    variables: IntArray
    low: IntArray
    high: IntArray
    gains: FloatArray
    error: float

    def select(self, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Hulls:
        """Some of the steps."""
        return Hulls(
            self.variables[kept], self.low[kept], self.high[kept], self.gains[kept], self.error
        )


def concave_hulls(problem: Problem) -> Hulls:
    """All steps of all variables' hulls, those that lose included.

    Single ranks of descending gain are their own hull. Elsewhere the hull is that of the options'
    values over their costs in the problem's budget, from the least rank on. Options that alone
    break the budget are left out.
    """
    if problem.concave_unit_steps:
        assert problem.gains is not None
        left = problem.spendable - problem.cost_of(problem.lower)
        upper = np.minimum(problem.upper, problem.lower + left // problem.costs)
        rows, ranks, gains = problem.gains.selected(problem.lower, upper)
        return Hulls(rows, ranks - 1, ranks, gains, 0.0)
    table = option_table(problem)
    sizes = np.diff(table.offsets)
    variables = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    values, costs = table.values, table.costs
    # A power of two keeps quotients of tiny gains clear of the subnormal numbers.
    shift = 900 - math.frexp(float(np.max(np.abs(values), initial=0.0)))[1]
    points = np.arange(len(values), dtype=np.int64)
    while True:
        # A point below the line between its neighbours is on no hull; all such may go at once.
        same = variables[points[1:]] == variables[points[:-1]]
        rise = np.ldexp(values[points[1:]], shift) - np.ldexp(values[points[:-1]], shift)
        slopes = rise / np.where(same, costs[points[1:]] - costs[points[:-1]], 1)
        below = same[1:] & same[:-1] & (slopes[:-1] < slopes[1:])
        if not below.any():
            break
        points = np.delete(points, np.flatnonzero(below) + 1)
    starts, ends = points[:-1][same], points[1:][same]
    return Hulls(
        variables[ends],
        table.ranks[starts],
        table.ranks[ends],
        values[ends] - values[starts],
        4 * float(table.value_errors.sum()),
    )
