"""Rational arithmetic for certificates: bounds and a search that owe nothing to the solvers.

Doubles are whole multiples of 2^-1074, so that every quantity here is a Python integer in that
unit. Doubles as such only narrow down which options are looked at exactly, with a margin for
their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from operator import mul, sub

import numpy as np

from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.caps import Row
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

PLACES = 1074
SCALE = 1 << PLACES


class CertificateError(ValueError):
    """A certificate claims what is not so."""


@dataclass(frozen=True)
class Charges:
    """What ranks are charged at some prices, exactly, in units of 2^-1074.

    Attributes:
        per_rank: by layer, for each rank.
        fixed: by layer, for a rank above 0.
    """

    per_rank: list[int]
    fixed: list[int]

    @classmethod
    def of(
        cls,
        problem: Problem,
        prices: Sequence[float],
        rank_price: float = 0.0,
        weights: Sequence[float] = (),
    ) -> Charges:
        """The charges of prices.

        Args:
            problem: whose rows are priced.
            prices: one a row: the budget's, then those of the caps.
            rank_price: for every rank of a layer.
            weights: by layer, for each rank; none by default.
        """
        per_rank = [integer(rank_price)] * len(problem.names)
        fixed = [0] * len(problem.names)
        for row, price in zip(problem.rows, map(integer, prices), strict=True):
            if not price:
                continue
            costs, own = row.costs.tolist(), row.fixed_costs.tolist()
            for i in row.layers.tolist():
                per_rank[i] += price * costs[i]
                fixed[i] += price * own[i]
        for i, weight in enumerate(weights):
            per_rank[i] += integer(weight)
        return cls(per_rank, fixed)

    def at(self, group: tuple[int, ...], rank: int) -> int:
        """What a rank is charged in all layers of a group together."""
        total = sum(self.per_rank[i] for i in group) * rank
        return total + (sum(self.fixed[i] for i in group) if rank else 0)


@dataclass(frozen=True)
class Response:
    """One variable at some prices: its exact best score, and what is needed to list the others.

    Attributes:
        group: the variable's layers.
        value: F of the rank vector in question.
        score: its F less charges.
        best: the best F less charges.
        best_rank: which rank has it (the smallest of equals).
    """

    problem: Problem
    charges: Charges
    group: tuple[int, ...]
    allowed: IntArray
    scores: FloatArray
    error: float
    value: int
    score: int
    best: int
    best_rank: int

    def alternatives(self, window: Fraction) -> list[tuple[int, int]]:
        """Rank and penalty of every other option less than the window from the best."""
        limit = int(window * SCALE)
        reach = round_up(window) * (1 + 2.0**-40) + 4 * self.error
        cut = float(np.max(self.scores)) - reach
        near = self.allowed[self.scores >= cut].tolist()
        result: list[tuple[int, int]] = []
        for rank, total in zip(near, exact_totals(self.problem, self.group, near), strict=True):
            penalty = self.best - (total - self.charges.at(self.group, rank))
            if penalty < limit and rank != self.best_rank:
                result.append((rank, penalty))
        return result

    def moves(self, rows: Sequence[Row], window: Fraction) -> list[tuple[tuple[int, ...], int]]:
        """Changes of the rows' costs, and the penalty, of every alternative that changes one."""
        own = [row.cost_at(self.group, self.best_rank) for row in rows]
        moves = (
            (tuple(row.cost_at(self.group, rank) - o for row, o in zip(rows, own, strict=True)), p)
            for rank, p in self.alternatives(window)
        )
        return [move for move in moves if any(move[0])]


