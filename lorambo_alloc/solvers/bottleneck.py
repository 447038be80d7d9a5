"""The operator norm: make the largest discarded singular value as small as possible."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.problem import Problem


def solve_bottleneck(problem: Problem, time_limit: float | None = None) -> Allocation:
    """Minimise max_i w_i sigma_{i, r_i + 1}; then, with what is left, the next largest, and so on.

    The least threshold that the budget allows is found by bisection. From there the layer with
    the largest discarded value has its rank raised until that no longer fits, is set aside, and
    the next follows. Every raise is needed by all answers as good, so the largest discarded value
    is minimal, which is what the certificate states. If no value occurs in two layers, the vector
    of discarded values in descending order is lexicographically minimal too; of equal ones the
    cheapest to lower goes first, which need not be best for the rest of the vector.

    Args:
        problem: a problem with the objective `operator`.
        time_limit: not needed; the time is that of a sort of all values.
    """
    choices = [_Choice(problem, group) for group in problem.variables]
    owner = {i: choice for choice in choices for i in choice.tails}
    _start_at_threshold(problem, choices)
    left = problem.budget - sum(choice.cost() for choice in choices)

    def entry(i: int) -> tuple[float, int, int]:
        """The layer's discarded value, greatest first; then what lowering it costs."""
        step, cost = owner[i].next_below(i)
        return -owner[i].tail(i), cost if step >= 0 else -1, i

    heap = [entry(i) for i in owner]
    heapq.heapify(heap)
    while heap:
        seen = heapq.heappop(heap)
        i = seen[2]
        if (fresh := entry(i)) != seen:  # a layer it is tied to has raised its rank meanwhile
            heapq.heappush(heap, fresh)
            continue
        step, cost = owner[i].next_below(i)
        if 0 <= step and cost <= left:
            left -= cost
            owner[i].at = step
            heapq.heappush(heap, entry(i))
    ranks = problem.lower.copy()
    for choice in choices:
        ranks[list(choice.tails)] = choice.allowed[choice.at]
    certificate = Certificate.of(
        problem.value_of(ranks), Fraction(0), 0.0, "threshold and leximax", closed=True
    )
    return Allocation(problem, ranks, certificate)


class _Choice:
    """One variable: its allowed ranks, what each layer discards at each, and the present one.

    Attributes:
        allowed: the ranks, ascending.
        tails: by layer, minus what it discards at each allowed rank (ascending, to be bisected).
        at: position of the present rank.
    """

    def __init__(self, problem: Problem, group: tuple[int, ...]) -> None:
        self.allowed: list[int] = problem.allowed_ranks(group[0]).tolist()
        self.tails = {i: _negated_tails(problem, i) for i in group}
        self.at = 0
        self._unit = sum(int(problem.costs[i]) for i in group)
        self._fixed = sum(int(problem.fixed_costs[i]) for i in group)

    def cost(self, at: int | None = None) -> int:
        """The cost at a position, or at the present one."""
        rank = self.allowed[self.at if at is None else at]
        return self._unit * rank + (self._fixed if rank else 0)

    def tail(self, i: int) -> float:
        """What layer i discards now."""
        return -self.tails[i][self.at]

    def next_below(self, i: int) -> tuple[int, int]:
        """The next position where layer i discards less, and its further cost; -1 if none."""
        step = bisect_right(self.tails[i], self.tails[i][self.at], lo=self.at)
        if step == len(self.allowed):
            return -1, 0
        return step, self.cost(step) - self.cost()

    def first_within(self, threshold: float) -> int:
        """The first position where no layer discards more than the threshold."""
        return max(bisect_left(tails, -threshold) for tails in self.tails.values())


def _negated_tails(problem: Problem, i: int) -> list[float]:
    row = np.append(problem.curves.layers.row(i), 0.0)[problem.allowed_ranks(i)]
    if problem.weights is not None:
        row = row * problem.weights[i]
    return (-row).tolist()


def _start_at_threshold(problem: Problem, choices: list[_Choice]) -> None:
    """Move every choice to where the least feasible threshold needs it."""

    def positions(threshold: float) -> list[int] | None:
        """What the threshold needs; None: more than there is, or than the budget."""
        result: list[int] = []
        spent = 0
        for choice in choices:
            at = choice.first_within(threshold)
            if at == len(choice.allowed):
                return None
            spent += choice.cost(at)
            result.append(at)
        return result if spent <= problem.budget else None

    # The threshold is one of the discarded values; the greatest is feasible.
    values = np.unique(-np.array([t for c in choices for row in c.tails.values() for t in row]))
    if not len(values):
        return
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if positions(float(values[middle])) is None:
            low = middle + 1
        else:
            high = middle
    for choice, at in zip(choices, positions(float(values[low])) or [], strict=True):
        choice.at = at
