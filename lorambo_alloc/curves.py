"""Spectra and gain curves: what each layer gains from each further rank."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, cast

import numpy as np

from lorambo_alloc import storage
from lorambo_alloc.arrays import FlatLayers, first_ascent, flatten
from lorambo_alloc.objectives import FloatArray, IntArray, real_number

_MAX_SIDE = 1 << 52  # so that d + k stays exact in a double


class _Layers(Mapping[str, FloatArray]):
    """Layer name to a 1-D array, over one flat array."""

    _layers: FlatLayers
    _index: dict[str, int]

    def __getitem__(self, name: str) -> FloatArray:
        row = self._layers.row(self._index[name])
        row.flags.writeable = False
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers.names)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def layers(self) -> FlatLayers:
        """All arrays end to end; read, do not write."""
        return self._layers


class Spectra(_Layers):
    """Singular values by layer, with where they came from.

    Args:
        values: name to a 1-D array of singular values, descending, finite, not negative; or a
            sequence of such, or a 2-D array, whose layers are named "0", "1", ...
        shapes: name to (d, k), the shape of the layer's matrix. With it `allocate` charges
            d + k parameters a rank.
        source: how the values were made, in words.
        unresolved: name to the squared Frobenius energy that the values leave out (a truncated
            or sketched spectrum); 0 where nothing is.

    Raises:
        ValueError: a layer's values are not a spectrum, a shape cannot have as many singular
            values as given, or a name is unknown or missing; the message names the layer.

    Example:
        >>> spectra = Spectra({"q": [3.0, 1.0], "v": [2.0]}, shapes={"q": (8, 8), "v": (8, 4)})
        >>> spectra["q"], spectra.shapes["v"]
        (array([3., 1.]), (8, 4))
    """

    def __init__(
        self,
        values: object,
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        source: str = "",
        unresolved: Mapping[str, float] | None = None,
    ) -> None:
        self._layers = flatten(values, "spectrum", "spectra")
        check_spectra(self._layers)
        self._index = {name: i for i, name in enumerate(self._layers.names)}
        self.shapes = None if shapes is None else check_shapes(shapes, self._layers)
        self.source = source
        self.unresolved = dict.fromkeys(self, 0.0)
        if not isinstance(unresolved, (Mapping, NoneType)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"unresolved: expected a mapping of layer name to energy, got {unresolved!r}"
            )
        for name, energy in (unresolved or {}).items():
            if name not in self._index:
                raise ValueError(f"unresolved: layer {name!r} is not among the spectra")
            if not 0 <= real_number(energy) < math.inf:
                raise ValueError(
                    f"unresolved: layer {name!r}: expected a finite energy >= 0, got {energy!r}"
                )
            self.unresolved[name] = float(energy)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one npz file (version 1, no pickle), whole or not at all."""
        header = {
            "names": self._layers.names,
            "source": self.source,
            "shapes": None if self.shapes is None else [self.shapes[name] for name in self],
            "unresolved": [self.unresolved[name] for name in self],
        }
        arrays = {"values": self._layers.flat, "offsets": self._layers.offsets}
        storage.write(path, "spectra", 1, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectra:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a spectra file, is newer than this library, or is damaged.
        """
        header, arrays = storage.read(path, "spectra", 1)
        try:
            names = cast(list[str], header["names"])
            if len(set(names)) < len(names):
                raise ValueError("a layer name appears twice")
            rows = np.split(arrays["values"], arrays["offsets"][1:-1]) if names else []
            values = dict(zip(names, rows, strict=True))
            shapes: list[tuple[int, int]] | None = header["shapes"]
            named = None if shapes is None else dict(zip(names, shapes, strict=True))
            unresolved = dict(zip(names, header["unresolved"], strict=True))
            return cls(values, shapes=named, source=header["source"], unresolved=unresolved)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: the file is damaged: {error}") from error

    def __repr__(self) -> str:
        made = f", source={self.source!r}" if self.source else ""
        return f"Spectra({len(self)} layers, {len(self._layers.flat)} singular values{made})"


class GainCurves(_Layers):
    """A caller's own gain curves: F_i(r), the total gain of layer i at rank r.

    Curves need be neither concave nor monotone. A rank that lowers the gain is taken only where
    a limit forces it.

    Args:
        curves: name to a 1-D array F(0), F(1), ..., F(R) with F(0) = 0, finite; or a sequence of
            such, or a 2-D array. `from_increments` takes F(1) - F(0), F(2) - F(1), ... instead.

    Raises:
        ValueError: a curve is not finite or does not start at 0; the message names the layer.

    Example:
        >>> curves = GainCurves({"q": [0.0, 5.0, 6.0], "v": [0.0, 1.0]})
        >>> GainCurves.from_increments({"q": [5.0, 1.0]})["q"]
        array([0., 5., 6.])
    """

    def __init__(self, curves: object) -> None:
        self._layers = flatten(curves, "gain curve", "gain curves")
        self._index = {name: i for i, name in enumerate(self._layers.names)}
        check_finite(self._layers, "gain curve")
        starts = self._layers.flat[self._layers.offsets[:-1]]
        for i in np.flatnonzero(starts != 0)[:1].tolist():
            raise ValueError(
                f"layer {self._layers.names[i]!r}: expected a gain curve that starts with "
                f"F(0) = 0, got F(0) = {starts[i]!r}; for gains of single ranks use "
                "GainCurves.from_increments"
            )
        self._increments = _exact_increments(self._layers)

    @classmethod
    def from_increments(cls, increments: object) -> GainCurves:
        """Curves from the gain of each single rank; the curve is their exact sum.

        Args:
            increments: name to a 1-D array of the gains of ranks 1, 2, ..., R; or a sequence of
                such, or a 2-D array.
        """
        gains = flatten(increments, "sequence of gains", "gains")
        check_finite(gains, "sequence of gains")
        curves = cls.__new__(cls)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            rows = [np.concatenate([[0.0], np.cumsum(gains.row(i))]) for i in range(len(gains))]
        curves._layers = flatten(
            dict(zip(gains.names, rows, strict=True)), "gain curve", "gain curves"
        )
        check_finite(curves._layers, "gain curve")
        curves._index = {name: i for i, name in enumerate(gains.names)}
        curves._increments = gains
        return curves

    @property
    def increments(self) -> FlatLayers | None:
        """The gains of single ranks, where doubles hold them exactly; else None."""
        return self._increments

    def __repr__(self) -> str:
        return f"GainCurves({len(self)} layers)"


def check_spectra(layers: FlatLayers) -> None:
    """Raise ValueError unless every layer is finite, not negative and descending."""
    fault = first_ascent(layers)
    first, last = layers.flat[layers.offsets[:-1]], layers.flat[layers.offsets[1:] - 1]
    if fault is None and np.all(np.isfinite(first)) and np.all(last >= 0):
        return
    check_finite(layers, "spectrum")
    for i in np.flatnonzero(np.minimum.reduceat(layers.flat, layers.offsets[:-1]) < 0).tolist():
        row = layers.row(i)
        j = int(np.argmax(row < 0))
        raise ValueError(
            f"layer {layers.names[i]!r}: expected singular values >= 0, got {row[j]} at index {j}"
        )
    assert fault is not None
    i = int(np.searchsorted(layers.offsets, fault, side="right")) - 1
    j = fault - int(layers.offsets[i])
    row = layers.row(i)
    raise ValueError(
        f"layer {layers.names[i]!r}: expected singular values in descending order, got {row[j]} "
        f"after {row[j - 1]} at index {j}"
    )


def check_finite(layers: FlatLayers, what: str) -> None:
    """Raise ValueError naming the first layer with a NaN or an infinity."""
    if np.all(np.isfinite(layers.flat)):
        return
    position = int(np.argmin(np.isfinite(layers.flat)))
    i = int(np.searchsorted(layers.offsets, position, side="right")) - 1
    raise ValueError(
        f"layer {layers.names[i]!r}: expected a {what} of finite numbers, got "
        f"{layers.flat[position]} at index {position - int(layers.offsets[i])}"
    )


def check_shapes(shapes: Mapping[str, Any], layers: FlatLayers) -> dict[str, tuple[int, int]]:
    """Shapes by layer, in layer order, each able to have as many singular values as given.

    Raises:
        ValueError: a name is missing or unknown, or a shape is not two whole numbers >= 1, or
            is too small for the layer's spectrum.
    """
    check_names(shapes, layers.names, "shapes")
    ordered = [shapes[name] for name in layers.names]
    lengths: list[int] = layers.lengths.tolist()
    result: dict[str, tuple[int, int]] = {}
    for name, shape, length in zip(layers.names, ordered, lengths, strict=True):
        try:
            d, k = shape
        except (TypeError, ValueError):
            d, k = 0, 0
        if not (type(d) is type(k) is int and 1 <= d <= _MAX_SIDE and 1 <= k <= _MAX_SIDE):
            d, k = _side(d), _side(k)
            if not d or not k:
                raise ValueError(
                    f"shapes: layer {name!r}: expected (d, k), two whole numbers from 1 to 2^52, "
                    f"got {shape!r}"
                )
        if length > d or length > k:
            raise ValueError(
                f"shapes: layer {name!r}: a {d} x {k} matrix has at most {min(d, k)} singular "
                f"values, got {length}"
            )
        result[name] = (d, k)
    return result


def _side(value: object) -> int:
    """A side of a matrix as an int, or 0 if it is none."""
    number = real_number(value)
    return int(number) if number.is_integer() and 1 <= number <= _MAX_SIDE else 0


def check_names(given: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    """Raise ValueError unless the mapping has exactly these layer names."""
    if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{what}: expected a mapping of layer name to value, got {given!r}")
    if len(given) == len(names) and all(name in given for name in names):
        return
    known = set(names)
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: layer {name!r} is not among the spectra")
    for name in names:
        if name not in given:
            raise ValueError(f"{what}: layer {name!r} is missing")


def _exact_increments(curves: FlatLayers) -> FlatLayers | None:
    """F(r) - F(r - 1) where every difference is a double, else None (Knuth's TwoSum error).

    None too where a layer has no ranks at all: every layer of increments has at least one.
    """
    offsets: IntArray = curves.offsets
    if np.any(curves.lengths == 1):
        return None
    flat = curves.flat.astype(np.float64, copy=False)
    inner = np.ones(len(flat), dtype=bool)
    inner[offsets[:-1]] = False
    after, before = flat[inner], flat[np.flatnonzero(inner) - 1]
    with np.errstate(over="ignore", invalid="ignore"):
        difference = after - before
        virtual = difference - after
        error = (after - (difference - virtual)) - (before + virtual)
    if len(difference) and not (np.all(np.isfinite(difference)) and np.all(error == 0)):
        return None
    return FlatLayers(curves.names, difference, offsets - np.arange(len(offsets)))
