"""The header of a safetensors file: names, shapes and metadata, without reading the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NUMBERS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"
}  # fmt: skip
_LONGEST = 100_000_000  # bytes of a header, as in safetensors


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        path: the file.
        shapes: by the tensor's key.
        metadata: strings by name.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    _places: Mapping[str, tuple[str, int, int]]

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read the header.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file.

        References:
            safetensors, "Format": 8 bytes with the length N of the header, N bytes of JSON, data.
        """
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LONGEST else b""
        try:
            entries: dict[str, Any] = json.loads(text)
            metadata = entries.pop("__metadata__", None) or {}
            shapes = {key: tuple(map(int, entry["shape"])) for key, entry in entries.items()}
            places = {
                key: (str(entry["dtype"]), 8 + length + entry["data_offsets"][0], math.prod(shape))
                for (key, entry), shape in zip(entries.items(), shapes.values(), strict=True)
            }
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}: expected a safetensors file, got something else") from error
        return cls(path, shapes, metadata, places)

    def number(self, key: str) -> float:
        """The one number of a tensor.

        Raises:
            ValueError: it has more numbers, is of another type, or not finite and above 0.
        """
        dtype, start, count = self._places[key]
        size = 2 if dtype == "BF16" else np.dtype(_NUMBERS.get(dtype, "V0")).itemsize
        value = math.nan
        if count == 1 and size:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(size)
            if len(data) == size:
                # A bfloat16 is the upper half of a float32.
                padded = b"\0\0" + data if dtype == "BF16" else data
                value = float(np.frombuffer(padded, _NUMBERS.get(dtype, "<f4"))[0])
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key!r}: expected one number above 0, got {dtype} {value}")
        return value
