"""Rational arithmetic for certificates: bounds and a search that owe nothing to the solvers.

Doubles are whole multiples of 2^-1074, so that every quantity here is a Python integer in that
unit. Doubles as such only narrow down which options are looked at exactly, with a margin for
their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

import numpy as np

from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

PLACES = 1074
SCALE = 1 << PLACES


class CertificateError(ValueError):
    """A certificate claims what is not so."""


@dataclass(frozen=True)
class Response:
    """One variable at a price: its exact best score, and what is needed to list the others."""

    problem: Problem
    group: tuple[int, ...]
    allowed: IntArray
    scores: FloatArray
    error: float
    value: int
    best: int
    best_cost: int

    def alternatives(self, price: int, window: Fraction) -> list[tuple[int, int]]:
        """Cost change and penalty of every option less than the window from the best."""
        limit = int(window * SCALE)
        reach = round_up(window) * (1 + 2.0**-40) + 4 * self.error
        cut = float(np.max(self.scores)) - reach
        near = self.allowed[self.scores >= cut].tolist()
        result: list[tuple[int, int]] = []
        for rank, total in zip(near, exact_totals(self.problem, self.group, near), strict=True):
            cost = self.problem.cost_at(self.group, rank)
            penalty = self.best - (total - price * cost)
            if penalty < limit and cost != self.best_cost:
                result.append((cost - self.best_cost, penalty))
        return result


def responses(
    problem: Problem, ranks: IntArray, price: float, rank_price: float = 0.0
) -> Iterator[Response]:
    """Each variable's best response to the prices, exactly; doubles only narrow the choice.

    Args:
        problem: a problem with gains.
        ranks: whose value to sum up on the way.
        price: per unit of cost.
        rank_price: per rank of a layer.
    """
    price_units, rank_units = integer(price), integer(rank_price)
    least = [
        problem.cost_at(group, int(problem.allowed_ranks(group[0])[0]))
        for group in problem.variables
    ]
    spare = problem.budget - sum(least)
    for group, own in zip(problem.variables, least, strict=True):
        unit = sum(int(problem.costs[i]) for i in group)
        fixed = sum(int(problem.fixed_costs[i]) for i in group)
        # What does not fit beside the least ranks of all others is in no feasible solution.
        most = (spare + own - fixed) // unit
        allowed = problem.allowed_ranks(group[0])
        allowed = allowed[(allowed <= min(most, 1 << 62)) | (allowed == allowed[0])]
        curve, magnitude = np.zeros(len(allowed)), 0.0
        for i in group:
            row = problem.curve(i)
            curve += row[allowed]
            magnitude += float(np.abs(np.diff(row)).sum()) + float(np.abs(row).max())
        cost = float(unit) * allowed + float(fixed) * (allowed > 0)
        with np.errstate(over="ignore", invalid="ignore"):
            charge = rank_price * len(group) * allowed
            scores = curve - price * cost - charge
        if not np.all(np.isfinite(scores)):
            raise CertificateError(f"the price {price!r} (or {rank_price!r} per rank) overflows")
        terms = int(allowed[-1]) + len(group) + 8
        error = (
            2.0**-52 * terms * (magnitude + price * float(cost[-1]) + abs(float(charge[-1])))
            + 2.0**-1070
        )
        near = allowed[scores >= np.max(scores) - 4 * error].tolist()
        mine = int(ranks[group[0]])
        totals = exact_totals(problem, group, [*near, mine])
        exact = [
            (
                total
                - price_units * (cost := problem.cost_at(group, rank))
                - rank_units * len(group) * rank,
                -cost,
            )
            for rank, total in zip(near, totals, strict=False)
        ]
        best, minus_cost = max(exact)
        yield Response(problem, group, allowed, scores, error, totals[-1], best, -minus_cost)


def better_exists(
    classes: list[list[tuple[int, int]]], left: int, price: int, window: int, effort: int
) -> bool | None:
    """Whether some choice of one option a class loses less than the window; None: too long.

    A plain dynamic program over the change of cost, one class after another, in integers.

    Args:
        classes: per class the change of cost and the penalty of each deviation.
        left: budget that no deviation at all leaves over.
        price: loss per unit of budget left over.
        window: losses below this are what is looked for.
        effort: how many states to look at before giving up.
    """
    # All deviations move the cost by multiples of a divisor: what does not divide stays unspent.
    divisor = gcd(*(change for options in classes for change, _ in options))
    unspent = left % divisor if divisor else max(left, 0)
    left -= unspent
    window -= price * unspent
    if window <= 0:
        return False
    unlimited = window + 1
    slopes = [
        (
            min((p // d for d, p in options if d > 0), default=unlimited),
            min((p // -d for d, p in options if d < 0), default=unlimited),
        )
        for options in classes
    ]
    order = sorted(range(len(classes)), key=lambda n: min(slopes[n]))
    spend, free = [price], [unlimited]
    for n in reversed(order):
        spend.append(min(spend[-1], slopes[n][0]))
        free.append(min(free[-1], slopes[n][1]))
    spend.reverse()
    free.reverse()
    states = {0: 0}
    if 0 <= left and price * left < window:
        return True
    looked = 0
    for depth, n in enumerate(order, start=1):
        fresh: dict[int, int] = {}
        for move, penalty in states.items():
            for change, extra in ((0, 0), *classes[n]):
                total, at = penalty + extra, move + change
                rest = left - at
                bound = total + (spend[depth] * rest if rest >= 0 else free[depth] * -rest)
                if bound >= window:
                    continue
                if rest >= 0 and total + price * rest < window:
                    return True
                if total < fresh.get(at, window):
                    fresh[at] = total
        looked += len(states) * (len(classes[n]) + 1)
        if looked > effort:
            return None
        states, least = {}, None
        for at in sorted(fresh):
            shortfall = fresh[at] - price * at
            if least is None or shortfall < least:
                states[at], least = fresh[at], shortfall
    return False


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
    best = sum(r.best for r in responses(problem, ranks, price, rank_price))
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
