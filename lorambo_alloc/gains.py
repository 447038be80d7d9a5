"""The gain of each single rank, computed where it is asked for.

A spectrum of 8e7 values is never squared as a whole: solvers look at a few gains per layer.
"""

from __future__ import annotations

import numpy as np

from lorambo_alloc.arrays import FlatLayers, chunks
from lorambo_alloc.objectives import FloatArray, IntArray, Objective, schatten

# Below this the square of a singular value has lost bits, or all of them. Above it there is no
# room left for products with costs and for sums of sums.
_SMALLEST_GAIN = 2.0**-960
GREATEST_SUM = 2.0**960


class Gains:
    """Gains of single ranks: the double nearest to weight times objective(sigma).

    Args:
        layers: singular values, or gains themselves with the objective `nuclear`.
        objective: maps a value to its gain.
        weights: one factor a layer, or None.
        sorted: whether the values of every layer descend.

    Raises:
        ValueError: a gain overflows, or all gains underflow.
    """

    def __init__(
        self,
        layers: FlatLayers,
        objective: Objective,
        weights: FloatArray | None,
        *,
        sorted: bool,
    ) -> None:
        values = layers
        if not objective.monotone_in_floats:
            layers = _descending_gains(layers, objective)
            objective = schatten(1)
        self.layers = layers
        self.weights = weights
        self.sorted = sorted
        self._objective = objective
        self._check_range(values)

    def at(self, rows: IntArray, ranks: IntArray) -> FloatArray:
        """The gain of rank `ranks[n]` (1 is the first) of layer `rows[n]`."""
        values = self.layers.flat[self.layers.offsets[rows] + (ranks - 1)]
        gains = self._objective.gains(values.astype(np.float64, copy=False))
        return gains if self.weights is None else gains * self.weights[rows]

    def row(self, i: int) -> FloatArray:
        """All gains of layer i."""
        gains = self._objective.gains(self.layers.row(i))
        return gains if self.weights is None else gains * self.weights[i]

    def selected(
        self, lower: IntArray, upper: IntArray, layers: IntArray | None = None
    ) -> tuple[IntArray, IntArray, FloatArray]:
        """Layer, rank and gain of every rank in (lower[n], upper[n]], layer by layer.

        Args:
            lower: one a layer.
            upper: one a layer.
            layers: which layers the limits are for; all in order by default.
        """
        if layers is None:
            layers = np.arange(len(lower), dtype=np.int64)
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
                values = values.astype(np.float64, copy=False)
                if self._objective == schatten(2):
                    total += float(np.vdot(values, values))
                    continue
                gains = self._objective.gains(values)
            else:
                rows = np.arange(part.start, part.stop, dtype=np.int64)
                gains = self.selected(0 * upper[part], upper[part], rows)[2]
            total += float(np.maximum(gains, 0.0).sum())
        return total

    def _check_range(self, values: FlatLayers) -> None:
        """Raise ValueError if a gain or a sum of gains overflows, or if all gains underflow.

        Args:
            values: the values the gains were made from, for the message.
        """
        if not len(values):
            return
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            largest = self._largest()
            total = float(np.sum(largest * self.layers.lengths))
        for i in np.flatnonzero(~np.isfinite(largest))[:1].tolist():
            raise ValueError(
                f"layer {values.names[i]!r}: a gain overflows (largest value "
                f"{np.max(np.abs(values.row(i)))}); scale down"
            )
        if total > GREATEST_SUM:
            i = int(np.argmax(largest))
            raise ValueError(
                f"layer {values.names[i]!r}: expected gains that sum to at most "
                f"{GREATEST_SUM:.0e}, got a gain of {largest[i]}; scale down"
            )
        first = np.abs(values.flat[values.offsets[:-1]].astype(np.float64))
        if self.weights is not None:
            first = np.where(self.weights > 0, first, 0.0)
        i = int(np.argmax(first))
        if first[i] > 0 and np.max(largest) < _SMALLEST_GAIN:
            raise ValueError(
                f"layer {values.names[i]!r}: the gain of {first[i]} underflows; scale up"
            )

    def _largest(self) -> FloatArray:
        """Per layer the largest magnitude of a gain."""
        if self.sorted:
            layers = np.arange(len(self.layers), dtype=np.int64)
            ends = self.at(layers, np.ones_like(layers)), self.at(layers, self.layers.lengths)
            return np.maximum(np.abs(ends[0]), np.abs(ends[1]))
        return np.array([float(np.max(np.abs(self.row(i)))) for i in range(len(self.layers))])


def _descending_gains(layers: FlatLayers, objective: Objective) -> FlatLayers:
    """Gains of a function that rounding may make rise by an ulp: computed, and made to descend."""
    with np.errstate(over="ignore", under="ignore"):
        gains = objective.gains(layers.flat.astype(np.float64, copy=False))
    for start, stop in zip(layers.offsets[:-1], layers.offsets[1:], strict=True):
        row = gains[start:stop]
        np.minimum.accumulate(row, out=row)
    return FlatLayers(layers.names, gains, layers.offsets)
