"""Greedy algorithms: by gain, lazily, and by gain per unit of cost.

None of them takes an element of gain 0: it would only spend.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from lorambo_alloc.submodular.constraints import Constraint, Knapsack, Room
from lorambo_alloc.submodular.guarantees import WEAKLY_SUBMODULAR
from lorambo_alloc.submodular.objectives import SetFunction, State


@dataclass(frozen=True)
class Run:
    """What an algorithm found.

    Attributes:
        items: the set, in the order chosen.
        trace: the elements whose prefixes are good places for an instance bound.
        complete: False if the time limit came first; then only what greedy guarantees is left.
    """

    items: tuple[int, ...]
    trace: tuple[int, ...]
    complete: bool = True


def greedy(objective: SetFunction, constraint: Constraint) -> Run:
    """Take the largest gain that fits, again and again (Nemhauser, Wolsey, Fisher 1978).

    For every class of objective; O(k) vectors of gains for k elements chosen.

    Args:
        objective: monotone.
        constraint: on the same elements.

    Raises:
        ValueError: the constraint is about another number of elements.

    References:
        Nemhauser, Wolsey, Fisher, Mathematical Programming 14 (1978) for cardinality; Fisher,
        Nemhauser, Wolsey, Mathematical Programming Study 8 (1978) for matroids.

    Example:
        >>> from lorambo_alloc.submodular import Cardinality, Coverage
        >>> greedy(Coverage([{0, 1}, {1, 2, 3}, {0}]), Cardinality(2)).items
        (1, 0)
    """
    constraint.check(objective.n)
    state, room = objective.start(), constraint.room(objective.n)
    while room.open.any():
        gains = np.where(room.open, state.gains(), -np.inf)
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        state.add(best)
        room.add(best)
    return Run(state.items, state.items)


def lazy_greedy(objective: SetFunction, constraint: Constraint) -> Run:
    """The greedy algorithm with gains looked at only when they may be the largest (Minoux 1978).

    A gain computed earlier bounds the gain now, *because f is submodular*; for a weakly
    submodular objective it does not, so such objectives are refused.

    Args:
        objective: monotone and submodular.
        constraint: on the same elements.

    Raises:
        ValueError: the objective is weakly submodular, or the constraint is about another number
            of elements.

    References:
        Minoux, Accelerated greedy algorithms, Optimization Techniques (1978).

    Example:
        >>> from lorambo_alloc.submodular import Cardinality, Function
        >>> f = Function(100, lambda s: min(sum(s), 250))
        >>> lazy_greedy(f, Cardinality(2)).items, f.evaluations  # greedy asks 200 times
        ((99, 98), 102)
    """
    if objective.kind == WEAKLY_SUBMODULAR:
        raise ValueError(
            "lazy greedy: expected a submodular objective, got a weakly submodular one, whose "
            "earlier gains are no bounds on later ones; use greedy"
        )
    constraint.check(objective.n)
    state, room = objective.start(), constraint.room(objective.n)
    # (minus the gain, element, size of the set at which it was computed)
    heap = [(-gain, j, 0) for j, gain in enumerate(state.gains().tolist()) if room.open[j]]
    heapq.heapify(heap)
    size = 0
    while heap and -heap[0][0] > 0:
        _, element, computed = heapq.heappop(heap)
        if not room.open[element]:
            continue
        if computed == size:
            state.add(element)
            room.add(element)
            size += 1
        else:
            gain = float(state.gains(np.array([element]))[0])
            heapq.heappush(heap, (-gain, element, size))
    return Run(state.items, state.items)


def density_greedy(objective: SetFunction, knapsack: Knapsack) -> Run:
    """Take the largest gain per unit of cost that fits, again and again.

    On its own it guarantees nothing: one element of gain 2 and cost 1 shuts out one of gain B and
    cost B from a budget of B.

    Args:
        objective: monotone.
        knapsack: on the same elements.

    Raises:
        ValueError: the knapsack is about another number of elements.

    Example:
        >>> from lorambo_alloc.submodular import Knapsack, Modular
        >>> density_greedy(Modular([2.0, 100.0]), Knapsack([1, 100], budget=100)).items
        (0,)
    """
    if not isinstance(knapsack, Knapsack):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"knapsack: expected a Knapsack, got {knapsack!r}")
    knapsack.check(objective.n)
    state, room = objective.start(), knapsack.room(objective.n)
    fill_by_density(state, room, knapsack)
    return Run(state.items, state.items)


def fill_by_density(state: State, room: Room, knapsack: Knapsack) -> None:
    """Go on from a set with what fits, the largest gain per unit of cost first."""
    costs = knapsack.costs.astype(np.float64)
    while room.open.any():
        densities = np.where(room.open, state.gains() / costs, -np.inf)
        best = int(densities.argmax())
        if densities[best] <= 0:
            break
        state.add(best)
        room.add(best)


def density_greedy_or_best_single(objective: SetFunction, knapsack: Knapsack) -> Run:
    """The better of density greedy's set and the best single element that fits.

    Args:
        objective: monotone.
        knapsack: on the same elements.

    Raises:
        ValueError: the knapsack is about another number of elements.

    References:
        Khuller, Moss, Naor, Information Processing Letters 70 (1999); the ratio 0.405 by Tang et
        al., Proc. ACM on Measurement and Analysis of Computing Systems 5 (2021).

    Example:
        >>> from lorambo_alloc.submodular import Knapsack, Modular
        >>> f = Modular([2.0, 100.0])
        >>> density_greedy_or_best_single(f, Knapsack([1, 100], budget=100)).items
        (1,)
    """
    run = density_greedy(objective, knapsack)
    state, room = objective.start(), knapsack.room(objective.n)
    gains = np.where(room.open, state.gains(), -np.inf)
    if objective.n and gains.max() > objective.value(run.items):
        return Run((int(gains.argmax()),), run.trace)
    return run
