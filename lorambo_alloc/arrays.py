"""Arrays from outside: anything with `__array__` or DLPack, checked, without its framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lorambo_alloc.objectives import FloatArray, IntArray

# DLPack device types whose memory the host may read: kDLCPU, kDLCUDAHost, kDLROCMHost.
_HOST_DEVICES = (1, 3, 11)


class FlatLayers:
    """The arrays of all layers end to end: `flat[offsets[i]:offsets[i + 1]]` is layer i.

    `flat` is float64 or float32. A C-contiguous two-dimensional array is viewed, not copied.
    """

    def __init__(self, names: tuple[str, ...], flat: npt.NDArray[Any], offsets: IntArray) -> None:
        self.names = names
        self.flat = flat
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> IntArray:
        """The number of entries of each layer."""
        return np.diff(self.offsets)

    def row(self, i: int) -> FloatArray:
        """Layer i, as float64 (a view where it is stored so)."""
        return self.flat[self.offsets[i] : self.offsets[i + 1]].astype(np.float64, copy=False)


def flatten(data: object, what: str, plural: str) -> FlatLayers:
    """Lay a mapping, a sequence of arrays or a 2-D array end to end.

    Args:
        data: name to 1-D array; or a sequence of 1-D arrays, or one 2-D array, whose layers are
            named "0", "1", ...
        what: what one layer's numbers are, for messages ("spectrum", "gain curve").
        plural: what all layers' are.

    Raises:
        ValueError: a layer is not a non-empty 1-D array of real numbers, or is not on the host.
    """
    if isinstance(data, Mapping):
        mapping = cast(Mapping[object, object], data)
        for name in mapping:
            if not isinstance(name, str):
                raise ValueError(f"layer names: expected strings, got {name!r}")
        names = tuple(cast(Mapping[str, object], mapping))
        arrays = mapping.values()
        rows = [_vector(array, name, what) for name, array in zip(names, arrays, strict=True)]
    elif isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        sequence = cast(Sequence[object], data)
        names = tuple(map(str, range(len(sequence))))
        rows = [_vector(array, name, what) for name, array in zip(names, sequence, strict=True)]
    else:
        array = _real(data, f"the {plural}", "a mapping, a sequence of arrays or a 2-D array")
        if array.ndim != 2:
            raise ValueError(
                f"the {plural}: expected a mapping of layer name to 1-D array, a sequence of 1-D "
                f"arrays or one 2-D array, got an array of shape {array.shape}"
            )
        if array.shape[0] and not array.shape[1]:
            raise ValueError(f"layer '0': expected a non-empty {what}, got one of length 0")
        names = tuple(map(str, range(array.shape[0])))
        offsets = np.arange(array.shape[0] + 1, dtype=np.int64) * array.shape[1]
        return FlatLayers(names, np.ascontiguousarray(array).reshape(-1), offsets)
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate(rows) if rows else np.zeros(0)
    return FlatLayers(names, flat, offsets)


def chunks(size: int, step: int = 1 << 16) -> Iterator[slice]:
    """Slices that cover range(size) in pieces that fit a cache."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def first_ascent(layers: FlatLayers) -> int | None:
    """Position in `flat` of the first entry that is not <= the one before it in its layer.

    NaN counts as an ascent. One pass, no full-size temporary.
    """
    flat, inner = layers.flat, layers.offsets[1:-1]
    breaks = 0
    for part in chunks(max(len(flat) - 1, 0)):
        ordered = flat[part.start + 1 : part.stop + 1] <= flat[part]
        breaks += len(ordered) - int(np.count_nonzero(ordered))
    # Layers meet at `inner`, where an ascent is no fault.
    if breaks == int(np.count_nonzero(~(flat[inner] <= flat[inner - 1]))):
        return None
    meets = np.zeros(len(flat) + 1, dtype=bool)
    meets[layers.offsets] = True
    faults = ~(flat[1:] <= flat[:-1]) & ~meets[1:-1]
    return int(np.argmax(faults)) + 1


def _vector(array: object, name: str, what: str) -> npt.NDArray[Any]:
    if not (type(array) is np.ndarray and array.ndim == 1 and array.dtype == np.float64):
        array = _real(array, f"layer {name!r}", f"a 1-D {what}")
        if array.ndim != 1:
            raise ValueError(
                f"layer {name!r}: expected a 1-D {what}, got an array of shape {array.shape}"
            )
    if not len(array):
        raise ValueError(f"layer {name!r}: expected a non-empty {what}, got one of length 0")
    return array


def _real(data: Any, where: str, expected: str) -> npt.NDArray[Any]:
    """As an array of float64 or float32, or a ValueError that names the place."""
    device = getattr(data, "__dlpack_device__", None)
    if device is not None and type(data) is not np.ndarray:
        try:
            kind = int(device()[0])
        except Exception as error:  # a device that DLPack does not know, such as torch's "meta"
            raise ValueError(f"{where}: expected {expected} in host memory: {error}") from error
        if kind not in _HOST_DEVICES:
            raise ValueError(
                f"{where}: expected {expected} in host memory, got one on a device (DLPack device "
                f"type {kind}); copy it to the host first, for instance with .cpu()"
            )
    only_dlpack = hasattr(data, "__dlpack__") and not hasattr(data, "__array__")
    array: npt.NDArray[Any]
    try:
        array = np.from_dlpack(data) if only_dlpack else np.asarray(data)
    except Exception as error:
        kind_of = type(data).__name__
        raise ValueError(f"{where}: expected {expected}, got {kind_of}: {error}") from error
    if array.dtype.kind == "f" and array.dtype.itemsize in (4, 8):
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind in "iu" or array.dtype == np.float16:
        return array.astype(np.float64)
    raise ValueError(f"{where}: expected {expected} of real numbers, got dtype {array.dtype}")
