"""The value at every budget: the upper hull of all budgets, from one sorted pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.costs import PerLayer, UniformRank, whole_number
from lorambo_alloc.hulls import Hulls, concave_hulls
from lorambo_alloc.limits import AllowedRanks, Limit
from lorambo_alloc.objectives import FloatArray, IntArray, Objective
from lorambo_alloc.problem import InfeasibleError, Problem
from lorambo_alloc.solve import solve

_GREATEST_BUDGET = (1 << 62) - 1
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

        Both axes are scaled to run from 0 to 1. With one breakpoint it is that one.

        References:
            Satopaa, Albrecht, Irwin and Raghavan 2011, Finding a "kneedle" in a haystack, for a
            concave curve without smoothing.
        """
        span = float(self.budgets[-1] - self.budgets[0])
        rise = float(self.values[-1] - self.values[0])
        x = (self.budgets - self.budgets[0]) / (span or 1.0)
        y = (self.values - self.values[0]) / (rise or 1.0)
        return int(self.budgets[np.argmax(y - x)])

    def ranks_at_breakpoint(self, index: int) -> IntArray:
        """A rank vector that costs `budgets[index]` and has the value `values[index]`, to rounding.

        Args:
            index: of the breakpoint; negative ones count from the end.

        Raises:
            IndexError: there is no such breakpoint.
        """
        steps = range(len(self))[index]
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
        array = np.asarray(budget)
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


def frontier(
    spectra: object,
    *,
    shapes: PerLayer[tuple[int, int]] | None = None,
    costs: PerLayer[int] | None = None,
    fixed_costs: PerLayer[int] | None = None,
    objective: str | Objective = "frobenius",
    weights: PerLayer[float] | None = None,
    min_rank: Limit = 0,
    max_rank: Limit = None,
    multiple_of: int = 1,
    allowed_ranks: AllowedRanks = None,
    tied: Iterable[Sequence[str]] = (),
) -> Frontier:
    """What every budget would buy: the upper hull of the best value, from one sorted pass.

    Each variable's ranks are replaced by the upper hull of its curve over its cost (where single
    ranks have descending gains, by themselves), and the steps of all hulls are taken in order of
    their gain per cost. That is the linear relaxation's optimum at every budget at once.

    Steps of equal gain per cost stay apart, in the order of the layers, so that every breakpoint is
    attained by whole ranks. Steps that gain nothing are left out.

    The time is that of one sort of all gains. The result holds 32 bytes a breakpoint, of which
    there are at most as many as ranks to choose from; making it takes about 110 bytes a rank.

    Args:
        spectra: as `allocate` takes it, and so are the limits: name to a 1-D array of singular
            values, descending; or `Spectra`, a sequence of arrays, a 2-D array or `GainCurves`.
        shapes: name to (d, k); a rank costs d + k parameters.
        costs: name to the cost of one rank, whole numbers >= 1; takes precedence over `shapes`.
            With neither, a rank costs 1 and budgets count ranks.
        fixed_costs: name to a cost charged once if the layer's rank is above 0.
        objective: "frobenius", "nuclear", `schatten(p)` or `log(noise)`; not "operator".
        weights: name to a factor >= 0 on the layer's gains.
        min_rank: the least rank, for all layers or by name.
        max_rank: the greatest rank, for all layers or by name.
        multiple_of: ranks are multiples of this.
        allowed_ranks: the ranks to choose from, for all layers or by name.
        tied: groups of layer names that share one rank.

    Returns:
        A `Frontier`.

    Raises:
        ValueError: an argument is not of this form, the objective is "operator", or the greatest
            ranks cost 2^62 or more.

    References:
        Dantzig 1957, Discrete-variable extremum problems; Sinha and Zoltners 1979, The
        multiple-choice knapsack problem, theorem 1 and its corollary (only the hull matters to
        the relaxation, which takes its steps in order of slope).

    Example:
        >>> curve = frontier({"q": [3.0, 2.0, 1.0], "v": [2.0]}, costs={"q": 2, "v": 1})
        >>> curve.budgets, curve.values
        (array([0, 2, 3, 5, 7]), array([ 0.,  9., 13., 17., 18.]))
        >>> curve.at(4), curve.price_at(4), dict(curve.allocation(4))
        (15.0, 2.0, {'q': 1, 'v': 1})
    """
    problem = _unlimited(
        spectra,
        shapes=shapes,
        costs=costs,
        fixed_costs=fixed_costs,
        objective=objective,
        weights=weights,
        min_rank=min_rank,
        max_rank=max_rank,
        multiple_of=multiple_of,
        allowed_ranks=allowed_ranks,
        tied=tied,
    )
    hulls = concave_hulls(problem)
    # Gains descend along a hull, so what gains nothing comes after all that does.
    hulls = hulls.select(hulls.gains > 0)
    costs_of = _step_costs(problem, hulls)
    # A power of two keeps quotients of tiny gains clear of the subnormal numbers.
    shift = 900 - math.frexp(float(np.max(hulls.gains, initial=0.0)))[1]
    densities = np.ldexp(hulls.gains, shift) / costs_of
    # Stable: equal steps of one variable must keep their order.
    order = np.argsort(-densities, kind="stable")
    base = float(problem.value_of(problem.lower))
    budgets = np.cumsum(np.concatenate([[problem.cost_of(problem.lower)], costs_of[order]]))
    values, error = _running_sums(base, hulls.gains[order])
    prices = np.append(np.ldexp(densities[order], -shift), 0.0)
    for array in (budgets, values, prices):
        array.flags.writeable = False
    steps = hulls.variables[order].astype(np.int32)
    ends = hulls.high.astype(np.int32)
    starts = np.searchsorted(hulls.variables, np.arange(len(problem.variables)))
    rounding = hulls.error + error
    return Frontier(problem, budgets, values, prices, rounding, steps, ends, starts)


