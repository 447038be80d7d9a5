"""The operator norm: make the largest discarded singular value as small as possible."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.problem import Problem


def solve_bottleneck(problem: Problem, time_limit: float | None = None) -> Allocation:
    """Minimise max_i w_i sigma_{i, r_i + 1}; then, with what is left, the next largest, and so on.

    The least threshold that the budget allows is found by bisection. From there the worst
    layer's rank is raised until that no longer fits, the layer is set aside, and the next worst
    follows. Every raise is needed by all answers as good, so the largest discarded
    value is minimal; the vector of discarded values in descending order is lexicographically
    minimal too if no two of them are equal (equal ones are raised cheapest first).

    Args:
        problem: a problem with the objective `operator`.
        time_limit: not needed; the time is that of a sort of all values.
    """
    groups = problem.variables
    ladders = [_ladder(problem, group) for group in groups]
    at = _threshold(problem, ladders)
    left = problem.spendable - sum(costs[n] for (_, _, costs), n in zip(ladders, at, strict=True))

    def entry(v: int) -> tuple[float, int, int]:
        _, tails, costs = ladders[v]
        step = at[v]
        further = costs[step + 1] - costs[step] if step + 1 < len(costs) else -1
        return -tails[step], further, v

    heap = [entry(v) for v in range(len(groups))]
    heapq.heapify(heap)
    while heap:
        _, further, v = heapq.heappop(heap)
        if 0 <= further <= left:
            left -= further
            at[v] += 1
            heapq.heappush(heap, entry(v))
    ranks = problem.lower.copy()
    for group, (steps, _, _), n in zip(groups, ladders, at, strict=True):
        ranks[list(group)] = steps[n]
    certificate = Certificate.of(
        problem.value_of(ranks), Fraction(0), 0.0, "threshold and leximax", closed=True
    )
    return Allocation(problem, ranks, certificate)


# Ranks worth taking, ascending, with the largest value each discards and what each costs.
_Ladder: TypeAlias = tuple[list[int], list[float], list[int]]


def _ladder(problem: Problem, group: tuple[int, ...]) -> _Ladder:
    """Each allowed rank that discards less than every smaller one."""
    allowed = problem.allowed_ranks(group[0])
    tails = np.zeros(len(allowed))
    for i in group:
        row = np.append(problem.curves.layers.row(i), 0.0)[allowed]
        np.maximum(tails, row if problem.weights is None else row * problem.weights[i], out=tails)
    better = np.ones(len(allowed), dtype=bool)
    better[1:] = tails[1:] < tails[:-1]
    steps = allowed[better].tolist()
    unit = sum(int(problem.costs[i]) for i in group)
    fixed = sum(int(problem.fixed_costs[i]) for i in group)
    costs = [unit * rank + (fixed if rank else 0) for rank in steps]
    return steps, tails[better].tolist(), costs


def _threshold(problem: Problem, ladders: list[_Ladder]) -> list[int]:
    """The steps that the least feasible threshold asks for; every answer as good contains them."""

    def steps(threshold: float) -> list[int] | None:
        """Per ladder the first step that discards at most the threshold; None: too dear."""
        result: list[int] = []
        spent = 0
        for _, tails, costs in ladders:
            n = bisect_left(tails, -threshold, key=lambda tail: -tail)
            if n == len(tails):
                return None
            spent += costs[n]
            result.append(n)
        return result if spent <= problem.spendable else None

    # Bisection over every value that some step discards: the sorted set of thresholds.
    values = sorted({tail for _, tails, _ in ladders for tail in tails})
    if not values:
        return []
    low, high = 0, len(values) - 1  # the greatest is feasible: all ladders at their first step
    while low < high:
        middle = (low + high) // 2
        if steps(values[middle]) is None:
            low = middle + 1
        else:
            high = middle
    found = steps(values[low])
    assert found is not None
    return found
