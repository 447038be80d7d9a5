"""Checkpoints of a training whose ranks move: what they hold, and a model that can load them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.checkpoint needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import SIDES, AdapterLayer, Side, adapter_layers
from lorambo_adapters.ranks.mask import set_mask
from lorambo_adapters.ranks.moments import holds
from lorambo_adapters.ranks.presence import spare_layers
from lorambo_adapters.ranks.resize import resize
from lorambo_adapters.ranks.resize_report import ResizeReport
from lorambo_adapters.ranks.sharded import peeled
from lorambo_adapters.ranks.stored_ranks import StoredRanks, ranks_of
from lorambo_adapters.ranks.transaction import Transaction
from lorambo_alloc.storage import replacing

RANKS_FILE = "lorambo_ranks.json"
"""The file in a checkpoint's folder, beside those of PEFT and the trainer."""

_KIND, _VERSION = "training ranks", 1

_RESTORED: WeakKeyDictionary[torch.nn.Module, Path] = WeakKeyDictionary()


def restore_ranks(
    model: torch.nn.Module, checkpoint: str | os.PathLike[str], adapter: str = "default"
) -> ResizeReport:
    """Give a model the ranks that a checkpoint has, so that its weights can be loaded into it.

    To be called before the optimizer is made: a trainer that goes on from the checkpoint makes one
    for the parameters that it finds, and loads weights and moments into them.

        model = get_peft_model(base, config)           # as at the start of the training
        restore_ranks(model, "out/checkpoint-500")
        trainer = Trainer(model, args, callbacks=[RankCallback(...)], ...)
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    Layers that the checkpoint leaves out lose their adapter (rank 0). Where `lorambo_ranks.json` is
    there and says that ranks were masked, the same ones are masked in the model. The weights are
    not loaded here: those of the layers whose rank changes are not what they were.

    Args:
        model: a `PeftModel` with the adapter as it was made for the training.
        checkpoint: a folder as PEFT saves it (`adapter_config.json` and
            `adapter_model.safetensors`); of an adapter that is not "default" PEFT's folder inside.
        adapter: the adapter's name.

    Returns:
        What was changed, as of `resize`.

    Raises:
        FileNotFoundError: there is no such folder, or no adapter in it.
        ValueError: the adapter is another one: a layer is not there, or its scale differs; or as
            `resize`.
    """
    inner, _ = peeled(model)
    stored = ranks_of(_adapter_folder(Path(checkpoint), adapter))
    layers = adapter_layers(inner, adapter)
    _same_scales(stored, layers, checkpoint)
    names = [name for layer in layers.values() for name in layer.names]
    wanted = dict.fromkeys((*names, *spare_layers(inner, adapter)), 0) | dict(stored)
    report = resize(inner, wanted, adapter=adapter)
    if (Path(checkpoint) / RANKS_FILE).exists():
        mask_as(inner, read_ranks(checkpoint)["controller"], adapter)
    _RESTORED[inner] = Path(checkpoint)
    return report


def restored_from(model: torch.nn.Module) -> Path | None:
    """The checkpoint that `restore_ranks` was last given for this model."""
    return _RESTORED.get(peeled(model)[0])


def write_ranks(
    checkpoint: str | os.PathLike[str], step: int, controller: Mapping[str, Any]
) -> None:
    """Write `lorambo_ranks.json` into a checkpoint's folder, whole or not at all.

    Args:
        checkpoint: the folder, which has to be there.
        step: the training step.
        controller: the state of a `RankController`.

    Raises:
        OSError: the file cannot be written.
    """
    entries = {"kind": _KIND, "version": _VERSION, "step": step, "controller": controller}
    text = json.dumps(entries, allow_nan=False)
    with replacing(Path(checkpoint) / RANKS_FILE) as file:
        file.write(text.encode() + b"\n")


