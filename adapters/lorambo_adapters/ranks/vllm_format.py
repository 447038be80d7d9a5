"""Ranks for adapters that vLLM will serve: one scale, one largest rank."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lorambo_adapters.ranks.peft_format import patterns, to_peft
from lorambo_adapters.ranks.peft_names import Known, Modules, split
from lorambo_adapters.ranks.scaling import adapted, constant_scale
from lorambo_alloc.costs import whole_number

# `MaxLoRARanks` of vLLM's configuration.
_SIZES = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ALLOWANCE = 2.0


def to_vllm(
    ranks: Mapping[str, int],
    *,
    scale: float | None = None,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
    target_parameters: Sequence[str] = (),
    modules: Modules | None = None,
    cap: int | None = None,
) -> tuple[dict[str, Any], int]:
    """Keywords for `LoraConfig` as vLLM reads them back, and the `max_lora_rank` to start it with.

    vLLM reads no patterns: it takes one scale from the configuration's `lora_alpha` and `r`, and
    sets aside `max_lora_rank` ranks in every layer, whatever the adapter's ranks are. The scale is
    right, since it is the same in every layer and in the defaults, and `r` is the largest rank.

    Args:
        ranks: as for `to_peft`, and so are the arguments up to `cap`.
        scale: the factor before B A in every layer, by default 1.
        alpha: instead of `scale`, with `r`.
        r: see `alpha`.
        rslora: `use_rslora`, which vLLM follows.
        target_parameters: which of the layers are parameters.
        modules: the model, or the names of all its modules.
        cap: the largest rank to accept, such as a server's `max_lora_rank`.

    Returns:
        The keywords, and the least of the values that vLLM accepts for `max_lora_rank` (1, 8, 16,
        32, 64, 128, 256, 320, 512) that is large enough.

    Raises:
        ValueError: as `to_peft`; or a rank is above `cap`, or above 512. Allocate with `max_rank`.

    Warns:
        UserWarning: vLLM sets aside more than twice the parameters that the ranks have.

    References:
        vLLM, `vllm/lora/peft_helper.py` and `vllm/config/lora.py`.

    Example:
        >>> config, max_lora_rank = to_vllm({"layers.0.q": 12, "layers.0.v": 9})
        >>> config["r"], config["lora_alpha"], max_lora_rank
        (12, 12, 16)
    """
    kept = adapted(ranks)
    most = _SIZES[-1] if cap is None else min(_SIZES[-1], whole_number(cap, "cap", 1))
    largest = max(kept, key=lambda name: kept[name])
    if kept[largest] > most:
        raise ValueError(
            f"layer {largest!r}: expected a rank of at most {most}, got {kept[largest]}; allocate "
            f"with max_rank={most}"
        )
    config = to_peft(
        ranks,
        scale=scale,
        alpha=alpha,
        r=r,
        rslora=rslora,
        target_parameters=target_parameters,
        modules=modules,
    )
    if config["r"] != kept[largest]:
        found = split(ranks, target_parameters, Known.of(modules))
        every = {name: rank for name, rank in (found.modules | found.parameters).items() if rank}
        factor = constant_scale(scale, alpha=alpha, r=r, rslora=rslora)
        config |= patterns(every, kept[largest], factor, rslora, "exact")
    size = next(size for size in _SIZES if size >= kept[largest])
    costs = _costs(ranks)
    used = sum(costs.get(name, 1) * rank for name, rank in kept.items())
    set_aside = size * sum(costs.get(name, 1) for name in ranks)
    if set_aside > _ALLOWANCE * used:
        warnings.warn(
            f"vLLM sets aside max_lora_rank={size} ranks in every layer, {set_aside / used:.1f} "
            f"times what the ranks take; allocate with a max_rank of {_below(size)} to need less",
            stacklevel=2,
        )
    return config, size


def _costs(ranks: Mapping[str, int]) -> dict[str, int]:
    """What a rank costs by layer, where an `Allocation` knows."""
    problem = getattr(ranks, "problem", None)
    if problem is None:
        return {}
    return dict(zip(problem.names, problem.costs.tolist(), strict=True))


def _below(size: int) -> int:
    return max((smaller for smaller in _SIZES if smaller < size), default=1)
