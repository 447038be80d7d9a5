"""The gain of each single rank, computed where it is asked for.

A spectrum of 8e7 values is never squared as a whole: solvers look at a few gains per layer.
"""

from __future__ import annotations

import numpy as np

from lorambo_alloc.arrays import FlatLayers, chunks
from lorambo_alloc.objectives import FloatArray, IntArray, Objective, schatten

# Below this the square of a singular value has lost bits, or all of them.
_SMALLEST_GAIN = 2.0**-960


class Gains:
    """Gains of single ranks: the double nearest to weight times objective(sigma).

    Args:
        layers: singular values, or gains themselves with the objective `nuclear`.
        objective: maps a value to its gain.
        weights: one factor a layer, or None.

    Raises:
        ValueError: a gain overflows, or a layer's whole spectrum underflows.
    """

    def __init__(
        self, layers: FlatLayers, objective: Objective, weights: FloatArray | None
    ) -> None:
        if not objective.monotone_in_floats:
            layers = _descending_gains(layers, objective)
            objective = schatten(1)
        self.layers = layers
        self.weights = weights
        self._objective = objective

    def at(self, rows: IntArray, ranks: IntArray) -> FloatArray:
        """The gain of rank `ranks[n]` (1 is the first) of layer `rows[n]`."""
        values = self.layers.flat[self.layers.offsets[rows] + (ranks - 1)]
        gains = self._objective.gains(values.astype(np.float64, copy=False))
        return gains if self.weights is None else gains * self.weights[rows]

    def row(self, i: int) -> FloatArray:
        """All gains of layer i."""
        gains = self._objective.gains(self.layers.row(i))
        return gains if self.weights is None else gains * self.weights[i]

    def selected(self, lower: IntArray, upper: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
        """Layer, rank and gain of every rank in (lower[i], upper[i]], layer by layer."""
        return self._selected(np.arange(len(lower), dtype=np.int64), lower, upper)

    def _selected(
        self, layers: IntArray, lower: IntArray, upper: IntArray
    ) -> tuple[IntArray, IntArray, FloatArray]:
        counts = np.maximum(upper - lower, 0)
        rows = np.repeat(layers, counts)
        firsts = np.repeat(lower + 1 - (np.cumsum(counts) - counts), counts)
        ranks = np.arange(len(rows), dtype=np.int64) + firsts
        return rows, ranks, self.at(rows, ranks)

    def positive_sum(self, upper: IntArray) -> float:
        """The sum of all positive gains of ranks 1 .. upper[i], to rounding."""
        offsets, flat = self.layers.offsets, self.layers.flat
        whole = bool(np.all(upper == self.layers.lengths))
        total = 0.0
        # Whole layers a chunk, so that no full-size temporary appears.
        step = max(1, (1 << 16) // max(int(np.max(self.layers.lengths, initial=1)), 1))
        for part in chunks(len(upper), step):
            if whole and self.weights is None:
                values = flat[offsets[part.start] : offsets[part.stop]]
                if self._objective == schatten(2):
                    total += float(np.vdot(values, values))
                    continue
                gains = self._objective.gains(values.astype(np.float64, copy=False))
            else:
                rows = np.arange(part.start, part.stop)
                gains = self._selected(rows, 0 * upper[part], upper[part])[2]
            total += float(np.maximum(gains, 0.0).sum())
        return total

    def check_range(self, first_values: FloatArray) -> None:
        """Raise ValueError if a gain overflows, or if all gains of a problem underflow.

        Args:
            first_values: the largest value of each layer.
        """
        if not len(first_values):
            return
        with np.errstate(over="ignore", under="ignore"):
            first = self._objective.gains(first_values)
            if self.weights is not None:
                first = first * self.weights
            total = float(np.dot(first, self.layers.lengths))
        for i in np.flatnonzero(~np.isfinite(first))[:1].tolist():
            raise ValueError(
                f"layer {self.layers.names[i]!r}: the gain of its largest value "
                f"{first_values[i]} overflows; scale the spectra down"
            )
        if not np.isfinite(total):
            raise ValueError("the sum of all gains may overflow; scale the spectra down")
        i = int(np.argmax(first_values))
        if first_values[i] > 0 and np.max(first) < _SMALLEST_GAIN and (
            self.weights is None or np.any(self.weights > 0)
        ):
            raise ValueError(
                f"layer {self.layers.names[i]!r}: the gain of its largest value "
                f"{first_values[i]} underflows; scale the spectra up"
            )


def _descending_gains(layers: FlatLayers, objective: Objective) -> FlatLayers:
    """Gains of a function that rounding may make rise by an ulp: computed, and made to descend."""
    with np.errstate(over="ignore", under="ignore"):
        gains = objective.gains(layers.flat.astype(np.float64, copy=False))
    for start, stop in zip(layers.offsets[:-1], layers.offsets[1:], strict=True):
        row = gains[start:stop]
        np.minimum.accumulate(row, out=row)
    return FlatLayers(layers.names, gains, layers.offsets)
