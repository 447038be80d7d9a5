"""What an adapter may cost: parameters, a share of its own, bytes, or whatever keeps its energy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from lorambo_adapters.arguments import budget_from
from lorambo_alloc.costs import UniformRank, whole_number

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_BYTES = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMG]i?)B", re.IGNORECASE | re.ASCII)
_PERCENT = re.compile(r"(energy:)?(\d{1,3}(?:\.\d{1,30})?)\s*%", re.ASCII)


@dataclass(frozen=True)
class Share:
    """A share of the adapter's own parameters, above 0 and at most 1."""

    share: Fraction


@dataclass(frozen=True)
class Bytes:
    """Bytes of the tensors that are stored."""

    count: int


@dataclass(frozen=True)
class Energy:
    """The least size that keeps this share of the energy, from 0 to 1."""

    share: Fraction


Budget: TypeAlias = "int | float | str | UniformRank | Share | Bytes | Energy"
"""What `parsed` takes."""


def parsed(budget: Budget) -> int | UniformRank | Share | Bytes | Energy:
    """Read a budget.

    Args:
        budget: a whole number of parameters; a share of the adapter's own as a float above 0 up to
            1; `uniform_rank(r)`; one of `Share`, `Bytes` and `Energy`; or text:

            - "331776", "1.5M", "uniform:8": parameters (M is 10^6, and B here is 10^9)
            - "50%": half of its own parameters
            - "500kB", "10MB", "8MiB": bytes of the tensors
            - "energy:95%": the least size that keeps 95 % of the energy

    Raises:
        ValueError: it is none of these.

    Example:
        >>> parsed("50%"), parsed("2MiB"), parsed("energy:99.5%").share
        (Share(share=Fraction(1, 2)), Bytes(count=2097152), Fraction(199, 200))
    """
    if isinstance(budget, str):
        budget = _from_text(budget.strip())
    elif isinstance(budget, float):
        budget = Share(Fraction(budget)) if 0 <= budget <= 1 else budget
    if isinstance(budget, Share | Energy):
        share, least = budget.share, isinstance(budget, Share)
        if not 0 <= share <= 1 or (least and share == 0):
            raise ValueError(
                f"budget: expected a share {'above 0' if least else 'from 0'} up to 1 (100 %), got "
                f"{float(share)!r}"
            )
    elif isinstance(budget, Bytes):
        return Bytes(whole_number(budget.count, "budget: bytes", 0))
    elif not isinstance(budget, UniformRank):
        return whole_number(budget, "budget (in parameters, or a share up to 1.0)", 0)
    return budget


def energy_target(
    energy: Energy,
    spectra: Mapping[str, Any],
    unresolved: float | Fraction,
    limits: Mapping[str, Any],
) -> float:
    """The value of the gains (sums of squares) that ranks have to reach to keep the energy.

    Args:
        energy: the share.
        spectra: layer to its singular values, descending.
        unresolved: energy that these do not show.
        limits: of `allocate`: "objective", "weights", "max_rank" (of all, or by layer) and
            "multiple_of".

    Returns:
        The target, rounded down.

    Raises:
        ValueError: gains are not energies, or the limits leave less than the share.
    """
    if limits["objective"] != "frobenius" or limits["weights"] is not None:
        raise ValueError(
            "budget: a share of the energy needs the objective 'frobenius', unweighted"
        )
    most, step = limits["max_rank"], whole_number(limits["multiple_of"], "multiple_of", 1)
    total, attainable = Fraction(unresolved), Fraction(0)
    for name, values in spectra.items():
        parts = [Fraction(float(value) * float(value)) for value in values]  # as gains have it
        top = most[name] if isinstance(most, Mapping) else most
        total += sum(parts)
        attainable += sum(parts[: min(top, len(parts)) // step * step])
    target = energy.share * total
    if target > attainable:
        raise ValueError(
            f"budget: expected a share of the energy up to {float(attainable / total)!r}, which "
            f"the limits on ranks allow, got {float(energy.share)!r}; raise max_rank or lower "
            "multiple_of"
        )
    value = float(target)
    return value if Fraction(value) <= target else math.nextafter(value, -math.inf)


def _from_text(text: str) -> int | UniformRank | Share | Bytes | Energy:
    if percent := _PERCENT.fullmatch(text):
        share = Fraction(percent[2]) / 100
        return Energy(share) if percent[1] else Share(share)
    if size := _BYTES.fullmatch(text):
        return Bytes(int(Fraction(size[1]) * _UNITS[size[2].lower()]))
    try:
        return budget_from(text)
    except ValueError as error:
        raise ValueError(
            f"{error}; or a share of its own parameters such as 50%, bytes such as 10MB or 8MiB, "
            "or energy:95%"
        ) from error
