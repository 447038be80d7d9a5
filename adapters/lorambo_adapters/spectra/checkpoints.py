"""Spectra of checkpoints on disk, and of what a fine-tuned one differs by from its base."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.checkpoints needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.decompose import is_exact
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.extraction import MatrixReader, Options, extract
from lorambo_adapters.spectra.stored_layers import (
    Checkpoint,
    StoredLayer,
    StoredLayers,
    stored_layers,
    unmerged_adapters,
)
from lorambo_alloc import Spectra

_MANY = 8


def checkpoint_spectra(
    checkpoint: Checkpoint,
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
    rank: int | None = 128,
    exact_below: int = 1024,
    tolerance: float = 3e-5,
    seed: int = 0,
    device: torch.device | str | None = None,
    source: str | None = None,
    output: str | os.PathLike[str] | None = None,
    workers: Workers | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Compute the spectra of a checkpoint's weights, tensor by tensor.

    Which tensors are layers. In files and state dicts: 2-D ones named `*.weight`, and each slice of
    3-D ones named `*experts.<name>` (as "<key>.<index>"). In a module: what `find_layers` finds.
    Norms and biases are not 2-D. "all-linear" leaves out what is, by its name, an embedding table
    or an output head: a module called `embed`, `embed_*`, `*embedding`, `*embeddings`, `wte`,
    `wpe`, `shared`, `relative_attention_bias`, `lm_head`, `lm_head.decoder`,
    `predictions.decoder`, `output_layer`, or, at the top level, `output`. Any other 2-D weight
    counts, a pooler's, a router's or a classification head's too: where PEFT sees it otherwise, use
    `exclude`. A weight stored under two names counts twice. The names are the files':
    transformers 5 renames and fuses some on loading (the experts of Mixtral, Qwen3-MoE, DeepSeek-V3
    and OLMoE, for instance); pass the loaded model for the names that PEFT then sees.

    Memory: one tensor as it is stored (mapped, not loaded, with up to 64 MB read before), and what
    `decompose` needs for it, whose docstring states it along with the accuracy.

    Args:
        checkpoint: see `TensorFiles` for files and folders; or a module or a state dict.
        targets: "all-linear", a regular expression that has to match a layer's whole name (the
            module's), or a list of names and of suffixes that begin after a dot, as PEFT's
            `target_modules`. Names given in this way may be of embedding tables.
        exclude: PEFT's `exclude_modules`, in the same form.
        rank: how many of the largest values to keep; None for all, which takes long for weights of
            several thousand rows.
        exact_below: see `decompose`, as for `tolerance` and `seed`.
        tolerance: of the estimated energy that is missed, where the method is not exact.
        seed: of the random start.
        device: where to decompose; by default the CPU for files, and where each weight lies for
            tensors in memory.
        source: what to record as the spectra's origin; by default the checkpoint's name.
        output: see `extract`: the spectra are saved there, and an interrupted run is resumed from
            `<output>.partial` by a later one with the same arguments and unchanged files. Runs on
            tensors in memory are not resumed.
        workers: the processes that share the layers out, in balanced loads: each reads and
            decomposes its own, and all return all spectra (`distributed.torchrun_workers`).
        progress: None shows a bar if stderr is a terminal, False never.

    Returns:
        Spectra with the shapes; layers are in the order of the module or the state dict, of files
        in the natural order of their names ("layers.2" before "layers.10"). The shapes are those
        stored: GPT-2's `Conv1D` is k x d there, which changes neither the values nor d + k.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no layer matches, a checkpoint is not one, or a weight is quantised, not finite
            or cannot be read; the message names files and tensors.
        WorkerLost: another worker has stopped; started again, the run continues where it was.

    Example:
        >>> import torch
        >>> state = {"up.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "up.bias": torch.ones(2)}
        >>> checkpoint_spectra(state)["up"].round(6)
        array([4., 3.])
    """
    options = Options(rank, exact_below, tolerance, seed)
    found = stored_layers(checkpoint, targets, exclude)
    # A live model's layers are dequantised as they are read.
    if not isinstance(checkpoint, torch.nn.Module):
        packed = [layer for layer in found.layers.values() if not layer.info.is_float]
        if packed:
            raise ValueError(
                f"{found.label}: expected floating-point weights of 16 bits or more, got "
                + _listed(f"{layer.place} of type {layer.info.dtype}" for layer in packed)
            )
    matrices = [
        MatrixReader(name, layer.shape, _on(layer.read, device), layer.info.file, layer.collective)
        for name, layer in found.layers.items()
    ]
    key = None
    if found.fingerprint is not None:
        key = {"weights": found.fingerprint, "layers": list(found.layers)}
    origin = source or f"weights of {found.label}"
    return extract(
        matrices, options, source=origin, output=output, key=key, workers=workers,
        progress=progress,
    )  # fmt: skip


