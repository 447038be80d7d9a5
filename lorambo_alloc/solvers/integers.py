"""The core program in Python's integers, for small problems that 64 bits do not hold.

Costs near 2^53, or gains of very different scales, leave no fixed point in which price and gains
are exact. With a few thousand options that does not matter: integers of any length are quick
enough.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem

_MAX_OPTIONS = 4096
_MAX_STEPS = 500_000  # extensions of states; about a second
_PLACES = 1074  # every double is a whole multiple of 2^-1074


@dataclass(frozen=True)
class _Option:
    """A rank of a variable: what it costs, and its gain less that cost at the price."""

    cost: int
    score: int
    rank: int


@dataclass(frozen=True)
class _Trail:
    """The deviations that led to a state, last one first."""

    variable: int
    rank: int
    before: _Trail | None


def best_in_integers(
    problem: Problem, price: float, ranks: IntArray, deadline: float | None = None
) -> IntArray | None:
    """An optimal rank vector; None if the problem is too large for this.

    Args:
        problem: any problem with gains.
        price: per unit of cost, >= 0; a good one keeps the search small.
        ranks: a feasible rank vector to improve on.
        deadline: `time.monotonic()` value at which to give up.
    """
    groups = problem.variables
    if sum(len(problem.allowed_ranks(group[0])) for group in groups) > _MAX_OPTIONS:
        return None
    units = _integer(price)
    options = [_options(problem, group, units) for group in groups]
    best = [max(own, key=lambda option: (option.score, -option.cost)) for own in options]
    bound = sum(option.score for option in best) + units * problem.spendable
    loss = bound - int(problem.value_of(ranks) * (1 << _PLACES))
    left = problem.spendable - sum(option.cost for option in best)
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
    left: int,
    price: int,
    loss: int,
    deadline: float | None,
) -> tuple[bool, _Trail | None]:
    """Whether all was searched, and the deviations that lose least, if less than the loss."""
    # Per variable: move of the cost, penalty and rank of each deviation that may matter.
    deviations = [
        [
            (option.cost - top.cost, top.score - option.score, option.rank)
            for option in own
            if option.cost != top.cost and top.score - option.score < loss
        ]
        for own, top in zip(options, best, strict=True)
    ]
    spend = [min((p // m for m, p, _ in own if m > 0), default=loss) for own in deviations]
    free = [min((p // -m for m, p, _ in own if m < 0), default=loss) for own in deviations]
    order = sorted(range(len(best)), key=lambda v: min(spend[v], free[v]))
    spend_ahead = [*accumulate((spend[v] for v in reversed(order)), min, initial=price)][::-1]
    free_ahead = [*accumulate((free[v] for v in reversed(order)), min, initial=loss)][::-1]
    found: _Trail | None = None
    states: dict[int, tuple[int, _Trail | None]] = {0: (0, None)}
    if 0 <= left and price * left < loss:
        loss = price * left  # the best responses themselves; an empty trail stands for them
        found = _Trail(order[0], best[order[0]].rank, None) if order else None
    steps = 0
    for depth, v in enumerate(order, start=1):
        steps += len(states) * (len(deviations[v]) + 1)
        late = deadline is not None and time.monotonic() > deadline
        if steps > _MAX_STEPS or late:
            return False, None
        grown: dict[int, tuple[int, _Trail | None]] = {}
        for move, (penalty, trail) in states.items():
            for change, extra, rank in ((0, 0, -1), *deviations[v]):
                at, lost = move + change, penalty + extra
                rest = left - at
                ahead = spend_ahead[depth] * rest if rest >= 0 else free_ahead[depth] * -rest
                if lost + ahead >= loss:
                    continue
                after = trail if rank < 0 else _Trail(v, rank, trail)
                if rest >= 0 and lost + price * rest < loss:
                    loss, found = lost + price * rest, after
                if at not in grown or lost < grown[at][0]:
                    grown[at] = lost, after
        # A state that costs more must be worth more.
        states, least = {}, None
        for at in sorted(grown):
            shortfall = grown[at][0] - price * at
            if least is None or shortfall < least:
                states[at], least = grown[at], shortfall
    return True, found


def _options(problem: Problem, group: tuple[int, ...], price: int) -> list[_Option]:
    """The ranks of a variable that the budget can hold, exactly scored."""
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
    costs = [problem.cost_at(group, rank) for rank in allowed]
    return [
        _Option(cost, total - price * cost, rank)
        for cost, total, rank in zip(costs, totals, allowed, strict=True)
        if cost <= problem.spendable
    ]


def _integer(value: float) -> int:
    """A double in units of 2^-1074."""
    return int(Fraction(value) * (1 << _PLACES))
