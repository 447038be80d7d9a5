"""Ranks as a preset of LyCORIS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from lorambo_adapters.ranks.scaling import adapted, alpha_for, constant_scale

Component = Literal["model", "unet", "text_encoder"]


def to_lycoris(
    ranks: Mapping[str, int],
    *,
    scale: float | None = None,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
    component: Component = "model",
) -> dict[str, Any]:
    """A preset with which LyCORIS gives each module its rank, and no other module any.

    `LycorisNetwork.apply_preset` takes it as it is; `toml_text` writes the file that `preset=`
    reads. LyCORIS takes a key for an expression that a name has to begin with ("layers.1" fits
    "layers.11" too) and joins names with "_"; the keys here fit whole names.

    Args:
        ranks: by module, as in the model's `named_modules`.
        scale: the factor before B A in every layer, by default 1: alpha is scale x rank.
        alpha: instead of `scale`, with `r`: those of the LoRA of uniform rank to be replaced.
        r: see `alpha`.
        rslora: whether that LoRA was rank-stabilised (`rs_lora`). The preset states alphas with
            which the plain rule gives the same scale.
        component: "model" for `create_lycoris`; "unet" or "text_encoder" for kohya's sd-scripts
            with `network_module=lycoris.kohya`, where the other one is left as it is. All the
            text encoders get the same ranks.

    Returns:
        The preset. It sets every key that selects modules, because LyCORIS keeps those of the
        preset before it. Modules of one rank share a key, since LyCORIS tries every key on every
        module.

    Raises:
        ValueError: all ranks are 0, two names become one with "_" for ".", or an argument is not of
            the form above.

    References:
        LyCORIS 4.1.3, `wrapper.py` and `kohya.py` (`apply_preset`, `create_modules`, `match_fn`,
        `find_conf_for_name`).

    Example:
        >>> preset = to_lycoris({"layers.1": 4, "layers.11": 2}, scale=0.5)
        >>> preset["name_algo_map"]["(?:layers[.]11)$"]
        {'algo': 'lora', 'dim': 2, 'alpha': 1}
    """
    if component not in ("model", "unet", "text_encoder"):
        raise ValueError(
            f"component: expected 'model', 'unet' or 'text_encoder', got {component!r}"
        )
    factor = constant_scale(scale, alpha=alpha, r=r, rslora=rslora)
    kept = adapted(ranks)
    check_underscores(ranks)
    by_rank: dict[int, list[str]] = {}
    for name, rank in kept.items():
        by_rank.setdefault(rank, []).append(_escaped(name))
    algorithms = {
        f"(?:{'|'.join(sorted(names))})$": {
            "algo": "lora",
            "dim": rank,
            "alpha": alpha_for(rank, factor),
        }
        for rank, names in sorted(by_rank.items())
    }
    preset: dict[str, Any] = {"enable_conv": True, "use_fnmatch": False, "exclude_name": []}
    parts = ("",) if component == "model" else ("unet_", "text_encoder_")
    for part in parts:
        preset[f"{part}target_module"] = []
        here = part == "" or part.startswith(component)
        preset[f"{part}target_name"] = list(algorithms) if here else []
    return {**preset, "module_algo_map": {}, "name_algo_map": algorithms}


def _escaped(name: str) -> str:
    """The name as an expression, if possible without a backslash.

    LyCORIS reads presets with the `toml` package, which leaves escapes in keys as they are.
    """
    return re.escape(name).replace(r"\.", "[.]").replace(r"\-", "-")


def check_underscores(names: Mapping[str, int]) -> None:
    """Make sure that no two names become one where dots are replaced by "_".

    Raises:
        ValueError: two do, and the tool would pass over one of them.
    """
    seen: dict[str, str] = {}
    for name in names:
        joined = name.replace(".", "_")
        if joined in seen:
            raise ValueError(
                f"layer {name!r}: expected a name that differs from {seen[joined]!r} in more than "
                "'.' and '_', which the tool does not tell apart"
            )
        seen[joined] = name
