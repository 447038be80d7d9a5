"""Single ranks of descending gain: water-filling, and classes of equal cost.

A layer's increments come in descending order, so best responses to a price are prefixes, found by
binary search: the gains themselves are never sorted or copied. Increments of equal cost are
interchangeable, so all layers of one cost form one concave class, which is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lorambo_alloc.arithmetic import last_bit, to_fixed
from lorambo_alloc.costs import exact_dot
from lorambo_alloc.gains import Gains
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.core import Core, Price, Relaxed
from lorambo_alloc.solvers.core_program import Class, promising_first

_FILL = 512  # increments after the break that may fill up what it leaves over
_SORT_AT_MOST = 8192  # increments that are sorted outright once a price bracket holds no more


@dataclass(frozen=True)
class Increments:
    """Single increments: rank `ranks[n]` of layer `rows[n]` gains `gains[n]`."""

    rows: IntArray
    ranks: IntArray
    gains: FloatArray


class ConcaveForm:
    """A problem whose `concave_unit_steps` holds."""

    name = "core dynamic program over cost classes"

    def __init__(self, problem: Problem) -> None:
        assert problem.gains is not None
        self.problem = problem
        self._gains: Gains = problem.gains
        self._lower = problem.lower
        self._budget = problem.spendable - exact_dot(problem.costs, problem.lower)
        # A rank that alone breaks the budget is never taken; leaving it out keeps products in
        # 64 bits.
        self._upper = np.minimum(problem.upper, self._lower + self._budget // problem.costs)
        free = self._upper > self._lower
        self.unit = int(np.gcd.reduce(problem.costs[free])) if free.any() else 1
        self._costs = problem.costs // self.unit
        self._budget //= self.unit

    def relax(self, offset: float = 0.0) -> Relaxed:
        """Water-filling: narrow a price bracket by sampled quantiles, then sort what is left.

        Args:
            offset: taken off every gain first.
        """
        costs = self._costs.astype(np.float64)
        # `outer` costs too much, at the lower price; `inner` fits, at the higher one.
        outer = self._above(offset)
        if self._spent(outer) <= self._budget:
            return Relaxed(0.0, outer, outer)
        inner = self._lower
        while (left := int(np.sum(outer - inner))) > max(_SORT_AT_MOST, 2 * len(costs)):
            for price in self._guess(inner, outer, offset):
                ranks = self._prefix(price * costs + offset, inner, outer)
                if self._spent(ranks) > self._budget:
                    outer = ranks
                else:
                    inner = ranks
            if int(np.sum(outer - inner)) > left - left // 8:
                # Stalled on equal densities: take them all together, or none.
                price = self._guess(inner, outer, offset)[0]
                level = price * costs + offset
                margin = (price * costs + abs(offset)) * 2.0**-50
                ties = self._prefix(level - margin, inner, outer)
                above = self._prefix(level + margin, inner, ties)
                if self._spent(ties) <= self._budget:
                    inner = ties
                elif self._spent(above) > self._budget:
                    outer = above
                else:
                    return self._fill_ties(price, above, ties)
        return self._fill_sorted(inner, outer, offset)

    def _above(self, offset: float) -> IntArray:
        """Per layer how many gains exceed the offset; mostly all of them."""
        layers = np.arange(len(self._upper), dtype=np.int64)
        if np.all(self._gains.at(layers, np.maximum(self._upper, 1)) > offset):
            return self._upper
        return self._prefix(np.full(len(layers), offset), self._lower, self._upper)

    def _prefix(self, thresholds: FloatArray, low: IntArray, high: IntArray) -> IntArray:
        """Per layer the number of gains above its threshold, known to be in [low, high]."""
        rows = np.arange(len(low), dtype=np.int64)
        low, high = low.copy(), high.copy()
        for _ in range(int(np.max(high - low, initial=0)).bit_length()):
            middle = (low + high + 1) >> 1
            # Where low == high the probe is rank `low`; look at rank 1 instead of rank 0.
            above = self._gains.at(rows, np.maximum(middle, 1)) > thresholds
            open_ = low < high
            low = np.where(above & open_, middle, low)
            high = np.where(above | ~open_, high, middle - 1)
        return low

    def _spent(self, ranks: IntArray) -> int:
        return exact_dot(self._costs, ranks - self._lower)

    def _guess(self, inner: IntArray, outer: IntArray, offset: float) -> tuple[float, float]:
        """Two prices that probably enclose the one sought, from evenly spaced increments."""
        rows = np.flatnonzero(outer > inner)
        width = (outer - inner)[rows]
        samples = max(4, 4096 // len(rows))
        steps = (np.arange(samples) + 0.5) / samples
        ranks = inner[rows, None] + 1 + (width[:, None] * steps).astype(np.int64)
        rows_flat = np.repeat(rows, samples)
        costs = self._costs[rows_flat].astype(np.float64)
        densities = (self._gains.at(rows_flat, ranks.ravel()) - offset) / costs
        weights = costs * np.repeat(width / samples, samples)
        order = np.argsort(-densities, kind="stable")
        spent = np.cumsum(weights[order])
        sought = float(self._budget - self._spent(inner))
        slack = spent[-1] / (2 * samples)
        ends = np.searchsorted(spent, [sought - slack, sought + slack])
        first, last = densities[order[np.minimum(ends, len(order) - 1)]].tolist()
        return first, last

    def _fill_ties(self, price: float, inner: IntArray, outer: IntArray) -> Relaxed:
        """Increments in (inner, outer] all have the price's density: take layers in turn."""
        ranks = inner.copy()
        residual = self._budget - self._spent(inner)
        for i in np.flatnonzero(outer > inner).tolist():
            cost = int(self._costs[i])
            step = min(int(outer[i] - inner[i]), residual // cost)
            ranks[i] += step
            residual -= step * cost
        return Relaxed(price, ranks, ranks)

    def _fill_sorted(self, inner: IntArray, outer: IntArray, offset: float) -> Relaxed:
        """Take increments in (inner, outer] by density; then whatever of the next ones fits."""
        rows, _, gains = self._gains.selected(inner, outer)
        costs = self._costs[rows]
        densities = (gains - offset) / costs
        order = np.argsort(-densities, kind="stable")
        residual = self._budget - self._spent(inner)
        taken = _affordable_prefix(costs[order], residual)
        # A density may underflow; a price of 0 means that the budget does not bind.
        price = max(float(densities[order[taken]]), math.ulp(0.0))
        residual -= int(costs[order[:taken]].sum())
        ranks = inner + np.bincount(rows[order[:taken]], minlength=len(inner))
        feasible = ranks.copy()
        rest = order[taken : taken + _FILL]
        while len(rest := rest[costs[rest] <= residual]):
            taken = _affordable_prefix(costs[rest], residual)
            feasible += np.bincount(rows[rest[:taken]], minlength=len(inner))
            residual -= int(costs[rest[:taken]].sum())
            rest = rest[taken:]
        return Relaxed(price, ranks, feasible)

    def free_ranks(self) -> tuple[IntArray, IntArray, int]:
        """Reduced cost of a rank and room for ranks by layer, and the reduced budget for them."""
        return self._costs, self._upper - self._lower, self._budget

    def size_of_all(self) -> int:
        """How many ranks are free to be taken."""
        return int(np.sum(self._upper - self._lower))

    def largest_gain(self) -> float:
        """The largest gain of a rank that is free to be taken, or 0."""
        rows = np.flatnonzero(self._upper > self._lower)
        return float(np.max(self._gains.at(rows, self._lower[rows] + 1), initial=0.0))

    def next_gains(self, ranks: IntArray) -> FloatArray:
        """What each layer's next rank gains (any number where it has none)."""
        rows = np.arange(len(ranks), dtype=np.int64)
        return self._gains.at(rows, np.minimum(ranks + 1, np.maximum(self._upper, 1)))

    def last_gains(self, ranks: IntArray) -> FloatArray:
        """What each layer's last rank gains (any number where it has none)."""
        return self._gains.at(np.arange(len(ranks), dtype=np.int64), np.maximum(ranks, 1))

    def last_bit_of_all(self) -> int:
        """The greatest e such that every gain is a whole multiple of 2^e."""
        return last_bit(self._gains.selected(self._lower, self._upper)[2])

    def bound(self, relaxed: Relaxed, offset: float) -> Fraction:
        """sum_i max_r (F_i(r) - (price c_i + offset) r) + price * budget, rounded up.

        Args:
            relaxed: the break solution for gains less the offset.
            offset: taken off every gain.
        """
        level = relaxed.price * self._costs
        margin = (level + abs(offset)) * 2.0**-49
        ranks = self._prefix(level + offset - margin, self._lower, self._upper)
        # Ranks within the margin of the level may be rightly in or out. One that is in and should
        # not be, or the other way round, changes the sum by at most twice the margin.
        sure = self._prefix(level + offset + margin, self._lower, ranks)
        hidden = Fraction(float(np.dot(ranks - sure, margin))) * 2
        left = self._budget - self._spent(ranks)
        count = int(np.sum(ranks - self._lower))
        value = self.problem.value_of(ranks)
        return value + Fraction(relaxed.price) * left - Fraction(offset) * count + hidden

    def respond(self, price: float) -> IntArray:
        """The ranks whose gains exceed price * cost."""
        return self._prefix(price * self._costs.astype(np.float64), self._lower, self._upper)

    def nearest(
        self, price: float, ranks: IntArray, count: int, window: float
    ) -> tuple[Increments, float]:
        """The next increments on both sides of the break, those of the smallest penalties."""
        reach = count // max(len(ranks), 1) + 2
        low = np.maximum(ranks - reach, self._lower)
        high = np.minimum(ranks + reach, self._upper)
        items = self._around(low, high)
        level = price * self._costs[items.rows]
        # Negative where the ranks are no best response, which rounding may have hidden.
        taken = items.ranks <= ranks[items.rows]
        penalties = np.where(taken, items.gains - level, level - items.gains)
        penalties -= (np.abs(items.gains) + level) * 2.0**-50  # never above the true penalty
        # Beyond the last one looked at, a layer's penalties only grow.
        ends = (items.ranks == low[items.rows] + 1) & (low > self._lower)[items.rows]
        ends |= (items.ranks == high[items.rows]) & (high < self._upper)[items.rows]
        beyond = float(np.min(penalties[ends], initial=math.inf))
        kept = penalties < window
        if np.count_nonzero(kept) > count:
            cut = np.partition(penalties, count)[count]
            kept = penalties < cut
        beyond = float(np.min(penalties[~kept], initial=beyond))
        return Increments(items.rows[kept], items.ranks[kept], items.gains[kept]), beyond

    def within(self, price: float, ranks: IntArray, window: float) -> Increments:
        """Increments that differ from price * cost by less than the window."""
        level = price * self._costs.astype(np.float64)
        margin = window + level * 2.0**-50  # and what rounding may hide
        return self._around(
            self._prefix(level + margin, self._lower, ranks),
            self._prefix(level - margin, ranks, self._upper),
        )

    def _around(self, low: IntArray, high: IntArray) -> Increments:
        return Increments(*self._gains.selected(low, high))

    def size(self, items: Increments) -> int:
        """The number of increments."""
        return len(items.rows)

    def reach(self, items: Increments, price: float, ranks: IntArray) -> float:
        """The largest |gain - price * cost|, rounded up."""
        level = price * self._costs[items.rows]
        distance = np.abs(items.gains - level) + (np.abs(items.gains) + level) * 2.0**-50
        return float(np.max(distance, initial=0.0))

    def last_bit(self, items: Increments) -> int:
        """Exponent of the last bit set in any of the gains."""
        return last_bit(items.gains)

    def core(self, items: Increments, price: Price, ranks: IntArray, limit: int) -> Core:
        """Exact penalties |gain - price * cost|, merged into one class a cost."""
        costs = self._costs[items.rows]
        fixed, exact = to_fixed(items.gains, price.exponent)
        net = fixed - price.units * costs  # exact modulo 2^64, and small
        taken = items.ranks <= ranks[items.rows]
        # Rounded down, each gain is off by less than a unit: as many units as there are increments
        # cover best responses and any solution's penalties.
        low = 0 if exact else len(net)
        # Rounding may have put an increment on the wrong side of the price; move it.
        wrong = np.where(taken, net < 0, net > 0)
        moved = np.where(taken, -1, 1)[wrong]
        ranks = ranks + np.bincount(items.rows[wrong], weights=moved, minlength=len(ranks)).astype(
            np.int64
        )
        taken = taken ^ wrong
        penalties = np.abs(net)
        if not exact:  # rounded down, the gain of an addition is understated by up to one unit
            penalties = np.maximum(penalties - np.where(taken, 0, 1), 0)
        # Within a layer penalties grow away from the break, so a class's cheapest deviations are
        # next ranks; equal ones are put in that order.
        distance = np.where(taken, -items.ranks, items.ranks)
        order = np.lexsort((distance, penalties, taken, costs))
        keys = costs[order] * 2 + taken[order]
        ends = np.flatnonzero(keys[1:] != keys[:-1]) + 1
        groups = np.split(order, ends) if len(order) else []
        classes: dict[int, list[tuple[bool, IntArray, IntArray]]] = {}
        for members in groups:
            cost = int(costs[members[0]])
            # No solution adds more than the budget holds, or frees more than is spent.
            most = (self._spent(ranks) if taken[members[0]] else self._budget) // cost
            sums = _sums_up_to(penalties[members[:most]], limit)
            classes.setdefault(cost, []).append(
                (bool(taken[members[0]]), items.rows[members[: len(sums)]], sums)
            )
        merged = [_merge(cost, parts) for cost, parts in classes.items()]
        merged = [pair for pair in merged if len(pair[0].moves)]
        merged = [merged[n] for n in promising_first([group for group, _ in merged])]
        return Core(ranks, [c for c, _ in merged], [rows for _, rows in merged], low)

    def apply(self, core: Core, choices: list[int]) -> IntArray:
        """Take or give back the first few increments of each class."""
        ranks = core.ranks.copy()
        for choice, group, (cost, additions, removals) in zip(
            choices, core.classes, core.decode, strict=True
        ):
            count = int(group.moves[choice - 1]) // cost if choice else 0
            np.add.at(ranks, additions[: max(count, 0)], 1)
            np.add.at(ranks, removals[: max(-count, 0)], -1)
        return ranks


def _merge(
    cost: int, parts: list[tuple[bool, IntArray, IntArray]]
) -> tuple[Class, tuple[int, IntArray, IntArray]]:
    """One class from the additions and the removals of one cost."""
    moves: list[IntArray] = []
    penalties: list[IntArray] = []
    rows = [np.zeros(0, dtype=np.int64)] * 2
    for taken, layer_rows, sums in parts:
        moves.append(np.arange(1, len(sums) + 1, dtype=np.int64) * (-cost if taken else cost))
        penalties.append(sums)
        rows[int(taken)] = layer_rows
    return Class(np.concatenate(moves), np.concatenate(penalties)), (cost, rows[0], rows[1])


def _sums_up_to(penalties: IntArray, limit: int) -> IntArray:
    """Running sums of ascending penalties, as far as they do not exceed the limit."""
    count = int(penalties.searchsorted(limit, side="right"))
    if count * limit >= 1 << 62:
        # A long sum could leave 64 bits; doubles tell where it goes far beyond the limit.
        count = int(penalties[:count].cumsum(dtype=np.float64).searchsorted(2.0 * limit + 1))
    sums = penalties[:count].cumsum()
    return sums[: int(sums.searchsorted(limit, side="right"))]


def _affordable_prefix(costs: IntArray, budget: int) -> int:
    """How many leading costs fit into the budget together."""
    if len(costs) * int(costs.max(initial=0)) < 1 << 62:
        return int(costs.cumsum().searchsorted(budget, side="right"))
    total = 0
    for n, cost in enumerate(costs.tolist()):
        total += cost
        if total > budget:
            return n
    return len(costs)
