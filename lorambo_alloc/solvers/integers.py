"""The core program in Python's integers, for small problems that 64 bits do not hold.

Costs near 2^53, or gains of very different scales, leave no fixed point in which price and gains
are exact. With a few thousand options that does not matter: integers of any length are quick
enough.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from operator import le, mul, sub

from lorambo_alloc.caps import Row
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem

_MAX_OPTIONS = 4096
_MAX_STEPS = 500_000  # extensions of states; about a second
_PLACES = 1074  # every double is a whole multiple of 2^-1074


@dataclass(frozen=True)
class _Option:
    """A rank of a variable: what it costs in each row, and its gain less charges at the prices."""

    costs: tuple[int, ...]
    score: int
    rank: int


@dataclass(frozen=True)
class _Trail:
    """The deviations that led to a state, last one first."""

    variable: int
    rank: int
    before: _Trail | None


@dataclass(frozen=True)
class _Deviation:
    """An option that is no best response: the change of the costs, and the penalty."""

    move: tuple[int, ...]
    penalty: int
    rank: int


def best_in_integers(
    problem: Problem,
    rows: Sequence[Row],
    prices: Sequence[float],
    ranks: IntArray,
    deadline: float | None = None,
) -> IntArray | None:
    """An optimal rank vector; None if the problem is too large for this.

    Args:
        problem: any problem with gains.
        rows: its budgets; those that cannot bind may be left out.
        prices: one a row, >= 0; good ones keep the search small.
        ranks: a feasible rank vector to improve on.
        deadline: `time.monotonic()` value at which to give up.
    """
    groups = problem.variables
    if sum(len(problem.allowed_ranks(group[0])) for group in groups) > _MAX_OPTIONS:
        return None
    units = list(map(_integer, prices))
    budgets = [min(row.budget, row.cost_of(problem.upper)) for row in rows]
    options = [_options(problem, group, rows, units, budgets) for group in groups]
    best = [max(own, key=lambda option: (option.score, -option.rank)) for own in options]
    bound = sum(option.score for option in best) + sum(map(mul, units, budgets))
    loss = bound - int(problem.value_of(ranks) * (1 << _PLACES))
    left = tuple(
        budget - sum(option.costs[k] for option in best) for k, budget in enumerate(budgets)
    )
    complete, trail = _search(options, best, left, units, loss, deadline)
    if not complete:
        return None
    if trail is None:
        return ranks
    chosen = [option.rank for option in best]
    while trail is not None:
        chosen[trail.variable] = trail.rank
        trail = trail.before
    result = ranks.copy()
    for group, rank in zip(groups, chosen, strict=True):
        result[list(group)] = rank
    return result


def _search(
    options: list[list[_Option]],
    best: list[_Option],
    left: tuple[int, ...],
    prices: list[int],
    loss: int,
    deadline: float | None,
) -> tuple[bool, _Trail | None]:
    """Whether all was searched, and the deviations that lose least, if less than the loss."""
    rows = range(len(prices))
    deviations = [
        [
            _Deviation(tuple(map(sub, option.costs, top.costs)), penalty, option.rank)
            for option in own
            if option.rank != top.rank and (penalty := top.score - option.score) < loss
        ]
        for own, top in zip(options, best, strict=True)
    ]
    # By variable and row, the least penalty per unit of budget spent, and per unit freed.
    spend = [
        [min((d.penalty // d.move[k] for d in own if d.move[k] > 0), default=loss) for k in rows]
        for own in deviations
    ]
    free = [
        [min((d.penalty // -d.move[k] for d in own if d.move[k] < 0), default=loss) for k in rows]
        for own in deviations
    ]
    order = sorted(range(len(best)), key=lambda v: min(*spend[v], *free[v]))
    spend_ahead, free_ahead = [list(prices)], [[loss] * len(prices)]
    for v in reversed(order):
        spend_ahead.append(list(map(min, spend_ahead[-1], spend[v])))
        free_ahead.append(list(map(min, free_ahead[-1], free[v])))
    spend_ahead.reverse()
    free_ahead.reverse()
    found: _Trail | None = None
    states: dict[tuple[int, ...], tuple[int, _Trail | None]] = {left: (0, None)}
    if min(left) >= 0 and sum(map(mul, prices, left)) < loss:
        loss = sum(map(mul, prices, left))
        # The best responses themselves; an empty trail stands for them.
        found = _Trail(order[0], best[order[0]].rank, None) if order else None
    stay = _Deviation(tuple(0 for _ in rows), 0, -1)
    steps = 0
    for depth, v in enumerate(order, start=1):
        steps += len(states) * (len(deviations[v]) + 1)
        late = deadline is not None and time.monotonic() > deadline
        if steps > _MAX_STEPS or late:
            return False, None
        grown: dict[tuple[int, ...], tuple[int, _Trail | None]] = {}
        spending, freeing = spend_ahead[depth], free_ahead[depth]
        for before, (penalty, trail) in states.items():
            for deviation in (stay, *deviations[v]):
                rest = tuple(map(sub, before, deviation.move))
                lost = penalty + deviation.penalty
                # Each row alone loses at least this on the way to its budget.
                ahead = max(
                    spending[k] * r if (r := rest[k]) >= 0 else freeing[k] * -r for k in rows
                )
                if lost + ahead >= loss:
                    continue
                after = trail if deviation.rank < 0 else _Trail(v, deviation.rank, trail)
                if min(rest) >= 0 and (total := lost + sum(map(mul, prices, rest))) < loss:
                    loss, found = total, after
                if rest not in grown or lost < grown[rest][0]:
                    grown[rest] = lost, after
        states = grown if len(prices) > 1 else _undominated(grown, prices[0])
    return True, found


def _undominated(
    states: dict[tuple[int, ...], tuple[int, _Trail | None]], price: int
) -> dict[tuple[int, ...], tuple[int, _Trail | None]]:
    """With one row: a state that costs more must be worth more."""
    kept: dict[tuple[int, ...], tuple[int, _Trail | None]] = {}
    least: int | None = None
    for rest in sorted(states, reverse=True):
        shortfall = states[rest][0] + price * rest[0]
        if least is None or shortfall < least:
            kept[rest], least = states[rest], shortfall
    return kept


def _options(
    problem: Problem,
    group: tuple[int, ...],
    rows: Sequence[Row],
    prices: list[int],
    budgets: list[int],
) -> list[_Option]:
    """The ranks of a variable that the budgets can hold, exactly scored."""
    allowed: list[int] = problem.allowed_ranks(group[0]).tolist()
    totals = [0] * len(allowed)
    for i in group:
        if problem.gains is not None:
            gains: list[float] = problem.gains.row(i)[: allowed[-1]].tolist()
            curve = [*accumulate(map(_integer, gains), initial=0)]
        else:
            assert problem.totals is not None
            curve = [_integer(total) for total in problem.totals.row(i).tolist()]
        totals = [total + curve[rank] for total, rank in zip(totals, allowed, strict=True)]
    options: list[_Option] = []
    for total, rank in zip(totals, allowed, strict=True):
        costs = tuple(row.cost_at(group, rank) for row in rows)
        if all(map(le, costs, budgets)):
            options.append(_Option(costs, total - sum(map(mul, prices, costs)), rank))
    return options


def _integer(value: float) -> int:
    """A double in units of 2^-1074."""
    return int(Fraction(value) * (1 << _PLACES))