def responses(problem: Problem, ranks: IntArray, charges: Charges) -> Iterator[Response]:
    """Each variable's best response to the charges, exactly; doubles only narrow the choice.

    Args:
        problem: a problem with gains.
        ranks: whose value to sum up on the way.
        charges: what ranks are charged.
    """
    groups = problem.variables
    least = [int(problem.allowed_ranks(group[0])[0]) for group in groups]
    # What does not fit beside the least ranks of all others is in no feasible solution.
    spare = [row.budget - row.cost_of(problem.lower) for row in problem.rows]
    for group, lowest in zip(groups, least, strict=True):
        allowed = problem.allowed_ranks(group[0])
        for row, left in zip(problem.rows, spare, strict=True):
            unit = sum(int(row.costs[i]) for i in group)
            if unit:
                fixed = sum(int(row.fixed_costs[i]) for i in group)
                most = (left + row.cost_at(group, lowest) - fixed) // unit
                allowed = allowed[(allowed <= min(most, 1 << 62)) | (allowed == lowest)]
        curve, magnitude = np.zeros(len(allowed)), 0.0
        for i in group:
            own = problem.curve(i)
            curve += own[allowed]
            magnitude += float(np.abs(np.diff(own)).sum()) + float(np.abs(own).max())
        try:
            # Division of integers rounds correctly, however long they are.
            per_rank = sum(charges.per_rank[i] for i in group) / SCALE
            once = sum(charges.fixed[i] for i in group) / SCALE
        except OverflowError:
            per_rank = once = math.inf
        with np.errstate(over="ignore", invalid="ignore"):
            charge = per_rank * allowed + once * (allowed > 0)
            scores = curve - charge
        if not np.all(np.isfinite(scores)):
            raise CertificateError(f"layer {problem.names[group[0]]!r}: a price overflows")
        terms = int(allowed[-1]) + len(group) + 8
        charged = abs(per_rank) * float(allowed[-1]) + abs(once)
        error = 2.0**-52 * terms * (magnitude + charged) + 2.0**-1070
        near = allowed[scores >= np.max(scores) - 4 * error].tolist()
        mine = int(ranks[group[0]])
        totals = exact_totals(problem, group, [*near, mine])
        exact = [
            (total - charges.at(group, rank), -rank)
            for rank, total in zip(near, totals, strict=False)
        ]
        best, minus_rank = max(exact)
        score = totals[-1] - charges.at(group, mine)
        yield Response(
            problem, charges, group, allowed, scores, error, totals[-1], score, best, -minus_rank
        )


