"""Ranks for kohya's sd-scripts: block dimensions where these are exact, or a file to start from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lorambo_adapters.ranks.lycoris_format import check_underscores
from lorambo_adapters.ranks.scaling import adapted, alpha_for, constant_scale
from lorambo_alloc import storage
from lorambo_alloc.costs import whole_number

Model = Literal["sd", "sdxl"]
Prefix = str | Callable[[str], str]

_SD_BLOCK = re.compile(r"(up|down)_blocks_(\d+)_attentions_(\d+)_")
_SDXL_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_")
_SDXL_START = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
_BLOCKS = {"sd": 25, "sdxl": 23}
_MIDDLE = 12


def to_kohya(
    ranks: Mapping[str, int],
    *,
    scale: float | None = None,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
    model: Model = "sdxl",
    modules: Iterable[str] | None = None,
) -> list[str]:
    """`--network_args` of `networks.lora` for a U-Net, where one rank a block says it all.

    sd-scripts gives all modules of a block's transformers one rank. That is exact if the ranks were
    allocated so (`tied=` the modules of each block); otherwise `write_kohya_seed` is the way.
    Not offered is `network_reg_dims` of the newer models: alpha stays the same for all ranks there,
    so that the scale would shift from layer to layer.

    Args:
        ranks: by module of the U-Net, in sd-scripts' own names for this model (Diffusers' for "sd",
            the original ones for "sdxl"), with dots or as "lora_unet_...": every linear layer and
            1 x 1 convolution in its transformers, those of rank 0 included.
        scale: the factor before B A in every layer, by default 1.
        alpha: instead of `scale`, with `r`: those of the LoRA of uniform rank to be replaced.
        r: see `alpha`.
        rslora: whether that LoRA was rank-stabilised.
        model: "sd" (Stable Diffusion 1 and 2, 25 blocks) or "sdxl" (23).
        modules: all modules that sd-scripts would adapt, to make sure that none of a block with a
            rank is missing from `ranks`.

    Returns:
        `["block_dims=...", "block_alphas=..."]`.

    Raises:
        ValueError: the modules of a block differ in rank, a module is not in a transformer of the
            U-Net (its convolutions elsewhere and text encoders have no block dimensions), or one of
            `modules` would get a rank that `ranks` does not give it.

    References:
        kohya-ss, sd-scripts, `networks/lora.py` (`get_block_dims_and_alphas`, `get_block_index`).

    Example:
        >>> names = [f"input_blocks.4.1.transformer_blocks.0.attn1.to_{x}" for x in "qkv"]
        >>> to_kohya({**dict.fromkeys(names, 4), "input_blocks.7.1.proj_in": 0})[0]
        'block_dims=0,0,0,0,0,4,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0'
    """
    if model not in _BLOCKS:
        raise ValueError(f"model: expected 'sd' or 'sdxl', got {model!r}")
    factor = constant_scale(scale, alpha=alpha, r=r, rslora=rslora)
    kept = adapted(ranks)
    dims: list[int | None] = [None] * _BLOCKS[model]
    for name in ranks:
        rank, block = kept.get(name, 0), _block(name, model)
        found = dims[block]
        if found is not None and found != rank:
            raise ValueError(
                f"layer {name!r}: expected rank {found} as elsewhere in block {block}, to which "
                f"sd-scripts gives one rank, got {rank}; write_kohya_seed gives each its own"
            )
        dims[block] = rank
    names = {_joined(name) for name in ranks}
    for name in modules or ():
        if _joined(name) not in names and dims[_block(name, model)]:
            raise ValueError(
                f"layer {name!r}: expected a rank, because sd-scripts gives it that of block "
                f"{_block(name, model)}"
            )
    whole = [dim or 0 for dim in dims]
    alphas = [alpha_for(dim, factor) if dim else 1 for dim in whole]
    return [
        f"block_dims={','.join(map(str, whole))}",
        f"block_alphas={','.join(map(str, alphas))}",
    ]


def write_kohya_seed(
    path: str | os.PathLike[str],
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    scale: float | None = None,
    alpha: float | None = None,
    r: int | None = None,
    rslora: bool = False,
    prefix: Prefix = "lora_unet",
    modules: Iterable[str] | None = None,
    seed: int = 0,
) -> None:
    """Write an untrained LoRA for sd-scripts to start with, by which each layer has its own rank.

    Pass the file as `--network_weights` with `--dim_from_weights`. It has each layer's rank and
    alpha, so that every layer has the same scale. lora_up is 0 and lora_down uniform in
    +-1 / sqrt(inputs), as sd-scripts begins itself, in float32. The file is written whole or not at
    all; memory holds it twice.

    Args:
        path: a .safetensors file.
        ranks: by module of the network, with dots, or in the file's own names ("lora_unet_...");
            rank 0 is left out, and sd-scripts then leaves the module as it is.
        shapes: of the weights: (out, in), of a convolution (out, in, height, width). By default
            those of an `Allocation`. These are of matrices: give a convolution's own, lest
            sd-scripts fail to load the file.
        scale: the factor before B A in every layer, by default 1.
        alpha: instead of `scale`, with `r`: those of the LoRA of uniform rank to be replaced.
        r: see `alpha`.
        rslora: whether that LoRA was rank-stabilised.
        prefix: what sd-scripts puts before the module's name: "lora_unet" (of a DiT too),
            "lora_te", "lora_te1", "lora_te2"; or a function of the module's name that gives the
            name in the file.
        modules: all modules of the network, to make sure that each layer is one: sd-scripts passes
            over names that it does not know.
        seed: for lora_down.

    Raises:
        ValueError: a layer has no shape, or one that is not as above; or a name is not in
            `modules`, or not unique in the file.
        ModuleNotFoundError: safetensors is absent.

    References:
        kohya-ss, sd-scripts, `networks/lora.py` (`create_network_from_weights`, `LoRAModule`).
    """
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "write_kohya_seed needs safetensors: pip install safetensors", name=missing.name
        ) from missing
    factor = constant_scale(scale, alpha=alpha, r=r, rslora=rslora)
    kept = adapted(ranks)
    known = None if modules is None else {_joined(name) for name in modules}
    sides = _weight_shapes(ranks) if shapes is None else shapes
    names = {name: _in_file(name, prefix) for name in kept}
    check_underscores(dict.fromkeys(names.values(), 0))
    if len(set(names.values())) < len(names):
        check_underscores(kept)
        raise ValueError("prefix: expected different names for different layers")
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    draws = np.random.default_rng(seed)
    for name, rank in sorted(kept.items(), key=lambda item: names[item[0]]):
        if known is not None and _joined(name) not in known:
            raise ValueError(f"layer {name!r}: expected one of modules")
        down, up = _factor_shapes(name, rank, sides.get(name))
        bound = 1 / math.sqrt(math.prod(down[1:]))
        key = names[name]
        tensors[f"{key}.lora_down.weight"] = draws.uniform(-bound, bound, down).astype(np.float32)
        tensors[f"{key}.lora_up.weight"] = np.zeros(up, np.float32)
        tensors[f"{key}.alpha"] = np.array(alpha_for(rank, factor), np.float32)
    about = {"ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "format": "pt"}
    content = save(tensors, metadata=about)
    with storage.replacing(path) as file:
        file.write(content)


def _joined(name: str) -> str:
    """The name without sd-scripts' prefix, and with "_" for "."."""
    return name.replace(".", "_").removeprefix("lora_unet_")


