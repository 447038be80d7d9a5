"""Multiple-choice view of a problem: per variable, the list of its ranks with cost and value.

A variable is a layer, or a tied group of layers. This is the general form, for steps that are
not single ranks of descending gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from lorambo_alloc.arithmetic import exact_sum, last_bit, to_fixed
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem


@dataclass(frozen=True)
class OptionTable:
    """Options of all variables end to end: `offsets[v]:offsets[v + 1]` are variable v's.

    Attributes:
        problem: where the options come from.
        members: per variable, the indices of its layers.
        offsets: int64, one more than there are variables.
        ranks: the rank of each option, ascending within a variable.
        costs: the cost of each option.
        values: F of each option, rounded.
        value_errors: per variable, a bound on the error of its entries of `values`.
    """

    problem: Problem
    members: list[tuple[int, ...]]
    offsets: IntArray
    ranks: IntArray
    costs: IntArray
    values: FloatArray
    value_errors: FloatArray

    def ranks_of(self, chosen: IntArray) -> IntArray:
        """Rank vector in layer order from one option position a variable."""
        ranks = np.zeros(len(self.problem.names), dtype=np.int64)
        for layers, rank in zip(self.members, self.ranks[chosen].tolist(), strict=True):
            for i in layers:
                ranks[i] = rank
        return ranks

    def fixed_values(
        self, variable: int, positions: IntArray, exponent: int
    ) -> tuple[IntArray, int]:
        """F of some options of one variable in units of 2^exponent, modulo 2^64.

        Returns:
            The integers, and how many units each may be too low (0: they are exact).
        """
        ranks = self.ranks[positions]
        total = np.zeros(len(ranks), dtype=np.int64)
        low = 0
        for i in self.members[variable]:
            gains, totals = self.problem.gains, self.problem.totals
            if gains is not None:
                fixed, exact = to_fixed(gains.row(i)[: int(ranks.max(initial=0))], exponent)
                sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(fixed)])
                total += sums[ranks]
                low += 0 if exact else len(fixed)
            else:
                assert totals is not None
                fixed, exact = to_fixed(totals.row(i)[ranks], exponent)
                total += fixed
                low += 0 if exact else 1
        return total, low

    def exactly_best(self, variable: int, positions: IntArray) -> int:
        """The position of the greatest F among some of a variable's, exactly; the first of equals.

        Args:
            variable: which.
            positions: its options to compare, ascending.
        """
        best, lead = int(positions[0]), Fraction(0)  # lead: F(best) - F(the option before)
        for before, position in pairwise(positions.tolist()):
            lead -= self._step(variable, int(self.ranks[before]), int(self.ranks[position]))
            if lead < 0:
                best, lead = position, Fraction(0)
        return best

    def _step(self, variable: int, low: int, high: int) -> Fraction:
        """F(high) - F(low) of a variable, exactly."""
        total = Fraction(0)
        for i in self.members[variable]:
            gains, totals = self.problem.gains, self.problem.totals
            if gains is not None:
                terms = gains.row(i)[low:high]
                total += exact_sum(terms) if terms.any() else 0
            else:
                assert totals is not None
                row = totals.row(i)
                total += Fraction(float(row[high])) - Fraction(float(row[low]))
        return total

    def last_bit(self, variable: int, positions: IntArray) -> int:
        """Exponent of the last bit set in any of the doubles that these options' F are sums of."""
        least = 1024
        ranks = self.ranks[positions]
        for i in self.members[variable]:
            if self.problem.gains is not None:
                terms = self.problem.gains.row(i)[: int(ranks.max(initial=0))]
            else:
                assert self.problem.totals is not None
                terms = self.problem.totals.row(i)[ranks]
            least = min(least, last_bit(terms))
        return least


def attainable_gain(problem: Problem) -> float:
    """The greatest gain that the limits allow at any budget, to rounding."""
    if problem.objective.kind == "operator":
        ends = problem.tails(0 * problem.lower), problem.tails(problem.upper)
        return float(np.max(ends[0], initial=0.0)) - float(np.max(ends[1], initial=0.0))
    if problem.concave_unit_steps:
        assert problem.gains is not None
        forced = problem.gains.selected(0 * problem.lower, problem.lower)[2]
        return problem.gains.positive_sum(problem.upper) + float(np.minimum(forced, 0.0).sum())
    total = 0.0
    for layers in problem.variables:
        allowed = problem.allowed_ranks(layers[0])
        total += float(np.max(sum((problem.curve(i)[allowed] for i in layers), np.zeros(1))))
    return total


def option_table(problem: Problem) -> OptionTable:
    """List every allowed rank of every variable.

    Options that alone cost more than the budget are left out, except a variable's cheapest.
    """
    members = problem.variables
    ranks: list[IntArray] = []
    costs: list[IntArray] = []
    values: list[FloatArray] = []
    errors: list[float] = []
    for layers in members:
        allowed = problem.allowed_ranks(layers[0])
        unit = sum(int(problem.costs[i]) for i in layers)
        fixed = sum(int(problem.fixed_costs[i]) for i in layers)
        # Floor division keeps unit * rank within the budget, hence within 64 bits.
        affordable = allowed <= min((problem.spendable - fixed) // unit, 1 << 62)
        affordable[0] = True
        allowed = allowed[affordable]
        value, magnitude = np.zeros(len(allowed)), 0.0
        for i in layers:
            curve = problem.curve(i)
            value += curve[allowed]
            magnitude += float(np.abs(np.diff(curve[: int(allowed[-1]) + 1])).sum())
        errors.append(magnitude * ((int(allowed[-1]) + len(layers) + 8) * 2.0**-52))
        ranks.append(allowed)
        # What is beyond the budget leaves rank 0 alone, and might not fit 64 bits.
        unit, fixed = min(unit, problem.spendable + 1), min(fixed, problem.spendable + 1)
        costs.append(unit * allowed + fixed * (allowed > 0))
        values.append(value)
    offsets = np.zeros(len(members) + 1, dtype=np.int64)
    np.cumsum([len(r) for r in ranks], out=offsets[1:])
    empty_int, empty = np.zeros(0, dtype=np.int64), np.zeros(0)
    return OptionTable(
        problem,
        members,
        offsets,
        np.concatenate([empty_int, *ranks]),
        np.concatenate([empty_int, *costs]),
        np.concatenate([empty, *values]),
        np.array(errors),
    )
