"""Running estimates of gain curves: discounted means, their standard errors, and optimism."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorambo_alloc.objectives import FloatArray

_FIELDS = ("weights", "squares", "means", "spreads")

# The weight of what was not observed for ever so long: its square is a normal number too.
_LEAST_WEIGHT = 2.0**-500

# Below it the optimism does not grow any more, lest it drown all other gains.
_FORGOTTEN = 2.0**-40


class RunningCurve:
    """Discounted moments of the gains of one layer's single ranks.

    With x_t the gain of a rank in round t, where it was observed, and the discount g,

        N = sum g^(n - t),   mean = sum g^(n - t) x_t / N,   S = sum g^(n - t) (x_t - mean)^2

    over the rounds t up to now, n. The division by N is the correction of the bias towards 0 that
    a running mean begins with (Kingma and Ba 2015, section 3), and with Q = sum g^(2 (n - t)) the
    variance S / (N - Q / N) is unbiased for independent observations of one distribution, and so is
    its product with Q / N^2 for the variance of the mean. Neither changes while nothing is
    observed. Updated in place as West 1979 does it.

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
        factors = np.clip(_LEAST_WEIGHT / self.weights, factor, 1.0)
        self.weights *= factors
        self.squares *= factors * factors
        self.spreads *= factors

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
        # Of one sign, but where the mean before was so great that rounding prevails.
        self.spreads[seen] += np.maximum(before * (gains - self.means[seen]), 0.0)

    def variances(self) -> FloatArray:
        """Of a single observation, by rank; NaN where all but one of them weigh next to nothing."""
        freedom = self.weights - self.squares / self.weights
        known = freedom > 1e-9 * self.weights
        return np.where(known, self.spreads, np.nan) / np.where(known, freedom, 1.0)

    def standard_errors(self) -> FloatArray:
        """Of the means, by rank; NaN as `variances`."""
        return np.sqrt(self.variances()) * (np.sqrt(self.squares) / self.weights)

    def optimism(self, rounds: float) -> FloatArray:
        """How far above the mean a rank's gain may well be: sigma (log(1 + rounds) / N)^1/2.

        Where sigma is not known (`variances`) it is the magnitude of the mean itself. Below a
        weight N of 2^-40 it does not grow any more.

        Args:
            rounds: the discounted number of all rounds so far.
        """
        variances = self.variances()
        sigma = np.where(np.isnan(variances), np.abs(self.means), np.sqrt(variances))
        return sigma * np.sqrt(math.log1p(rounds) / np.maximum(self.weights, _FORGOTTEN))

    def state_dict(self) -> dict[str, list[float]]:
        """The moments as lists of doubles, which JSON keeps to the bit."""
        return {field: getattr(self, field).tolist() for field in _FIELDS}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunningCurve:
        """The inverse of `state_dict`.

        Raises:
            ValueError: the moments are not finite numbers, no moments at all, negative where that
                cannot be, or of different lengths.
        """
        curve = cls()
        for field in _FIELDS:
            values = np.array(state[field], dtype=np.float64)
            if values.ndim != 1 or not np.all(np.isfinite(values)):
                raise ValueError(f"{field}: expected finite numbers, got {state[field]!r}")
            if not len(values) or (field != "means" and np.any(values < 0)):
                raise ValueError(f"{field}: expected numbers >= 0, got {state[field]!r}")
            setattr(curve, field, values)
        if np.any(curve.weights < _LEAST_WEIGHT / 2):
            raise ValueError(f"weights: expected numbers above 0, got {state['weights']!r}")
        if len({len(getattr(curve, field)) for field in _FIELDS}) > 1:
            raise ValueError("expected moments of one length")
        return curve
