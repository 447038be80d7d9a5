"""Running estimates of gain curves: discounted means, their standard errors, and optimism."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorambo_alloc.objectives import FloatArray

_FIELDS = ("weights", "squares", "means", "spreads")

# The weight of what was not observed for ever so long; with it the optimism stays finite.
_LEAST_WEIGHT = 2.0**-40


class RunningCurve:
    """Discounted moments of the gains of one layer's single ranks.

    With x_t the gain of a rank in round t, where it was observed, and the discount g,

        N = sum g^(n - t),   mean = sum g^(n - t) x_t / N,   S = sum g^(n - t) (x_t - mean)^2

    over the rounds t up to now, n. The division by N is the correction of the bias towards 0 that
    a running mean begins with (Kingma and Ba 2015, section 3), and with Q = sum g^(2 (n - t)) the
    variance S / (N - Q / N) is unbiased for independent observations of one distribution, and so is
    its product with Q / N^2 for the variance of the mean. Updated in place as West 1979 does it.

    Attributes:
        weights: N by rank; its length is that of the longest curve observed.
        squares: Q by rank.
        means: by rank.
        spreads: S by rank.
    """

    def __init__(self) -> None:
        self.weights, self.squares, self.means, self.spreads = (np.zeros(0) for _ in _FIELDS)

    def __len__(self) -> int:
        return len(self.means)

    def discount(self, factor: float) -> None:
        """Let a round pass."""
        self.weights *= factor
        self.squares *= factor * factor
        self.spreads *= factor

    def add(self, gains: FloatArray) -> None:
        """Observe the gains of ranks 1 .. len(gains), in this round."""
        missing = len(gains) - len(self)
        if missing > 0:
            for field in _FIELDS:
                setattr(self, field, np.concatenate([getattr(self, field), np.zeros(missing)]))
        seen = slice(0, len(gains))
        self.weights[seen] += 1.0
        self.squares[seen] += 1.0
        before = gains - self.means[seen]
        self.means[seen] += before / self.weights[seen]
        self.spreads[seen] += before * (gains - self.means[seen])

    def variances(self) -> FloatArray:
        """Of a single observation, by rank; NaN where a rank was observed once, or long ago."""
        weights = np.maximum(self.weights, _LEAST_WEIGHT)
        freedom = weights - self.squares / weights
        known = freedom > 1e-9 * weights
        return np.where(known, self.spreads, np.nan) / np.where(known, freedom, 1.0)

    def standard_errors(self) -> FloatArray:
        """Of the means, by rank; NaN as `variances`."""
        weights = np.maximum(self.weights, _LEAST_WEIGHT)
        return np.sqrt(self.variances() * self.squares) / weights

    def optimism(self, rounds: float) -> FloatArray:
        """How far above the mean a rank's gain may well be: sigma (log(1 + rounds) / N)^1/2.

        Where sigma is not known it is the magnitude of the mean itself.

        Args:
            rounds: the discounted number of all rounds so far.
        """
        variances = self.variances()
        sigma = np.where(np.isnan(variances), np.abs(self.means), np.sqrt(np.abs(variances)))
        return sigma * np.sqrt(math.log1p(rounds) / np.maximum(self.weights, _LEAST_WEIGHT))

    def state_dict(self) -> dict[str, list[float]]:
        """The moments as lists of doubles, which JSON keeps to the bit."""
        return {field: getattr(self, field).tolist() for field in _FIELDS}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunningCurve:
        """The inverse of `state_dict`.

        Raises:
            ValueError: the moments are not finite numbers, or of different lengths.
        """
        curve = cls()
        for field in _FIELDS:
            values = np.array(state[field], dtype=np.float64)
            if values.ndim != 1 or not np.all(np.isfinite(values)):
                raise ValueError(f"{field}: expected finite numbers, got {state[field]!r}")
            setattr(curve, field, values)
        if len({len(getattr(curve, field)) for field in _FIELDS}) > 1:
            raise ValueError("expected moments of one length")
        return curve