def lefts_and_prices(
    rows: Sequence[Row], prices: Sequence[float], answers: Sequence[Response]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """By row, what the best responses leave over (it may be negative), and the exact price."""
    lefts = (row.budget - sum(row.cost_at(r.group, r.best_rank) for r in answers) for row in rows)
    return tuple(lefts), tuple(map(integer, prices))


def better_exists(
    classes: list[list[tuple[tuple[int, ...], int]]],
    left: tuple[int, ...],
    prices: tuple[int, ...],
    window: int,
    effort: int,
) -> bool | None:
    """Whether some choice of one option a class loses less than the window; None: too long.

    A plain dynamic program over the changes of the costs, one class after another, in integers.

    Args:
        classes: per class the change of the cost in each row and the penalty of each deviation.
        left: by row, the budget that no deviation at all leaves over.
        prices: by row, the loss per unit of budget left over.
        window: losses below this are what is looked for.
        effort: how many states to look at before giving up.
    """
    rows = range(len(left))
    rests: list[int] = []
    for k in rows:
        # All deviations move a cost by multiples of a divisor: what does not divide is unspent.
        divisor = gcd(*(change[k] for options in classes for change, _ in options))
        unspent = left[k] % divisor if divisor else max(left[k], 0)
        rests.append(left[k] - unspent)
        window -= prices[k] * unspent
    if window <= 0:
        return False
    # By row and class, the least penalty per unit spent and per unit freed.
    unlimited = window + 1
    slopes = [
        [
            (
                min((p // d[k] for d, p in options if d[k] > 0), default=unlimited),
                min((p // -d[k] for d, p in options if d[k] < 0), default=unlimited),
            )
            for k in rows
        ]
        for options in classes
    ]
    order = sorted(range(len(classes)), key=lambda n: min(map(min, slopes[n])))
    spend, free = [list(prices)], [[unlimited] * len(prices)]
    for n in reversed(order):
        spend.append([min(spend[-1][k], slopes[n][k][0]) for k in rows])
        free.append([min(free[-1][k], slopes[n][k][1]) for k in rows])
    spend.reverse()
    free.reverse()
    states: dict[tuple[int, ...], int] = {tuple(rests): 0}
    if all(rest >= 0 for rest in rests) and sum(map(mul, prices, rests)) < window:
        return True
    stay = tuple(0 for _ in rows)
    looked = 0
    for depth, n in enumerate(order, start=1):
        fresh: dict[tuple[int, ...], int] = {}
        spending, freeing = spend[depth], free[depth]
        for rest, penalty in states.items():
            for change, extra in ((stay, 0), *classes[n]):
                total = penalty + extra
                after = tuple(map(sub, rest, change))
                # Each row alone loses at least this on the way to its budget.
                ahead = max(
                    spending[k] * r if (r := after[k]) >= 0 else freeing[k] * -r for k in rows
                )
                if total + ahead >= window:
                    continue
                if min(after) >= 0 and total + sum(map(mul, prices, after)) < window:
                    return True
                if total < fresh.get(after, window):
                    fresh[after] = total
        looked += len(states) * (len(classes[n]) + 1)
        if looked > effort:
            return None
        states = fresh if len(left) > 1 else _undominated(fresh, prices[0])
    return False


def _undominated(states: dict[tuple[int, ...], int], price: int) -> dict[tuple[int, ...], int]:
    """With one row: a state that has spent more must be worth more."""
    kept: dict[tuple[int, ...], int] = {}
    least: int | None = None
    for rest in sorted(states, reverse=True):
        shortfall = states[rest] + price * rest[0]
        if least is None or shortfall < least:
            kept[rest], least = states[rest], shortfall
    return kept


def exact_totals(problem: Problem, group: tuple[int, ...], ranks: list[int]) -> list[int]:
    """F at some ranks, summed over the group, in units of 2^-1074."""
    totals = [0] * len(ranks)
    for i in group:
        if problem.gains is None:
            assert problem.totals is not None
            row = problem.totals.row(i)
            for n, rank in enumerate(ranks):
                totals[n] += integer(float(row[rank]))
            continue
        gains = problem.gains.row(i)
        running, reached = 0, 0
        for n in sorted(range(len(ranks)), key=ranks.__getitem__):
            running += sum(map(integer, gains[reached : ranks[n]].tolist()))
            reached = max(reached, ranks[n])
            totals[n] += running
    return totals


def integer(value: float) -> int:
    """A double in units of 2^-1074, exactly."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (PLACES - denominator.bit_length() + 1)


def two_price_bound(
    problem: Problem, ranks: IntArray, prices: tuple[float, float], waste: int
) -> Fraction:
    """A bound by a price per unit of cost and a price per rank, exactly.

    A rank price >= 0 comes with the most ranks that the budget holds; one below 0 with the fewest
    ranks that cost the budget less `waste`.

    Args:
        problem: with single ranks of descending gain.
        ranks: a rank vector (any).
        prices: per unit of cost, >= 0, and per rank.
        waste: how much of the budget a solution may leave over.
    """
    price, rank_price = prices
    unpriced = [0.0] * len(problem.caps)
    charges = Charges.of(problem, [price, *unpriced], rank_price)
    best = sum(response.best for response in responses(problem, ranks, charges))
    # Counted here once more, so that nothing rests on the solvers' own count.
    room = list(
        zip(problem.costs.tolist(), problem.lower.tolist(), problem.upper.tolist(), strict=True)
    )
    count = sum(low for _, low, _ in room)
    left = problem.budget - sum(cost * low for cost, low, _ in room)
    if rank_price >= 0:
        for cost, low, high in sorted(room):
            step = min(high - low, left // cost)
            count += step
            left -= step * cost
            if step < high - low:
                break
    else:
        left -= waste
        for cost, low, high in sorted(room, reverse=True):
            if left <= 0:
                break
            step = min(high - low, -(-left // cost))
            count += step
            left -= step * cost
    units = best + integer(price) * problem.budget + integer(rank_price) * count
    return Fraction(units, SCALE)


def value_step(problem: Problem) -> Fraction:
    """The greatest number that all gains, hence all values, are whole multiples of."""
    assert problem.gains is not None
    step = 0
    for i in range(len(problem.names)):
        step = gcd(step, *map(integer, problem.gains.row(i).tolist()))
    return Fraction(step, SCALE)
