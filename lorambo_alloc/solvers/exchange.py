"""Exchanges of a few deviations at once, by two bundles of two or three.

Where many deviations cost the price nothing (ties), a good answer is one that spends the budget
to the last unit. Among all pairs of a few hundred deviations, two that together fill it can be
found by sorting (Horowitz and Sahni, JACM 21, 1974: two lists for the subset sum). Where there are
fewer deviations, so that pairs are few, some of their triples make the list as long.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.solvers.core_program import Class

_DEVIATIONS = 384  # about 74,000 pairs
_BUNDLES = 74_000  # as many bundles where there are fewer pairs
_PATIENCE = 24  # rounds without an improvement, after which no more are tried
_LARGEST = 1 << 59  # of a move: nine of them add up within 64 bits
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
    """Choices of up to nine deviations that lose least, if that is less than the incumbent.

    A heuristic: it looks at the most promising deviations, and for each bundle at the partners
    that leave least of the budget. Further rounds look at other deviations among equals, with
    up to three of them made beforehand.

    Args:
        classes: deviations, most promising first.
        residual: budget that the break solution leaves over.
        price: loss per unit of budget left over.
        incumbent: loss to beat, below 2^59.
        target: a loss that is good enough.
        rounds: how often to look, at most; a round takes about 20 ms.
        deadline: `time.monotonic()` value after which no round begins.
        balanced: make as many deviations that spend as that free; bundles are pairs then.
    """
    rng = np.random.default_rng(0)
    best, found = incumbent, None
    unimproved = 0
    for attempt in range(rounds):
        if best <= target or unimproved == _PATIENCE:
            break
        if deadline is not None and time.monotonic() > deadline:
            break
        deviations = _leading(classes, rng)
        made = [] if balanced else _some(deviations, attempt % 4, rng)
        choices = _best_two_bundles(deviations, made, residual, price, best, balanced, rng)
        unimproved += 1
        if choices is not None:
            unimproved = 0
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


def _best_two_bundles(
    deviations: _Deviations,
    made: list[int],
    residual: int,
    price: int,
    incumbent: int,
    balanced: bool,
    rng: np.random.Generator,
) -> tuple[int, list[int]] | None:
    """The least loss below the incumbent's, and the positions that attain it.

    Args:
        deviations: what to choose from; position 0 is no deviation.
        made: positions of deviations that are made in any case.
        residual: as above, and so on.
        price: as above.
        incumbent: as above.
        balanced: as above.
        rng: draws triples.
    """
    moves, penalties, owners = deviations.moves, deviations.penalties, deviations.owners
    spent, lost = int(moves[made].sum()), int(penalties[made].sum())
    residual -= spent
    incumbent -= lost
    bundles = _bundles(deviations, made, incumbent, balanced, rng)
    bundle_moves: IntArray = moves[bundles].sum(axis=0)
    order = np.argsort(bundle_moves, kind="stable")
    bundles, bundle_moves = bundles[:, order], bundle_moves[order]
    bundle_penalties, bundle_owners = penalties[bundles].sum(axis=0), owners[bundles]
    fitting: IntArray = np.searchsorted(bundle_moves, residual - bundle_moves, side="right") - 1
    best, found = incumbent, None
    for back in range(_PARTNERS):
        partner = fitting - back
        own = np.flatnonzero(partner >= 0)
        other = partner[own]
        left = residual - bundle_moves[own] - bundle_moves[other]
        loss = bundle_penalties[own] + bundle_penalties[other]
        loss += np.minimum(left, max(incumbent, 0) // price + 1) * price
        better = np.flatnonzero(loss < best)
        clash = _clash(bundle_owners[:, own[better]], bundle_owners[:, other[better]])
        better = better[~clash]
        if len(better):
            n = int(better[np.argmin(loss[better])])
            best, found = int(loss[n]), (int(own[n]), int(other[n]))
    if found is None:
        return None
    return best + lost, [*made, *(int(n) for bundle in found for n in bundles[:, bundle])]


def _bundles(
    deviations: _Deviations,
    made: list[int],
    incumbent: int,
    balanced: bool,
    rng: np.random.Generator,
) -> IntArray:
    """Positions of two or three deviations of different classes, a bundle a column.

    All pairs that lose less than the incumbent, a pair (0, n) being a single one. Where more than
    half of all pairs are among them, as many triples as there is room for are drawn beside them,
    some of them more than once; pairs have a third member 0 then.
    """
    moves, penalties, owners = deviations.moves, deviations.penalties, deviations.owners
    free = ~np.isin(owners, owners[made]) if made else np.ones(len(owners), dtype=bool)
    first, second = np.triu_indices(len(moves))
    keep = (owners[first] != owners[second]) & (penalties[first] + penalties[second] < incumbent)
    keep &= free[first] & free[second]
    if balanced:
        keep &= (moves[first] > 0) == (moves[second] < 0)
        keep &= first > 0
    keep |= (first == 0) & (second == 0)
    pairs = np.stack([first[keep], second[keep]])
    real = pairs[:, pairs[0] > 0]
    room = min(_BUNDLES - pairs.shape[1], real.shape[1] * len(moves) // 3)  # a triple has 3 pairs
    # Where few pairs are, penalties decide, and triples have more of them.
    mostly_kept = 2 * pairs.shape[1] > len(first)
    if balanced or room <= 0 or not mostly_kept:
        return pairs
    drawn = real[:, rng.integers(0, real.shape[1], room)]
    third = np.asarray(rng.integers(1, len(moves), drawn.shape[1]), dtype=np.int64)
    fits = free[third] & np.all(owners[third] != owners[drawn], axis=0)
    fits &= penalties[third] + penalties[drawn].sum(axis=0) < incumbent
    triples = np.vstack([drawn, third])[:, fits]
    return np.hstack([np.vstack([pairs, np.zeros_like(pairs[:1])]), triples])


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
    order = order[np.abs(moves[order]) < _LARGEST]
    spending, freeing = order[moves[order] > 0], order[moves[order] < 0]
    keep = np.concatenate([spending[: _DEVIATIONS // 2], freeing[: _DEVIATIONS // 2]])
    columns = ((0, moves), (0, penalties), (-1, owners), (0, options))
    return _Deviations(*(np.concatenate([[first], column[keep]]) for first, column in columns))


def _clash(own: IntArray, other: IntArray) -> npt.NDArray[np.bool_]:
    """Where two bundles touch one class twice, from the owners of their members."""
    same = np.zeros(own.shape[1], dtype=bool)
    for a in own:
        for b in other:
            same |= (a == b) & (a >= 0)
    return same
