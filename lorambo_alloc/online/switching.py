"""The best move from given ranks: what is gained, less what moving costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context
from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import round_down, round_up
from lorambo_alloc.curves import GainCurves
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solve import solve

ProblemOf = Callable[[GainCurves], Problem]
"""From curves to the problem with everything else that it needs."""

_ABOVE = 2.0**-40  # the price at which two moves are worth the same: then fewer are better
_SOLUTIONS = 60  # to find the price that limits the number of moves; some ten do in practice


@dataclass(frozen=True)
class Move:
    """The best ranks, seen from those that are there.

    Attributes:
        ranks: int64 by layer.
        allocation: these ranks, with the certificate.
        raised: what a moved rank was charged beyond its own price, so that few enough move; units
            of gain.
        moved: how many ranks move.
    """

    ranks: IntArray
    allocation: Allocation
    raised: float
    moved: int

    def notes(self, max_moves: int | None) -> list[str]:
        """What the limit on moves has done, in words."""
        if max_moves is None or not (self.raised or self.moved > max_moves):
            return []
        if self.moved > max_moves:
            return [
                f"more than {max_moves} {'rank moves' if max_moves == 1 else 'ranks move'}, as no "
                "fewer moves were found that keep to the budget and the limits"
            ]
        lost = Fraction(self.raised) * (max_moves - self.moved)
        lost += Fraction(self.allocation.certificate.gap)
        return [
            f"each moved rank was charged {self.raised:.4g} more, so that at most {max_moves} "
            f"{'moves' if max_moves == 1 else 'move'}; that loses at most {_at_least(lost)} beside "
            "the best such move"
        ]


def best_move(
    names: Sequence[str],
    gains: Sequence[FloatArray],
    now: IntArray,
    switching: FloatArray,
    problem_of: ProblemOf,
    *,
    max_moves: int | None = None,
    time_limit: float | None = None,
) -> Move:
    """Maximise sum_i F_i(r_i) - s_i |r_i - now_i|, and perhaps with few moves.

    The switching cost is a part of the curve: up to the present rank a rank kept saves s_i, beyond
    it one added costs s_i. So the problem stays one of `solve`, with its certificate, and its value
    is the sum above plus the constant sum_i s_i now_i. Curves that were concave remain so.

    At most `max_moves` ranks move: each is charged a price more, at which few enough do. Ranks that
    are best at that price are best among all with no more moves than they make (Everett 1963,
    Theorem 1), and none with up to `max_moves` moves gains more than they do by over raised *
    (max_moves - moved), plus the certificate's gap. The price is where the best ranks with too many
    moves and those with few enough are worth the same; where others are worth more there, they take
    the place of the former or the latter. Where the limits alone force more moves than `max_moves`,
    the fewest possible are made.

    Gains and prices of single ranks are added in doubles; the solution is exact for these sums.

    Args:
        names: the layers'.
        gains: by layer, those of single ranks; at least one each.
        now: the present ranks, int64 by layer, none longer than its gains.
        switching: s by layer, >= 0.
        problem_of: makes the problem.
        max_moves: see above; None: any number.
        time_limit: seconds for each of the solutions.

    Raises:
        ValueError: as `Problem`.

    References:
        Everett, Generalized Lagrange multiplier method, Operations Research 11, 1963, theorem 1.
    """

    def solved(more: float) -> Move:
        kept: dict[str, FloatArray] = {}
        for i, name in enumerate(names):
            price = switching[i] + more
            kept[name] = gains[i] + np.where(np.arange(len(gains[i])) < now[i], price, -price)
        curves = GainCurves.from_increments(kept)
        allocation = _or_stay(solve(problem_of(curves), time_limit=time_limit), now)
        ranks = allocation.ranks
        return Move(ranks, allocation, more, int(np.abs(ranks - now).sum()))

    free = solved(0.0)
    if max_moves is None or free.moved <= max_moves:
        return free
    best: Move | None = None
    few_moved, few_gained = 0, 0.0  # to stay
    if not _feasible(free.allocation.problem, now):
        best = solved(_prohibitive(gains, now, switching))
        max_moves = max(max_moves, best.moved)
        if free.moved <= max_moves:
            return free
        few_moved, few_gained = best.moved, _gained(gains, now, switching, best.ranks)
    many_moved, many_gained = free.moved, _gained(gains, now, switching, free.ranks)
    scale = max(float(np.max(np.abs(row))) for row in gains)
    above = _ABOVE
    for _ in range(_SOLUTIONS):
        even = max(0.0, (many_gained - few_gained) / (many_moved - few_moved))
        found = solved(even + above * (even or scale))
        if found.moved > max_moves:
            if found.moved < many_moved:
                many_moved, many_gained = found.moved, _gained(gains, now, switching, found.ranks)
                above = _ABOVE
            else:
                above *= 256
            continue
        if best is None or found.moved >= best.moved:
            best = found
        if found.moved == max_moves or found.moved <= few_moved:
            break
        few_moved, few_gained = found.moved, _gained(gains, now, switching, found.ranks)
    return best or solved(_prohibitive(gains, now, switching))


def _gained(
    gains: Sequence[FloatArray], now: IntArray, switching: FloatArray, ranks: IntArray
) -> float:
    """What ranks gain over the present ones, less what moving costs."""
    terms: list[float] = []
    for i in np.flatnonzero(ranks != now).tolist():
        first, last = sorted((int(now[i]), int(ranks[i])))
        sign = 1.0 if ranks[i] > now[i] else -1.0
        terms.extend((sign * gains[i][first:last]).tolist())
        terms.append(-float(switching[i]) * (last - first))
    return math.fsum(terms)


def _prohibitive(gains: Sequence[FloatArray], now: IntArray, switching: FloatArray) -> float:
    """A price of a move above all that any number of moves can gain: the fewest are made."""
    reach = [max(rank, len(row) - rank) for row, rank in zip(gains, now.tolist(), strict=True)]
    total = sum(float(np.abs(row).sum()) for row in gains) + float(switching @ np.array(reach))
    return 2 * total or 1.0


def _feasible(problem: Problem, ranks: IntArray) -> bool:
    try:
        problem.check(ranks)
    except ValueError:
        return False
    return True


def _or_stay(allocation: Allocation, now: IntArray) -> Allocation:
    """The present ranks where these are worth no less than those of an allocation."""
    problem, certificate = allocation.problem, allocation.certificate
    if not _feasible(problem, now):
        return allocation
    more = problem.value_difference(now, allocation.ranks)
    if more < 0:
        return allocation
    if more:  # a time limit ended the search
        value = problem.value_of(now)
        gap = Fraction(certificate.upper_bound) - value
        certificate = replace(
            certificate,
            value=round_down(value),
            gap=round_up(gap),
            status=certificate.status if gap else "optimal_exact",
        )
    return Allocation(problem, now, certificate)


def _at_least(number: Fraction) -> str:
    """Four digits, rounded up."""
    upwards = Context(prec=4, rounding=ROUND_CEILING)
    return f"{float(upwards.create_decimal_from_float(round_up(number))):.4g}"
