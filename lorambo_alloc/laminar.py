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
    """The budgets that some rank vector within the limits would break."""
    return [row for row in problem.rows if row.cost_of(problem.upper) > row.budget]


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
    layers = np.arange(len(ranks), dtype=np.int64)
    last = problem.gains.at(layers, np.maximum(ranks, 1))
    last[ranks == problem.lower] = np.inf  # nothing to give back
    room = ranks < problem.upper
    next_gain = problem.gains.at(layers, np.where(room, ranks + 1, 1))
    next_gain[~room] = -np.inf
    least = np.zeros(len(ranks))  # with no full set, what is worth nothing is not missed
    for own in reversed(family):
        if int(ranks[own.layers].sum()) >= own.capacity:
            least[own.layers] = float(np.min(last[own.layers]))
    return bool(np.all(next_gain <= least) and np.all(last >= 0))
