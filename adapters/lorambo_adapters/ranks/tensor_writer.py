"""A safetensors file written one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.tensor_writer needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.tensor_files import TensorInfo
from lorambo_alloc.storage import replacing

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


def planned_as(info: TensorInfo) -> Planned:
    """A plan to write a tensor as it is stored elsewhere.

    Raises:
        ValueError: its type cannot be stored.
    """
    names = {code: dtype for dtype, code in _CODES.items()}
    dtype = names.get(info.dtype, getattr(torch, info.dtype, None))
    if dtype not in _CODES:
        raise ValueError(f"expected a tensor of a type that can be stored, got {info.dtype}")
    return Planned(info.shape, dtype)


def writing_order(planned: Mapping[str, Planned]) -> list[str]:
    """The order in which `TensorWriter.add` wants the tensors.

    Larger types first, as safetensors' own writer has it, so that each tensor starts at a multiple
    of its type's size; among equals, as in the plan.
    """
    return sorted(planned, key=lambda key: -planned[key].dtype.itemsize)


class TensorWriter:
    """Writes the tensors of a plan, in `writing_order`; made by `tensor_writer`."""

    def __init__(
        self, file: BinaryIO, planned: Mapping[str, Planned], metadata: Mapping[str, str]
    ) -> None:
        self._file, self._planned = file, planned
        self._left = writing_order(planned)[::-1]
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for key in reversed(self._left):
            plan, start = planned[key], end
            if plan.dtype not in _CODES:
                raise ValueError(f"tensor {key!r}: type {plan.dtype} cannot be stored")
            end += plan.nbytes
            header[key] = {
                "dtype": _CODES[plan.dtype],
                "shape": list(plan.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: it is not the one whose turn it is, or not of the planned shape and type.
        """
        plan = self._planned[key]
        if not self._left or self._left[-1] != key:
            raise ValueError(f"expected tensor {self._left[-1:]}, got {key!r}")
        if (tuple(tensor.shape), tensor.dtype) != (plan.shape, plan.dtype):
            raise ValueError(
                f"tensor {key!r}: expected {plan.shape} of {plan.dtype}, got "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
        self._left.pop()
        if plan.nbytes:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._file.write(flat.numpy().data)

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            ValueError: a planned tensor has not been written.
        """
        if self._left:
            raise ValueError(f"expected {len(self._left)} more tensors, first {self._left[-1]!r}")


@contextmanager
def tensor_writer(
    path: str | os.PathLike[str], planned: Mapping[str, Planned], metadata: Mapping[str, str]
) -> Generator[TensorWriter]:
    """A safetensors file that takes the place of `path` once all planned tensors are written.

    Memory: one tensor.

    Args:
        path: of the file; an older one stays as it is until the end, and if an error comes first.
        planned: key to shape and type of every tensor.
        metadata: text by key, for the file's header.

    Raises:
        ValueError: a tensor is missing, or not as planned.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan = {"a": Planned((2,), torch.float32)}
        ...     with tensor_writer(f"{folder}/f.safetensors", plan, {}) as writer:
        ...         writer.add("a", torch.ones(2))
        ...     load_file(f"{folder}/f.safetensors")
        {'a': tensor([1., 1.])}
    """
    with replacing(path) as file:
        writer = TensorWriter(file, planned, metadata)
        yield writer
        writer.finish()
