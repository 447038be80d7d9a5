"""Curvature in a file: Kronecker factors take long to estimate, and serve many allocations.

The format is safetensors (a JSON header, then each tensor's bytes), so other tools can read the
tensors. It is written and read here a tensor at a time, since the factors may take half the memory
and a library that wants all of them contiguous, or as bytes, would take the other half.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Literal, NamedTuple

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.curvature_files needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.whitening import Factors, SymmetricFactor
from lorambo_alloc import storage

_KIND, _VERSION = "curvature", 1
_KEY = "lorambo_alloc"  # of the metadata
_DTYPES = {"float64": ("F64", torch.float64), "float32": ("F32", torch.float32)}
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


class How(NamedTuple):
    """How factors were made: the attributes of a `Curvature`."""

    kind: str
    terms: int
    damping: float
    source: str


def save_curvature(
    factors: Mapping[str, Factors],
    how: How,
    path: str | os.PathLike[str],
    *,
    dtype: Literal["float64", "float32"] = "float64",
) -> None:
    """Write factors to a safetensors file, whole or not at all.

    A factor or eigenbasis that layers share (q, k and v have one A) is stored once, and is shared
    again once loaded. The file takes 8 (k^2 + k + d^2 + d) bytes a layer with "float64", 8 (k + d)
    where both factors are diagonal. Memory: one copy of the largest tensor, and none for factors in
    float64 on the CPU.

    Args:
        factors: by layer.
        how: they were made.
        path: an older file there is replaced at the end.
        dtype: of the file. With "float64" everything is equal to the bit once loaded. "float32"
            takes half the space; factors are float64 in memory again, and whitened gradients differ
            by about 1e-7 of |B^-1/2| |G| |A^-1/2| (spectral norms).

    Raises:
        ValueError: dtype is another one.
        OSError: the file cannot be written.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected 'float64' or 'float32', got {dtype!r}")
    code, wanted = _DTYPES[dtype]
    sides: dict[int, int] = {}
    tensors: dict[int, int] = {}
    described: list[dict[str, Any]] = []
    stored: list[torch.Tensor] = []

    def tensor(given: torch.Tensor) -> int:
        if id(given) not in tensors:
            tensors[id(given)] = len(stored)
            stored.append(given)
        return tensors[id(given)]

    def side(factor: SymmetricFactor | None) -> int | None:
        if factor is None:
            return None
        if id(factor) not in sides:
            sides[id(factor)] = len(described)
            described.append({
                "values": tensor(factor.values),
                "vectors": None if factor.vectors is None else tensor(factor.vectors),
                "damping": factor.damping,
                "rounding": factor.rounding,
            })  # fmt: skip
        return sides[id(factor)]

    layers = [
        [name, list(each.shape), side(each.right), side(each.left)]
        for name, each in factors.items()
    ]
    header: dict[str, Any] = {}
    place = 0
    for i, each in enumerate(stored):
        size = each.numel() * wanted.itemsize
        header[f"tensor.{i}"] = {
            "dtype": code, "shape": list(each.shape), "data_offsets": [place, place + size],
        }  # fmt: skip
        place += size
    ours = {
        "kind": _KIND, "version": _VERSION, "curvature": how.kind, "terms": how.terms,
        "damping": how.damping, "source": how.source, "layers": layers,
        "factors": described, "transposed": [_transposed(each) for each in stored],
    }  # fmt: skip
    header["__metadata__"] = {_KEY: json.dumps(ours)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (
        storage.replacing(path) as file,
        progress_bar("saving", float(place), shown=None if place > 1 << 28 else False) as advance,
    ):
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for each in stored:
            # eigh's eigenvectors are stored by columns: as they are, and no copy is made.
            rows = each.T if _transposed(each) else each
            file.write(_bytes(rows.detach().cpu().to(wanted).contiguous()))
            advance(float(each.numel() * wanted.itemsize), "")


def load_curvature(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> tuple[dict[str, Factors], How]:
    """Read what `save_curvature` wrote: in float64, with what was shared shared again.

    Memory beyond the result: the largest tensor once more, while its numbers are checked.

    Args:
        path: the file.
        device: where the factors shall lie.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of these, of a newer version, cut short or damaged. There is
            no checksum; of the numbers it is checked that they are finite.
    """
    where = os.fspath(path)
    with open(path, "rb") as file:
        header, ours = _headers(file, where)
        try:
            infos = [header[f"tensor.{i}"] for i in range(len(ours["transposed"]))]
            kinds = {code: dtype for code, dtype in _DTYPES.values()}
            plan = [(kinds[info["dtype"]], [int(n) for n in info["shape"]]) for info in infos]
            ends = [0, *(int(info["data_offsets"][1]) for info in infos)]
            sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in plan]
            negative = any(n < 0 for _, shape in plan for n in shape)
            if negative or sizes != [b - a for a, b in itertools.pairwise(ends)]:
                raise ValueError("the tensors' places do not fit their shapes")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: the file is damaged: {error!r}") from error
        start = file.tell()
        got = os.fstat(file.fileno()).st_size - start
        if got != ends[-1]:
            raise ValueError(
                f"{where}: the file is damaged: expected {ends[-1]} bytes of tensors, got {got}"
            )
        hidden = None if got > 1 << 28 else False
        with progress_bar("loading", float(got), shown=hidden) as advance:
            tensors: list[torch.Tensor] = []
            for (dtype, shape), transposed in zip(plan, ours["transposed"], strict=True):
                found = _read(file, dtype, shape, where).to(device)
                if not bool(torch.isfinite(found).all()):
                    raise ValueError(f"{where}: the file is damaged: got NaN or infinity")
                tensors.append(found.T if transposed else found)
                advance(float(found.numel() * dtype.itemsize), "")
    try:
        factors = dict(_factors(ours, tensors))
        how = How(
            str(ours["curvature"]), int(ours["terms"]), float(ours["damping"]), str(ours["source"])
        )
        return factors, how
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{where}: the file is damaged: {error!r}") from error


def _headers(file: BinaryIO, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The safetensors header, and ours that is in it."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 2 <= length <= min(_LONGEST_HEADER, os.fstat(file.fileno()).st_size):
            raise ValueError("no header")
        header = json.loads(file.read(length))
        ours = json.loads(header["__metadata__"][_KEY])
        kind, version = ours["kind"], int(ours["version"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected a curvature file of lorambo-alloc, got something else, or a "
            "file cut short in its header"
        ) from error
    if kind != _KIND:
        raise ValueError(f"{where}: expected a file of kind {_KIND!r}, got {kind!r}")
    if version > _VERSION:
        raise ValueError(
            f"{where}: expected {_KIND} version {_VERSION} or older, got {version}: "
            "a newer lorambo-alloc wrote it"
        )
    return header, ours


def _factors(ours: dict[str, Any], tensors: list[torch.Tensor]) -> Iterator[tuple[str, Factors]]:
    sides: list[SymmetricFactor] = []
    for entry in ours["factors"]:
        values = tensors[entry["values"]]
        vectors = None if entry["vectors"] is None else tensors[entry["vectors"]]
        n = len(values)
        if values.ndim != 1 or (vectors is not None and tuple(vectors.shape) != (n, n)):
            raise ValueError(f"eigenvalues and eigenvectors of unlike sizes, {n} and others")
        factor = SymmetricFactor(values, vectors, 0.0, float(entry["rounding"]))
        # As it was, not computed anew from a mean that may round in another way here.
        factor.damping = float(entry["damping"])
        sides.append(factor)
    for name, (d, k), right, left in ours["layers"]:
        pair = [None if i is None else sides[i] for i in (right, left)]
        for factor, n in zip(pair, (k, d), strict=True):
            if factor is not None and len(factor.values) != n:
                raise ValueError(f"layer {name!r}: a factor of {len(factor.values)}, not {n}")
        yield str(name), Factors(str(name), (int(d), int(k)), pair[0], pair[1])


def _transposed(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory (little-endian, as safetensors has it)."""
    if sys.byteorder != "little":
        raise ValueError("expected a little-endian machine")
    array: Any = tensor.reshape(-1).numpy()  # numpy's stubs know no buffers before Python 3.12
    return memoryview(array).cast("B")


def _read(file: BinaryIO, dtype: torch.dtype, shape: list[int], where: str) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    view = _bytes(tensor)
    done = 0
    while done < len(view):
        # Every binary file that `open` returns has it; the type BinaryIO does not say so.
        count = file.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise ValueError(f"{where}: the file is damaged: it ends too early")
        done += count
    return tensor.double()
