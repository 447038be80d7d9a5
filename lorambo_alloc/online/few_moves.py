"""More moves of single ranks, as far as a limit on their number leaves room."""

from __future__ import annotations

import numpy as np

from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem


def filled_up(problem: Problem, ranks: IntArray, now: IntArray, room: int) -> IntArray:
    """Ranks after the best single steps and exchanges, one after the other.

    A step takes a layer (or a tied group as a whole) to its next allowed rank, up or down; an
    exchange is a step up of one and a step down of another. Of those that gain, fit and move no
    more ranks away from `now` than there is room for, the one with the greatest gain for each rank
    moved is taken, until there is none. Heuristic, but for a room of 1 or 2 from the present ranks
    where all steps are of one rank and curves concave: then no other move is possible.

    Args:
        problem: with the gains that count.
        ranks: a feasible rank vector, int64 by layer.
        now: the present ranks, from which moves are counted, int64 by layer.
        room: how many more ranks may move.

    Returns:
        A feasible rank vector that is worth no less.
    """
    steps = _Steps(problem, now)
    while room > 0:
        found = steps.best(ranks, room)
        if found is None:
            break
        ranks, moved = found
        room -= moved
    return ranks


class _Steps:
    """The next steps of every free choice, from any ranks."""

    def __init__(self, problem: Problem, now: IntArray) -> None:
        self._problem, self._now = problem, now
        self._choices = problem.variables
        self._allowed = [problem.allowed_ranks(layers[0]) for layers in self._choices]

    def best(self, ranks: IntArray, room: int) -> tuple[IntArray, int] | None:
        """The best step or exchange, with how many more ranks have moved; None: none gains."""
        up, down = self._all(ranks, 1), self._all(ranks, -1)
        left = self._problem.budget - self._problem.cost_of(ranks)
        # Staying as a step of its own makes a single step an exchange with it.
        up, down = _and_none(up), _and_none(down)
        gain, cost, moved = (up[k][:, None] + down[k][None, :] for k in (1, 2, 3))
        other = up[0][:, None] != down[0][None, :]
        fitting = np.flatnonzero((cost <= left) & (moved <= room) & (gain > 0) & other)
        worth = (gain / np.maximum(moved, 1)).flat[fitting]
        for place in fitting[np.argsort(-worth, kind="stable")].tolist():
            i, j = divmod(place, gain.shape[1])
            taken = ranks.copy()
            for choice, direction in ((int(up[0][i]), 1), (int(down[0][j]), -1)):
                if choice >= 0:
                    self._take(taken, choice, direction)
            # Sums in doubles may have lost a gain, and caps have not been looked at.
            if self._problem.fits(taken) and self._problem.value_difference(taken, ranks) > 0:
                return taken, int(moved[i, j])
        return None

    def _take(self, ranks: IntArray, choice: int, direction: int) -> None:
        layers = list(self._choices[choice])
        place = int(np.searchsorted(self._allowed[choice], int(ranks[layers[0]]))) + direction
        ranks[layers] = self._allowed[choice][place]

    def _all(
        self, ranks: IntArray, direction: int
    ) -> tuple[IntArray, FloatArray, IntArray, IntArray]:
        """Which choices have such a step; its gain, cost and moves."""
        which: list[int] = []
        gains: list[float] = []
        costs: list[int] = []
        moves: list[int] = []
        for choice, layers in enumerate(self._choices):
            place = int(np.searchsorted(self._allowed[choice], int(ranks[layers[0]]))) + direction
            if not 0 <= place < len(self._allowed[choice]):
                continue
            taken = ranks.copy()
            self._take(taken, choice, direction)
            which.append(choice)
            gains.append(float(self._problem.value_difference(taken, ranks)))
            old, new = int(ranks[layers[0]]), int(taken[layers[0]])
            costs.append(self._problem.cost_at(layers, new) - self._problem.cost_at(layers, old))
            moves.append(
                sum(abs(new - int(self._now[i])) - abs(old - int(self._now[i])) for i in layers)
            )
        return (
            np.array(which, dtype=np.int64),
            np.array(gains, dtype=np.float64),
            np.array(costs, dtype=np.int64),
            np.array(moves, dtype=np.int64),
        )


def _and_none(
    steps: tuple[IntArray, FloatArray, IntArray, IntArray],
) -> tuple[IntArray, FloatArray, IntArray, IntArray]:
    which, gains, costs, moves = steps
    return np.append(which, -1), np.append(gains, 0.0), np.append(costs, 0), np.append(moves, 0)