def _step_costs(problem: Problem, hulls: Hulls) -> IntArray:
    """What each step along a hull costs."""
    variables = problem.variables
    unit = np.array([problem.costs[list(layers)].sum() for layers in variables], dtype=np.int64)
    fixed = np.array(
        [problem.fixed_costs[list(layers)].sum() for layers in variables], dtype=np.int64
    )
    costs = unit[hulls.variables] * (hulls.high - hulls.low)
    return costs + np.where(hulls.low == 0, fixed[hulls.variables], 0)


def _unlimited(spectra: object, **keywords: Any) -> Problem:
    """The problem with a budget that holds everything."""
    too_dear = "costs: expected greatest ranks that cost less than 2^62 together"
    try:
        problem = Problem(spectra, _GREATEST_BUDGET, **keywords)
    except InfeasibleError as error:
        raise ValueError(f"{too_dear}, got least ranks that cost {error.minimum_budget}") from None
    if problem.objective.kind == "operator":
        raise ValueError(
            "objective: a frontier needs gains that add up; 'operator' has none. For the largest "
            "value discarded at a budget call allocate(..., objective='operator')"
        )
    greatest = problem.cost_of(problem.upper)
    if greatest > _GREATEST_BUDGET:
        raise ValueError(f"{too_dear}, got {greatest}; divide the costs by a common factor")
    return problem


def _running_sums(base: float, gains: FloatArray) -> tuple[FloatArray, float]:
    """The base, plus the first 0, 1, 2, ... gains; and a bound on the error of any of them.

    Sums within blocks, then sums of blocks: an error of about 2 sqrt(n) last bits, not n.
    """
    count = len(gains)
    width = max(math.isqrt(count), 1)
    blocks = np.zeros((-(-count // width), width))
    blocks.ravel()[:count] = gains
    np.cumsum(blocks, axis=1, out=blocks)
    # A block ends where the next one starts, so the sums ascend across blocks too.
    before = np.cumsum(np.concatenate([[base], blocks[:, -1]]))
    sums = np.concatenate([[base], (blocks + before[:-1, None]).ravel()[:count]])
    # With what rounded quotients lose, which may put two steps in the wrong order.
    total = abs(base) + float(gains.sum())
    return sums, _ulps((2 * width + 16) * total)


def _ulps(magnitude: float) -> float:
    """Last bits of a magnitude, and of the subnormal numbers that it may be lost among."""
    return magnitude * 2.0**-52 + 2.0**-1060


def _table(frontier: Frontier) -> str:
    """Shares of the gain with the budget that the hull says they take, in aligned columns."""
    budgets, values = frontier.budgets, frontier.values
    head = f"Frontier({len(frontier):,} breakpoints, objective {frontier.problem.objective})"
    last = float(values[-1])
    if not last > 0:
        return f"{head}: nothing to gain"
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
