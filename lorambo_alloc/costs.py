"""Costs and budgets: exact integers in the units of the caller."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from lorambo_alloc.curves import check_names
from lorambo_alloc.objectives import IntArray, real_number

T = TypeVar("T")

PerLayer: TypeAlias = Mapping[str, T] | Sequence[T]
"""One value a layer: by name, or in layer order."""


@dataclass(frozen=True)
class UniformRank:
    """A budget: what giving every layer the rank `rank` costs. Made by `uniform_rank`."""

    rank: int

    def cost(self, costs: IntArray, fixed_costs: IntArray) -> int:
        """The budget in the units of the costs."""
        if self.rank == 0:
            return 0
        return self.rank * exact_dot(costs, np.ones_like(costs)) + exact_dot(
            fixed_costs, np.ones_like(costs)
        )


def uniform_rank(rank: int) -> UniformRank:
    """The budget that uniform rank `rank` would cost, the usual baseline.

    Args:
        rank: a whole number >= 0; layers whose spectrum is shorter are charged it all the same,
            as an adapter of that rank would be.

    Raises:
        ValueError: the rank is not a whole number >= 0.

    Example:
        >>> from lorambo_alloc import allocate
        >>> allocate({"q": [3.0, 2.0], "v": [1.0]}, uniform_rank(1)).ranks
        array([2, 0])
    """
    return UniformRank(whole_number(rank, "uniform_rank", least=0))


def whole_number(value: object, where: str, least: int) -> int:
    """An int from a whole number of any numeric type.

    Raises:
        ValueError: it is not a finite whole number, or is below `least`.
    """
    number: int | None = None
    if not isinstance(value, (bool, np.bool_)):
        try:
            # `value` may be anything; what has no index raises the TypeError below.
            number = operator.index(value)  # pyright: ignore[reportArgumentType]
        except TypeError:
            if real_number(value).is_integer():
                number = int(real_number(value))
    if number is None or number < least:
        raise ValueError(f"{where}: expected a whole number >= {least}, got {value!r}")
    return number


def per_layer(
    values: PerLayer[Any], names: tuple[str, ...], what: str, parse: Callable[[Any, str], T]
) -> list[T]:
    """One parsed value a layer, in layer order, from a mapping or a sequence.

    Raises:
        ValueError: a name is missing or unknown, the length is wrong, or `parse` refuses.
    """
    if isinstance(values, Mapping):
        check_names(values, names, what)
        ordered = [values[name] for name in names]
    else:
        if isinstance(values, str) or not isinstance(values, (Sequence, np.ndarray)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"{what}: expected one value per layer, by name or in order, got {values!r}"
            )
        ordered = list(values)
        if len(ordered) != len(names):
            raise ValueError(f"{what}: expected {len(names)} values, got {len(ordered)}")
    return [
        parse(value, f"{what}: layer {name!r}") for name, value in zip(names, ordered, strict=True)
    ]


def whole_numbers(values: PerLayer[Any], names: tuple[str, ...], what: str, least: int) -> IntArray:
    """Whole numbers up to 2^53, one a layer."""
    if isinstance(values, Mapping) and len(values) == len(names):
        plain = [values.get(name) for name in names]
        if all(type(value) is int and least <= value <= 1 << 53 for value in plain):
            return np.array(plain, dtype=np.int64)

    def parse(value: Any, where: str) -> int:
        number = whole_number(value, where, least)
        if number > 1 << 53:
            raise ValueError(f"{where}: expected at most 2^53, got {number}")
        return number

    return np.array(per_layer(values, names, what, parse), dtype=np.int64)


def exact_dot(a: IntArray, b: IntArray) -> int:
    """Sum of products of integers >= 0, without overflow."""
    if float(np.multiply(a, b, dtype=np.float64).sum()) < 2.0**62:
        return int((a * b).sum())
    return sum(map(operator.mul, a.tolist(), b.tolist()))
