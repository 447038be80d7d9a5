"""Objectives: from a singular value to the gain of keeping it.

An objective maps the j-th singular value of a layer to the gain of the layer's j-th rank. Every
objective here is nondecreasing in the singular value, so a descending spectrum has descending
gains, and its gain curve is concave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

_NAMED = ("frobenius", "nuclear", "operator")


@dataclass(frozen=True)
class Objective:
    """A gain per singular value. Make one with a name, `schatten` or `log`.

    Attributes:
        kind: `power` (gain sigma^p), `log` (gain 1/2 log(1 + sigma^2 / noise)) or `operator`
            (no gain per rank: the largest discarded singular value is minimised).
        parameter: p for `power`, the noise for `log`, unused for `operator`.
    """

    kind: Literal["power", "log", "operator"]
    parameter: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("power", "log", "operator"):
            raise ValueError(f"objective: unknown kind {self.kind!r}")
        if self.kind != "operator":
            positive_number(self.parameter, f"objective {self.kind!r}")
        elif self.parameter != 0:
            raise ValueError("objective: 'operator' takes no parameter")

    @property
    def monotone_in_floats(self) -> bool:
        """Whether rounding keeps the gains of a descending spectrum descending.

        One correctly rounded product does (p = 1, 2); `pow` and `log1p` need not.
        """
        return self.kind == "power" and self.parameter in (1.0, 2.0)

    def gains(self, sigma: FloatArray) -> FloatArray:
        """Gains of singular values, elementwise and unweighted."""
        if self.kind == "log":
            ratio = sigma / math.sqrt(self.parameter)
            # Beyond 2^100 the square may overflow, and the 1 is far below the last bit.
            large = ratio > 2.0**100
            gains = 0.5 * np.log1p(np.square(np.where(large, 0.0, ratio)))
            return np.where(large, np.log(np.where(large, ratio, 1.0)), gains)
        if self.parameter == 2.0:
            return np.square(sigma)
        if self.parameter == 1.0:
            return sigma
        return np.power(sigma, self.parameter)

    def __str__(self) -> str:
        if self.kind == "operator":
            return "operator"
        if self.kind == "log":
            return f"log(noise={self.parameter:g})"
        names = {2.0: "frobenius", 1.0: "nuclear"}
        return names.get(self.parameter, f"schatten({self.parameter:g})")


def schatten(p: float) -> Objective:
    """The p-th power of the Schatten p-norm: keeping sigma_j gains sigma_j^p.

    Args:
        p: a finite number above 0; 2 is `frobenius`, 1 is `nuclear`.

    Raises:
        ValueError: p is not a finite number above 0.

    Example:
        >>> str(schatten(2)), str(schatten(0.5))
        ('frobenius', 'schatten(0.5)')
    """
    return Objective("power", positive_number(p, "schatten(p)"))


def log(noise: float) -> Objective:
    """Parallel Gaussian channels: keeping sigma_j gains half of ln(1 + sigma_j^2 / noise) nats.

    Args:
        noise: a finite number above 0, in the units of sigma squared.

    Raises:
        ValueError: noise is not a finite number above 0.

    References:
        Cover and Thomas, Elements of Information Theory, section 9.4 (parallel channels).
    """
    return Objective("log", positive_number(noise, "log(noise)"))


def positive_number(value: object, where: str) -> float:
    """A finite double above 0; ValueError for anything else."""
    number = real_number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{where}: expected a finite number > 0, got {value!r}")
    return number


def real_number(value: object) -> float:
    """A double from a real number; NaN for anything that is not one, or is out of range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def parse_objective(objective: str | Objective) -> Objective:
    """Turn a name into an objective; objectives pass through.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        objective = repr(objective)
    if objective == "frobenius":
        return schatten(2)
    if objective == "nuclear":
        return schatten(1)
    if objective == "operator":
        return Objective("operator")
    known = ", ".join(map(repr, _NAMED))
    raise ValueError(
        f"objective: expected one of {known}, schatten(p) or log(noise), got {objective!r}"
    )
