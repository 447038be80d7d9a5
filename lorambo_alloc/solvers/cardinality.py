"""A second multiplier, on the number of ranks, for gains that follow the costs.

Where every increment gains its cost plus (or minus) a constant, one price says little: the bound
counts a fraction of a rank that no solution has. But the budget limits the number of ranks, and a
solution better than the incumbent wastes so little budget that it needs a number of them. Either
limit can be priced too:

    value <= sum_i max_r (F_i(r) - p c_i r - q r) + p budget + q n

for q >= 0 with n the most ranks that the budget holds, and for q <= 0 with n the fewest that a
better solution can have.

References:
    Martello and Toth, Upper bounds and algorithms for hard 0-1 knapsack problems, Operations
    Research 45 (1997): cardinality constraints derived from the budget.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.core_program import Class
from lorambo_alloc.solvers.exchange import best_exchange

_BISECTIONS = 64
_ROUNDS = 8  # of exchanges


@dataclass(frozen=True)
class Cut:
    """A bound by two prices.

    Attributes:
        price: gain per reduced unit of cost.
        rank_price: gain per rank.
        ranks: the number of ranks beyond the least ones that the limit allows.
        bound: no solution (better than the incumbent) has a value above this.
    """

    price: float
    rank_price: float
    ranks: int
    bound: Fraction


def most_ranks(costs: IntArray, room: IntArray, budget: int) -> int:
    """The greatest number of ranks that a budget holds.

    Args:
        costs: of one rank, by layer.
        room: how many ranks each layer can take.
        budget: in the units of the costs.
    """
    count = 0
    for i in _by_cost(costs, room):
        step = min(int(room[i]), budget // int(costs[i]))
        count += step
        budget -= step * int(costs[i])
        if step < room[i]:
            break
    return count


def fewest_ranks(costs: IntArray, room: IntArray, cost: int) -> int:
    """The least number of ranks that cost at least so much; the arguments are as above."""
    count = 0
    for i in reversed(_by_cost(costs, room)):
        if cost <= 0:
            break
        step = min(int(room[i]), -(-cost // int(costs[i])))
        count += step
        cost -= step * int(costs[i])
    return count


def _by_cost(costs: IntArray, room: IntArray) -> list[int]:
    """The layers that have room, cheapest first."""
    free = np.flatnonzero(room > 0)
    return free[np.argsort(costs[free], kind="stable")].tolist()


def cardinality_cut(form: ConcaveForm, waste: int, deadline: float | None = None) -> Cut | None:
    """The best bound by a price on the number of ranks, if one of the two limits binds.

    Args:
        form: the problem.
        waste: reduced units of budget that a better solution leaves over at most.
        deadline: `time.monotonic()` value after which to give up.
    """
    costs, room, budget = form.free_ranks()
    taken = int(np.sum(form.relax().ranks - form.problem.lower))
    most = most_ranks(costs, room, budget)
    fewest = fewest_ranks(costs, room, budget - waste)
    if most <= taken:
        limit, least, greatest = most, 0.0, form.largest_gain()
    elif fewest > taken:
        limit, least, greatest = fewest, -form.largest_gain(), 0.0
    else:
        return None
    # The bound is convex in the rank price; its slope is the limit minus the ranks taken.
    low, high = least, greatest
    for _ in range(_BISECTIONS):
        if deadline is not None and time.monotonic() > deadline:
            return None
        middle = (low + high) / 2
        if int(np.sum(form.relax(middle).ranks - form.problem.lower)) >= limit:
            low = middle
        else:
            high = middle
    candidates = dict.fromkeys([low, high, *(_rounded(low, bits) for bits in (12, 24, 36))])
    cuts = [
        Cut(relaxed.price, q, limit, form.bound(relaxed, q) + Fraction(q) * limit)
        for q in candidates
        if least <= q <= greatest
        for relaxed in [form.relax(q)]
    ]
    return min(cuts, key=lambda cut: cut.bound)


def swaps_at_limit(form: ConcaveForm, cut: Cut) -> IntArray | None:
    """Ranks as many as the limit, near-best at the cut's prices, that spend the budget well.

    A heuristic: the break solution, with one rank more where the limit asks for that, and then
    exchanges of equally many ranks given and taken.
    """
    ranks = form.relax().ranks
    missing = cut.ranks - int(np.sum(ranks - form.problem.lower))
    if missing not in (0, 1):
        return None
    costs, room, budget = form.free_ranks()
    least = form.problem.lower
    prices = cut.price * costs + cut.rank_price
    layers = np.arange(len(ranks), dtype=np.int64)
    if missing:
        scores = np.where(ranks < least + room, form.next_gains(ranks) - prices, -np.inf)
        ranks = ranks + (layers == np.argmax(scores))
    spends, frees = ranks < least + room, ranks > least
    # Penalties of one rank more and one less in whole units, as fine as doubles allow.
    more = np.abs(prices - form.next_gains(ranks))
    less = np.abs(form.last_gains(ranks) - prices)
    unit = math.ldexp(max(float(np.max(np.abs(prices), initial=0.0)), cut.price), -44)
    if not unit > 0:
        return None
    classes: list[Class] = []
    for i in layers.tolist():
        cost = int(costs[i])
        options = [(cost, more[i])] * bool(spends[i]) + [(-cost, less[i])] * bool(frees[i])
        moves = np.array([move for move, _ in options], dtype=np.int64)
        penalties = np.array([min(float(penalty) / unit, 2.0**58) for _, penalty in options])
        classes.append(Class(moves, penalties.astype(np.int64)))
    price = max(int(cut.price / unit), 1)
    left = budget - int(np.dot(costs, ranks - least))
    choices = best_exchange(classes, left, price, 1 << 58, 0, rounds=_ROUNDS, balanced=True)
    if choices is None:
        return None
    taken = [
        int(np.sign(group.moves[choice - 1])) if choice else 0
        for group, choice in zip(classes, choices, strict=True)
    ]
    return ranks + np.array(taken, dtype=np.int64)


def _rounded(value: float, bits: int) -> float:
    """The nearest double with so many bits: where gains are whole, the best price often is."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)
