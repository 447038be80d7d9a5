"""Greedy repairs of a rank vector under several budgets: step down until it fits, then fill up."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from lorambo_alloc.caps import Row
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

_AHEAD = 8  # a step up may skip so many allowed ranks


class Filling:
    """Steps up and down the allowed ranks of each variable, with the budgets kept in view.

    Args:
        problem: any problem with gains.
        rows: the budgets that matter.
        prices: one a row; steps are ranked by their gain per priced cost.
    """

    def __init__(self, problem: Problem, rows: Sequence[Row], prices: Sequence[float]) -> None:
        self._problem = problem
        self._rows = rows
        self._groups = problem.variables
        self._rows_of: list[list[int]] = [[] for _ in self._groups]
        variable_of = np.zeros(len(problem.names), dtype=np.int64)
        for v, group in enumerate(self._groups):
            variable_of[list(group)] = v
        for k, row in enumerate(rows):
            charged: list[int] = np.unique(variable_of[row.layers]).tolist()
            for v in charged:
                self._rows_of[v].append(k)
        # A row without a price still counts a little, so that free steps prefer cheap layers.
        dearest = max((p * max(r.budget, 1) for p, r in zip(prices, rows, strict=True)), default=0)
        least = 1e-6 * (dearest or 1.0)
        self._weights = [
            price + least / max(row.budget, 1) for price, row in zip(prices, rows, strict=True)
        ]
        self._values: dict[int, FloatArray] = {}
        self._allowed: dict[int, list[int]] = {}

    def repaired(self, ranks: IntArray) -> IntArray:
        """Step down where a budget is exceeded, losing as little as one step at a time can."""
        ranks = ranks.copy()
        for k, row in enumerate(self._rows):
            excess = row.cost_of(ranks) - row.budget
            if excess <= 0:
                continue
            members = [v for v in range(len(self._groups)) if k in self._rows_of[v]]
            heap = [step for v in members if (step := self._down(v, row, ranks)) is not None]
            heapq.heapify(heap)
            while excess > 0 and heap:
                _, v, rank, freed = heapq.heappop(heap)
                ranks[list(self._groups[v])] = rank
                excess -= freed
                if (step := self._down(v, row, ranks)) is not None:
                    heapq.heappush(heap, step)
        return ranks

    def filled(
        self, ranks: IntArray, accepts: Callable[[IntArray], bool] | None = None
    ) -> IntArray:
        """Step up where it fits, the best gain per priced cost first.

        Args:
            ranks: within all budgets.
            accepts: whether a rank vector satisfies further constraints; None: there are none.
        """
        ranks = ranks.copy()
        left = [row.budget - row.cost_of(ranks) for row in self._rows]
        heap = [step for v in range(len(self._groups)) if (step := self._up(v, ranks, left))]
        heapq.heapify(heap)
        while heap:
            step = heapq.heappop(heap)
            _, v, rank = step
            group = self._groups[v]
            fresh = self._up(v, ranks, left)
            if fresh != step:  # what fitted when it was pushed may not fit any more
                if fresh is not None:
                    heapq.heappush(heap, fresh)
                continue
            before = int(ranks[group[0]])
            ranks[list(group)] = rank
            if accepts is not None and not accepts(ranks):
                ranks[list(group)] = before
                continue
            for k in self._rows_of[v]:
                left[k] -= self._cost(k, v, rank) - self._cost(k, v, before)
            if (following := self._up(v, ranks, left)) is not None:
                heapq.heappush(heap, following)
        return ranks

    def _down(self, v: int, row: Row, ranks: IntArray) -> tuple[float, int, int, int] | None:
        """Loss per cost freed, variable, new rank and cost freed of its next step down."""
        allowed, values = self._options(v)
        at = allowed.index(int(ranks[self._groups[v][0]]))
        if at == 0:
            return None
        freed = row.cost_at(self._groups[v], allowed[at]) - row.cost_at(
            self._groups[v], allowed[at - 1]
        )
        loss = float(values[at] - values[at - 1])
        return loss / freed, v, allowed[at - 1], freed

    def _up(self, v: int, ranks: IntArray, left: list[int]) -> tuple[float, int, int] | None:
        """Minus the gain per priced cost, variable and new rank of its best step up that fits."""
        allowed, values = self._options(v)
        own = int(ranks[self._groups[v][0]])
        at = allowed.index(own)
        best: tuple[float, int, int] | None = None
        for n in range(at + 1, min(at + 1 + _AHEAD, len(allowed))):
            costs = [self._cost(k, v, allowed[n]) - self._cost(k, v, own) for k in self._rows_of[v]]
            if any(cost > left[k] for cost, k in zip(costs, self._rows_of[v], strict=True)):
                break
            gain = float(values[n] - values[at])
            priced = sum(
                self._weights[k] * cost for cost, k in zip(costs, self._rows_of[v], strict=True)
            )
            density = -gain / priced if priced else -gain * 1e300
            if gain > 0 and (best is None or density < best[0]):
                best = density, v, allowed[n]
        return best

    def _cost(self, k: int, v: int, rank: int) -> int:
        return self._rows[k].cost_at(self._groups[v], rank)

    def _options(self, v: int) -> tuple[list[int], FloatArray]:
        if v not in self._values:
            group = self._groups[v]
            allowed = self._problem.allowed_ranks(group[0])
            self._values[v] = np.sum([self._problem.curve(i)[allowed] for i in group], axis=0)
            self._allowed[v] = allowed.tolist()
        return self._allowed[v], self._values[v]
