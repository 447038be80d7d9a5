"""Keys of LoRA files: which tensors are the factors of which layer, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

PREFIX = "base_model.model."  # PEFT's, before the names of the model's own modules
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration

# What a key ends with, and what the tensor then is. PEFT; diffusers before and since PEFT ("lora",
# "_lora" in attention processors, "lora_linear_layer" in text encoders); kohya and LyCORIS.
_ENDINGS = (
    (r"\.lora_A(\.default)?(\.weight)?", "A"),
    (r"\.lora_B(\.default)?(\.weight)?", "B"),
    (r"\.lora_embedding_A(\.default)?", "A"),
    (r"\.lora_embedding_B(\.default)?", "B"),
    (r"(\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight", "A"),
    (r"(\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight", "B"),
    (r"(?<=_lora\d)\.down\.weight", "A"),
    (r"(?<=_lora\d)\.up\.weight", "B"),
    (r"\.lora_mid\.weight", "middle"),
    (r"([._]lora)?\.alpha", "alpha"),
    (r"\.lora_magnitude_vector(\.default)?(\.weight)?|\.dora_scale", "magnitude"),
    (r"\.lora_B(\.default)?\.bias", "bias"),
)
_KEY = re.compile(
    "(?P<name>.+?)(" + "|".join(f"(?P<p{i}>{end})" for i, (end, _) in enumerate(_ENDINGS)) + ")"
)
# Parts of AdaLoRA, KaSA, LoHa, LoKr, OFT, VeRA and others, whose updates are not of the form B A.
OTHER_METHODS = re.compile(r".*\.(lora_(?!dropout)|hada_|lokr_|oft_|boft_|vera_)\w+(\.\w+)*")


Parts = dict[str, str]
"""The keys of one layer's tensors, by what they are."""


def by_layer(keys: Iterable[str]) -> tuple[dict[str, Parts], list[str]]:
    """The keys of each layer, by the layer's name in the file, and the keys of no layer.

    Raises:
        ValueError: a layer has two tensors for one part.
    """
    layers: dict[str, Parts] = {}
    others: list[str] = []
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        part = next(part for i, (_, part) in enumerate(_ENDINGS) if match[f"p{i}"] is not None)
        parts = layers.setdefault(match["name"], {})
        if part in parts:
            raise ValueError(f"expected one {part} a layer, got {parts[part]!r} and {key!r}")
        parts[part] = key
    for name in [name for name, parts in layers.items() if parts.keys() == {"alpha"}]:
        others += layers.pop(name).values()  # of another method, or a parameter of that name
    return layers, others


def module_name(raw: str, layers: Container[str]) -> str:
    """The module's name: without PEFT's prefix and the wrappers it put inside one another.

    Args:
        raw: the layer's name in the file.
        layers: the names of all layers in it.
    """
    pieces = raw.split(".")
    inner = [
        piece
        for i, piece in enumerate(pieces)
        if piece != "base_layer" or ".".join(pieces[:i]) not in layers
    ]
    return ".".join(inner).removeprefix(PREFIX)