def _block(name: str, model: Model) -> int:
    """The index of the block that a module of the U-Net's transformers lies in."""
    joined = _joined(name)
    if model == "sd":
        if joined.startswith("mid_block_attentions_"):
            return _MIDDLE
        match = _SD_BLOCK.match(joined)
        if match:
            at = 3 * int(match[2]) + int(match[3])
            if at < _MIDDLE:
                return at + (1 if match[1] == "down" else _MIDDLE + 1)
    else:
        match = _SDXL_BLOCK.match(joined)
        # Else it is a ResNet's, which has convolutions of 3 x 3 beside its linear layers.
        if match and re.search(r"_(transformer_blocks|proj_in|proj_out)(_|$)", joined):
            index, limit = int(match[2]), 3 if match[1] == "middle_block" else 9
            if index < limit:
                return _SDXL_START[match[1]] + index
    raise ValueError(
        f"layer {name!r}: expected a module in a transformer of the U-Net of {model!r}, which has "
        "block dimensions; write_kohya_seed takes others"
    )


def _in_file(name: str, prefix: Prefix) -> str:
    if callable(prefix):
        return prefix(name)
    return name if name.startswith("lora_") and "." not in name else f"{prefix}_{_joined(name)}"


def _weight_shapes(ranks: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that an `Allocation` knows of."""
    curves = getattr(getattr(ranks, "problem", None), "curves", None)
    shapes: Mapping[str, tuple[int, int]] | None = getattr(curves, "shapes", None)
    if shapes is None:
        raise ValueError("shapes: expected the shape of each layer's weight, got none")
    return dict(shapes)


def _factor_shapes(
    name: str, rank: int, shape: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if shape is None or len(shape) not in (2, 4):
        raise ValueError(
            f"layer {name!r}: expected a shape (out, in) or (out, in, height, width), got {shape}"
        )
    out, *inputs = (whole_number(side, f"layer {name!r}: shape", 1) for side in shape)
    return (rank, *inputs), (out, rank, *([1] * (len(inputs) - 1)))
