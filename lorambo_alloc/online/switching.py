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
from lorambo_alloc.online.few_moves import filled_up
from lorambo_alloc.online.limited_search import limited_search
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
        allocation: these ranks, with the certificate: beside any number of moves.
        moved: how many ranks move.
        lost: at most this much is lost beside the best ranks with as few moves as were allowed;
            exact but for the rounding of the gains' and prices' sums.
        limited: whether the number of moves was limited.
    """

    ranks: IntArray
    allocation: Allocation
    moved: int
    lost: Fraction = Fraction(0)
    limited: bool = False

    def notes(self, max_moves: int | None) -> list[str]:
        """What the limit on moves has done, in words."""
        if max_moves is None or not self.limited:
            return []
        if self.moved > max_moves:
            return [
                f"more than {max_moves} {'rank moves' if max_moves == 1 else 'ranks move'}, as no "
                "fewer moves were found that keep to the budget and the limits"
            ]
        most = "1 rank moves" if max_moves == 1 else f"{max_moves} ranks move"
        return [
            f"at most {most}; the best that keep to it gain at most {_at_least(self.lost)} more"
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
    Theorem 1), and none with up to `max_moves` moves gains more than they do by over the price
    times the moves left, plus the certificate's gap. The price is where the best ranks with too
    many moves and those with few enough are worth the same; where others are worth more there, they
    take the place of the former or the latter. If moves are left then, they are used up by single
    steps and exchanges (`filled_up`), and the best ranks are searched for (`limited_search`): where
    there are caps, or too many candidates, what may still be lost is stated instead. Where the
    limits alone force more moves than `max_moves`, the fewest possible are made.

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
        return Move(allocation.ranks, allocation, int(np.abs(allocation.ranks - now).sum()))

    free = solved(0.0)
    if max_moves is None or free.moved <= max_moves:
        return free
    problem, allowed = free.allocation.problem, max_moves
    highest = _prohibitive(gains, now, switching)
    least = Move(now, free.allocation, 0)
    if not _feasible(problem, now):
        least = solved(highest)
        allowed = max(max_moves, least.moved)
        if free.moved <= allowed:
            return replace(free, limited=True)
    scale = max(float(np.max(np.abs(row))) for row in gains)
    found = _priced(
        solved, free, least, allowed, scale, lambda ranks: _gained(gains, now, switching, ranks)
    )
    price, found = (highest, solved(highest)) if found is None else found
    ranks = filled_up(problem, found.ranks, now, allowed - found.moved)
    lost = Fraction(price) * (allowed - found.moved) + Fraction(found.allocation.certificate.gap)
    lost = max(Fraction(0), lost - problem.value_difference(ranks, found.ranks))
    if lost and not problem.caps:
        prices = found.allocation.certificate.price, price
        better = limited_search(problem, now, allowed, prices, ranks)
        if better is not None:
            ranks, lost = better, Fraction(0)
    moved = int(np.abs(ranks - now).sum())
    return Move(ranks, _with_ranks(free.allocation, ranks), moved, lost, limited=True)


def _priced(
    solved: Callable[[float], Move],
    many: Move,
    few: Move,
    max_moves: int,
    scale: float,
    gained: Callable[[IntArray], float],
) -> tuple[float, Move] | None:
    """A price of a move, and the best ranks at it, which make at most `max_moves`.

    None where none was found in a number of tries.

    Args:
        solved: the best ranks at a price.
        many: those at 0, which make more moves.
        few: those with the fewest.
        max_moves: see above.
        scale: of a rank's gain.
        gained: what ranks gain over the present ones.
    """
    best: tuple[float, Move] | None = None
    few_moved, few_gained = few.moved, gained(few.ranks)
    many_moved, many_gained = many.moved, gained(many.ranks)
    above = _ABOVE
    for _ in range(_SOLUTIONS):
        even = max(0.0, (many_gained - few_gained) / (many_moved - few_moved))
        price = even + above * (even or scale)
        found = solved(price)
        if found.moved > max_moves:
            if found.moved < many_moved:
                many_moved, many_gained = found.moved, gained(found.ranks)
                above = _ABOVE
            else:
                above *= 256
            continue
        if best is None or found.moved >= best[1].moved:
            best = price, found
        if found.moved == max_moves or found.moved <= few_moved:
            break
        few_moved, few_gained = found.moved, gained(found.ranks)
    return best


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
    problem = allocation.problem
    if not _feasible(problem, now) or problem.value_difference(now, allocation.ranks) < 0:
        return allocation
    return _with_ranks(allocation, now)


def _with_ranks(allocation: Allocation, ranks: IntArray) -> Allocation:
    """Other feasible ranks, with the same proved bound."""
    problem, certificate = allocation.problem, allocation.certificate
    if problem.value_difference(ranks, allocation.ranks):
        value = problem.value_of(ranks)
        gap = Fraction(certificate.upper_bound) - value
        certificate = replace(
            certificate,
            value=round_down(value),
            gap=round_up(gap),
            status="gap_certified" if gap else "optimal_exact",
        )
    return Allocation(problem, ranks, certificate)


def _at_least(number: Fraction) -> str:
    """Four digits, rounded up."""
    upwards = Context(prec=4, rounding=ROUND_CEILING)
    return f"{float(upwards.create_decimal_from_float(round_up(number))):.4g}"
