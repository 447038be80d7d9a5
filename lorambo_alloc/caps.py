"""Side conditions: budgets of groups of layers, each in its own units; convex constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from lorambo_alloc.costs import UniformRank, exact_dot, whole_number, whole_numbers
from lorambo_alloc.objectives import IntArray


@dataclass(frozen=True)
class Cap:
    """A budget for a group of layers: the parameters of a pipeline stage, the bytes on a device.

    Groups may nest or cross.

    Attributes:
        layers: the names of the group's layers.
        budget: a whole number in the cap's own units, or `uniform_rank(r)`: what uniform rank r
            would cost the group.
        costs: the cost of one rank in the cap's units, whole numbers >= 1 by name or in the order
            of `layers`. None: the costs and fixed costs of the problem.
        fixed_costs: with `costs`: charged once where a layer's rank is above 0.

    Example:
        >>> from lorambo_alloc import allocate
        >>> spectra = {"q": [3.0, 2.0], "v": [2.5, 2.0], "o": [1.0, 0.5]}
        >>> dict(allocate(spectra, 4, caps={"attention": Cap(["q", "v"], 2)}))
        {'q': 1, 'v': 1, 'o': 2}
    """

    layers: Sequence[str]
    budget: int | UniformRank
    costs: Mapping[str, int] | Sequence[int] | None = None
    fixed_costs: Mapping[str, int] | Sequence[int] | None = None


Constraints: TypeAlias = Callable[[Mapping[str, Any]], Sequence[Any]]
"""From the cvxpy expression of each layer's rank, by name, to cvxpy constraints."""

Caps: TypeAlias = Mapping[str, Cap | tuple[Sequence[str], int | UniformRank]]


@dataclass(frozen=True, eq=False)
class Row:
    """One linear budget over the layers: the problem's own, or a cap's.

    Attributes:
        name: the cap's name; empty for the problem's own budget.
        costs: the cost of one rank, int64 by layer; 0 outside the group.
        fixed_costs: the cost of a rank above 0, int64 by layer.
        budget: an int in the same units.
    """

    name: str
    costs: IntArray
    fixed_costs: IntArray
    budget: int

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"cap {self.name!r}" if self.name else "budget"

    @property
    def layers(self) -> IntArray:
        """The indices of the layers that it charges."""
        return np.flatnonzero(self.costs)

    def cost_at(self, group: Iterable[int], rank: int) -> int:
        """What one rank costs in all layers of a group together."""
        return sum(
            int(self.costs[i]) * rank + (int(self.fixed_costs[i]) if rank else 0) for i in group
        )

    def cost_of(self, ranks: IntArray) -> int:
        """The cost of a rank vector, exactly."""
        total = exact_dot(self.costs, ranks)
        if self.fixed_costs.any():
            total += exact_dot(self.fixed_costs, (ranks > 0).astype(np.int64))
        return total


def parse_caps(caps: object, names: tuple[str, ...], own: Row) -> tuple[Row, ...]:
    """Check the caps of a problem.

    Args:
        caps: as `Problem` takes them, or None.
        names: the layers' names.
        own: the problem's own budget, whose costs are the default.

    Raises:
        ValueError: a cap is not of its form or names an unknown layer; the message names the cap.
    """
    if caps is None:
        return ()
    if not isinstance(caps, Mapping):
        raise ValueError(f"caps: expected a mapping of name to Cap, got {caps!r}")
    index = {name: i for i, name in enumerate(names)}
    rows: list[Row] = []
    for name, cap in cast(Mapping[object, object], caps).items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"caps: expected names that are non-empty strings, got {name!r}")
        if isinstance(cap, tuple) and len(cast(tuple[Any, ...], cap)) == 2:
            cap = Cap(*cast(tuple[Any, Any], cap))
        if not isinstance(cap, Cap):
            raise ValueError(f"cap {name!r}: expected a Cap or (layers, budget), got {cap!r}")
        rows.append(_parse(name, cap, index, own))
    return tuple(rows)


def _parse(name: str, cap: Cap, index: dict[str, int], own: Row) -> Row:
    where = f"cap {name!r}"
    if isinstance(cap.layers, str) or not isinstance(cap.layers, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{where}: expected a list of layer names, got {cap.layers!r}")
    members = tuple(cap.layers)
    for layer in members:
        if not isinstance(layer, str) or layer not in index:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{where}: layer {layer!r} is not among the spectra")
    if not members or len(set(members)) < len(members):
        raise ValueError(f"{where}: expected one or more different layers, got {list(members)!r}")
    positions = np.array([index[layer] for layer in members], dtype=np.int64)
    costs, fixed = np.zeros_like(own.costs), np.zeros_like(own.costs)
    if cap.costs is None:
        if cap.fixed_costs is not None:
            raise ValueError(f"{where}: fixed_costs need costs in the same units beside them")
        costs[positions] = own.costs[positions]
        fixed[positions] = own.fixed_costs[positions]
    else:
        costs[positions] = whole_numbers(cap.costs, members, f"{where}: costs", 1)
        if cap.fixed_costs is not None:
            fixed[positions] = whole_numbers(cap.fixed_costs, members, f"{where}: fixed_costs", 0)
    if isinstance(cap.budget, UniformRank):
        budget = cap.budget.cost(costs[positions], fixed[positions])
    else:
        budget = whole_number(cap.budget, f"{where}: budget", least=0)
    return Row(name, costs, fixed, budget)
