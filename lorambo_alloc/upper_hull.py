"""The upper hull of value over budget: what it says at any budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.costs import UniformRank, whole_number
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import InfeasibleError, Problem
from lorambo_alloc.solve import solve

_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class Frontier:
    """The upper hull of value over budget: what `frontier` found.

    The hull is the optimum of the linear relaxation at every budget, so no rank vector within a
    budget has a greater value than `at(budget)`, to rounding. At a breakpoint the hull is
    attained: `ranks_at_breakpoint` has the ranks. Between breakpoints the best ranks are worth
    as much or less; `allocation(budget)` finds them.

    Attributes:
        problem: the problem, with a budget that holds everything.
        budgets: breakpoints, int64, ascending, in the units of the costs. The first is the cost
            of the least ranks; beyond the last, nothing gains.
        values: the hull at each breakpoint, in units of gain.
        prices: gain per unit of cost from each breakpoint to the next, descending; 0 after the
            last.
        rounding: no value of the hull is off by more than this: no feasible rank vector has a
            value above `at(budget) + rounding`.
    """

    problem: Problem
    budgets: IntArray
    values: FloatArray
    prices: FloatArray
    rounding: float
    # Which variable moves to its next rank at each breakpoint after the first; those ranks, end to
    # end by variable; and where each variable's start.
    _steps: npt.NDArray[np.int32]
    _ends: npt.NDArray[np.int32]
    _starts: IntArray

    def __len__(self) -> int:
        return len(self.budgets)

    @property
    def upper_hull(self) -> tuple[IntArray, FloatArray]:
        """Budgets and values of the breakpoints, to plot."""
        return self.budgets, self.values

    @overload
    def at(self, budget: int | UniformRank) -> float: ...
    @overload
    def at(self, budget: Sequence[Any] | npt.NDArray[Any]) -> FloatArray: ...
    def at(self, budget: Any) -> Any:
        """The upper hull at a budget: an upper bound on the best value, to rounding.

        It is the best value itself where the budget is a breakpoint, and beyond the last one.

        Args:
            budget: a whole number in the units of the costs, `uniform_rank(r)`, or an array of
                whole numbers.

        Returns:
            A float, or an array of the budgets' shape, in units of gain.

        Raises:
            InfeasibleError: the budget is below the cost of the least ranks.
            ValueError: it is not a whole number.

        References:
            Dantzig 1957, Discrete-variable extremum problems (the relaxed knapsack); Sinha and
            Zoltners 1979, theorem 1 (multiple choice).
        """
        asked = self._parse(budget)
        k = self._segment(asked)
        after = np.minimum(k + 1, len(self) - 1)
        width = np.maximum(self.budgets[after] - self.budgets[k], 1)
        share = (asked - self.budgets[k]) / width
        values = self.values[k] + share * (self.values[after] - self.values[k])
        return float(values) if values.ndim == 0 else values

    @overload
    def price_at(self, budget: int | UniformRank) -> float: ...
    @overload
    def price_at(self, budget: Sequence[Any] | npt.NDArray[Any]) -> FloatArray: ...
    def price_at(self, budget: Any) -> Any:
        """The slope of the upper hull to the right of a budget: gain per unit of cost.

        Args:
            budget: as `at` takes it.

        Raises:
            InfeasibleError: the budget is below the cost of the least ranks.
            ValueError: it is not a whole number.
        """
        prices = self.prices[self._segment(self._parse(budget))]
        return float(prices) if prices.ndim == 0 else prices

    def knee(self) -> int:
        """The breakpoint farthest above the chord from the hull's first point to its last.

        Both axes are scaled to run from 0 to 1. Of points that rounding cannot tell apart it is
        the first; so a straight hull, which has no knee, gives the cost of the least ranks.

        References:
            Satopaa, Albrecht, Irwin and Raghavan 2011, Finding a "kneedle" in a haystack, for a
            concave curve without smoothing.
        """
        span = float(self.budgets[-1] - self.budgets[0])
        rise = float(self.values[-1] - self.values[0])
        x = (self.budgets - self.budgets[0]) / (span or 1.0)
        y = (self.values - self.values[0]) / (rise or 1.0)
        above = y - x
        noise = 2 * self.rounding / (rise or 1.0) + 2.0**-50
        return int(self.budgets[np.argmax(above >= above.max() - noise)])

    def ranks_at_breakpoint(self, index: int) -> IntArray:
        """A rank vector that costs `budgets[index]` and has the value `values[index]`, to rounding.

        Args:
            index: of the breakpoint; negative ones count from the end.

        Raises:
            IndexError: there is no such breakpoint.
        """
        count = len(self)
        if not -count <= index < count:
            raise IndexError(
                f"index: expected a breakpoint from {-count} to {count - 1}, got {index}"
            )
        steps = index % count
        ranks = self.problem.lower.copy()
        variables = self.problem.variables
        moves = np.bincount(self._steps[:steps], minlength=len(variables))
        for v in np.flatnonzero(moves).tolist():
            ranks[list(variables[v])] = self._ends[self._starts[v] + moves[v] - 1]
        return ranks

    def allocation(
        self,
        budget: int | UniformRank,
        *,
        method: str = "auto",
        time_limit: float | None = None,
    ) -> Allocation:
        """The best ranks at a budget, exactly, as `allocate` finds them.

        Args:
            budget: a whole number in the units of the costs, or `uniform_rank(r)`.
            method: as `allocate` takes it.
            time_limit: as `allocate` takes it.

        Raises:
            InfeasibleError: the budget is below the cost of the least ranks.
            ValueError: as `allocate`.
        """
        return solve(self.problem.with_budget(budget), method, time_limit)

    def _parse(self, budget: Any) -> IntArray:
        """Budgets as int64 from the first breakpoint on; those beyond the last as the last."""
        first, last = int(self.budgets[0]), int(self.budgets[-1])
        if isinstance(budget, UniformRank):
            budget = budget.cost(self.problem.costs, self.problem.fixed_costs)
        try:
            array = np.asarray(budget)
        except ValueError as error:  # lists of unequal lengths
            raise ValueError(f"budget: expected an array of whole numbers: {error}") from None
        if array.dtype.kind in "iu":
            least = int(np.min(array, initial=last))
            wide = array.astype(np.uint64 if array.dtype.kind == "u" else np.int64)
            numbers = np.minimum(wide, wide.dtype.type(last)).astype(np.int64)
        else:
            flat = array.ravel().tolist() if array.ndim else [budget]
            whole = [min(whole_number(number, "budget", 0), last) for number in flat]
            least = min(whole, default=last)
            numbers = np.array(whole, dtype=np.int64).reshape(array.shape)
        if least < 0:
            raise ValueError(f"budget: expected a whole number >= 0, got {least}")
        if least < first:
            raise InfeasibleError(least, first)
        return numbers

    def _segment(self, budgets: IntArray) -> IntArray:
        """The index of the last breakpoint that is not beyond each budget."""
        return np.searchsorted(self.budgets, budgets, side="right").astype(np.int64) - 1

    def __repr__(self) -> str:
        return _table(self)


def _table(frontier: Frontier) -> str:
    """Shares of the gain with the budget that the hull says they take, in aligned columns."""
    budgets, values = frontier.budgets, frontier.values
    head = f"Frontier({len(frontier):,} breakpoints, objective {frontier.problem.objective})"
    last = float(values[-1])
    if not last > 0:
        if len(frontier) == 1:
            return f"{head}: nothing to gain"
        return f"{head}: values from {float(values[0]):.6g} to {last:.6g}, none above 0"
    rows = [("of the gain", "budget at least", "of the cost", "price")]
    for share in _SHARES:
        budget = _cheapest(frontier, share * last)
        part = f"{100 * budget / int(budgets[-1]):.1f}%"
        rows.append(
            (f"{100 * share:.0f}%", f"{budget:,}", part, f"{frontier.price_at(budget):.4g}")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([head, *lines, f"knee at {frontier.knee():,}; values are the upper hull"])


def _cheapest(frontier: Frontier, value: float) -> int:
    """The least whole budget at which the hull reaches a value, to rounding."""
    k = int(np.searchsorted(frontier.values, value))
    if k == 0:
        return int(frontier.budgets[0])
    low, high = int(frontier.budgets[k - 1]), int(frontier.budgets[k])
    part = (value - float(frontier.values[k - 1])) / float(
        frontier.values[k] - frontier.values[k - 1]
    )
    return min(low + math.ceil(part * (high - low)), high)
