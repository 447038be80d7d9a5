"""Exchanges of a few deviations at once, by pairs of pairs.

Where many deviations cost the price nothing (ties), a good answer is one that spends the budget
to the last unit. Among all pairs of a few hundred deviations, two that together fill it can be
found by sorting (Horowitz and Sahni, JACM 21, 1974: two lists for the subset sum).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.solvers.core_program import Class

_DEVIATIONS = 384  # about 74,000 pairs
_PARTNERS = 4  # neighbours in the sorted list that are tried, as the nearest may share a class


def best_exchange(
    classes: list[Class],
    residual: int,
    price: int,
    incumbent: int,
    target: int,
    *,
    rounds: int,
    deadline: float | None = None,
    balanced: bool = False,
) -> list[int] | None:
    """Choices of up to seven deviations that lose least, if that is less than the incumbent.

    A heuristic: it looks at the most promising deviations, and for each pair at the partners
    that leave least of the budget. Further rounds look at other deviations among equals, with
    up to three of them made beforehand.

    Args:
        classes: deviations, most promising first.
        residual: budget that the break solution leaves over.
        price: loss per unit of budget left over.
        incumbent: loss to beat, below 2^59.
        target: a loss that is good enough.
        rounds: how often to look; a round takes about 20 ms.
        deadline: `time.monotonic()` value after which no round begins.
        balanced: make as many deviations that spend as that free.
    """
    rng = np.random.default_rng(0)
    best, found = incumbent, None
    for attempt in range(rounds):
        if best <= target or (deadline is not None and time.monotonic() > deadline):
            break
        deviations = _leading(classes, rng)
        made = [] if balanced else _some(deviations, attempt % 4, rng)
        choices = _best_pair_of_pairs(deviations, made, residual, price, best, balanced)
        if choices is not None:
            best, positions = choices
            found = [0] * len(classes)
            for position in positions:
                if position:
                    found[int(deviations.owners[position])] = int(deviations.options[position])
    return found


def _some(deviations: _Deviations, count: int, rng: np.random.Generator) -> list[int]:
    """Positions of so many deviations of different classes, at random."""
    positions = rng.permutation(len(deviations.moves) - 1)[: 4 * count] + 1
    distinct = np.unique(deviations.owners[positions], return_index=True)[1]
    return positions[np.sort(distinct)[:count]].tolist()


def _best_pair_of_pairs(
    deviations: _Deviations,
    made: list[int],
    residual: int,
    price: int,
    incumbent: int,
    balanced: bool,
) -> tuple[int, list[int]] | None:
    """The least loss below the incumbent's, and the positions that attain it.

    Args:
        deviations: what to choose from; position 0 is no deviation.
        made: positions of deviations that are made in any case.
        residual: as above, and so on.
        price: as above.
        incumbent: as above.
        balanced: as above.
    """
    moves, penalties, owners = deviations.moves, deviations.penalties, deviations.owners
    spent, lost = int(moves[made].sum()), int(penalties[made].sum())
    residual -= spent
    incumbent -= lost
    # Pairs (0, n) are single ones.
    first, second = np.triu_indices(len(moves))
    pair_penalties = penalties[first] + penalties[second]
    keep = (owners[first] != owners[second]) & (pair_penalties < incumbent)
    if balanced:
        keep &= (moves[first] > 0) == (moves[second] < 0)
        keep &= first > 0
    keep |= (first == 0) & (second == 0)
    if made:
        free = ~np.isin(owners, owners[made])
        keep &= free[first] & free[second]
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
        loss += np.minimum(left, max(incumbent, 0) // price + 1) * price
        loss[_clash(owners, first, second, own, other)] = incumbent
        n = int(np.argmin(loss)) if len(loss) else 0
        if len(loss) and loss[n] < best:
            best, found = int(loss[n]), (int(own[n]), int(other[n]))
    if found is None:
        return None
    positions = [*made, *(int(side[pair]) for pair in found for side in (first, second))]
    return best + lost, positions


@dataclass(frozen=True)
class _Deviations:
    """Move, penalty, class and option of some deviations, after an empty one."""

    moves: IntArray
    penalties: IntArray
    owners: IntArray
    options: IntArray


def _leading(classes: list[Class], rng: np.random.Generator) -> _Deviations:
    """The deviations of least slope, equals at random.

    As many that spend as that free, so that they can make up for each other.
    """
    none = np.zeros(0, dtype=np.int64)
    moves = np.concatenate([none, *(group.moves for group in classes)])
    penalties = np.concatenate([none, *(group.penalties for group in classes)])
    sizes = [len(group.moves) for group in classes]
    owners = np.repeat(np.arange(len(classes), dtype=np.int64), sizes)
    options = np.concatenate([none, *(np.arange(1, size + 1, dtype=np.int64) for size in sizes)])
    order = np.lexsort((rng.permutation(len(moves)), penalties / np.abs(moves)))
    spending, freeing = order[moves[order] > 0], order[moves[order] < 0]
    keep = np.concatenate([spending[: _DEVIATIONS // 2], freeing[: _DEVIATIONS // 2]])
    columns = ((0, moves), (0, penalties), (-1, owners), (0, options))
    return _Deviations(*(np.concatenate([[first], column[keep]]) for first, column in columns))


def _clash(
    owners: IntArray, first: IntArray, second: IntArray, own: IntArray, other: IntArray
) -> IntArray:
    """Where two pairs touch one class twice."""
    a, b = owners[first[own]], owners[second[own]]
    c, d = owners[first[other]], owners[second[other]]
    same = ((a == c) & (a >= 0)) | ((b == d) & (b >= 0))
    return np.flatnonzero(same | ((a == d) & (a >= 0)) | ((b == c) & (b >= 0)))
