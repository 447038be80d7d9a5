"""The rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.baselines.equal import mlp_only, uniform
from lorambo_alloc.baselines.shares import gora, square_root
from lorambo_alloc.baselines.thresholds import adalora, eva
from lorambo_alloc.problem import Problem


class Rule(Protocol):
    """A rule that needs nothing but the problem."""

    def __call__(self, problem: Problem, *, fill: bool = False) -> Allocation:
        """Ranks by the rule; see the package."""
        ...


RULES: Mapping[str, Rule] = {
    "uniform": uniform,
    "mlp_only": mlp_only,
    "eva": eva,
    "adalora": adalora,
    "gora": gora,
    "square_root": square_root,
}
"""The rules by name."""