def delta_spectra(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
    rank: int | None = 128,
    exact_below: int = 1024,
    tolerance: float = 3e-5,
    seed: int = 0,
    device: torch.device | str | None = None,
    source: str | None = None,
    output: str | os.PathLike[str] | None = None,
    workers: Workers | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Compute the spectra of W_tuned - W_base, tensor by tensor.

    Both checkpoints must have the same layers, matched by name, in the same stored shape, in
    floating-point types of 16 bits or more. The types may differ: entries are subtracted in float32
    (in float64 if one of the two is float64 or the decomposition is exact), which rounds each
    difference once at most. A layer that was not trained has a spectrum of zeros.

    A checkpoint saved in bfloat16 has lost what training changed by less than half a unit in the
    last place of a weight, and differs by whole units elsewhere: noise with a flat spectrum, which
    is part of these spectra.

    Memory: one tensor of each checkpoint as it is stored (mapped, with up to 64 MB read before),
    their difference (4 d k bytes, or 8 d k), and what `decompose` needs for it.

    Args:
        base: before fine-tuning; a path, a module or a state dict.
        tuned: after it; the two need not be of one kind.
        targets: see `checkpoint_spectra`, as for all other arguments. Tensors that are no target
            may differ in any way (a resized embedding table, a new head).
        exclude: names that are no target.
        rank: how many of the largest values to keep; None for all.
        exact_below: see `decompose`.
        tolerance: see `decompose`.
        seed: see `decompose`.
        device: where to subtract and to decompose; by default where the tuned weight lies.
        source: what to record as the spectra's origin; by default both names.
        output: where to save, and beside which to resume.
        workers: the processes that share the layers out.
        progress: None shows a bar if stderr is a terminal, False never.

    Returns:
        Spectra with the shapes, in the order of the base; see `checkpoint_spectra`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: layers are missing from one of the two, differ in shape or are quantised (all
            such are in one message: the first 8 and how many more), none matches, or a weight is
            not finite or cannot be read.
        WorkerLost: another worker has stopped; started again, the run continues where it was.

    Example:
        >>> import torch
        >>> base = {"up.weight": torch.zeros(2, 3)}
        >>> tuned = {"up.weight": torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])}
        >>> delta_spectra(base, tuned)["up"].round(6)
        array([2., 1.])
    """
    options = Options(rank, exact_below, tolerance, seed)
    before, after = layer_pairs(base, tuned, targets, exclude)
    matrices = differences(before, after, rank, exact_below, device)
    key = None
    if before.fingerprint is not None and after.fingerprint is not None:
        key = {
            "base": before.fingerprint,
            "tuned": after.fingerprint,
            "layers": list(before.layers),
        }
    origin = source or f"{after.label} less {before.label}"
    return extract(
        matrices, options, source=origin, output=output, key=key, workers=workers,
        progress=progress,
    )  # fmt: skip


def layer_pairs(
    base: Checkpoint,
    tuned: Checkpoint,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
) -> tuple[StoredLayers, StoredLayers]:
    """The layers of both checkpoints, which have the same names and shapes.

    Raises:
        ValueError: see `delta_spectra`.
    """
    for which, side in ((base, "base"), (tuned, "tuned")):
        active = unmerged_adapters(which) if isinstance(which, torch.nn.Module) else []
        if active:
            raise ValueError(
                f"{side}: expected a model whose weights hold what it learnt, got unmerged "
                f"adapters ({', '.join(active)}); use lora_spectra(model), or call "
                "merge_and_unload() first"
            )
    before, after = (stored_layers(which, targets, exclude) for which in (base, tuned))
    if before.label == after.label:
        before = replace(before, label=f"{before.label} (base)")
        after = replace(after, label=f"{after.label} (tuned)")
    _check_pairs(before, after)
    return before, after


def differences(
    base: StoredLayers,
    tuned: StoredLayers,
    rank: int | None,
    exact_below: int = 1024,
    device: torch.device | str | None = None,
) -> list[MatrixReader]:
    """What each layer of the tuned checkpoint differs by, in the order of the base.

    Args:
        base: before.
        tuned: after.
        rank: of the decomposition that follows, with `exact_below`: it says whether the difference
            is formed in float64.
        exact_below: see `decompose`.
        device: where to subtract; by default where the tuned weight lies.
    """
    matrices: list[MatrixReader] = []
    for name, layer in base.layers.items():
        other = tuned.layers[name]
        double = is_exact(layer.shape, rank, exact_below)
        files = " and ".join(file for file in (layer.info.file, other.info.file) if file)
        read = _difference(layer, other, device, double)
        collective = layer.collective or other.collective
        matrices.append(MatrixReader(name, layer.shape, read, files, collective))
    return matrices


def _check_pairs(base: StoredLayers, tuned: StoredLayers) -> None:
    wrong: list[str] = []
    for name, before in base.layers.items():
        after = tuned.layers.get(name)
        if after is None:
            wrong.append(f"{before.place} of {base.label} is missing from {tuned.label}")
        elif not before.info.is_float or not after.info.is_float:
            wrong.append(
                f"{before.place} is {before.info.dtype} in {base.label} and {after.info.dtype} in "
                f"{tuned.label}, not floating-point of 16 bits or more in both"
            )
        elif before.shape != after.shape:
            wrong.append(
                f"{before.place} is of shape {before.shape} in {base.label} and {after.shape} in "
                f"{tuned.label}"
            )
    common = len(base.layers.keys() & tuned.layers.keys())
    wrong += [
        f"{after.place} of {tuned.label} is missing from {base.label}"
        for name, after in tuned.layers.items()
        if name not in base.layers
    ]
    if wrong:
        hint = "" if common else " (no name is in both: perhaps one has a prefix before its names)"
        raise ValueError(
            f"expected {base.label} and {tuned.label} to have the same layers, got {len(wrong)} "
            f"that differ{hint}: {_listed(wrong)}"
        )


def _difference(
    base: StoredLayer, tuned: StoredLayer, device: torch.device | str | None, double: bool
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        after, before = tuned.read(), base.read()
        wide = double or torch.float64 in (after.dtype, before.dtype)
        dtype = torch.float64 if wide else torch.float32
        # A copy, lest a live model or a mapped file be written to.
        difference = after.to(device=device or after.device, dtype=dtype, copy=True)
        return difference.sub_(before.to(difference.device))

    return read


def _on(
    read: Callable[[], torch.Tensor], device: torch.device | str | None
) -> Callable[[], torch.Tensor]:
    return read if device is None else lambda: read().to(device)


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f"; and {len(items) - _MANY} more" if len(items) > _MANY else ""
    return "; ".join(items[:_MANY]) + more
