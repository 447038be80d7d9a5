"""The layers of a problem that is solved again and again: costs and limits, without curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lorambo_alloc.caps import Cap, Caps, Row, parse_caps
from lorambo_alloc.costs import whole_numbers
from lorambo_alloc.curves import GainCurves
from lorambo_alloc.limits import AllowedRanks, Limit, parse_limits
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem

_ANY = 1 << 53  # ranks, where no curve says how many there are


class Layers:
    """Costs and limits of the layers, checked once.

    Args:
        costs: as `OnlineAllocator` takes it, and so on.
        fixed_costs: as there.
        min_rank: as there.
        max_rank: as there.
        multiple_of: as there.
        allowed_ranks: as there.
        tied: as there.
        caps: as there.

    Raises:
        ValueError: an argument is not of its form, or some layer has no rank that is allowed.

    Attributes:
        names: the layers'.
        costs: of a rank, int64 by layer.
        fixed_costs: of a rank above 0, int64 by layer.
        limits: the allowed ranks, whatever curves there are.
        caps: the side budgets.
    """

    def __init__(
        self,
        costs: Mapping[str, int],
        fixed_costs: Mapping[str, int] | None,
        min_rank: Limit,
        max_rank: Limit,
        multiple_of: int,
        allowed_ranks: AllowedRanks,
        tied: Iterable[Sequence[str]],
        caps: Caps | None,
    ) -> None:
        if not isinstance(costs, Mapping) or not costs:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"costs: expected a mapping of layer name to cost, got {costs!r}")
        self.names: tuple[str, ...] = tuple(costs)
        self.costs = whole_numbers(costs, self.names, "costs", 1)
        fixed = dict.fromkeys(self.names, 0) if fixed_costs is None else fixed_costs
        self.fixed_costs = whole_numbers(fixed, self.names, "fixed_costs", 0)
        lengths = np.full(len(self.names), _ANY)
        self.limits = limits = parse_limits(
            self.names, lengths, min_rank, max_rank, multiple_of, allowed_ranks, tied
        )
        self.caps = parse_caps(caps, self.names, self._row(0))
        # What a problem is told, from what was checked: an iterator, or a mapping that its owner
        # goes on to change, holds something else the second time.
        self._tied = [[self.names[i] for i in group] for group in limits.groups]
        self._allowed = {self.names[i]: ranks.tolist() for i, ranks in limits.lists.items()}
        self._named_caps = {
            row.name: Cap(
                [name for name, cost in self.named(row.costs).items() if cost],
                row.budget,
                row.costs[row.layers].tolist(),
                row.fixed_costs[row.layers].tolist(),
            )
            for row in self.caps
        }

    def _row(self, budget: int) -> Row:
        return Row("", self.costs, self.fixed_costs, budget)

    def cost_of(self, ranks: IntArray) -> int:
        """What ranks cost, exactly."""
        return self._row(0).cost_of(ranks)

    def excess(self, ranks: IntArray, budget: int) -> str:
        """Which budget the present ranks exceed, in words; empty if none."""
        for row in (self._row(budget), *self.caps):
            cost = row.cost_of(ranks)
            if cost > row.budget:
                return f"the present ranks cost {cost}, more than the {row.where} {row.budget}"
        return ""

    def allows(self, ranks: IntArray) -> bool:
        """Whether ranks satisfy the limits and ties, whatever they cost."""
        try:
            self.limits.check(ranks)
        except ValueError:
            return False
        return True

    def parse_ranks(self, ranks: Mapping[str, int], now: IntArray) -> IntArray:
        """Ranks by name, and the present ones of layers left out, as int64 by layer.

        Raises:
            ValueError: a layer is unknown, or a rank is not a whole number from 0 to 2^53.
        """
        if not isinstance(ranks, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"ranks: expected a mapping of layer name to rank, got {ranks!r}")
        known = set(self.names)
        for name in ranks:
            if name not in known:
                raise ValueError(f"ranks: layer {name!r} is not among the layers")
        return whole_numbers({**self.named(now), **ranks}, self.names, "ranks", 0)

    def named(self, values: IntArray) -> dict[str, int]:
        """Values in layer order, by name."""
        return dict(zip(self.names, values.tolist(), strict=True))

    def problem(self, curves: GainCurves, budget: int, lower: IntArray, upper: IntArray) -> Problem:
        """The problem at one time.

        Args:
            curves: of all layers.
            budget: at that time.
            lower: the least ranks, int64 by layer, in addition to the limits.
            upper: the greatest ones.

        Raises:
            InfeasibleError: the least ranks cost more than the budget or a cap.
            ValueError: the limits leave a layer no rank.
        """
        return Problem(
            curves,
            budget,
            costs=self.costs.tolist(),
            fixed_costs=self.fixed_costs.tolist(),
            min_rank=self.named(lower),
            max_rank=self.named(upper),
            multiple_of=self.limits.multiple_of,
            allowed_ranks=self._allowed,
            tied=self._tied,
            caps=self._named_caps,
        )

    def check_budget(self, budget: int) -> None:
        """Raise InfeasibleError unless the least ranks fit a budget and all caps."""
        lower = self.limits.lower
        nothing = {name: np.zeros(max(1, rank)) for name, rank in self.named(lower).items()}
        self.problem(GainCurves.from_increments(nothing), budget, lower, lower)
