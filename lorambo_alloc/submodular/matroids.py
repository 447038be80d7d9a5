"""Partition and laminar matroids: at most so many elements out of nested or disjoint sets."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.submodular.constraints import Constraint, Mask, Room
from lorambo_alloc.submodular.guarantees import MATROID
from lorambo_alloc.submodular.objectives import ROUNDING


class _LaminarRoom:
    """Capacities left; an element is open while every set that holds it has room."""

    def __init__(self, open_: Mask, left: list[int], chains: list[list[int]], members: Any) -> None:
        self.open = open_
        self._left, self._chains, self._members = left, chains, members
        for number, capacity in enumerate(left):
            if capacity == 0:
                self.open[members[number]] = False

    def add(self, element: int) -> None:
        self.open[element] = False
        for number in self._chains[element]:
            self._left[number] -= 1
            if self._left[number] == 0:
                self.open[self._members[number]] = False


class LaminarMatroid(Constraint):
    """At most so many elements out of each of some sets, which are nested or disjoint.

    Args:
        n: the number of elements; those in no set are free.
        sets: collections of elements, by name or in order.
        capacities: a whole number >= 0 for each set, by name or in order.

    Raises:
        ValueError: two sets cross (each has an element of its own and they share one), an
            element is unknown, or a capacity is missing.

    Example:
        >>> sets = {"stage": {0, 1, 2}, "block": {0, 1}}
        >>> matroid = LaminarMatroid(4, sets, {"stage": 2, "block": 1})
        >>> matroid.feasible([0, 2, 3], 4), matroid.feasible([0, 1], 4)
        (True, False)
    """

    kind = MATROID

    def __init__(
        self,
        n: int,
        sets: Mapping[str, Iterable[int]] | Sequence[Iterable[int]],
        capacities: Mapping[str, int] | Sequence[int],
    ) -> None:
        self.n = whole_number(n, "n", least=0)
        if isinstance(sets, Mapping) != isinstance(capacities, Mapping):
            raise ValueError("capacities: expected names where the sets have names, else order")
        if isinstance(sets, Mapping):
            self.names = tuple(repr(name) for name in sets)
            assert isinstance(capacities, Mapping)
            for name in (*sets, *capacities):
                if name not in capacities or name not in sets:
                    raise ValueError(f"capacities: {name!r} is not among both sets and capacities")
            given: list[Any] = [capacities[name] for name in sets]
            collections = list(sets.values())
        else:
            self.names = tuple(str(number) for number in range(len(sets)))
            given, collections = list(capacities), list(sets)
            if len(given) != len(collections):
                raise ValueError(f"capacities: expected {len(sets)}, got {len(given)}")
        self.capacities = [
            whole_number(c, f"capacities: set {name}", least=0)
            for c, name in zip(given, self.names, strict=True)
        ]
        self.members = [
            _elements(collection, self.n, f"set {name}")
            for collection, name in zip(collections, self.names, strict=True)
        ]
        self._chains = self._nest()

    def _nest(self) -> list[list[int]]:
        """For each element, the sets that hold it, from large to small."""
        chains: list[list[int]] = [[] for _ in range(self.n)]
        order = sorted(range(len(self.members)), key=lambda s: -len(self.members[s]))
        place = {s: position for position, s in enumerate(order)}
        for s in order:
            members: list[int] = self.members[s].tolist()
            # All elements must lie in the same sets so far; the latest of the innermost sets
            # holds some of them, not all, and is no smaller: it crosses.
            innermost: set[int] = {chains[e][-1] if chains[e] else -1 for e in members}
            if len(innermost) > 1:
                latest = max(place.get(t, -1) for t in innermost)
                raise ValueError(self._crossing(order[latest], s))
            for e in members:
                chains[e].append(s)
        return chains

    def _crossing(self, s: int, t: int) -> str:
        a, b = set(self.members[s].tolist()), set(self.members[t].tolist())
        return (
            f"sets {self.names[s]} and {self.names[t]} cross: both hold {min(a & b)}, only "
            f"{self.names[s]} holds {min(a - b)}, only {self.names[t]} holds {min(b - a)}; "
            "a laminar matroid's sets are nested or disjoint"
        )

    def check(self, n: int) -> None:
        """Raise ValueError unless there are n elements."""
        if n != self.n:
            raise ValueError(f"constraint: expected {n} elements, as the objective, got {self.n}")

    def room(self, n: int) -> Room:
        """What may be added to the empty set."""
        self.check(n)
        return _LaminarRoom(
            np.ones(n, dtype=bool), self.capacities.copy(), self._chains, self.members
        )

    def heaviest(self, weights: FloatArray) -> float:
        """The greatest weight of an independent set."""
        chosen = weights[self.shares(weights) > 0]
        return float(chosen.sum()) * (1 + 2 * len(chosen) * ROUNDING)

    def shares(self, weights: FloatArray) -> FloatArray:
        """An independent set of the greatest weight: greedy finds it (Rado, Edmonds)."""
        room, shares = self.room(len(weights)), np.zeros(len(weights))
        for element in np.argsort(-weights, kind="stable").tolist():
            if weights[element] <= 0:
                break
            if room.open[element]:
                room.add(element)
                shares[element] = 1.0
        return shares


class PartitionMatroid(LaminarMatroid):
    """At most so many elements out of each group.

    Args:
        groups: the group of each element.
        capacities: a whole number >= 0: one for all groups, or one for each by name.

    Raises:
        ValueError: a group has no capacity, or a capacity is not a whole number >= 0.

    Example:
        >>> PartitionMatroid(["attention", "attention", "mlp"], 1).feasible([0, 2], 3)
        True
    """

    def __init__(self, groups: Sequence[Hashable], capacities: int | Mapping[Any, int]) -> None:
        self.groups = tuple(groups)
        members: dict[Hashable, list[int]] = {}
        for element, group in enumerate(self.groups):
            members.setdefault(group, []).append(element)
        if isinstance(capacities, Mapping):
            for group in members:
                if group not in capacities:
                    raise ValueError(f"capacities: group {group!r} is missing")
            limits = [capacities[group] for group in members]
        else:
            limits = [capacities] * len(members)
        names = [str(group) for group in members]
        for name, limit in zip(names, limits, strict=True):
            whole_number(limit, f"capacities: group {name!r}", least=0)
        super().__init__(len(self.groups), list(members.values()), limits)
        self.names = tuple(names)


def _elements(collection: Iterable[int], n: int, what: str) -> IntArray:
    """Distinct elements below n, ascending."""
    numbers = sorted({whole_number(e, what, least=0) for e in collection})
    if numbers and numbers[-1] >= n:
        raise ValueError(f"{what}: expected elements below {n}, got {numbers[-1]}")
    return np.array(numbers, dtype=np.int64)
