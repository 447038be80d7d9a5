"""Ranks as keywords of PEFT's LoraConfig: exact layers, exact ranks, one scale."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lorambo_adapters.ranks.peft_names import (
    Known,
    Modules,
    Split,
    caught_by_a_list,
    check_suffix_keys,
    containers,
    exact_key,
    split,
)
from lorambo_adapters.ranks.scaling import adapted, alpha_for, constant_scale

Keys = Literal["exact", "suffix"]
Targets = Literal["auto", "list", "regex"]


def to_peft(
    ranks: Mapping[str, int],
    *,
    scale: float | None = None,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
    target_parameters: Sequence[str] = (),
    modules: Modules | None = None,
    targets: Targets = "auto",
    keys: Keys = "exact",
) -> dict[str, Any]:
    r"""Keywords with which `LoraConfig(**to_peft(ranks), ...)` gives each layer its rank.

    PEFT does not adapt alpha to a layer's rank: with `rank_pattern` alone, half the rank means
    twice the scale. Here every layer has one scale, that of the default `r` and `lora_alpha` too,
    so that programs which read those alone (vLLM, PEFT's hot-swapping) use the right one. A layer
    of rank 0, which PEFT refuses, is left out of the targets.

    Args:
        ranks: by module, as PEFT's patterns name them (without "base_model.model."), such as an
            `Allocation`. An expert of a 3-D parameter is "<parameter's full name>.<index>".
        scale: the factor before B A in every layer, by default 1.
        alpha: instead of `scale`, with `r`: those of the LoRA of uniform rank to be replaced,
            whose scale is then kept.
        r: see `alpha`.
        rslora: `use_rslora`: PEFT then divides alpha by sqrt(r), here and in `alpha`'s meaning.
        target_parameters: which of the layers are parameters, by names or suffixes as for
            `find_layers`. Not needed where `modules` is the model itself.
        modules: the model before PEFT (nothing but names and shapes is read, so it may be on the
            meta device), or the names of all its modules. With it, every name is known to exist and
            no other module is caught; with the model itself, also that PEFT does not read the
            targets in another way, as it does for some mixture-of-experts models.
        targets: form of `target_modules`. "list": full names. PEFT takes an entry for a suffix, so
            that "lm_head" catches "decoder.lm_head" too: refused where a layer of `ranks` or a name
            in `modules` shows it. "regex": one expression for whole names, which is exact without
            knowing the model; but for mixture-of-experts models of transformers 5, PEFT 0.21.2
            turns it into the last parts of the names it matches, and Unsloth cannot take it.
            "auto": a list, or an expression where a list is known to catch more.
        keys: "exact": "^" and the escaped name (PEFT 0.15 and newer). "suffix": the plain name,
            for PEFT 0.14, and for EVA, which matches names with "base_model.model." before them;
            refused where a key would also match a layer of another rank.

    Returns:
        `r`, `lora_alpha`, `use_rslora`, `target_modules`, `target_parameters` if there are any, and
        `rank_pattern` and `alpha_pattern` with the same keys in the order in which PEFT saves them.
        Layers of rank `r`, the largest one, need no key. With parameters, `r` is their most
        frequent rank instead.

    Raises:
        ValueError: all ranks are 0; experts of one parameter differ in rank; a name is not in the
            model; the targets would catch a module that has no rank; or an argument is not of the
            form above.

    Note:
        PEFT 0.21.2 compares keys with the names of targeted modules only, and so warns that a
        parameter's key "did not match any targeted module". The key has been used all the same.
        There is no such warning where the parameters have one rank. PEFT's adapters of parameters
        work with neither dropout nor DoRA.

    References:
        PEFT 0.21.2, `utils/other.py` (`get_pattern_key`), `tuners/tuners_utils.py`
        (`check_target_module_exists`, `_find_minimal_target_modules`),
        `utils/transformers_weight_conversion.py`, `utils/hotswap.py`.

    Example:
        >>> config = to_peft({"layers.1.q": 8, "layers.11.q": 2, "layers.1.v": 0}, alpha=16, r=4)
        >>> config["target_modules"], config["r"], config["lora_alpha"]
        (['layers.1.q', 'layers.11.q'], 8, 32)
        >>> config["rank_pattern"], config["alpha_pattern"]
        ({'^layers\\.11\\.q': 2}, {'^layers\\.11\\.q': 8})
    """
    factor = constant_scale(scale, alpha=alpha, r=r, rslora=rslora)
    kept, known = adapted(ranks), Known.of(modules)
    found = split(ranks, target_parameters, known)
    wanted = {name: rank for name, rank in found.modules.items() if rank}
    parameters = {name: rank for name, rank in found.parameters.items() if rank}
    config: dict[str, Any] = {
        "target_modules": _target_modules(wanted, ranks, known, targets, bool(parameters))
    }
    if parameters:
        config["target_parameters"] = _target_parameters(parameters, found, known)
    check_reading(modules, config)
    default = _most_frequent(parameters.values()) if parameters else max(kept.values())
    config |= patterns(wanted | parameters, default, factor, rslora, keys)
    return config


def patterns(
    ranks: Mapping[str, int], default: int, scale: float, rslora: bool, keys: Keys
) -> dict[str, Any]:
    """`r`, `lora_alpha`, `use_rslora` and the two patterns; layers of the default rank have no key.

    Args:
        ranks: module or parameter to its rank >= 1.
        default: `r`; 0 to have a key for every layer.
        scale: of every layer.
        rslora: `use_rslora`.
        keys: see `to_peft`.

    Raises:
        ValueError: `keys` is not one of the two, or suffix keys would not be exact.
    """
    if keys not in ("exact", "suffix"):
        raise ValueError(f"keys: expected 'exact' or 'suffix', got {keys!r}")
    if keys == "suffix":
        check_suffix_keys(ranks)
    # PEFT saves the keys sorted, and the first that matches counts: so they are sorted here.
    by_key = sorted(
        (exact_key(name) if keys == "exact" else name, rank)
        for name, rank in ranks.items()
        if rank != default
    )
    r = default or max(ranks.values())
    return {
        "r": r,
        "lora_alpha": alpha_for(r, scale, rslora),
        "use_rslora": rslora,
        "rank_pattern": dict(by_key),
        "alpha_pattern": {key: alpha_for(rank, scale, rslora) for key, rank in by_key},
    }


def _most_frequent(ranks: Any) -> int:
    """The most frequent rank; of several, the largest."""
    return max(Counter(ranks).items(), key=lambda item: (item[1], item[0]))[0]


def _target_modules(
    wanted: Mapping[str, int],
    ranks: Mapping[str, int],
    known: Known,
    targets: Targets,
    is_mixture: bool,
) -> list[str] | str:
    """The modules as a list if that is exact as far as is known, else as one expression."""
    if targets not in ("auto", "list", "regex"):
        raise ValueError(f"targets: expected 'auto', 'list' or 'regex', got {targets!r}")
    names = sorted(wanted)
    # The clash of interest is with what must stay without an adapter.
    inside = {above for name in ranks for above in containers(name)}
    caught = caught_by_a_list(names, {*ranks, *inside, *(known.modules or ())})
    if targets == "list" or is_mixture:
        if caught is not None:
            raise ValueError(
                f"module {caught[0]!r}: expected no adapter, but the target {caught[1]!r} in a "
                "list catches it, as PEFT matches suffixes"
                + (", use targets='regex'" * (not is_mixture))
            )
        if targets == "regex" and names:
            raise ValueError(
                "targets: expected 'auto' or 'list' for a model with experts, of whose regular "
                "expression PEFT keeps no more than the last parts of names, got 'regex'"
            )
        return names
    if targets == "regex" or caught is not None:
        return "(?:" + "|".join(map(re.escape, names)) + ")"
    return names


def _target_parameters(parameters: Mapping[str, int], found: Split, known: Known) -> list[str]:
    names = sorted(parameters)
    caught = caught_by_a_list(names, {*found.parameters, *(known.parameters or ())})
    if caught is not None:
        raise ValueError(
            f"parameter {caught[0]!r}: expected no adapter, but PEFT matches suffixes and would "
            f"take it for {caught[1]!r}"
        )
    return names


def check_reading(model: Any, config: Mapping[str, Any]) -> None:
    """Make sure that PEFT, if it is installed, leaves the targets as they are for this model.

    Args:
        model: before PEFT; names of modules, which tell nothing of this, pass.
        config: entries of a configuration, "target_modules" among them.

    Raises:
        ValueError: it would read them as others.
    """
    if not hasattr(getattr(model, "config", None), "model_type") or not any(
        p.ndim == 3 and p.shape[0] > 1 for p in model.parameters()
    ):
        return  # without stacked experts nothing is converted, and importing PEFT takes seconds
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return
    given = config["target_modules"]
    read = LoraConfig(
        target_modules=given if isinstance(given, str) else list(given),
        target_parameters=list(config.get("target_parameters") or ()),
    )
    convert_peft_config_for_transformers(read, model=model, conversions=None)
    before = {given} if isinstance(given, str) else set(given)
    after = {read.target_modules} if isinstance(read.target_modules, str) else read.target_modules
    lost = sorted(before - set(after or ()))
    if lost:
        raise ValueError(
            f"module {lost[0]!r}: expected PEFT to take it as it stands, but for a model of type "
            f"{model.config.model_type!r} it reads the targets as modules {sorted(after or ())} "
            f"and parameters {sorted(read.target_parameters or ())}; name the module's weight as a "
            "parameter (the name and '.weight'), or leave it out"
        )
