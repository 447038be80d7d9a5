"""Curves to solve with, from estimates that do not cover every layer and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorambo_alloc.limits import Limits
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.online.running_curves import RunningCurve


@dataclass(frozen=True)
class CompletedCurves:
    """What each layer gains from single ranks, and which ranks it may take at present.

    Attributes:
        gains: by layer, of ranks 1, 2, ...; at least one each.
        lower: the least rank, int64 by layer.
        upper: the greatest, int64 by layer; up to the limits that hold anyway.
        notes: what was made up, in words.
    """

    gains: list[FloatArray]
    lower: IntArray
    upper: IntArray
    notes: tuple[str, ...]


def completed_curves(
    curves: Mapping[str, RunningCurve],
    limits: Limits,
    costs: IntArray,
    now: IntArray,
    *,
    all_move: bool,
    exploration: float = 0.0,
    rounds: float = 0.0,
) -> CompletedCurves:
    """Complete the estimates, as `OnlineAllocator` says it (optimism included in every gain).

    Args:
        curves: the estimates of the layers observed.
        limits: what is allowed whatever the estimates are.
        costs: of one rank, int64 by layer.
        now: the present ranks, int64 by layer.
        all_move: whether layers never observed may change their rank too.
        exploration: the factor of the optimism.
        rounds: the discounted number of rounds.
    """
    firsts = [
        (curve.means[0] + exploration * curve.optimism(rounds)[0]) / costs[i]
        for i, name in enumerate(limits.names)
        if (curve := curves.get(name)) is not None
    ]
    positive = np.maximum(firsts, 0.0) if firsts else np.ones(1)
    density = float(np.max(positive) if exploration else np.mean(positive)) or 1.0
    gains: list[FloatArray] = []
    lower, upper = limits.lower.copy(), np.zeros_like(now)
    stay: list[str] = []
    made_up: list[str] = []
    allowed = _allowed(limits, now)
    for i, name in enumerate(limits.names):
        least = int(max(limits.lower[i], now[i]))
        curve = curves.get(name)
        if curve is None:
            if exploration:
                least = max(least, _first_rank(limits, i))
            elif allowed[i] and not all_move:
                lower[i] = now[i]
                stay.append(name)
            if lower[i] < least or not allowed[i]:
                made_up.append(name)
            row = costs[i] * density / np.arange(1, max(least, 1) + 1)
        else:
            row = curve.means + exploration * curve.optimism(rounds)
            row = np.concatenate([row, np.full(max(0, least - len(row)), row[-1])])
            least = len(row)
        gains.append(row)
        upper[i] = min(least, limits.upper[i])
    notes: list[str] = []
    if stay:
        notes.append(f"{_listed(stay)} never observed, and {_verb(stay)} as it is")
    if made_up:
        how = "like the best layer" if exploration else "by a stand-in"
        notes.append(f"{_listed(made_up)} never observed, and valued {how}")
    return CompletedCurves(gains, lower, upper, tuple(notes))


def _allowed(limits: Limits, ranks: IntArray) -> list[bool]:
    """By layer, whether its rank satisfies the limits and its ties."""
    allowed = [
        bool(limits.lower[i] <= rank <= limits.upper[i])
        and rank % limits.multiple_of == 0
        and (i not in limits.lists or rank in limits.lists[i])
        for i, rank in enumerate(ranks.tolist())
    ]
    for group in limits.groups:
        members = list(group)
        if len(set(ranks[members].tolist())) > 1 or not all(allowed[i] for i in members):
            for i in members:
                allowed[i] = False
    return allowed


def _first_rank(limits: Limits, i: int) -> int:
    """The least rank above 0 that a layer may take; 0 if there is none."""
    if i in limits.lists:
        return next((int(rank) for rank in limits.lists[i] if rank > 0), 0)
    first = max(limits.multiple_of, int(limits.lower[i]))
    return first if first <= limits.upper[i] else 0


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"1 layer ({shown}) was" if len(names) == 1 else f"{len(names)} layers ({shown}) were"


def _verb(names: list[str]) -> str:
    return "stays" if len(names) == 1 else "each stays"
