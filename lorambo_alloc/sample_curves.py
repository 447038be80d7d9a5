"""The curves of several samples side by side: values of rank vectors, and weighted means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from lorambo_alloc.curves import GainCurves
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

_CHUNK = 32  # rank vectors whose values are taken at once


@dataclass(frozen=True)
class MeanCurves:
    """A weighted mean of the samples' curves, to rounding.

    Attributes:
        curves: the mean in units of 2^exponent.
        exponent: of those units.
        error: no rank vector's mean value differs by more from that of the curves, in units of 1.
    """

    curves: GainCurves
    exponent: int
    error: Fraction


class SampleCurves:
    """The curves of all samples as one matrix, of which weighted means are quick.

    Where every sample has gains of single ranks, a row has those; else the curves themselves.
    Sample s is in units of 2^exponents[s], its greatest entry just below 1.

    Args:
        problems: one a sample, alike but for the gains.
        keywords: what other problems with the same layers, costs and limits take.

    Attributes:
        problems: as given.
        first: the first of them.
        budget: of all of them.
        exponents: of each sample's units.
        magnitudes: the sum of the magnitudes of each sample's gains, in its units, to rounding.
    """

    def __init__(self, problems: Sequence[Problem], keywords: dict[str, Any]) -> None:
        first = problems[0]
        self.first = first
        self.budget = first.budget
        self.problems = tuple(problems)
        self._keywords = keywords
        gains = [problem.gains for problem in problems]
        by_rank = all(g is not None for g in gains) and bool(np.all(first.max_lengths > 0))
        self._descending = by_rank and all(g is not None and g.sorted for g in gains)
        self._by_rank = by_rank
        lengths = first.max_lengths + (0 if by_rank else 1)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self._lengths = lengths
        matrix = np.empty((len(problems), int(self._offsets[-1])))
        magnitudes = np.zeros(len(problems))
        for s, problem in enumerate(problems):
            row = matrix[s]
            if by_rank:
                assert problem.gains is not None
                row[:] = problem.gains.selected(0 * lengths, lengths)[2]
                magnitudes[s] = np.abs(row).sum()
            else:
                for i in range(len(first.names)):
                    row[self._part(i)] = curve = problem.curve(i)
                    magnitudes[s] += np.abs(np.diff(curve)).sum()
        # A power of two a sample keeps products clear of both ends of the doubles.
        self.exponents = np.frexp(np.max(np.abs(matrix), axis=1, initial=0.0))[1]
        np.ldexp(matrix, -self.exponents[:, None], out=matrix)
        self.magnitudes = np.ldexp(magnitudes, -self.exponents)
        self._matrix = matrix

    def _part(self, i: int) -> slice:
        return slice(int(self._offsets[i]), int(self._offsets[i + 1]))

    def values(self, ranks: IntArray) -> FloatArray:
        """Each sample's value of some rank vectors (vectors x layers).

        Returns:
            Vectors x samples, each sample in its own units.
        """
        values = np.empty((len(ranks), len(self._matrix)))
        places = np.arange(self._matrix.shape[1]) - np.repeat(self._offsets[:-1], self._lengths)
        for start in range(0, len(ranks), _CHUNK):
            part = slice(start, start + _CHUNK)
            spread = np.repeat(ranks[part], self._lengths, axis=1)
            chosen = places < spread if self._by_rank else places == spread
            values[part] = chosen.astype(np.float64) @ self._matrix.T
        return values

    def mean(self, weights: FloatArray, *, exponent: int | None = None) -> MeanCurves:
        """The samples' curves, each times its weight, summed up.

        Args:
            weights: one a sample, >= 0, of its curves in its own units.
            exponent: of the units of the result; by default such that its greatest entry is
                just below 1.
        """
        mean = weights @ self._matrix
        rows = [mean[self._part(i)] for i in range(len(self._lengths))]
        drift = 0.0
        if self._descending:
            # Means of descending gains descend, but for rounding.
            rows = [np.minimum.accumulate(row) for row in rows]
            mean, rounded = np.concatenate([np.zeros(0), *rows]), mean
            drift = float(np.abs(mean - rounded).sum())
        if exponent is None:
            exponent = math.frexp(float(np.max(np.abs(mean), initial=0.0)))[1]
        named = {
            name: np.ldexp(row, -exponent) for name, row in zip(self.first.names, rows, strict=True)
        }
        curves = GainCurves.from_increments(named) if self._by_rank else GainCurves(named)
        # Rounding of products and sums over samples and ranks, and of subnormal products.
        terms = len(weights) + int(np.max(self._lengths, initial=0)) + 8
        lost = terms * 2.0**-51 * float(weights @ self.magnitudes) + 1.01 * drift
        lost += 2.0**-1060 * (1 + len(weights)) * (1 + len(mean))
        return MeanCurves(curves, exponent, Fraction(lost))

    def problem(self, curves: GainCurves, **changes: Any) -> Problem:
        """The problem with these curves in the place of a sample's."""
        return Problem(curves, self.budget, **(self._keywords | changes))
