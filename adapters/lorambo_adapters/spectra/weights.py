"""Spectra of the weights themselves: the singular values of a model's linear layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from lorambo_alloc import Spectra

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.weights needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

State = Mapping[str, torch.Tensor]


def weight_spectra(
    model: torch.nn.Module | State,
    *,
    layers: str | None = None,
    source: str | None = None,
    device: torch.device | str | None = None,
    chunk_bytes: int = 1 << 28,
) -> Spectra:
    """Compute the singular values of a model's linear weights, in float64.

    A weight W of shape (d, k) = (out_features, in_features) has min(d, k) singular values, and a
    LoRA of rank r beside it has r (d + k) parameters. All values are computed, so the spectra
    leave no energy unresolved.

    Args:
        model: a module, whose `torch.nn.Linear` layers count; or a state dict, whose 2-D tensors
            named `*.weight` count. A state dict cannot tell a linear layer from an embedding
            table, so choose with `layers` where it holds both.
        layers: a regular expression that the whole name of a layer must match (the name of the
            module, without `.weight`); every layer by default.
        source: what to record as the spectra's origin, put before how they were computed.
        device: where to decompose; by default where each weight lies. It must know float64 (Apple's
            MPS does not: pass "cpu" there).
        chunk_bytes: float64 weights that are copied and decomposed together, at most; a single
            larger matrix still goes through. Matrices of equal shape share a batch.

    Returns:
        Spectra with the shapes, in the order of the model.

    Raises:
        ValueError: no layer counts, or a weight is not an array of finite floating-point numbers
            (quantised, or on the meta device); the message names the layer.

    Example:
        >>> import torch
        >>> from lorambo_adapters.spectra.weights import weight_spectra
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> spectra = weight_spectra(model)
        >>> spectra.shapes, spectra["0"].round(6)
        ({'0': (2, 4)}, array([2.828427, 0.      ]))
    """
    weights = dict(_linear_weights(model))
    if layers is not None:
        pattern = re.compile(layers)
        weights = {name: w for name, w in weights.items() if pattern.fullmatch(name)}
    if not weights:
        chosen = "" if layers is None else f" whose name matches {layers!r}"
        raise ValueError(f"expected at least one linear layer with a 2-D weight{chosen}, got none")

    values: dict[str, np.ndarray] = {}
    for names in _chunks(weights, chunk_bytes):
        stack = torch.stack([_as_float64(name, weights[name], device) for name in names])
        spectra = torch.linalg.svdvals(stack).cpu().numpy()
        values.update(zip(names, spectra, strict=True))
    method = f"singular values of {len(weights)} weights, torch.linalg.svdvals in float64"
    return Spectra(
        {name: values[name] for name in weights},
        shapes={name: (int(w.shape[0]), int(w.shape[1])) for name, w in weights.items()},
        source=f"{source}; {method}" if source else method,
    )


def _linear_weights(model: torch.nn.Module | State) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model, torch.nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield name, module.weight
        return
    for key, tensor in model.items():
        if key.endswith(".weight") and tensor.ndim == 2:
            yield key.removesuffix(".weight"), tensor


def _chunks(weights: State, chunk_bytes: int) -> Iterator[list[str]]:
    """Yield names of equal shape and device, together at most `chunk_bytes` in float64."""
    alike: dict[tuple[torch.Size, torch.device], list[str]] = defaultdict(list)
    for name, weight in weights.items():
        alike[weight.shape, weight.device].append(name)
    for (shape, _), names in alike.items():
        at_once = max(1, chunk_bytes // (8 * shape.numel()))
        for start in range(0, len(names), at_once):
            yield names[start : start + at_once]


def _as_float64(name: str, weight: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    if weight.is_meta or not weight.is_floating_point():
        what = "a weight without data (meta device)" if weight.is_meta else str(weight.dtype)
        raise ValueError(f"layer {name!r}: expected a floating-point weight, got {what}")
    matrix = weight.detach().to(device=device or weight.device, dtype=torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"layer {name!r}: expected finite weights, got NaN or infinity")
    return matrix
