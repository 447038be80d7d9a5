"""Which tensors of a checkpoint are a LoRA's layers, told by their names and shapes alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.stored_layers needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer, find_layers, is_packed
from lorambo_adapters.names import natural
from lorambo_adapters.spectra.tensor_files import (
    Fingerprint,
    TensorFiles,
    TensorInfo,
    tensor_info,
    tensors_in,
    whole,
)
from lorambo_adapters.targets import is_all_linear, name_matcher

Checkpoint = str | os.PathLike[str] | torch.nn.Module | Mapping[str, torch.Tensor]
"""A folder or a file, a live model, or a state dict."""

# A checkpoint cannot tell a linear layer from an embedding table or an output head, so names do.
# The words are those of BERT, GPT-2, GPT-NeoX, T5, Llama, OPT, BLOOM, CLIP, XLNet, ChatGLM,
# InternLM2 and Mamba. "output" is a head at the top level; in BERT's layers it is not.
_NOT_LINEAR = re.compile(
    r"(.*\.)?(embed(_\w+)?|\w*embeddings?|wte|wpe|shared|relative_attention_bias"
    r"|lm_head(\.decoder)?|predictions\.decoder|output_layer)|output"
)
_EXPERTS = re.compile(r"(.*\.)?experts\.(?!\w*bias)\w+")
_SUFFIXES = (".weight", ".qweight", ".weight_packed")  # the last two hold packed integers


@dataclass(frozen=True)
class StoredLayer:
    """A layer's weight as it is stored.

    Attributes:
        key: the tensor's name.
        info: of the whole tensor, which may hold many experts.
        shape: of the matrix, as it is stored: GPT-2's `Conv1D` is (in, out).
        read: makes the matrix, without writing to it.
        collective: whether `read` takes all processes at once: it gathers a `DTensor`.
    """

    key: str
    info: TensorInfo
    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]
    collective: bool = False

    @property
    def place(self) -> str:
        """The tensor's name, and the file's where there is one, for messages."""
        return f"{self.key!r} in {self.info.file}" if self.info.file else repr(self.key)


@dataclass(frozen=True)
class StoredLayers:
    """The layers of one checkpoint by name.

    Attributes:
        label: what to call the checkpoint.
        layers: name to layer.
        fingerprint: of its files; None for tensors in memory.
    """

    label: str
    layers: dict[str, StoredLayer]
    fingerprint: Fingerprint | None


def stored_layers(
    checkpoint: Checkpoint,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
) -> StoredLayers:
    """Find the layers of a checkpoint.

    In files and state dicts these are the 2-D tensors named `*.weight`, and each slice of 3-D ones
    named `*experts.<name>` (as "<key>.<index>"). Packed integers named `*.qweight` or
    `*.weight_packed` are found too, so that they can be refused. In a module they are what
    `find_layers` finds.

    Args:
        checkpoint: a path as `TensorFiles` takes it, a state dict, or a module.
        targets: "all-linear", which leaves out embedding tables and output heads by the names that
            `checkpoint_spectra` lists; or a regular expression, or a list of names and suffixes.
        exclude: a regular expression, or a list of names and suffixes, that are no layers.

    Returns:
        The layers in the order of the module or state dict; of files in the natural order of the
        names ("layers.2" before "layers.10").

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no tensor matches, or the path is no checkpoint.
    """
    if isinstance(checkpoint, torch.nn.Module):
        found = find_layers(checkpoint, targets, exclude=exclude)
        label = f"the {type(checkpoint).__name__}"
        return StoredLayers(label, {layer.name: _from_module(layer) for layer in found}, None)
    infos: Mapping[str, TensorInfo]
    if isinstance(checkpoint, Mapping):
        state = tensors_in(checkpoint)
        check_no_adapters(state)
        infos = {key: tensor_info(tensor) for key, tensor in state.items()}
        label, order, fingerprint = "the state dict", list(infos), None
        read = _state_reader(state)
    elif not isinstance(checkpoint, (str, os.PathLike)):
        raise ValueError(
            f"expected a path, a module or a state dict, got {type(checkpoint).__name__}"
        )
    else:
        infos = TensorFiles(checkpoint)
        label, order, fingerprint = infos.label, sorted(infos, key=natural), infos.fingerprint()
        read = infos.read
    wanted = _matcher(targets, exclude)
    layers: dict[str, StoredLayer] = {}
    for key in order:
        info = infos[key]
        for name, part, shape in _matrices(key, info):
            # As with PEFT's `target_parameters`, a pattern names all experts, not one of them.
            if wanted(name if part is None else key):
                gathered = isinstance(checkpoint, Mapping) and _is_dtensor(checkpoint[key])
                layers[name] = StoredLayer(key, info, shape, _reading(read, key, part), gathered)
    if not layers:
        raise ValueError(
            f"{label}: expected at least one 2-D tensor named *.weight that matches "
            f"targets={targets!r}, got none among {len(infos)} tensors"
        )
    return StoredLayers(label, layers, fingerprint)


def check_no_adapters(state: Iterable[str]) -> None:
    """Refuse the state dict of a model with PEFT's adapters in it, whose names are not layers'.

    Raises:
        ValueError: a name is an adapter's or a wrapped layer's.
    """
    for key in state:
        if ".base_layer." in key or ".lora_A." in key or ".lora_B." in key:
            raise ValueError(
                f"expected the state dict of a model without adapters, got {key!r} in it; pass the "
                "model (adapters are seen through), or lora_spectra(model) for the adapters"
            )


def unmerged_adapters(model: torch.nn.Module) -> list[str]:
    """Names of PEFT's adapters that act on a model, but are not in its weights."""
    found: dict[str, None] = {}
    for module in model.modules():
        if hasattr(module, "base_layer") and not getattr(module, "disable_adapters", False):
            merged = getattr(module, "merged_adapters", ())
            active = getattr(module, "active_adapters", ())
            has = getattr(module, "lora_A", None)
            found |= {
                name: None for name in active if name not in merged and (has is None or name in has)
            }
    return list(found)


