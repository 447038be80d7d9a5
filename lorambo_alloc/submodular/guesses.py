"""Partial enumeration under a knapsack: guess one or two elements, then go on greedily."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import combinations

import numpy as np

from lorambo_alloc.submodular.constraints import Knapsack
from lorambo_alloc.submodular.greedy import Run, density_greedy_or_best_single
from lorambo_alloc.submodular.objectives import SetFunction

RUNS_WITHOUT_A_LIMIT = 100_000
"""More greedy runs than this are refused unless a time limit is given."""


def one_guess(
    objective: SetFunction, knapsack: Knapsack, *, time_limit: float | None = None
) -> Run:
    """From every single element that fits, go on with density greedy; the best of all.

    Each set on the way is also tried with the one element that adds most to it. The guarantee
    needs that: without it the ratio can be below 0.6174.

    O(n) greedy runs, so O(n^2 k) gains for sets of k elements.

    Args:
        objective: monotone, and submodular for the guarantee of 0.6174.
        knapsack: on the same elements.
        time_limit: seconds; when they are over, the best so far is returned, which is never worse
            than `density_greedy_or_best_single`, and `complete` is False.

    Raises:
        ValueError: more than 100,000 runs and no time limit; or another number of elements.

    References:
        Feldman, Nutov, Shoham, Practical budgeted submodular maximization, Algorithmica 85 (2023).

    Example:
        >>> from lorambo_alloc.submodular import Knapsack, Modular
        >>> one_guess(Modular([3.0, 4.0, 4.0]), Knapsack([2, 3, 3], budget=6)).items
        (1, 2)
    """
    return _guess(objective, knapsack, 1, "one guess", time_limit)


def two_guesses(
    objective: SetFunction, knapsack: Knapsack, *, time_limit: float | None = None
) -> Run:
    """From every pair of elements that fits, go on with density greedy; the best of all.

    O(n^2) greedy runs, so O(n^3 k) gains for sets of k elements.

    Args:
        objective: monotone, and submodular for the guarantee of 1 - 1/e.
        knapsack: on the same elements.
        time_limit: seconds; when they are over, the best so far is returned, which is never worse
            than `density_greedy_or_best_single`, and `complete` is False.

    Raises:
        ValueError: more than 100,000 runs and no time limit; or another number of elements.

    References:
        Feldman, Nutov, Shoham, Algorithmica 85 (2023); Kulik, Schwartz, Shachnai, Operations
        Research Letters 49 (2021). Three guesses, in the first proof of the ratio: Sviridenko,
        Operations Research Letters 32 (2004).

    Example:
        >>> from lorambo_alloc.submodular import Knapsack, Modular
        >>> two_guesses(Modular([3.0, 4.0, 4.0]), Knapsack([2, 3, 3], budget=6)).items
        (1, 2)
    """
    return _guess(objective, knapsack, 2, "two guesses", time_limit)


def _guess(
    objective: SetFunction, knapsack: Knapsack, size: int, name: str, time_limit: float | None
) -> Run:
    knapsack.check(objective.n)
    runs = sum(math.comb(objective.n, k) for k in range(1, size + 1))
    if time_limit is None and runs > RUNS_WITHOUT_A_LIMIT:
        raise ValueError(
            f"{name}: {objective.n} elements take {runs} greedy runs, more than "
            f"{RUNS_WITHOUT_A_LIMIT}; pass time_limit, or use 'density greedy or best single'"
        )
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    first = density_greedy_or_best_single(objective, knapsack)
    best, value = first.items, objective.value(first.items)
    for guess in _guesses(objective.n, size):
        if time.monotonic() >= deadline:
            return Run(best, first.trace, complete=False)
        found = _go_on(objective, knapsack, guess)
        if found is not None and found[0] > value:
            value, best = found
    return Run(best, first.trace)


def _guesses(n: int, size: int) -> Iterator[tuple[int, ...]]:
    for k in range(1, size + 1):
        yield from combinations(range(n), k)


def _go_on(
    objective: SetFunction, knapsack: Knapsack, guess: tuple[int, ...]
) -> tuple[float, tuple[int, ...]] | None:
    """The best set on the way of density greedy from a guess; None if the guess is no use.

    Each set on the way is also tried with the one element that adds most to it, as in the
    "Greedy+Max" of Yaroslavtsev, Zhou and Avdiukhin (ICML 2020).
    """
    state, room = objective.start(), knapsack.room(objective.n)
    for element in guess:
        # An optimal set needs no element of gain 0 on top of others of its own.
        if not room.open[element] or state.gains(np.array([element]))[0] <= 0:
            return None
        state.add(element)
        room.add(element)
    costs = knapsack.costs.astype(np.float64)
    best, items = state.value, state.items
    while room.open.any():
        gains = np.where(room.open, state.gains(), -np.inf)
        densest, largest = int((gains / costs).argmax()), int(gains.argmax())
        if gains[largest] <= 0:
            break
        if state.value + float(gains[largest]) > best:
            best, items = state.value + float(gains[largest]), (*state.items, largest)
        state.add(densest)
        room.add(densest)
    return best, items
