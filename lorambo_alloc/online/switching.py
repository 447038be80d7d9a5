"""The best move from given ranks: what is gained, less what moving costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.curves import GainCurves
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solve import solve

ProblemOf = Callable[[GainCurves], Problem]
"""From curves to the problem with everything else that it needs."""

_HALVINGS = 60  # of the price that limits the number of moves; it is that precise then


@dataclass(frozen=True)
class Move:
    """The best ranks, seen from those that are there.

    Attributes:
        ranks: int64 by layer.
        allocation: these ranks, or others of exactly the same value, with the certificate.
        raised: what a moved rank was charged beyond its own price, so that few enough move; units
            of gain.
        moved: how many ranks move.
    """

    ranks: IntArray
    allocation: Allocation
    raised: float
    moved: int


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

    At most `max_moves` ranks move: each is charged a price more, found by halving, at which few
    enough do. Ranks that are best at that price are best among all with no more moves than they
    make (Everett 1963, Theorem 1), and none with up to `max_moves` moves gains more than they do by
    over raised * (max_moves - moved), plus the certificate's gap. Where the limits alone force more
    moves, these are made.

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
        allocation = solve(problem_of(curves), time_limit=time_limit)
        ranks = _or_stay(allocation, now)
        return Move(ranks, allocation, more, int(np.abs(ranks - now).sum()))

    best = solved(0.0)
    if max_moves is None or best.moved <= max_moves:
        return best
    low, high = 0.0, 2 * max(float(np.max(np.abs(row), initial=0.0)) for row in gains)
    best = solved(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if best.moved >= max_moves or not low < middle < high:
            break
        found = solved(middle)
        if found.moved <= max_moves:
            best, high = found, middle
        else:
            low = middle
    return best


def _or_stay(allocation: Allocation, now: IntArray) -> IntArray:
    """The ranks of an allocation, or the present ones where these are worth no less."""
    problem = allocation.problem
    try:
        problem.check(now)
    except ValueError:
        return allocation.ranks
    return now if problem.value_difference(allocation.ranks, now) <= 0 else allocation.ranks
