"""Weighted coverage, and modular functions as its case of disjoint sets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.submodular.guarantees import MODULAR
from lorambo_alloc.submodular.objectives import (
    ROUNDING,
    Ceiling,
    Relaxation,
    SetFunction,
    State,
    non_negative,
)


class _CoverageState:
    """A set under `Coverage`, with the weights of the points that it leaves uncovered."""

    def __init__(self, function: Coverage) -> None:
        self._function = function
        self._uncovered = function.weights.copy()
        self._items: list[int] = []
        self._value = 0.0

    @property
    def items(self) -> tuple[int, ...]:
        return tuple(self._items)

    @property
    def value(self) -> float:
        return self._value

    def gains(self, candidates: IntArray | None = None) -> FloatArray:
        f = self._function
        if candidates is None:
            gains: FloatArray = np.bincount(
                f.owners, weights=self._uncovered[f.flat], minlength=f.n
            ).astype(np.float64)
            return gains
        return np.array([self._uncovered[f.row(j)].sum() for j in candidates.tolist()], dtype=float)

    def add(self, element: int) -> None:
        row = self._function.row(element)
        self._value += float(self._uncovered[row].sum())
        self._uncovered[row] = 0.0
        self._items.append(element)

    def copy(self) -> _CoverageState:
        other = _CoverageState(self._function)
        other._uncovered = self._uncovered.copy()
        other._items, other._value = self._items.copy(), self._value
        return other


class Coverage(SetFunction):
    """Weighted coverage: the total weight of the points that the chosen sets cover.

    f(S) = sum of w_p over the points p in the union of the sets of S; monotone and submodular.

    Args:
        sets: one collection of points (whole numbers >= 0) an element.
        weights: finite and >= 0, one a point; 1 each where None.

    Raises:
        ValueError: a point is not a whole number or has no weight, or a weight is negative.

    Example:
        >>> f = Coverage([{0, 1}, {1, 2}, {2}])
        >>> f.value([0, 1]), f.start().gains()
        (3.0, array([2., 2., 1.]))
    """

    def __init__(self, sets: Iterable[Iterable[int]], weights: object = None) -> None:
        rows = [_points(points, f"sets: element {j}") for j, points in enumerate(sets)]
        super().__init__(len(rows))
        points = max((row[-1] for row in rows if row), default=-1) + 1
        if weights is None:
            self.weights: FloatArray = np.ones(points)
        else:
            self.weights = non_negative(weights, "weights")
            if len(self.weights) < points:
                raise ValueError(
                    f"weights: expected one for each of {points} points, got {len(self.weights)}"
                )
        with np.errstate(over="ignore"):
            total = float(self.weights.sum())
        if total > 2.0**900:
            raise ValueError(
                f"weights: expected a sum of at most 2^900, got {total!r}; choose other units"
            )
        sizes = [len(row) for row in rows]
        self.flat: IntArray = np.array([p for row in rows for p in row], dtype=np.int64)
        self.owners: IntArray = np.repeat(np.arange(self.n), sizes)
        self._offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def row(self, element: int) -> IntArray:
        """The points of an element, ascending."""
        return self.flat[self._offsets[element] : self._offsets[element + 1]]

    def start(self) -> State:
        """Return the empty set."""
        return _CoverageState(self)

    def value(self, items: Iterable[int]) -> float:
        """The weight that the sets cover together, correctly rounded."""
        covered: set[int] = set()
        for item in self.check_items(items):
            covered.update(self.row(item).tolist())
        return math.fsum(self.weights[p] for p in covered)

    def ceilings(self, items: Sequence[int], within: Relaxation) -> list[Ceiling]:
        """The gains at the set; each sum of m weights is within m roundings."""
        state = self.start()
        for item in items:
            state.add(item)
        up = 1 + 2 * (len(self.weights) + 1) * ROUNDING
        return [(self.value(items) * (1 + 4 * ROUNDING), state.gains() * up)]


def _points(points: Iterable[int], where: str) -> list[int]:
    if not isinstance(points, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{where}: expected a collection of points, got {points!r}")
    return sorted({whole_number(point, where, least=0) for point in points})


class Modular(Coverage):
    """A sum of weights: f(S) = sum of w_j over S.

    Args:
        weights: finite and >= 0, one an element.

    Raises:
        ValueError: a weight is negative or not finite.

    Example:
        >>> Modular([3.0, 1.0, 2.0]).value([0, 2])
        5.0
    """

    kind = MODULAR

    def __init__(self, weights: object) -> None:
        own = non_negative(weights, "weights")
        super().__init__([[j] for j in range(len(own))], own)
