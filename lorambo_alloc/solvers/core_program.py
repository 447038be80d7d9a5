"""A sparse dynamic program over deviations from the break solution.

Given a price, every choice that differs from the break solution carries a penalty >= 0: what the
Lagrangian loses by it. A solution's loss against the Lagrangian bound is

    loss = sum of penalties + price * (budget left over)

so only deviations with a penalty below the incumbent's loss can matter, a few thousand of
millions, and the program runs over how much they move the cost. All quantities are integers:
costs in units of their greatest common divisor, gains in a fixed point that holds every bit
(or, where it cannot, is rounded so that losses come out too low, never too high).

References:
    Pisinger, A minimal algorithm for the multiple-choice knapsack problem, European Journal of
    Operational Research 83 (1995): the expanding core, and the upper bound of a state by the
    best remaining slopes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lorambo_alloc.objectives import IntArray

_PENALTY_LIMIT = 1 << 62
_BLOCK = 1 << 20  # states made at a time
_MAX_TRACE = 60_000_000  # entries kept to walk back from the best state, about 400 MB


@dataclass(frozen=True)
class Class:
    """One group of which exactly one option is chosen; option 0 (no deviation) is implied.

    Attributes:
        moves: change of the cost by each option, int64, not 0, below 2^62 in magnitude.
        penalties: the penalty of each option, int64, >= 0.
    """

    moves: IntArray
    penalties: IntArray

    @cached_property
    def slopes(self) -> tuple[int, int]:
        """Least penalty per unit of cost spent, and per unit of cost freed (rounded down)."""
        slopes = self.penalties // np.abs(self.moves)
        spending = self.moves > 0
        spend = slopes[spending].min(initial=_PENALTY_LIMIT)
        return int(spend), int(slopes[~spending].min(initial=_PENALTY_LIMIT))


def promising_first(classes: list[Class]) -> list[int]:
    """Positions of the classes by ascending slope; equal slopes spend and free in turn.

    Where many slopes are equal, keeping the sum of moves near 0 lets a limited number of states
    reach the residual budget in many ways (Pisinger's balanced programs).
    """
    slopes = [group.slopes for group in classes]
    order = sorted(range(len(classes)), key=lambda n: min(slopes[n]))
    result: list[int] = []
    running = 0
    start = 0
    while start < len(order):
        least = min(slopes[order[start]])
        stop = start
        while stop < len(order) and min(slopes[order[stop]]) == least:
            stop += 1
        # Stacks of the classes that spend and that free at this slope, dearest moves last.
        spending = [n for n in order[start:stop] if slopes[n][0] <= slopes[n][1]][::-1]
        freeing = [n for n in order[start:stop] if slopes[n][0] > slopes[n][1]][::-1]
        while spending or freeing:
            take = spending if (running <= 0 or not freeing) and spending else freeing
            n = take.pop()
            moves = classes[n].moves
            running += int(moves[moves > 0][0] if take is spending else moves[moves < 0][0])
            result.append(n)
        start = stop
    return result


@dataclass
class Outcome:
    """What a run of the program found.

    Attributes:
        loss: the least loss found, or the `incumbent` it was given.
        choices: one option a class (0: no deviation, n: option n - 1) that attains it; None if
            nothing better than the incumbent was found.
        bound: no solution over these classes loses less than this.
        states: the largest number of states held.
    """

    loss: int
    choices: list[int] | None
    bound: int
    states: int


@dataclass(frozen=True)
class _States:
    """States of the program: how far each has moved the cost, and what it has lost by that.

    Attributes:
        moves: change of the cost.
        penalties: the sum of the penalties so far.
        parents: position of the state before the last class.
        options: what was chosen in the last class (0: no deviation).
    """

    moves: IntArray
    penalties: IntArray
    parents: IntArray
    options: IntArray

    def __len__(self) -> int:
        return len(self.moves)

    def __getitem__(self, keep: IntArray | npt.NDArray[np.bool_]) -> _States:
        return _States(
            self.moves[keep], self.penalties[keep], self.parents[keep], self.options[keep]
        )

    @classmethod
    def join(cls, parts: list[_States]) -> _States:
        """All states of several parts."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.moves for part in parts]),
            np.concatenate([part.penalties for part in parts]),
            np.concatenate([part.parents for part in parts]),
            np.concatenate([part.options for part in parts]),
        )


