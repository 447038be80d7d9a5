"""Constraints on sets: what every constraint offers, cardinality and knapsack.

Costs, budgets and capacities are whole numbers, so what is feasible is decided exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from lorambo_alloc.costs import exact_dot, whole_number
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.submodular.guarantees import CARDINALITY, KNAPSACK
from lorambo_alloc.submodular.objectives import ROUNDING

Mask: TypeAlias = npt.NDArray[np.bool_]

_LARGEST_COST = 1 << 53


class Room(Protocol):
    """What may still be added to a feasible set. What may not, never may again."""

    @property
    def open(self) -> Mask:
        """Which elements may be added; those in the set may not."""
        ...

    def add(self, element: int) -> None:
        """Put an element in."""
        ...


class Constraint(ABC):
    """A family of feasible sets, closed under taking elements away.

    Attributes:
        kind: "cardinality", "matroid" or "knapsack": the constraint whose guarantees hold.
    """

    kind: str

    @abstractmethod
    def check(self, n: int) -> None:
        """Raise ValueError unless the constraint is about n elements."""

    @abstractmethod
    def room(self, n: int) -> Room:
        """What may be added to the empty set."""

    @abstractmethod
    def heaviest(self, weights: FloatArray) -> float:
        """A bound on the total weight of a feasible set, rounded up.

        Args:
            weights: >= 0, one an element; infinite where nothing is known.
        """

    @abstractmethod
    def shares(self, weights: FloatArray) -> FloatArray:
        """The heaviest set, to rounding: 1 for its elements, 0 for others.

        Under a knapsack one element may have a share in between.

        Args:
            weights: finite and >= 0, one an element.
        """

    def cost(self, items: Sequence[int]) -> int:
        """What a set costs; the number of its elements where there are no costs."""
        return len(items)

    def feasible(self, items: Iterable[int], n: int) -> bool:
        """Whether a set of distinct elements out of n is feasible."""
        room = self.room(n)
        for item in items:
            if not room.open[item]:
                return False
            room.add(item)
        return True


class _CountRoom:
    """How many more elements fit."""

    def __init__(self, n: int, left: int) -> None:
        self.open = np.full(n, left > 0)
        self._left = left

    def add(self, element: int) -> None:
        self._left -= 1
        self.open[element] = False
        if self._left == 0:
            self.open[:] = False


class Cardinality(Constraint):
    """At most so many elements.

    Args:
        limit: a whole number >= 0.

    Raises:
        ValueError: it is anything else.

    Example:
        >>> Cardinality(2).feasible([4, 1], 5)
        True
    """

    kind = CARDINALITY

    def __init__(self, limit: int) -> None:
        self.limit = whole_number(limit, "limit", least=0)

    def check(self, n: int) -> None:
        """Any number of elements will do."""

    def room(self, n: int) -> Room:
        """What may be added to the empty set."""
        return _CountRoom(n, self.limit)

    def heaviest(self, weights: FloatArray) -> float:
        """The sum of the largest weights."""
        k = min(self.limit, len(weights))
        top = np.partition(weights, len(weights) - k)[len(weights) - k :] if k else weights[:0]
        return float(np.sort(top).sum()) * (1 + 2 * k * ROUNDING)

    def shares(self, weights: FloatArray) -> FloatArray:
        """The elements of the largest weights."""
        shares = np.zeros(len(weights))
        shares[np.argsort(-weights, kind="stable")[: self.limit]] = 1.0
        return shares


class _KnapsackRoom:
    """How much budget is left: a Python int, as costs may come to more than 64 bits together."""

    def __init__(self, costs: IntArray, left: int) -> None:
        self._costs, self._left = costs, left
        self.open = costs <= min(left, _LARGEST_COST)

    def add(self, element: int) -> None:
        self._left -= int(self._costs[element])
        self.open &= self._costs <= min(self._left, _LARGEST_COST)
        self.open[element] = False


class Knapsack(Constraint):
    """A total cost within a budget.

    Args:
        costs: a whole number from 1 to 2^53, one an element.
        budget: a whole number >= 0, in the units of the costs.

    Raises:
        ValueError: a cost or the budget is anything else.

    Example:
        >>> Knapsack([4096, 18432], budget=20_000).feasible([0, 1], 2)
        False
    """

    kind = KNAPSACK

    def __init__(self, costs: Iterable[int], budget: int) -> None:
        if not isinstance(costs, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"costs: expected one an element, got {costs!r}")
        numbers = [whole_number(c, f"costs: element {j}", least=1) for j, c in enumerate(costs)]
        for j, number in enumerate(numbers):
            if number > _LARGEST_COST:
                raise ValueError(f"costs: element {j}: expected at most 2^53, got {number}")
        self.costs: IntArray = np.array(numbers, dtype=np.int64)
        self.budget = whole_number(budget, "budget", least=0)

    def check(self, n: int) -> None:
        """Raise ValueError unless there are n costs."""
        if n != len(self.costs):
            raise ValueError(f"costs: expected one for each of {n} elements, got {len(self.costs)}")

    def room(self, n: int) -> Room:
        """What may be added to the empty set."""
        self.check(n)
        return _KnapsackRoom(self.costs, self.budget)

    def as_cardinality(self) -> Constraint:
        """The same sets as a cardinality constraint where all costs are equal; else itself."""
        if len(self.costs) and (self.costs == self.costs[0]).all():
            return Cardinality(self.budget // int(self.costs[0]))
        return self

    def cost(self, items: Sequence[int]) -> int:
        """The total cost."""
        chosen = self.costs[list(items)]
        return exact_dot(chosen, np.ones_like(chosen))

    def heaviest(self, weights: FloatArray) -> float:
        """The fractional knapsack, as its dual at the break element's price p.

        For every p >= 0 no feasible set weighs more than p budget + sum of max(0, w_j - p c_j),
        so a price that rounding moved costs nothing but tightness.
        """
        fits = (self.costs <= self.budget) & (weights > 0)
        w, c = weights[fits], self.costs[fits]
        if not np.isfinite(w).all():
            return np.inf
        costs = c.astype(np.float64)
        if exact_dot(c, np.ones_like(c)) <= self.budget:
            return float(w.sum()) * (1 + 2 * len(w) * ROUNDING)
        # In doubles, as int64 could wrap: the price need not be exact.
        order = np.argsort(-(w / costs), kind="stable")
        crossed = int(np.searchsorted(np.cumsum(costs[order]), float(self.budget), side="right"))
        at = order[min(crossed, len(order) - 1)]
        price = float(w[at] / costs[at])
        excess = np.maximum(w - price * costs, 0.0)
        # w - p c is off by a rounding of p c and one of itself: by 4 u w at most where it is
        # positive, and where it came out 0 it is no more than that above it; and by underflow.
        slack = 8 * ROUNDING * float(w.sum()) + len(w) * 2.0**-1070
        total = price * float(self.budget) + float(excess.sum()) + slack
        return total * (1 + (2 * len(w) + 8) * ROUNDING)

    def shares(self, weights: FloatArray) -> FloatArray:
        """The fractional knapsack, to rounding: by weight per cost until the budget is spent."""
        shares = np.zeros(len(weights))
        fits = np.flatnonzero((self.costs <= self.budget) & (weights > 0))
        costs = self.costs[fits].astype(np.float64)
        order = np.argsort(-(weights[fits] / costs), kind="stable")
        before = np.cumsum(costs[order]) - costs[order]
        left = (float(self.budget) - before) / costs[order]
        shares[fits[order]] = np.clip(left, 0.0, 1.0)
        return shares
