"""Non-oblivious local search under a matroid, with the potential computed exactly."""

from __future__ import annotations

import math
import time

import numpy as np

from lorambo_alloc.objectives import FloatArray
from lorambo_alloc.submodular.constraints import Constraint, Mask
from lorambo_alloc.submodular.greedy import Run, greedy
from lorambo_alloc.submodular.guarantees import KNAPSACK, LOCAL_SEARCH_EPSILON
from lorambo_alloc.submodular.objectives import SetFunction, State

LARGEST_RANK = 16
"""Sets of more elements are refused: the potential of k elements is a sum over 2^k subsets."""


def local_search(
    objective: SetFunction, matroid: Constraint, *, time_limit: float | None = None
) -> Run:
    """Exchange one element for another while a potential grows (Filmus and Ward 2014).

    The potential of a set A is a weighted sum of f over its subsets, with gains

        g(A + e) - g(A) = sum over B in A of m(|A|, |B|) (f(B + e) - f(B)),
        m(a, b) = integral over p in [0, 1] of e^p / (e - 1) p^b (1 - p)^(a - b)

    The paper estimates it from samples; here it is summed over all 2^k subsets, so nothing is left
    to chance. If no exchange S - s + o raises g by more than D, then for every feasible O

        f(O) <= e / (e - 1) f(S) + k D

    with k = |S|, so stopping at D <= epsilon f(S) / k leaves f(S) >= (1 - 1/e - epsilon) OPT, with
    epsilon = 0.001. Every exchange costs 2^k vectors of gains.

    Args:
        objective: monotone, and submodular for the guarantee.
        matroid: on the same elements.
        time_limit: seconds; when they are over, the better of greedy's set and the present one is
            returned, and `complete` is False. So it is where exchanges go in a circle, as they may
            if f is not what it claims, or as good as singular.

    Raises:
        ValueError: the matroid's rank is above 16, it is about another number of elements, or
            it is a knapsack.

    References:
        Filmus, Ward, Monotone submodular maximization over a matroid via non-oblivious local
        search, SIAM Journal on Computing 43 (2014).

    Example:
        >>> from lorambo_alloc.submodular import Coverage, PartitionMatroid
        >>> f = Coverage([{0}, {1}, {0}], weights=[1.0, 0.9])
        >>> one_of_two = PartitionMatroid(["a", "a", "b"], 1)
        >>> greedy(f, one_of_two).items, local_search(f, one_of_two).items
        ((0,), (2, 1))
    """
    if matroid.kind == KNAPSACK:
        raise ValueError("local search: expected a matroid, got a knapsack; use select")
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    start = greedy(objective, matroid)
    base = _extend(objective, matroid, start.items)
    if len(base) > LARGEST_RANK:
        raise ValueError(
            f"local search: the matroid has rank {len(base)}, and its potential 2^{len(base)} "
            f"terms; expected a rank of at most {LARGEST_RANK}; use 'greedy'"
        )
    improved, complete = _search(objective, matroid, base, deadline)
    items = _in_greedy_order(objective, improved)
    if objective.value(items) > objective.value(start.items):
        return Run(items, items, complete)
    return Run(start.items, start.items, complete)


def _extend(objective: SetFunction, matroid: Constraint, items: tuple[int, ...]) -> list[int]:
    """A base: the theorem exchanges elements of one base for those of another."""
    room = matroid.room(objective.n)
    base = list(items)
    for element in items:
        room.add(element)
    while room.open.any():
        base.append(int(room.open.argmax()))
        room.add(base[-1])
    return base


