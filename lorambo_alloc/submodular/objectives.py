"""Set functions: what every objective offers, and the checks that they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.submodular.guarantees import SUBMODULAR

Ceiling: TypeAlias = tuple[float, FloatArray]
"""A number a and weights w >= 0 by element: f(T) <= a + sum of w over T, for every set T."""

ROUNDING = 2.0**-53


class State(Protocol):
    """A set that grows, with the gains of adding to it."""

    @property
    def items(self) -> tuple[int, ...]:
        """The elements, in the order in which they were added."""
        ...

    @property
    def value(self) -> float:
        """The set's value."""
        ...

    def gains(self, candidates: IntArray | None = None) -> FloatArray:
        """f(S + j) - f(S) for the candidates (all elements: None); 0 for those in the set."""
        ...

    def add(self, element: int) -> None:
        """Put an element that is not in the set into it."""
        ...

    def copy(self) -> State:
        """Return a set that grows on its own."""
        ...


class Relaxation(Protocol):
    """The feasible sets, as bounds see them."""

    def heaviest(self, weights: FloatArray) -> float:
        """A bound on the total weight of a feasible set, rounded up."""
        ...

    def shares(self, weights: FloatArray) -> FloatArray:
        """The heaviest set, to rounding; a knapsack may take a share of one element."""
        ...


class SetFunction(ABC):
    """A monotone set function f on the elements 0..n - 1 with f(empty) = 0.

    Attributes:
        n: the number of elements.
        kind: "modular", "submodular" or "weakly submodular": the class whose guarantees hold.
        incremental: whether the gains of all elements cost little more than the gain of one.
        layers: the layer of each element, or None.
    """

    kind: str = SUBMODULAR
    incremental: bool = True
    layers: tuple[str, ...] | None = None

    def __init__(self, n: int) -> None:
        self.n = n

    @abstractmethod
    def start(self) -> State:
        """Return the empty set."""

    @abstractmethod
    def value(self, items: Iterable[int]) -> float:
        """The value of a set, computed afresh.

        Raises:
            ValueError: an item is not an element, or comes twice.
        """

    @abstractmethod
    def ceilings(self, items: Sequence[int], within: Relaxation) -> list[Ceiling]:
        """Bounds on f, proved from the gains at a set; rounded up, each step of the way.

        Where f is monotone and submodular, f(T) <= f(S) + sum of the gains at S over T. Any set S
        will do; the better S is, the tighter the bound.

        Args:
            items: the elements of S.
            within: the sets for which the bound should be tight; it holds for all.
        """

    def rounding(self, size: int, value: float) -> float:
        """How far a computed value may be from f, for values up to so much of so many elements.

        0 where that is a matter of the last bits, which every tolerance covers.
        """
        return 0.0

    def sketch(self, state: State) -> Ceiling:
        """What `ceilings` would say at a set, to rounding, from the gains at hand."""
        return state.value, state.gains()

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.n} elements, {self.kind}"

    def check_items(self, items: Iterable[int]) -> list[int]:
        """Elements as ints.

        Raises:
            ValueError: an item is not an element, or comes twice.
        """
        checked = [whole_number(item, "items", least=0) for item in items]
        for item in checked:
            if item >= self.n:
                raise ValueError(f"items: expected elements below {self.n}, got {item}")
        if len(set(checked)) < len(checked):
            raise ValueError(f"items: expected each element once, got {checked}")
        return checked


def non_negative(values: object, what: str) -> FloatArray:
    """A vector of finite numbers >= 0, copied.

    Raises:
        ValueError: it is anything else; the message names the first entry at fault.
    """
    array = finite(values, what, 1)
    if (array < 0).any():
        j = int(np.argmax(array < 0))
        raise ValueError(f"{what}: expected numbers >= 0, got {float(array[j])!r} at {j}")
    return array.copy()


def finite(values: object, what: str, dimensions: int) -> FloatArray:
    """A float64 array of finite numbers (a view where it is one).

    Raises:
        ValueError: it is anything else.
    """
    try:
        array: FloatArray = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected an array of real numbers: {error}") from error
    if array.ndim != dimensions:
        raise ValueError(f"{what}: expected {dimensions} dimensions, got shape {array.shape}")
    # A sum that is finite vouches for every entry without a mask as large as the array.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not math.isfinite(float(array.sum()))
    if suspicious and not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{what}: expected finite numbers, got {array[tuple(where)]} at {where}")
    return array
