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


@dataclass
class _Trace:
    """Per class, the parent and the option of every state kept after it."""

    parents: list[npt.NDArray[np.int32]] = field(default_factory=lambda: [])
    options: list[npt.NDArray[np.int32]] = field(default_factory=lambda: [])
    size: int = 0

    def add(self, parents: IntArray, options: IntArray) -> None:
        self.parents.append(parents.astype(np.int32))
        self.options.append(options.astype(np.int32))
        self.size += len(parents)

    def walk(self, state: int, depth: int) -> list[int]:
        choices = [0] * depth
        for step in range(depth - 1, -1, -1):
            choices[step] = int(self.options[step][state])
            state = int(self.parents[step][state])
        return choices


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
    spend, free = _suffix_slopes(classes, price)
    relief = _suffix_relief(classes)
    moves = np.zeros(1, dtype=np.int64)
    penalties = np.zeros(1, dtype=np.int64)
    largest = 1
    if residual >= 0 and price * residual < best:
        best, found = price * residual, (0, 0)
    depth = 0
    for depth, group in enumerate(classes, start=1):
        late = deadline is not None and time.monotonic() > deadline
        if late or trace.size > _MAX_TRACE:
            bounds = _bounds(moves, penalties, residual, spend[depth - 1], free[depth - 1], best)
            dropped = min(dropped, int(bounds.min(initial=best)))
            break
        parents = np.arange(len(moves), dtype=np.int64)
        options = np.zeros(len(moves), dtype=np.int64)
        all_moves, all_penalties = [moves], [penalties]
        all_parents, all_options = [parents], [options]
        # Options in blocks, pruned at once, so that a wide class stays small in memory.
        block = max(1, (1 << 20) // max(len(moves), 1))
        for start in range(0, len(group.moves), block):
            part = slice(start, start + block)
            new_moves = (moves[:, None] + group.moves[None, part]).ravel()
            new_penalties = (penalties[:, None] + group.penalties[None, part]).ravel()
            bounds = _bounds(new_moves, new_penalties, residual, spend[depth], free[depth], best)
            # What exceeds the budget by more than the classes to come can free is hopeless.
            # Besides, this keeps every move within 64 bits.
            keep = np.flatnonzero((bounds < best) & (new_moves <= residual + relief[depth]))
            width = len(group.moves[part])
            all_moves.append(new_moves[keep])
            all_penalties.append(new_penalties[keep])
            all_parents.append(keep // width)
            all_options.append(keep % width + start + 1)
        moves, penalties = np.concatenate(all_moves), np.concatenate(all_penalties)
        parents, options = np.concatenate(all_parents), np.concatenate(all_options)

        keep = _undominated(moves, penalties, price)
        moves, penalties = moves[keep], penalties[keep]
        improved = _best_state(moves, penalties, residual, price, best)
        if improved is not None:
            best, state = improved
            found = (depth, state)
        bounds = _bounds(moves, penalties, residual, spend[depth], free[depth], best)
        alive = bounds < best
        if np.count_nonzero(alive) > max_states:
            cut = np.argpartition(np.where(alive, bounds, best), max_states)
            dropped = min(dropped, int(bounds[cut[max_states:]][alive[cut[max_states:]]].min()))
            alive[cut[max_states:]] = False
        if found is not None and found[0] == depth:
            alive[found[1]] = True  # kept for the walk back
            found = (depth, int(np.count_nonzero(alive[: found[1]])))
        keep = keep[alive]
        moves, penalties = moves[alive], penalties[alive]
        largest = max(largest, len(moves))
        trace.add(parents[keep], options[keep])
        if not len(moves):
            break
    choices = None
    if found is not None:
        choices = trace.walk(found[1], found[0]) + [0] * (len(classes) - found[0])
    return Outcome(best, choices, min(dropped, best), largest)


def _suffix_slopes(classes: list[Class], price: int) -> tuple[list[int], list[int]]:
    """Per depth, the least slope of spending and of freeing among the classes still to come."""
    spend, free = [price], [_PENALTY_LIMIT]
    for group in reversed(classes):
        up, down = group.slopes
        spend.append(min(spend[-1], up))
        free.append(min(free[-1], down))
    return spend[::-1], free[::-1]


def _suffix_relief(classes: list[Class]) -> list[int]:
    """Per depth, how much cost the classes still to come can free together."""
    relief = [0]
    for group in reversed(classes):
        relief.append(relief[-1] + max(-int(group.moves.min()), 0))
    return relief[::-1]


def _bounds(
    moves: IntArray, penalties: IntArray, residual: int, spend: int, free: int, best: int
) -> IntArray:
    """A lower bound on the loss of every completion of each state; at least `best` if hopeless.

    Budget left over costs at least `spend` a unit (filled or wasted), an excess at least `free`.
    """
    left = residual - moves
    under = np.minimum(np.maximum(left, 0), best // max(spend, 1) + 1)
    over = np.minimum(np.maximum(-left, 0), best // max(free, 1) + 1)
    return penalties + under * spend + over * min(free, best + 1)


def _undominated(moves: IntArray, penalties: IntArray, price: int) -> IntArray:
    """Positions of the states that no other state beats in cost and value, by ascending cost.

    State a beats b if it costs no more and penalty_a + price * (move_b - move_a) <= penalty_b.
    At equal cost the comparison is exact; across costs it is in doubles with a margin for their
    rounding, so that nothing undominated is dropped.
    """
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
    margin = 2.0**-50 * (
        float(sorted_penalties.max()) + float(price) * float(sorted_moves[-1] - origin)
    )
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = shortfall[1:] < least[:-1] + margin
    return order[keep]


def _best_state(
    moves: IntArray, penalties: IntArray, residual: int, price: int, best: int
) -> tuple[int, int] | None:
    """The feasible state of least loss and that loss, if it is below `best`."""
    left = residual - moves
    affordable = best // price + 1
    candidates = np.flatnonzero((left >= 0) & (left < affordable))
    if not len(candidates):
        return None
    losses = penalties[candidates] + left[candidates] * price
    n = int(np.argmin(losses))
    loss = int(losses[n])
    return (loss, int(candidates[n])) if loss < best else None