@dataclass
class _Trace:
    """Per class, the parent and the option of every state kept after it."""

    parents: list[npt.NDArray[np.int32]] = field(default_factory=lambda: [])
    options: list[npt.NDArray[np.int32]] = field(default_factory=lambda: [])
    size: int = 0

    def add(self, states: _States) -> None:
        self.parents.append(states.parents.astype(np.int32))
        self.options.append(states.options.astype(np.int32))
        self.size += len(states)

    def walk(self, state: int, depth: int) -> list[int]:
        choices = [0] * depth
        for step in range(depth - 1, -1, -1):
            choices[step] = int(self.options[step][state])
            state = int(self.parents[step][state])
        return choices


class _Ahead:
    """What the classes still to come can do for a state, by depth.

    Attributes:
        spend: the least loss per unit of budget left over (filled, or wasted at the price).
        free: the least loss per unit of cost freed.
        relief: how much cost they can free together.
    """

    def __init__(self, classes: list[Class], residual: int, price: int) -> None:
        self._residual = residual
        self.spend, self.free, self.relief = [price], [_PENALTY_LIMIT], [0]
        for group in reversed(classes):
            spend, free = group.slopes
            self.spend.append(min(self.spend[-1], spend))
            self.free.append(min(self.free[-1], free))
            self.relief.append(self.relief[-1] + max(-int(group.moves.min()), 0))
        for values in (self.spend, self.free, self.relief):
            values.reverse()

    def bounds(self, depth: int, moves: IntArray, penalties: IntArray, best: int) -> IntArray:
        """A lower bound on the loss of every completion of states; `best` or more if hopeless."""
        spend, free = self.spend[depth], self.free[depth]
        left = self._residual - moves
        # What is too much or too little for any loss below `best` is cut, so that products fit.
        under = np.minimum(np.maximum(left, 0), best // max(spend, 1) + 1)
        over = np.minimum(np.maximum(-left, 0), best // max(free, 1) + 1)
        bounds = penalties + under * spend + over * min(free, best + 1)
        # An excess that cannot be freed any more is hopeless. Besides, leaving it out keeps the
        # moves within 64 bits.
        return np.where(left < -self.relief[depth], np.maximum(bounds, best), bounds)


def solve_core(
    classes: list[Class],
    residual: int,
    price: int,
    incumbent: int,
    max_states: int,
    deadline: float | None = None,
) -> Outcome:
    """Find the deviations with the least loss, if it is below the incumbent's.

    Args:
        classes: deviations; put those of the smallest slopes first.
        residual: budget that the break solution leaves over (may be negative).
        price: loss per unit of budget left over, > 0.
        incumbent: loss of the best solution known, < 2^59.
        max_states: states held after a class; the least promising are dropped beyond it, and
            their bound is remembered.
        deadline: `time.monotonic()` value at which to stop.
    """
    best = incumbent
    found: tuple[int, int] | None = None  # depth and state of the best loss
    dropped = incumbent  # least bound of what was dropped
    trace = _Trace()
    ahead = _Ahead(classes, residual, price)
    zero = np.zeros(1, dtype=np.int64)
    states = _States(zero, zero, zero, zero)
    largest = 1
    if residual >= 0 and price * residual < best:
        best, found = price * residual, (0, 0)
    for depth, group in enumerate(classes, start=1):
        complete = not _late(deadline) and trace.size <= _MAX_TRACE
        grown = states
        if complete:
            grown, complete = _grow(states, group, ahead, depth, best, price, deadline)
        if not complete:
            # As if the states still stood before this class: a bound on all that was skipped.
            standing = ahead.bounds(depth - 1, states.moves, states.penalties, best)
            dropped = min(dropped, int(standing.min(initial=best)))
            if grown is states:
                break
        improved = _best_state(grown, residual, price, best)
        if improved is not None:
            best, found = improved[0], (depth, improved[1])
        bounds = ahead.bounds(depth, grown.moves, grown.penalties, best)
        alive = bounds < best
        if np.count_nonzero(alive) > max_states:
            kept = _most_promising(np.where(alive, bounds, best), max_states)
            dropped = min(dropped, int(bounds[alive & ~kept].min()))
            alive &= kept
        if found is not None and found[0] == depth:
            alive[found[1]] = True  # kept for the walk back
            found = (depth, int(np.count_nonzero(alive[: found[1]])))
        states = grown[alive]
        largest = max(largest, len(states))
        trace.add(states)
        if not len(states):
            break
    choices = None
    if found is not None:
        choices = trace.walk(found[1], found[0]) + [0] * (len(classes) - found[0])
    return Outcome(best, choices, min(dropped, best), largest)


def _grow(
    states: _States,
    group: Class,
    ahead: _Ahead,
    depth: int,
    best: int,
    price: int,
    deadline: float | None,
) -> tuple[_States, bool]:
    """States after one more class, undominated; and whether all of its options were tried."""
    stay = np.arange(len(states), dtype=np.int64)
    parts = [_States(states.moves, states.penalties, stay, np.zeros_like(stay))]
    size = len(states)
    # Options in blocks, pruned at once, so that a wide class stays small in memory.
    block = max(1, _BLOCK // max(len(states), 1))
    complete = True
    for start in range(0, len(group.moves), block):
        if start and _late(deadline):
            complete = False
            break
        options = slice(start, start + block)
        moves = (states.moves[:, None] + group.moves[None, options]).ravel()
        penalties = (states.penalties[:, None] + group.penalties[None, options]).ravel()
        keep = np.flatnonzero(ahead.bounds(depth, moves, penalties, best) < best)
        width = len(group.moves[options])
        parts.append(_States(moves[keep], penalties[keep], keep // width, keep % width + start + 1))
        size += len(keep)
        if size > 4 * _BLOCK:
            joined = _States.join(parts)
            parts = [joined[_undominated(joined, price)]]
            size = len(parts[0])
    grown = _States.join(parts)
    return grown[_undominated(grown, price)], complete


def _most_promising(bounds: IntArray, count: int) -> npt.NDArray[np.bool_]:
    """The `count` states of the least bounds, 1 <= count <= len(bounds).

    Of those that are equal to the last, evenly spread positions, and so, as states ascend by cost,
    evenly spread costs. What `argpartition` takes among equals differs between processors.
    """
    last = np.partition(bounds, count - 1)[count - 1]
    kept = bounds < last
    equal = np.flatnonzero(bounds == last)
    wanted = count - int(np.count_nonzero(kept))
    kept[equal[np.arange(wanted) * len(equal) // wanted]] = True
    return kept


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _undominated(states: _States, price: int) -> IntArray:
    """Positions of the states that no other state beats in cost and value, by ascending cost.

    State a beats b if it costs no more and penalty_a + price * (move_b - move_a) <= penalty_b.
    At equal cost the comparison is exact; across costs it is in doubles with a margin for their
    rounding, so that nothing undominated is dropped.
    """
    moves, penalties = states.moves, states.penalties
    order = np.lexsort((penalties, moves))
    sorted_moves, sorted_penalties = moves[order], penalties[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = sorted_moves[1:] != sorted_moves[:-1]
    order, sorted_moves, sorted_penalties = (
        order[first],
        sorted_moves[first],
        sorted_penalties[first],
    )
    origin = int(sorted_moves[0])
    shortfall = sorted_penalties - float(price) * (sorted_moves - origin)
    least = np.minimum.accumulate(shortfall)
    margin = 2.0**-49 * (
        float(sorted_penalties.max()) + float(price) * float(sorted_moves[-1] - origin)
    )
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = shortfall[1:] < least[:-1] + margin
    return order[keep]


def _best_state(states: _States, residual: int, price: int, best: int) -> tuple[int, int] | None:
    """The least loss of a feasible state and its position, if it is below `best`."""
    left = residual - states.moves
    candidates = np.flatnonzero((left >= 0) & (left < best // price + 1))
    if not len(candidates):
        return None
    losses = states.penalties[candidates] + left[candidates] * price
    n = int(np.argmin(losses))
    return (int(losses[n]), int(candidates[n])) if losses[n] < best else None
