"""The ranks of an extracted adapter: a budget in any of its forms, and the exact solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.extract_ranks needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.budgets import Bytes, Energy, Share, energy_target
from lorambo_alloc import (
    Allocation,
    BudgetCertificate,
    Certificate,
    Spectra,
    allocate,
    minimize_budget,
)
from lorambo_alloc.costs import UniformRank


def solved_ranks(
    spectra: Spectra, wanted: Any, types: Mapping[str, torch.dtype], limits: dict[str, Any]
) -> tuple[Allocation, Certificate | BudgetCertificate]:
    """The best ranks within a budget, or the cheapest that keep an energy.

    Args:
        spectra: of the differences, with shapes.
        wanted: what `budgets.parsed` returned; a share is of the weights' parameters.
        types: layer to the type in which factors are stored.
        limits: of `allocate`, "max_rank" among them.

    Raises:
        ValueError: a uniform rank above `max_rank`, or an energy that the limits do not allow.
        InfeasibleError: the least ranks cost more than the budget (a `ValueError`).
    """
    assert spectra.shapes is not None
    shapes = spectra.shapes
    most = limits["max_rank"]
    if isinstance(wanted, UniformRank) and any(
        min(wanted.rank, *shape) > most for shape in shapes.values()
    ):
        raise ValueError(
            f"budget: expected a uniform rank up to max_rank, which is {most}, got {wanted.rank}; "
            "raise max_rank"
        )
    if isinstance(wanted, Energy):
        left = sum(map(Fraction, spectra.unresolved.values()), Fraction(0))
        target = energy_target(wanted, spectra, left, limits)
        cheapest = minimize_budget(spectra, value=target, **limits)
        return cheapest.allocation, cheapest.certificate
    if isinstance(wanted, Share):
        wanted = math.floor(wanted.share * sum(d * k for d, k in shapes.values()))
    elif isinstance(wanted, Bytes):
        limits["costs"] = {n: (d + k) * types[n].itemsize for n, (d, k) in shapes.items()}
        wanted = wanted.count
    allocation = allocate(spectra, wanted, **limits)
    return allocation, allocation.certificate


def captured_share(
    spectra: Spectra, ranks: Mapping[str, int], energy: Mapping[str, float]
) -> float:
    """The share of the energies that ranks keep, by the spectra."""
    kept = math.fsum(float(v @ v) for n, values in spectra.items() for v in (values[: ranks[n]],))
    total = math.fsum(energy.values())
    return kept / total if total else 1.0