def _matcher(
    targets: str | Sequence[str], exclude: str | Sequence[str] | None
) -> Callable[[str], bool]:
    excluded = name_matcher(exclude, "exclude")
    if is_all_linear(targets):
        return lambda name: _NOT_LINEAR.fullmatch(name) is None and not excluded(name)
    included = name_matcher(targets, "targets")
    return lambda name: included(name) and not excluded(name)


def _matrices(key: str, info: TensorInfo) -> Iterator[tuple[str, int | None, tuple[int, int]]]:
    """The layers in a tensor: name, slice, shape."""
    shape = info.shape
    if len(shape) == 2 and 0 not in shape:
        for suffix in _SUFFIXES:
            if key.endswith(suffix):
                yield key.removesuffix(suffix), None, (shape[0], shape[1])
    elif len(shape) == 3 and 0 not in shape and _EXPERTS.fullmatch(key):
        for expert in range(shape[0]):
            yield f"{key}.{expert}", expert, (shape[1], shape[2])


def _from_module(layer: TargetLayer) -> StoredLayer:
    # As stored, so that a module compares with a file: Conv1D and embeddings are transposed.
    stored = layer.kind in ("conv1d", "embedding")
    d, k = layer.shape
    shape = (k, d) if stored else (d, k)
    kind = layer.kind
    weight = getattr(layer.module, layer.parameter)
    info = tensor_info(weight)
    dtype = "quantized" if kind == "quantized" and is_packed(weight) else info.dtype
    read = (lambda: layer.matrix().T) if stored else layer.matrix
    stored_as = TensorInfo(info.shape, dtype)
    return StoredLayer(layer.name, stored_as, shape, read, _is_dtensor(weight))


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _state_reader(
    state: Mapping[str, torch.Tensor],
) -> Callable[[str, int | None], torch.Tensor]:
    def read(key: str, part: int | None) -> torch.Tensor:
        tensor = whole(state[key])
        return tensor if part is None else tensor[part]

    return read


def _reading(
    read: Callable[[str, int | None], torch.Tensor], key: str, part: int | None
) -> Callable[[], torch.Tensor]:
    return lambda: read(key, part)
