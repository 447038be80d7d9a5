"""Any curve and any limit: one option a variable (the multiple-choice knapsack).

Best responses to a price come from one scan of all options; concavity is not assumed anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorambo_alloc.costs import exact_dot
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.options import OptionTable, option_table
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.core import Core, Price, Relaxed
from lorambo_alloc.solvers.core_program import Class, promising_first

_MAX_PRICE_STEPS = 200


@dataclass(frozen=True)
class Positions:
    """Options near the price: positions in the table, and the variable of each, ascending."""

    positions: IntArray
    variables: IntArray


class MultipleChoiceForm:
    """A problem as an option table."""

    name = "core dynamic program over multiple choices"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._table: OptionTable = option_table(problem)
        starts = self._table.offsets[:-1]
        self._starts = starts
        self._variables = np.repeat(
            np.arange(len(starts), dtype=np.int64), np.diff(self._table.offsets)
        )
        least = self._table.costs[starts]
        extra = self._table.costs - least[self._variables]
        self._budget = problem.spendable - exact_dot(least, np.ones_like(least))
        self.unit = max(int(np.gcd.reduce(extra)), 1) if len(extra) else 1
        self._costs = extra // self.unit  # beyond each variable's cheapest option
        self._budget //= self.unit
        # One sorted key an option, to find the option of a variable's rank.
        self._stride = int(self._table.ranks.max(initial=0)) + 1
        self._keys = self._variables * self._stride + self._table.ranks

    def relax(self) -> Relaxed:
        """The Lagrangian dual by cutting planes: the slope between the two ends, until it stays.

        References:
            Kelley 1960 in one dimension; Dinkelbach's iteration for the breakpoints.
        """
        values, costs = self._table.values, self._costs
        rich = self._exactly_best()
        if self._spent(rich) <= self._budget:
            ranks = self._table.ranks_of(rich)
            return Relaxed(0.0, ranks, ranks)
        # The dearest price: every variable at its cheapest option.
        poor = self._starts.copy()
        price = 0.0
        for _ in range(_MAX_PRICE_STEPS):
            gain = float(np.sum(values[rich] - values[poor]))
            step = float(np.sum((costs[rich] - costs[poor]).astype(np.float64)))
            price = gain / step
            if not price > 0:
                # Rounding, or a richer end worth nothing: the poorer end is as good.
                price = float(np.finfo(np.float64).tiny)
                break
            middle = self._best(price)
            score = float(np.sum(values[middle] - values[poor])) - price * float(
                np.sum((costs[middle] - costs[poor]).astype(np.float64))
            )
            if score <= 2.0**-46 * abs(gain) + 0.0 or np.array_equal(middle, poor):
                break
            if self._spent(middle) <= self._budget:
                poor = middle
            elif np.array_equal(middle, rich):
                break
            else:
                rich = middle
        ranks = self._table.ranks_of(poor)
        return Relaxed(price, ranks, self._table.ranks_of(self._fill(poor, rich)))

    def _best(self, price: float) -> IntArray:
        """Per variable its best option at a price; the cheapest among equals."""
        scores = self._table.values - price * self._costs
        best = np.maximum.reduceat(scores, self._starts)
        hits = np.flatnonzero(scores == best[self._variables])
        first = np.ones(len(hits), dtype=bool)
        first[1:] = self._variables[hits[1:]] != self._variables[hits[:-1]]
        return hits[first]

    def _exactly_best(self) -> IntArray:
        """Per variable the option of the greatest value, exactly; the cheapest among equals."""
        best = self._best(0.0)
        values = self._table.values
        margins = 4 * self._table.value_errors[self._variables]
        near = np.flatnonzero(values >= values[best][self._variables] - margins)
        for variable, positions in _by_variable(self._alternatives(near)):
            best[variable] = self._table.exactly_best(variable, positions)
        return best

    def _spent(self, chosen: IntArray) -> int:
        costs = self._costs[chosen]
        return exact_dot(costs, np.ones_like(costs))

    def _fill(self, poor: IntArray, rich: IntArray) -> IntArray:
        """Move variables from the poorer to the richer end, where they fit, best slope first."""
        gain = self._table.values[rich] - self._table.values[poor]
        cost = self._costs[rich] - self._costs[poor]
        chosen = poor.copy()
        residual = self._budget - self._spent(poor)
        better = np.flatnonzero((gain > 0) & (cost <= residual))
        slopes = gain[better] / np.maximum(cost[better], 1)
        for v in better[np.argsort(-slopes, kind="stable")].tolist():
            if cost[v] <= residual:
                chosen[v] = rich[v]
                residual -= int(cost[v])
        return chosen

    def _chosen(self, ranks: IntArray) -> IntArray:
        """The positions of a rank vector's options."""
        first = [layers[0] for layers in self._table.members]
        keys = np.arange(len(first), dtype=np.int64) * self._stride + ranks[first]
        return np.searchsorted(self._keys, keys).astype(np.int64)

    def _penalties(self, price: float, chosen: IntArray) -> FloatArray:
        """How much less than the chosen option of its variable each option scores, rounded."""
        scores = self._table.values - price * self._costs
        return scores[chosen][self._variables] - scores

    def respond(self, price: float) -> IntArray:
        """The best option of every variable at the price."""
        return self._table.ranks_of(self._best(price))

    def nearest(
        self, price: float, ranks: IntArray, count: int, window: float
    ) -> tuple[Positions, float]:
        """The options of the smallest penalties, and the chosen ones."""
        chosen = self._chosen(ranks)
        penalties = self._penalties(price, chosen) - self._margins(price)
        kept = penalties < window
        if np.count_nonzero(kept) > count + len(chosen):
            kept = penalties < np.partition(penalties, count + len(chosen))[count + len(chosen)]
        beyond = float(np.min(penalties[~kept], initial=math.inf))
        kept[chosen] = True
        return self._alternatives(np.flatnonzero(kept)), beyond

    def within(self, price: float, ranks: IntArray, window: float) -> Positions:
        """Options that score within the window of the chosen one, and the chosen ones."""
        chosen = self._chosen(ranks)
        near = self._penalties(price, chosen) <= window + self._margins(price)
        return self._alternatives(np.flatnonzero(near))

    def _margins(self, price: float) -> FloatArray:
        """Per option, what rounding may hide in its penalty."""
        most = self._costs[self._table.offsets[1:] - 1]  # each variable's dearest option
        margins = 4 * self._table.value_errors + price * most * 2.0**-50
        return margins[self._variables]

    def _alternatives(self, positions: IntArray) -> Positions:
        """Drop variables with no option but one."""
        variables = self._variables[positions]
        several = np.bincount(variables, minlength=len(self._starts))[variables] > 1
        return Positions(positions[several], variables[several])

    def size(self, items: Positions) -> int:
        """The number of options, chosen ones included."""
        return len(items.positions)

    def reach(self, items: Positions, price: float, ranks: IntArray) -> float:
        """The largest difference to the chosen option's score, rounded up."""
        penalties = self._penalties(price, self._chosen(ranks)) + self._margins(price)
        return 2 * float(np.max(np.abs(penalties[items.positions]), initial=0.0))

    def last_bit(self, items: Positions) -> int:
        """Exponent of the last bit set in any of the gains that the options are sums of."""
        return min(
            (self._table.last_bit(v, positions) for v, positions in _by_variable(items)),
            default=1024,
        )

    def core(self, items: Positions, price: Price, ranks: IntArray, limit: int) -> Core:
        """Exact penalties against each variable's exactly best option; one class a variable."""
        chosen = self._chosen(ranks)
        best = chosen.copy()
        classes: list[tuple[Class, IntArray]] = []
        low = 0
        for variable, positions in _by_variable(items):
            fixed, too_low = self._table.fixed_values(variable, positions, price.exponent)
            costs = self._costs[positions]
            base = int(np.flatnonzero(positions == chosen[variable])[0])
            # Exact modulo 2^64, and small.
            net = (fixed - fixed[base]) - price.units * (costs - costs[base])
            top = base if net[base] == net.max() else int(np.argmax(net))
            best[variable] = positions[top]
            # Both scores may be too low by so much, so that each penalty is off by at most that
            # either way. Understated here, it is low by twice that; and the top may not be the
            # true best response, which is once more.
            penalties = np.maximum(net[top] - net - too_low, 0)
            low += 3 * too_low
            keep = penalties <= limit
            keep[top] = False
            if keep.any():
                group = Class((costs - costs[top])[keep], penalties[keep])
                classes.append((group, positions[keep]))
        classes = [classes[n] for n in promising_first([group for group, _ in classes])]
        return Core(
            self._table.ranks_of(best), [c for c, _ in classes], [p for _, p in classes], low
        )

    def apply(self, core: Core, choices: list[int]) -> IntArray:
        """Replace the best responses of the variables that deviate."""
        chosen = self._chosen(core.ranks)
        for choice, positions in zip(choices, core.decode, strict=True):
            if choice:
                position = int(positions[choice - 1])
                chosen[self._variables[position]] = position
        return self._table.ranks_of(chosen)


def _by_variable(items: Positions) -> list[tuple[int, IntArray]]:
    """The options of each variable among the items."""
    starts = np.flatnonzero(np.diff(items.variables, prepend=-1))
    return [
        (int(items.variables[part[0]]), items.positions[part])
        for part in np.split(np.arange(len(items.variables)), starts[1:])
        if len(part)
    ]
