"""The best ranks within a limit on moves, searched near two prices: of cost, and of a move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

_STATES = 100_000  # partial solutions that are kept at a time
_ROUNDING = 1e-12  # of sums of gains in doubles, relative to the bound


@dataclass(frozen=True)
class _Options:
    """What a free choice (a layer, or a tied group) may become, with what that does."""

    layers: list[int]
    ranks: IntArray
    gains: FloatArray
    costs: IntArray
    moves: IntArray
    penalties: FloatArray

    def near(self, gap: float) -> _Options:
        """Those with a penalty of at most the gap."""
        kept = self.penalties <= gap
        return _Options(
            self.layers,
            self.ranks[kept],
            self.gains[kept],
            self.costs[kept],
            self.moves[kept],
            self.penalties[kept],
        )


def limited_search(
    problem: Problem,
    now: IntArray,
    max_moves: int,
    prices: tuple[float, float],
    incumbent: IntArray,
) -> IntArray | None:
    """The best ranks of which at most `max_moves` differ from the present ones; None: too many.

    With l and m the prices, every choice's best response has the value p = max over its ranks of
    gain - l cost - m moves, seen from the present rank, and no ranks gain more than the sum of all
    p plus l times what is left of the budget plus m max_moves. What a rank lacks to p is lost of
    that bound, so a partial solution that lacks more than the incumbent does cannot become better
    (Pisinger's core, in two constraints). A dynamic program over what is left then keeps, of
    partial solutions with as many moves, those that no cheaper one gains as much as. Exact up to
    rounding in doubles, for any curves, limits and ties; without caps.

    Args:
        problem: with the gains that count, and no caps.
        now: the present ranks, int64 by layer.
        max_moves: how many ranks may move.
        prices: per unit of cost and per move, both >= 0; the closer to the optimal ones the fewer
            partial solutions there are.
        incumbent: feasible ranks with no more moves.

    Returns:
        Ranks worth no less than the incumbent's; None if there are too many partial solutions.

    References:
        Pisinger, A minimal algorithm for the multiple-choice knapsack problem, EJOR 83, 1995.
    """
    choices = [_options(problem, now, layers, max_moves, prices) for layers in problem.variables]
    left = problem.budget - problem.cost_of(now)
    responses = -sum(float(np.min(c.penalties)) for c in choices)
    bound = responses + prices[0] * left + prices[1] * max_moves
    gap = bound - float(problem.value_difference(incumbent, now))
    gap += _ROUNDING * (abs(bound) + responses)
    choices = [
        _Options(c.layers, c.ranks, c.gains, c.costs, c.moves, c.penalties - np.min(c.penalties))
        for c in choices
    ]
    near = sorted((c.near(gap) for c in choices), key=lambda c: len(c.ranks))
    cheapest = np.array([0, *np.cumsum([int(c.costs.min()) for c in near[::-1]])])[::-1]
    costs, moves = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    gains, lacking = np.zeros(1), np.zeros(1)
    origins: list[IntArray] = []
    for k, choice in enumerate(near):
        width = len(choice.ranks)
        if len(costs) * width > 50 * _STATES:
            return None
        costs = np.add.outer(costs, choice.costs).ravel()
        moves = np.add.outer(moves, choice.moves).ravel()
        gains = np.add.outer(gains, choice.gains).ravel()
        lacking = np.add.outer(lacking, choice.penalties).ravel()
        fits = (moves <= max_moves) & (lacking <= gap) & (costs + cheapest[k + 1] <= left)
        kept = _undominated(np.flatnonzero(fits), moves, costs, gains)
        if len(kept) > _STATES:
            return None
        costs, moves, gains, lacking = (each[kept] for each in (costs, moves, gains, lacking))
        origins.append(kept)
    if not len(gains):
        return incumbent
    state = int(np.argmax(gains))
    ranks = now.copy()
    for choice, kept in zip(near[::-1], origins[::-1], strict=True):
        state, option = divmod(int(kept[state]), len(choice.ranks))
        ranks[choice.layers] = choice.ranks[option]
    return ranks if problem.value_difference(ranks, incumbent) > 0 else incumbent


def _options(
    problem: Problem,
    now: IntArray,
    layers: tuple[int, ...],
    max_moves: int,
    prices: tuple[float, float],
) -> _Options:
    """All ranks of a choice within the limit; its penalties are less the price of each, so far."""
    members = list(layers)
    ranks = problem.allowed_ranks(layers[0])
    moves = np.abs(ranks[:, None] - now[members]).sum(axis=1)
    ranks, moves = ranks[moves <= max_moves], moves[moves <= max_moves]
    before = sum(problem.cost_at([i], int(now[i])) for i in members)
    costs = np.array([problem.cost_at(members, rank) - before for rank in ranks.tolist()])
    gains = np.zeros(len(ranks))
    for i in members:
        curve = problem.curve(i)
        gains += curve[ranks] - curve[now[i]]
    worth = gains - prices[0] * costs - prices[1] * moves
    return _Options(members, ranks, gains, costs.astype(np.int64), moves, -worth)


def _undominated(states: IntArray, moves: IntArray, costs: IntArray, gains: FloatArray) -> IntArray:
    """Of these, the ones that gain more than all cheaper ones with as many moves."""
    order = states[np.lexsort((-gains[states], costs[states], moves[states]))]
    starts = np.flatnonzero(np.diff(moves[order], prepend=-1))
    kept: list[IntArray] = []
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        group = order[first:last]
        best = np.maximum.accumulate(gains[group])
        better = np.ones(len(group), dtype=bool)
        better[1:] = gains[group][1:] > best[:-1]
        kept.append(group[better])
    return np.concatenate(kept) if kept else states
