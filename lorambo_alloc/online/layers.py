"""The layers of a problem that is solved again and again: costs and limits, without curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lorambo_alloc.caps import Caps
from lorambo_alloc.costs import exact_dot, whole_number, whole_numbers
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
        self.names = tuple(costs)
        self.costs = whole_numbers(costs, self.names, "costs", 1)
        fixed = dict.fromkeys(self.names, 0) if fixed_costs is None else fixed_costs
        self.fixed_costs = whole_numbers(fixed, self.names, "fixed_costs", 0)
        self._tied = list(tied)
        self._caps, self._multiple_of, self._allowed_ranks = caps, multiple_of, allowed_ranks
        lengths = np.full(len(self.names), _ANY)
        self.limits = parse_limits(
            self.names, lengths, min_rank, max_rank, multiple_of, allowed_ranks, self._tied
        )

    def cost_of(self, ranks: IntArray) -> int:
        """What ranks cost, exactly."""
        return exact_dot(self.costs, ranks) + exact_dot(self.fixed_costs, 1 * (ranks > 0))

    def parse_ranks(self, ranks: Mapping[str, int], now: IntArray) -> IntArray:
        """Ranks by name, and the present ones of layers left out, as int64 by layer.

        Raises:
            ValueError: a layer is unknown, or a rank is not a whole number >= 0.
        """
        if not isinstance(ranks, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"ranks: expected a mapping of layer name to rank, got {ranks!r}")
        known = set(self.names)
        for name in ranks:
            if name not in known:
                raise ValueError(f"ranks: layer {name!r} is not among the layers")
        parsed = [
            whole_number(ranks.get(name, rank), f"ranks: layer {name!r}", 0)
            for name, rank in self.named(now).items()
        ]
        return np.array(parsed, dtype=np.int64)

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
            multiple_of=self._multiple_of,
            allowed_ranks=self._allowed_ranks,
            tied=self._tied,
            caps=self._caps,
        )

    def check_budget(self, budget: int) -> None:
        """Raise InfeasibleError unless the least ranks fit a budget and all caps."""
        lower = self.limits.lower
        nothing = {name: np.zeros(max(1, rank)) for name, rank in self.named(lower).items()}
        self.problem(GainCurves.from_increments(nothing), budget, lower, lower)
