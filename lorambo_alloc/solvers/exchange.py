"""Exchanges of up to four deviations at once, by pairs of pairs.

Where many deviations cost the price nothing (ties), a good answer is one that spends the budget
to the last unit. Among all pairs of a few hundred deviations, two that together fill it can be
found by sorting (Horowitz and Sahni, JACM 21, 1974: two lists for the subset sum).
"""

from __future__ import annotations

import numpy as np

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.solvers.core_program import Class

_DEVIATIONS = 384  # about 74,000 pairs
_PARTNERS = 4  # neighbours in the sorted list that are tried, as the nearest may share a class


def best_exchange(
    classes: list[Class], residual: int, price: int, incumbent: int
) -> list[int] | None:
    """Choices of up to four deviations that lose least, if that is less than the incumbent.

    A heuristic: it looks at the most promising deviations, and for each pair at the partners
    that leave least of the budget.

    Args:
        classes: deviations, most promising first.
        residual: budget that the break solution leaves over.
        price: loss per unit of budget left over.
        incumbent: loss to beat, below 2^59.
    """
    moves, penalties, owners, options = _leading(classes)
    # Position 0 is no deviation; pairs (0, n) are single ones.
    first, second = np.triu_indices(len(moves))
    pair_penalties = penalties[first] + penalties[second]
    keep = (owners[first] != owners[second]) & (pair_penalties < incumbent)
    keep |= (first == 0) & (second == 0)
    first, second, pair_penalties = first[keep], second[keep], pair_penalties[keep]
    pair_moves = moves[first] + moves[second]
    order = np.argsort(pair_moves, kind="stable")
    first, second = first[order], second[order]
    pair_moves, pair_penalties = pair_moves[order], pair_penalties[order]
    fitting = np.searchsorted(pair_moves, residual - pair_moves, side="right") - 1
    best, found = incumbent, None
    for back in range(_PARTNERS):
        partner = fitting - back
        own = np.flatnonzero(partner >= 0)
        other = partner[own]
        left = residual - pair_moves[own] - pair_moves[other]
        loss = pair_penalties[own] + pair_penalties[other]
        loss += np.minimum(left, incumbent // price + 1) * price
        loss[_clash(owners, first, second, own, other)] = incumbent
        n = int(np.argmin(loss)) if len(loss) else 0
        if len(loss) and loss[n] < best:
            best, found = int(loss[n]), (int(own[n]), int(other[n]))
    if found is None:
        return None
    choices = [0] * len(classes)
    for pair in found:
        for position in (int(first[pair]), int(second[pair])):
            if position:
                choices[int(owners[position])] = int(options[position])
    return choices


def _leading(classes: list[Class]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Move, penalty, class and option of the deviations of least slope, after an empty one.

    As many that spend as that free, so that they can make up for each other.
    """
    none = np.zeros(0, dtype=np.int64)
    moves = np.concatenate([none, *(group.moves for group in classes)])
    penalties = np.concatenate([none, *(group.penalties for group in classes)])
    sizes = [len(group.moves) for group in classes]
    owners = np.repeat(np.arange(len(classes), dtype=np.int64), sizes)
    options = np.concatenate([none, *(np.arange(1, size + 1, dtype=np.int64) for size in sizes)])
    slopes = penalties / np.abs(moves)
    order = np.argsort(slopes, kind="stable")
    spending, freeing = order[moves[order] > 0], order[moves[order] < 0]
    keep = np.concatenate([spending[: _DEVIATIONS // 2], freeing[: _DEVIATIONS // 2]])
    columns = ((0, moves), (0, penalties), (-1, owners), (0, options))
    a, b, c, d = (np.concatenate([[first], column[keep]]) for first, column in columns)
    return a, b, c, d


def _clash(
    owners: IntArray, first: IntArray, second: IntArray, own: IntArray, other: IntArray
) -> IntArray:
    """Where two pairs touch one class twice."""
    a, b = owners[first[own]], owners[second[own]]
    c, d = owners[first[other]], owners[second[other]]
    same = ((a == c) & (a >= 0)) | ((b == d) & (b >= 0))
    return np.flatnonzero(same | ((a == d) & (a >= 0)) | ((b == c) & (b >= 0)))
