"""Spectra of the weights themselves: the singular values of a model's linear layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorambo_alloc import Spectra
from lorambo_alloc.costs import whole_number

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.weights needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer, find_layers, floating_point
from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.decompose import Decomposition, arithmetic, decompose
from lorambo_adapters.spectra.stored_layers import check_no_adapters
from lorambo_adapters.spectra.tensor_files import tensors_in
from lorambo_adapters.targets import is_all_linear, name_matcher

State = Mapping[str, torch.Tensor]
Device = torch.device | str | None


def weight_spectra(
    model: torch.nn.Module | State | Sequence[TargetLayer],
    *,
    targets: str | Sequence[str] = "all-linear",
    layers: str | None = None,
    rank: int | None = None,
    source: str | None = None,
    device: torch.device | str | None = None,
    chunk_bytes: int = 1 << 28,
    seed: int = 0,
    progress: bool | None = None,
) -> Spectra:
    """Compute the singular values of a model's weights.

    A weight W of shape (d, k) = (out_features, in_features) has min(d, k) singular values, and a
    LoRA of rank r beside it has r (d + k) parameters. By default all values are computed, in
    float64, so the spectra leave no energy unresolved. With `rank` only the largest ones are, by
    `decompose`, which is much faster for large weights and whose docstring states its accuracy;
    the energy of the others is in `Spectra.unresolved`.

    Memory beyond the model: the float64 weights of a chunk twice (`chunk_bytes`, or one larger
    matrix) and what LAPACK works in; with `rank`, one weight at a time, and what `decompose` needs.

    Args:
        model: a module, whose layers `find_layers` finds; or what it has found, for targets of
            other kinds; or a state dict, whose 2-D tensors named `*.weight` count. The weight of a
            PEFT layer is its base layer's, with what is merged into it. A state dict
            cannot tell a linear layer from an embedding table or an output head, so choose where
            it holds them, and it has the weights of GPT-2's `Conv1D` as k x d.
        targets: PEFT's `target_modules`, see `find_layers`. "all-linear" takes every linear layer
            but a transformers model's output head, and of a state dict everything that counts.
            Of no effect on layers already found.
        layers: a regular expression that the whole name of a layer must match besides (the name of
            the module, without `.weight`); every layer by default.
        rank: how many of the largest values to compute, >= 1; all of them by default.
        source: what to record as the spectra's origin, put before how they were computed.
        device: where to decompose; by default where each weight lies. It must know float64 (Apple's
            MPS does not: pass "cpu" there).
        chunk_bytes: float64 weights that are copied and decomposed together, at most; a single
            larger matrix still goes through. Matrices of equal shape share a batch.
        seed: of the random test matrices that `decompose` uses for large weights.
        progress: None shows a bar if stderr is a terminal, False never.

    Returns:
        Spectra with the shapes, in the order of the model.

    Raises:
        ValueError: no layer counts, an argument is not of this form, or a weight is not an array
            of finite floating-point numbers (of integers, or on the meta device); the message
            names the layer.

    Example:
        >>> import torch
        >>> from lorambo_adapters.spectra.weights import weight_spectra
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> spectra = weight_spectra(model)
        >>> spectra.shapes, spectra["0"].round(6)
        ({'0': (2, 4)}, array([2.828427, 0.      ]))
    """
    weights = dict(_weights(model, targets))
    whole_number(chunk_bytes, "chunk_bytes", 1)
    if layers is not None:
        chosen_by_name = name_matcher(layers, "layers")
        weights = {name: w for name, w in weights.items() if chosen_by_name(name)}
    if not weights:
        chosen = "" if layers is None else f" whose name matches {layers!r}"
        raise ValueError(f"expected at least one linear layer with a 2-D weight{chosen}, got none")

    rank = None if rank is None else whole_number(rank, "rank", 1)
    values: dict[str, np.ndarray] = {}
    unresolved = dict.fromkeys(weights, 0.0)
    work = {name: arithmetic(weight.shape, rank) for name, weight in weights.items()}
    with progress_bar("spectra", sum(work.values()), progress) as advance:
        # Chunks for svdvals, which takes matrices of one shape together; else one at a time.
        at_once = _chunks(weights, chunk_bytes) if rank is None else ([name] for name in weights)
        for names in at_once:
            advance(0.0, names[0])
            if rank is None:
                stack = torch.stack([_as_float64(name, weights[name], device) for name in names])
                values.update(zip(names, torch.linalg.svdvals(stack).cpu().numpy(), strict=True))
            else:
                found = _decomposed(names[0], weights[names[0]], device, rank, seed)
                values[names[0]], unresolved[names[0]] = found.values, found.unresolved
            advance(sum(work[name] for name in names), "")
    if rank is None:
        method = f"singular values of {len(weights)} weights, torch.linalg.svdvals in float64"
    else:
        method = (
            f"at most {rank} largest singular values of {len(weights)} weights, "
            f"lorambo_adapters.spectra.decompose with seed {seed}"
        )
    return Spectra(
        {name: values[name] for name in weights},
        shapes={name: weight.shape for name, weight in weights.items()},
        source=f"{source}; {method}" if source else method,
        unresolved=unresolved,
    )


@dataclass(frozen=True)
class _Weight:
    """A weight that is read (dequantised, gathered) when it is needed, and not before."""

    shape: tuple[int, int]
    device: torch.device
    read: Callable[[Device], torch.Tensor]


def _weights(
    model: torch.nn.Module | State | Sequence[TargetLayer], targets: str | Sequence[str]
) -> Iterator[tuple[str, _Weight]]:
    if isinstance(model, torch.nn.Module):
        model = find_layers(model, targets)
    if not isinstance(model, Mapping):
        for layer in model if isinstance(model, Iterable) else [model]:
            if not isinstance(layer, TargetLayer):
                raise ValueError(
                    "model: expected a torch.nn.Module, a state dict or layers from find_layers, "
                    f"got {model!r}"
                )
            where = getattr(layer.module, layer.parameter).device
            yield layer.name, _Weight(layer.shape, where, layer.matrix)
        return
    check_no_adapters(model)
    wanted = (lambda name: True) if is_all_linear(targets) else name_matcher(targets, "targets")
    for key, tensor in tensors_in(model).items():
        name = key.removesuffix(".weight")
        if name != key and tensor.ndim == 2 and tensor.numel() and wanted(name):
            shape = int(tensor.shape[0]), int(tensor.shape[1])
            yield name, _Weight(shape, tensor.device, _reader(name, tensor))


def _reader(name: str, tensor: torch.Tensor) -> Callable[[Device], torch.Tensor]:
    return lambda device: floating_point(name, tensor.detach()).to(device or tensor.device)


def _decomposed(name: str, weight: _Weight, device: Device, rank: int, seed: int) -> Decomposition:
    matrix = weight.read(device)
    try:
        return decompose(matrix, rank, seed=seed)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _chunks(weights: Mapping[str, _Weight], chunk_bytes: int) -> Iterator[list[str]]:
    """Yield names of equal shape and device, together at most `chunk_bytes` in float64."""
    alike: dict[tuple[tuple[int, int], torch.device], list[str]] = defaultdict(list)
    for name, weight in weights.items():
        alike[weight.shape, weight.device].append(name)
    for ((d, k), _), names in alike.items():
        at_once = max(1, chunk_bytes // max(1, 8 * d * k))
        for start in range(0, len(names), at_once):
            yield names[start : start + at_once]


def _as_float64(name: str, weight: _Weight, device: Device) -> torch.Tensor:
    matrix = weight.read(device).to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"layer {name!r}: expected finite weights, got NaN or infinity")
    return matrix
