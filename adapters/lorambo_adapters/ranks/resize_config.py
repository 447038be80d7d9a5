"""A resized adapter's configuration: exact ranks, and the alphas that keep its scales."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.resize_config needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import AdapterLayer
from lorambo_adapters.ranks.peft_names import caught_by_a_list, exact_key
from lorambo_adapters.ranks.scaling import alpha_for, rank_factor
from lorambo_adapters.spectra.lora_modules import changed_bases
from lorambo_adapters.targets import unwrap


def alpha_of(layer: AdapterLayer, rank: int) -> int | float:
    """The alpha that keeps alpha / r, or alpha / sqrt(r), as it is."""
    alpha = layer.module.lora_alpha[layer.adapter]
    rslora = bool(layer.module.use_rslora[layer.adapter])
    if rank == layer.rank:
        return alpha
    return alpha_for(rank, alpha / rank_factor(layer.rank, rslora), rslora)


def config_of(model: Any, adapter: str, masked: bool = False) -> tuple[Any, Any]:
    """PEFT's configurations by adapter, and this adapter's; None where the model has none.

    Args:
        model: as `peeled` gives it.
        adapter: the adapter's name.
        masked: the configuration is to stay as it is, so it may be that of a part of the model.

    Raises:
        ValueError: it is the configuration of a part, or the adapter ties layers.
    """
    for path, module in () if masked else unwrap(model).named_modules():
        configs = getattr(module, "peft_config", None)
        if path and isinstance(configs, dict) and adapter in configs:
            raise ValueError(
                f"model: expected the one that has PEFT's configuration of adapter {adapter!r}, to "
                f"which layers' names belong, got {type(model).__name__} around it; give its "
                f"{path!r}"
            )
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or adapter not in configs:
        return None, None
    config = configs[adapter]
    if getattr(config, "target_modules_to_tie", None):
        raise ValueError(
            f"adapter {adapter!r}: expected one that ties no layers, got ensure_weight_tying"
        )
    return configs, config


def configured(
    config: Any,
    ranks: Mapping[str, int],
    alphas: Mapping[str, int | float],
    targets: list[str] | str | None,
) -> Any:
    """A copy of the configuration with exact keys, sorted as PEFT sorts them when it saves.

    Args:
        config: PEFT's.
        ranks: of every layer that has the adapter; what `r` and `lora_alpha` say needs no key.
        alphas: likewise.
        targets: `target_modules`, where they have changed.
    """
    new = copy.copy(config)
    default = config.r, config.lora_alpha
    names = sorted(name for name in ranks if (ranks[name], alphas[name]) != default)
    new.rank_pattern = {exact_key(name): ranks[name] for name in names}
    new.alpha_pattern = {exact_key(name): alphas[name] for name in names}
    odd = any(rank % 2 for rank in ranks.values())
    if odd and getattr(new, "init_lora_weights", None) == "orthogonal":
        new.init_lora_weights = True  # PEFT takes even ranks alone there, also to load trained ones
    if targets is not None:
        new.target_modules = targets if isinstance(targets, str) else set(targets)
        new.layers_to_transform = new.layers_pattern = None
    return new


def exact_targets(model: torch.nn.Module, names: Iterable[str]) -> list[str] | str:
    """`target_modules` for these and no others: a list if PEFT's suffix rule allows one.

    Args:
        model: with its adapters; others of its modules may end like one of the names.
        names: of modules.
    """
    names = sorted(names)
    others = {
        re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)
        for name, _ in unwrap(model).named_modules()
    }
    if caught_by_a_list(names, others) is None:
        return names
    return "(?:" + "|".join(map(re.escape, names)) + ")"


def warn_changed_base(model: Any, adapter: str) -> None:
    """Warn where the adapter's initialisation depends on the ranks that it had."""
    changed = changed_bases(model, [adapter])
    if changed:
        warnings.warn(
            f"{', '.join(sorted(changed))} changed the base model's weights by the ranks as they "
            "were: save the base model with this adapter, or convert it to a LoRA of the original "
            "base before; PEFT would change the base by the new ranks when it loads this",
            stacklevel=3,
        )
