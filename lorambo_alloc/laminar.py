"""Nested caps with equal costs: a laminar matroid, in which single exchanges decide optimality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorambo_alloc.caps import Row
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem


@dataclass(frozen=True)
class LaminarSet:
    """A set of layers that may hold so many ranks together.

    Attributes:
        row: the budget that says so.
        layers: indices, ascending.
        cost: what every rank of these layers costs in the row.
        capacity: budget // cost.
    """

    row: Row
    layers: IntArray
    cost: int
    capacity: int


def binding_rows(problem: Problem) -> list[Row]:
    """The budgets that matter: neither out of reach within the limits nor implied by others."""
    rows = [row for row in problem.rows if row.cost_of(problem.upper) > row.budget]
    for row in sorted(rows, key=lambda row: -len(row.layers)):
        others = [other for other in rows if other is not row]
        if _implied(problem, row, others):
            rows = others
    return rows


def _implied(problem: Problem, row: Row, others: list[Row]) -> bool:
    """Whether disjoint groups that cost the same in their own rows allow no more than the row.

    Found by taking groups from the smallest, or from the largest, which suffices where they nest.
    """
    inside = [
        other
        for other in others
        if np.array_equal(other.costs, np.where(other.costs > 0, row.costs, 0))
        and np.array_equal(other.fixed_costs, np.where(other.costs > 0, row.fixed_costs, 0))
    ]
    for sign in (1, -1):
        free = problem.upper.copy()
        most = 0
        for other in sorted(inside, key=lambda other: sign * len(other.layers)):
            if np.all(free[other.layers] == problem.upper[other.layers]):
                free[other.layers] = 0
                most += other.budget
        if most + row.cost_of(free) <= row.budget:
            return True
    return False


def laminar_family(problem: Problem) -> list[LaminarSet] | None:
    """The binding budgets as capacities of nested sets, inner ones first; None if they are not.

    They are if every layer's choices are single ranks of descending gain, ranks cost the same in
    all layers of a group, and any two groups are nested or disjoint.
    """
    if not problem.concave_unit_steps:
        return None
    family: list[LaminarSet] = []
    for row in binding_rows(problem):
        layers = row.layers
        cost = int(row.costs[layers[0]])
        if row.fixed_costs.any() or not np.all(row.costs[layers] == cost):
            return None
        family.append(LaminarSet(row, layers, cost, row.budget // cost))
    family.sort(key=lambda own: len(own.layers))
    # From the outside in, each set must lie within one set of those that came before it.
    innermost = np.full(len(problem.names), -1, dtype=np.int64)
    for n, own in reversed(list(enumerate(family))):
        if len(set(innermost[own.layers].tolist())) > 1:
            return None
        innermost[own.layers] = n
    return family


def exchange_optimal(problem: Problem, ranks: IntArray) -> bool:
    """Whether no single exchange of ranks improves on these, which then are optimal.

    An independent set of a matroid is of greatest weight if and only if no element can be added,
    dropped or swapped for another with profit (Rado 1957, Edmonds 1971). In a laminar matroid a
    new element can replace exactly those within the smallest full set that it belongs to.
    Comparisons of doubles are exact.

    Args:
        problem: any; the answer is False for one that is no laminar matroid.
        ranks: a feasible rank vector, int64 by layer.
    """
    family = laminar_family(problem)
    if family is None:
        return False
    assert problem.gains is not None
    last = np.full(len(ranks), np.inf)  # with nothing to give back
    held = np.flatnonzero(ranks > problem.lower)
    last[held] = problem.gains.at(held, ranks[held])
    next_gain = np.full(len(ranks), -np.inf)
    room = np.flatnonzero(ranks < problem.upper)
    next_gain[room] = problem.gains.at(room, ranks[room] + 1)
    least = np.zeros(len(ranks))  # with no full set, what is worth nothing is not missed
    for own in reversed(family):
        if int(ranks[own.layers].sum()) >= own.capacity:
            least[own.layers] = float(np.min(last[own.layers]))
    return bool(np.all(next_gain <= least) and np.all(last >= 0))
