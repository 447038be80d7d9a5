"""Batches of which only the first samples are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.fewer_samples needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing


def half_of(batch: Any) -> Any:
    """The first half of a batch's samples, rounded up and at least 2; else the batch itself.

    It is taken whole where it is not sure what its samples are: unless it is a mapping of tensors
    of one first dimension (or of 1, which is broadcast), numbers, texts and None. Patches of
    images, class weights and caches are not cut, nor is what goes with them.
    """
    if not isinstance(batch, Mapping):
        return batch
    lengths: set[int] = set()
    for value in batch.values():
        if _is_rows(value):
            lengths.add(len(value))
        elif not (value is None or isinstance(value, (torch.Tensor, bool, int, float, str))):
            return batch
    lengths.discard(1)
    if len(lengths) != 1:
        return batch
    (samples,) = lengths
    half = max(2, -(-samples // 2))
    return batch if half >= samples else _cut(batch, samples, half)


def first_samples(batch: Any, count: int) -> dict[str, Any]:
    """The first samples of a batch: every tensor whose first dimension is theirs is cut.

    Raises:
        ValueError: it is no mapping with a tensor.
    """
    tensors = [v for v in batch.values() if _is_rows(v)] if hasattr(batch, "values") else []
    if not tensors:
        raise ValueError(
            "samples_per_batch: expected batches that are mappings with tensors, got "
            f"{type(batch).__name__}"
        )
    labels = batch.get("labels")
    return _cut(batch, len(labels if _is_rows(labels) else tensors[0]), count)


def _cut(batch: Mapping[str, Any], samples: int, count: int) -> dict[str, Any]:
    return {
        key: value[:count] if _is_rows(value) and len(value) == samples else value
        for key, value in batch.items()
    }


def _is_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0
