"""Ranks for programs that train through PEFT: axolotl and Unsloth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorambo_adapters.ranks.peft_format import patterns, to_peft
from lorambo_adapters.ranks.peft_names import Known, Modules, split
from lorambo_adapters.ranks.scaling import adapted, constant_scale

_TRAINED_IN_FULL = ("embed_tokens", "lm_head")


def to_axolotl(
    ranks: Mapping[str, int],
    *,
    scale: float | None = None,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
    target_parameters: Sequence[str] = (),
    modules: Modules | None = None,
) -> dict[str, Any]:
    r"""Entries of an axolotl configuration; `yaml_text` writes them as YAML.

    Args:
        ranks: as for `to_peft`, and so are the other arguments.
        scale: the factor before B A in every layer, by default 1.
        alpha: instead of `scale`, with `r`.
        r: see `alpha`.
        rslora: `peft_use_rslora`.
        target_parameters: which of the layers are parameters.
        modules: the model, or the names of all its modules.

    Returns:
        `adapter`, `lora_r`, `lora_alpha`, the targets and both patterns. axolotl takes no
        `lora_alpha` but a whole one: where it is not whole, it is rounded, and every layer has an
        alpha of its own in the pattern instead.

    Raises:
        ValueError: as `to_peft`.

    Note:
        axolotl ignores the patterns (and says so) where `lora_model_dir` continues an adapter, and
        refuses `lora_dropout` beside `lora_target_parameters`, where it is set to 0 here.

    References:
        axolotl, `src/axolotl/loaders/adapter.py` and `utils/schemas/peft.py`.

    Example:
        >>> from lorambo_adapters.ranks.config_text import yaml_text
        >>> print(yaml_text(to_axolotl({"layers.0.q": 2, "layers.0.v": 4})), end="")
        adapter: "lora"
        lora_r: 4
        lora_alpha: 4
        lora_target_linear: false
        lora_target_modules:
          - "layers.0.q"
          - "layers.0.v"
        lora_rank_pattern:
          "^layers\\.0\\.q": 2
        lora_alpha_pattern:
          "^layers\\.0\\.q": 2
        peft_use_rslora: false
    """
    config = to_peft(
        ranks,
        scale=scale,
        alpha=alpha,
        r=r,
        rslora=rslora,
        target_parameters=target_parameters,
        modules=modules,
    )
    if not isinstance(config["lora_alpha"], int):
        found = split(ranks, target_parameters, Known.of(modules))
        every = {name: rank for name, rank in (found.modules | found.parameters).items() if rank}
        factor = constant_scale(scale, alpha=alpha, r=r, rslora=rslora)
        config |= patterns(every, 0, factor, rslora, "exact")
        config["lora_alpha"] = max(1, round(config["lora_alpha"]))
    entries: dict[str, Any] = {
        "adapter": "lora",
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_target_linear": False,
        "lora_target_modules": config["target_modules"],
    }
    if "target_parameters" in config:
        entries["lora_target_parameters"] = config["target_parameters"]
        entries["lora_dropout"] = 0.0
    entries["lora_rank_pattern"] = config["rank_pattern"]
    entries["lora_alpha_pattern"] = config["alpha_pattern"]
    entries["peft_use_rslora"] = rslora
    return entries


def to_unsloth(
    ranks: Mapping[str, int],
    *,
    scale: float | None = None,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
    target_parameters: Sequence[str] = (),
    modules: Modules | None = None,
) -> dict[str, Any]:
    """Keywords for `FastLanguageModel.get_peft_model(model, **to_unsloth(ranks))`.

    Args:
        ranks: as for `to_peft`, and so are the other arguments.
        scale: the factor before B A in every layer, by default 1.
        alpha: instead of `scale`, with `r`.
        r: see `alpha`.
        rslora: `use_rslora`.
        target_parameters: which of the layers are parameters.
        modules: the model, or the names of all its modules.

    Returns:
        What `to_peft` gives, with a list of targets (Unsloth takes a string apart, letter by
        letter) and with `target_parameters` even where there are none, lest it adds the experts of
        a mixture-of-experts model.

    Raises:
        ValueError: as `to_peft`; or a layer is the embedding or the output head, which Unsloth
            trains in full instead of adapting them.

    References:
        Unsloth, `unsloth/models/llama.py`, `get_peft_model`.

    Example:
        >>> sorted(to_unsloth({"layers.0.q_proj": 2}))[:3]
        ['alpha_pattern', 'lora_alpha', 'r']
    """
    for name in adapted(ranks):
        if name.rpartition(".")[2] in _TRAINED_IN_FULL:
            raise ValueError(
                f"layer {name!r}: expected a layer that Unsloth adapts; it would train all of this "
                "one's weights"
            )
    config = to_peft(
        ranks,
        scale=scale,
        alpha=alpha,
        r=r,
        rslora=rslora,
        target_parameters=target_parameters,
        modules=modules,
        targets="list",
    )
    return {"target_parameters": [], **config}
