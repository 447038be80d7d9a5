"""A caller's own set function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import FloatArray, IntArray, real_number
from lorambo_alloc.submodular.guarantees import SUBMODULAR, WEAKLY_SUBMODULAR
from lorambo_alloc.submodular.objectives import (
    ROUNDING,
    Ceiling,
    Relaxation,
    SetFunction,
    State,
)


class _FunctionState:
    """A set under `Function`."""

    def __init__(self, function: Function, items: tuple[int, ...] = ()) -> None:
        self._function = function
        self._items = items

    @property
    def items(self) -> tuple[int, ...]:
        return self._items

    @property
    def value(self) -> float:
        return self._function.of(frozenset(self._items))

    def gains(self, candidates: IntArray | None = None) -> FloatArray:
        own = frozenset(self._items)
        base = self.value
        each = range(self._function.n) if candidates is None else candidates.tolist()
        return np.array([self._function.of(own | {j}) - base for j in each], dtype=float)

    def add(self, element: int) -> None:
        self._items = (*self._items, element)

    def copy(self) -> _FunctionState:
        return _FunctionState(self._function, self._items)


class Function(SetFunction):
    """A caller's own set function. What it is, the caller claims; `bound_check` looks for lies.

    Its values are taken as exact. They are remembered, so f is asked once about each set.

    Args:
        n: the number of elements.
        f: from a frozenset of elements to a finite number; monotone, and f(frozenset()) = 0.
        submodular: whether f is submodular. If not, the only bound is OPT <= f(all elements).

    Raises:
        ValueError: n is not a whole number >= 0, or f(frozenset()) is not 0.

    Example:
        >>> f = Function(3, lambda s: min(len(s), 2))
        >>> f.value([0, 1, 2])
        2.0
    """

    incremental = False

    def __init__(
        self, n: int, f: Callable[[frozenset[int]], Any], *, submodular: bool = True
    ) -> None:
        super().__init__(whole_number(n, "n", least=0))
        self.kind = SUBMODULAR if submodular else WEAKLY_SUBMODULAR
        self._f = f
        self._known: dict[frozenset[int], float] = {}
        if not callable(f):
            raise ValueError(f"f: expected a function of a frozenset, got {f!r}")
        if self.of(frozenset()) != 0:
            raise ValueError(f"f(frozenset()): expected 0, got {self.of(frozenset())!r}")

    @property
    def evaluations(self) -> int:
        """How many sets f has been asked about."""
        return len(self._known)

    def of(self, items: frozenset[int]) -> float:
        """The caller's value of a set.

        Raises:
            ValueError: f returned what is not a finite number.
        """
        known = self._known.get(items)
        if known is None:
            given = self._f(items)
            known = real_number(given)
            if not math.isfinite(known):
                raise ValueError(f"f({sorted(items)}): expected a finite number, got {given!r}")
            self._known[items] = known
        return known

    def start(self) -> State:
        """Return the empty set."""
        return _FunctionState(self)

    def value(self, items: Iterable[int]) -> float:
        """The caller's value of a set."""
        return self.of(frozenset(self.check_items(items)))

    def ceilings(self, items: Sequence[int], within: Relaxation) -> list[Ceiling]:
        """The gains at the set if f is submodular, and f of everything."""
        everything = self.of(frozenset(range(self.n)))
        found: list[Ceiling] = [(everything, np.zeros(self.n))]
        if self.kind == SUBMODULAR:
            state = _FunctionState(self, tuple(items))
            gains = state.gains()
            # One subtraction: half a unit in the last place of the larger operand at most.
            found.append((state.value, np.maximum(gains + 2 * ROUNDING * np.abs(gains), 0.0)))
        return found

    def sketch(self, state: State) -> Ceiling:
        """The gains at the set, or f of everything where f is not submodular."""
        if self.kind == SUBMODULAR:
            return super().sketch(state)
        return self.of(frozenset(range(self.n))), np.zeros(self.n)
