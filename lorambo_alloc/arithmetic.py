"""Exact sums of doubles, directed rounding, and fixed point.

Every finite double is an integer times a power of two, so sums of doubles are exact in integers.
`exact_sum` adds a large array without an error and without a Python loop over its entries;
`to_fixed` writes doubles as 64-bit integers modulo 2^64, in which differences are exact as long
as they themselves fit, however large the terms are.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from lorambo_alloc.objectives import FloatArray, IntArray

_CHUNK = 1 << 20  # entries; half-mantissas below 2^27 sum below 2^47, exact in a double


def exact_sum(values: FloatArray) -> Fraction:
    """The sum of finite doubles, exactly.

    Example:
        >>> exact_sum(np.array([2.0**60, 1.0, -(2.0**60)]))
        Fraction(1, 1)
    """
    total = Fraction(0)
    for start in range(0, len(values), _CHUNK):
        fraction, exponent = np.frexp(values[start : start + _CHUNK])
        mantissa = np.ldexp(fraction, 53).astype(np.int64)
        least = int(exponent.min())
        bins = exponent - least
        # The mantissa in two halves: each half's sums per exponent are exact in doubles.
        chunk = 0
        for half, shift in ((mantissa >> 27, 27), (mantissa & ((1 << 27) - 1), 0)):
            sums = np.bincount(bins, weights=half)
            for k in np.flatnonzero(sums).tolist():
                chunk += int(sums[k]) << (shift + k)
        places = 53 - least
        total += Fraction(chunk, 1 << places) if places >= 0 else chunk << -places
    return total


def round_down(value: Fraction) -> float:
    """The largest double that is not above the value."""
    nearest = _to_float(value)
    return nearest if Fraction(nearest) <= value else math.nextafter(nearest, -math.inf)


def round_up(value: Fraction) -> float:
    """The smallest double that is not below the value."""
    return -round_down(-value) + 0.0  # + 0.0 turns -0.0 into 0.0


def _to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        limit = math.nextafter(math.inf, 0.0)
        return limit if value > 0 else -limit


def last_bit(values: FloatArray) -> int:
    """The greatest e such that all the doubles are whole multiples of 2^e; 1024 if all are 0.

    Example:
        >>> last_bit(np.array([6.0, 0.5])), last_bit(np.array([4096.0]))
        (-1, 12)
    """
    fraction, exponent = np.frexp(values[values != 0])
    mantissa = np.ldexp(fraction, 53).astype(np.int64)
    lowest = np.frexp((mantissa & -mantissa).astype(np.float64))[1] - 1
    return int(np.min(exponent - 53 + lowest, initial=1024))


def to_fixed(values: FloatArray, exponent: int) -> tuple[IntArray, bool]:
    """Doubles in units of 2^exponent, rounded down, modulo 2^64.

    Returns:
        The integers (sums and differences of them are right modulo 2^64), and whether no bit
        was lost in rounding down.
    """
    fraction, exponents = np.frexp(values)
    mantissa = np.ldexp(fraction, 53).astype(np.int64)
    shift = exponents.astype(np.int64) - (53 + exponent)
    left = np.minimum(np.maximum(shift, 0), 63)
    right = np.minimum(np.maximum(-shift, 0), 63)
    fixed = (mantissa << left) >> right
    lost = (fixed << right) != (mantissa << left)
    fixed[shift > 63] = 0
    return fixed, not bool(np.any(lost & (shift < 0)))
