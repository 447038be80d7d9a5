"""PEFT's adapter_config.json for given ranks and scales: exact patterns, and nothing else changed.

`peft_entries` is the one place where the files that `compress`, `extract_lora` and
`extract_calibrated` write get their patterns from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lorambo_adapters.ranks.peft_format import to_peft
from lorambo_adapters.ranks.peft_names import Modules, exact_key
from lorambo_adapters.spectra.peft_config import PeftConfig


def peft_entries(
    entries: Mapping[str, Any],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    parameters: Collection[str] = (),
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """A configuration by which PEFT gives each layer its rank and its scale.

    `r` and `lora_alpha` are those of the first layer of the greatest rank. Every layer that differs
    has an entry in both patterns, under `^` and its whole name, escaped: PEFT takes the first key
    that fits, and no other fits.

    Args:
        entries: of the configuration so far; what does not concern ranks is kept.
        ranks: name (as PEFT's patterns see it) to rank >= 1. Of experts: the parameter's full name.
        scales: name to scale, alpha / r or, with `use_rslora`, alpha / sqrt(r).
        parameters: which of the names, of those left out too, are parameters.
        left_out: names of layers that `entries` aim at and that shall have no adapter. If there are
            any, the targets become the others' names, as `to_peft` has them.

    Raises:
        ValueError: no layer is left, or the configuration that results would not give a layer its
            rank and scale (a defect).

    Example:
        >>> config = peft_entries({}, {"q": 2, "v": 4}, {"q": 0.5, "v": 0.5}, left_out=["k"])
        >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]
        (4, 2, {'^q': 2}, {'^q': 1})
        >>> config["target_modules"]
        ['q', 'v']
    """
    if not ranks:
        raise ValueError("expected at least one layer with a rank, got none")
    rslora = bool(entries.get("use_rslora"))
    alphas = {
        name: _number(scales[name] * (math.sqrt(rank) if rslora else rank))
        for name, rank in ranks.items()
    }
    widest = max(ranks, key=lambda name: ranks[name])
    r, alpha = ranks[widest], alphas[widest]
    others = sorted(n for n in ranks if (ranks[n], alphas[n]) != (r, alpha))
    keys = {name: exact_key(name) for name in others}
    result = {
        **entries,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {keys[name]: ranks[name] for name in others},
        "alpha_pattern": {keys[name]: alphas[name] for name in others},
    }
    if entries.get("init_lora_weights") == "orthogonal" and any(n % 2 for n in ranks.values()):
        # How it began; when PEFT loads the adapter, it would refuse odd ranks on account of it.
        result["init_lora_weights"] = True
    if left_out:
        every = {**ranks, **dict.fromkeys(left_out, 0)}
        targets = to_peft(every, target_parameters=sorted(parameters))
        result["target_modules"] = targets["target_modules"]
        if "target_parameters" in result or "target_parameters" in targets:
            result["target_parameters"] = targets.get("target_parameters")
        for selection in ("layers_to_transform", "layers_pattern"):  # the names say it all
            if result.get(selection) is not None:
                result[selection] = None
    _check(PeftConfig.checked(result, "the new configuration"), ranks, scales)
    return result


def extracted_entries(
    ranks: Mapping[str, int],
    scale: float,
    *,
    base: str | None,
    flipped: bool,
    bias: str = "none",
    modules_to_save: Collection[str] = (),
    modules: Modules | None = None,
) -> dict[str, Any]:
    """A configuration for factors that were not trained but computed, of one scale.

    Args:
        ranks: by layer; those of rank 0 are left out of the targets.
        scale: of every layer.
        base: where PEFT is to find the base model.
        flipped: `fan_in_fan_out`.
        bias: PEFT's.
        modules_to_save: PEFT's.
        modules: the base model, if it is at hand, as `to_peft` takes it.

    Raises:
        ValueError: as `peft_entries` and `to_peft`.
    """
    entries: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": bias,
        "fan_in_fan_out": flipped,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }
    if modules_to_save:
        entries["modules_to_save"] = sorted(modules_to_save)
    kept = {name: rank for name, rank in ranks.items() if rank}
    left_out = [name for name, rank in ranks.items() if not rank]
    targets = to_peft(ranks, modules=modules)["target_modules"]
    named = {**entries, "target_modules": targets}
    # With the model at hand the targets are known to catch no other module.
    left_out = left_out if modules is None else []
    return peft_entries(named, kept, dict.fromkeys(kept, scale), left_out=left_out)


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _check(config: PeftConfig, ranks: Mapping[str, int], scales: Mapping[str, float]) -> None:
    for name, rank in ranks.items():
        found, scale = config.rank(name), config.scale(name)
        if found != rank or not math.isclose(scale, scales[name], rel_tol=1e-12):
            raise ValueError(
                f"layer {name!r}: expected rank {rank} and scale {scales[name]!r} by the new "
                f"configuration, got {found} and {scale!r}"
            )
