"""Which layers have an adapter, and the alpha that keeps every layer's scale the same."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import real_number


def adapted(ranks: Mapping[str, int]) -> dict[str, int]:
    """The layers with a rank above 0, in the order given.

    Args:
        ranks: by layer; rank 0 means that the layer has no adapter.

    Returns:
        Layer to rank, as plain ints.

    Raises:
        ValueError: not a mapping of names to whole numbers >= 0, or every rank is 0.

    Example:
        >>> adapted({"q": 4, "k": 0})
        {'q': 4}
    """
    if not isinstance(ranks, Mapping):
        raise ValueError(f"ranks: expected a mapping of layer to rank, got {type(ranks).__name__}")
    for name in ranks:
        if not isinstance(name, str) or not name or "\n" in name:
            raise ValueError(f"ranks: expected the names of layers, got {name!r}")
    found = {name: whole_number(rank, f"layer {name!r}: rank", 0) for name, rank in ranks.items()}
    kept = {name: rank for name, rank in found.items() if rank}
    if not kept:
        raise ValueError(f"ranks: expected a rank above 0, got 0 in all of {len(found)} layers")
    return kept


def constant_scale(
    scale: float | None = None,
    *,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
) -> float:
    """The factor before B A that every layer shall have.

    Args:
        scale: the factor itself; 1 if nothing is given.
        alpha: of the LoRA of uniform rank that the ranks replace, with its `r`. The factor is then
            alpha / r, or alpha / sqrt(r) with `rslora`, so that no layer's scale changes.
        r: see `alpha`.
        rslora: whether that LoRA was rank-stabilised.

    Raises:
        ValueError: not a finite number > 0, or both ways at once.

    Example:
        >>> constant_scale(alpha=32, r=16), constant_scale(alpha=32, r=16, rslora=True)
        (2.0, 8.0)
    """
    if alpha is not None or r is not None:
        if alpha is None or r is None or scale is not None:
            raise ValueError(
                "scale: expected either scale, or alpha and r of the uniform LoRA to be replaced, "
                f"got scale={scale!r}, alpha={alpha!r}, r={r!r}"
            )
        scale = real_number(alpha) / rank_factor(whole_number(r, "r", 1), rslora)
    found = 1.0 if scale is None else real_number(scale)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"scale: expected a finite number > 0, got {found}")
    return found


def rank_factor(rank: int, rslora: bool = False) -> float:
    """What alpha is divided by: the rank, or its square root with `rslora`."""
    return math.sqrt(rank) if rslora else float(rank)


def alpha_for(rank: int, scale: float, rslora: bool = False) -> int | float:
    """The alpha with which a layer of this rank has this scale.

    alpha = scale x rank, or scale x sqrt(rank) with `rslora`, moved to the neighbouring double
    where that makes the division that the tools do give the scale back exactly. An int where it is
    whole.

    Example:
        >>> alpha_for(6, 2.0), alpha_for(3, 0.5), alpha_for(16, 1.0, rslora=True)
        (12, 1.5, 4)
    """
    factor = rank_factor(rank, rslora)
    alpha = scale * factor
    for candidate in (alpha, math.nextafter(alpha, 0.0), math.nextafter(alpha, math.inf)):
        if candidate / factor == scale:
            alpha = candidate
            break
    return int(alpha) if alpha.is_integer() else alpha