def _search(
    objective: SetFunction, matroid: Constraint, base: list[int], deadline: float
) -> tuple[list[int], bool]:
    """Exchange until no exchange gains more than epsilon f / k, or the deadline is over."""
    # Why a local optimum is good. Pair the bases S and O so that each S - s_i + o_i is a base
    # (Brualdi). Let S(p) hold each element of S with probability p, F(p) = E f(S(p)), and I(h) be
    # the integral of e^p / (e - 1) h(p) over [0, 1]. By parts, and by f submodular and monotone,
    #     sum_i [g(S) - g(S - s_i)]              = I(F') = e / (e - 1) f(S) - I(F),
    #     sum_i [g(S - s_i + o_i) - g(S - s_i)] >= I(E sum_i [f(S(p) + o_i) - f(S(p))])
    #                                           >= f(O) - I(F).
    # The second exceeds the first by k D at most, so f(O) <= e / (e - 1) f(S) + k D.
    k = len(base)
    chosen = base.copy()
    seen: set[frozenset[int]] = set()
    while k:
        # The potential of a base seen before cannot have grown: rounding decides, or f is not
        # what it claims. The theorem is lost then, and without this the search might not end.
        if time.monotonic() >= deadline or frozenset(chosen) in seen:
            return chosen, False
        seen.add(frozenset(chosen))
        gains = potential_gains(objective, chosen)
        best, place, element = -math.inf, -1, -1
        for i in range(k):
            room = _open_without(objective, matroid, chosen, i)
            change = np.where(room, gains[i] - gains[i, chosen[i]], -np.inf)
            o = int(change.argmax())
            if change[o] > best:
                best, place, element = float(change[o]), i, o
        if best <= LOCAL_SEARCH_EPSILON * objective.value(chosen) / k:
            break
        chosen[place] = element
    return chosen, True


def _open_without(
    objective: SetFunction, matroid: Constraint, chosen: list[int], place: int
) -> Mask:
    """What fits in the place of one of the chosen; itself among it."""
    room = matroid.room(objective.n)
    for i, element in enumerate(chosen):
        if i != place:
            room.add(element)
    return room.open


def potential_gains(objective: SetFunction, chosen: list[int]) -> FloatArray:
    """The potential's gains g(A + e) - g(A) for each A = chosen less one, and every element e.

    Args:
        objective: on n elements.
        chosen: k elements.

    Returns:
        k x n: row i is for the set without the i-th of the chosen.
    """
    k = len(chosen)
    weights = potential_weights(k - 1)
    gains = np.zeros((k, objective.n))

    def visit(state: State, size: int, free: list[int]) -> None:
        """Add the share of a subset B, then those of the subsets that extend it."""
        without = [i for i in range(k) if not used[i]]
        gains[without] += weights[size] * state.gains()
        if size + 1 == k:
            return  # all k elements are a subset of none of the sets
        for position, i in enumerate(free):
            larger = state.copy()
            larger.add(chosen[i])
            used[i] = True
            visit(larger, size + 1, free[position + 1 :])
            used[i] = False

    used = [False] * k
    visit(objective.start(), 0, list(range(k)))
    return gains


def potential_weights(size: int) -> list[float]:
    """m(a, b) for a = size and b = 0..a: the weight of a subset of b elements in the potential.

    m(a, b) = b! (a - b)! / (a + 1)! sum over k of (b + 1)_k / ((a + 2)_k k!) / (e - 1): the
    exponential's series, integrated term by term.

    Example:
        >>> [round(m, 4) for m in potential_weights(1)]
        [0.418, 0.582]
    """
    weights: list[float] = []
    for b in range(size + 1):
        term = 1.0 / (math.comb(size, b) * (size + 1))
        total, k = 0.0, 0
        while term > total * 2.0**-60:
            total += term
            term *= (b + 1 + k) / ((size + 2 + k) * (k + 1))
            k += 1
        weights.append(total / math.expm1(1))
    return weights


def _in_greedy_order(objective: SetFunction, items: list[int]) -> tuple[int, ...]:
    """The items, largest gain first, without those that add nothing."""
    state, left = objective.start(), sorted(items)
    while left:
        gains = state.gains(np.array(left, dtype=np.int64))
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        state.add(left.pop(best))
    return state.items