def read_ranks(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of a checkpoint's `lorambo_ranks.json`: "step" and "controller".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or of a newer version.
    """
    file = Path(checkpoint) / RANKS_FILE
    try:
        entries = json.loads(file.read_bytes())
        kind, version = entries["kind"], int(entries["version"])
        _ = int(entries["step"]), dict(entries["controller"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: expected {_KIND} as JSON, got something else") from error
    if kind != _KIND:
        raise ValueError(f"{file}: expected {_KIND}, got {kind!r}")
    if version > _VERSION:
        raise ValueError(
            f"{file}: expected version {_VERSION} or older, got {version}: a newer lorambo-alloc "
            "wrote it"
        )
    return entries


def mask_as(model: torch.nn.Module, state: Mapping[str, Any], adapter: str) -> None:
    """Mask the ranks that are masked in a controller's state; without any do nothing.

    Args:
        model: with the adapter, whose tensors have the ranks that they had then.
        state: its entry "active" has the rows that count, by layer.
        adapter: the adapter's name.

    Raises:
        ValueError: a layer is not there, or has fewer ranks than the state names.
    """
    layers = adapter_layers(peeled(model)[0], adapter)
    changes = Transaction()
    for name, rows in state.get("active", {}).items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"layer {name!r}: expected one that has the adapter, got none")
        if rows and max(rows) >= layer.rank:
            raise ValueError(
                f"layer {name!r}: expected tensors of {max(rows) + 1} ranks or more, of which "
                f"{len(rows)} count, got {layer.rank}"
            )
        if rows != layer.active.tolist():
            set_mask(changes, layer, torch.tensor(rows, dtype=torch.long))
    changes.commit()


def fit_to(
    model: torch.nn.Module,
    tensors: MutableMapping[str, torch.Tensor],
    adapter: str,
    optimizer: Any = None,
) -> ResizeReport | None:
    """Give a model the ranks of the tensors that are about to be loaded into it.

    Args:
        model: whose `state_dict` the tensors are named by.
        tensors: what will be loaded. If no factor of the adapter is among it, nothing is done. PEFT
            does not insert the adapter's name for layers that do not have the adapter; for those
            that get it back it is inserted here.
        adapter: the adapter's name.
        optimizer: as `resize` takes it, if it is there already and trains the adapter.

    Returns:
        What was changed, if ranks differed.
    """
    inner, _ = peeled(model)
    layers = adapter_layers(inner, adapter)
    paths = {id(module): path for path, module in model.named_modules()}
    wanted: dict[str, int] = {}
    for layer in layers.values():
        key = f"{paths[id(layer.module)]}.{_suffix('A', layer.is_embedding, adapter)}"
        rank = layer.rows("A", tensors[key]).shape[1] if key in tensors else 0
        wanted |= dict.fromkeys(layer.names, rank)
    for name, module in spare_layers(inner, adapter).items():
        embedding, wanted[name] = isinstance(module.get_base_layer(), torch.nn.Embedding), 0
        for side in SIDES:
            bare = f"{paths[id(module)]}.{_suffix(side, embedding)}"
            key = f"{paths[id(module)]}.{_suffix(side, embedding, adapter)}"
            if bare in tensors:
                tensors[key] = tensors.pop(bare)
            if side == "A" and key in tensors:
                wanted[name] = len(tensors[key])
    present = {name: layer.rank for layer in layers.values() for name in layer.names}
    if not any(wanted.values()) or all(present.get(n, 0) == r for n, r in wanted.items()):
        return None
    if optimizer is not None:
        ids = {id(layer.parameter(side)) for layer in layers.values() for side in SIDES}
        optimizer = optimizer if holds(optimizer, ids) else None
    return resize(inner, wanted, optimizer, adapter)


def _suffix(side: Side, embedding: bool, adapter: str = "") -> str:
    """A factor's name in its layer, in a model; without an adapter, in PEFT's files."""
    parts = (
        [f"lora_embedding_{side}", adapter] if embedding else [f"lora_{side}", adapter, "weight"]
    )
    return ".".join(part for part in parts if part)


def _adapter_folder(checkpoint: Path, adapter: str) -> Path:
    inside = checkpoint / adapter
    return inside if adapter != "default" and inside.is_dir() else checkpoint


def _same_scales(
    stored: StoredRanks, layers: Mapping[str, AdapterLayer], checkpoint: str | os.PathLike[str]
) -> None:
    """Make sure that resizing, which keeps scales, will give those of the checkpoint."""
    for layer in layers.values():
        for name in layer.names:
            scale = stored.scales.get(name)
            if scale is not None and not math.isclose(scale, layer.scale, rel_tol=1e-6):
                raise ValueError(
                    f"layer {name!r}: expected the scale of {checkpoint}, {scale:g}, got "
                    f"{layer.scale:g}; make the adapter as it was made for the training"
                )
