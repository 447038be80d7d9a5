"""What a person types for a budget and an objective, turned into what `allocate` takes."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from lorambo_alloc import log, schatten, uniform_rank

if TYPE_CHECKING:
    from lorambo_alloc.costs import UniformRank
    from lorambo_alloc.objectives import Objective

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
# Thirty digits are far beyond any budget, and keep a pasted novel out of the integer parser.
_NUMBER = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)([kmgb]?)", re.IGNORECASE | re.ASCII)
_UNIFORM = re.compile(r"uniform:(\d{1,30})", re.ASCII)


def budget_from(text: str) -> int | UniformRank:
    """Read a budget: `331776`, `1.5M` or `uniform:8`.

    Suffixes are decimal (k, M, and G or B for 10^9, in either case) and exact: 1.5M is 1500000.

    Raises:
        ValueError: `text` is none of these, or names a fraction of a parameter.

    >>> budget_from("1.5M")
    1500000
    """
    stripped = text.strip()
    if uniform := _UNIFORM.fullmatch(stripped):
        return uniform_rank(int(uniform[1]))
    number = _NUMBER.fullmatch(stripped)
    if number is None:
        raise ValueError(
            f"budget {text!r}: expected a whole number such as 331776, one with a suffix "
            "k, M, G or B such as 1.5M, or uniform:R such as uniform:8"
        )
    amount = Fraction(number[1]) * _SUFFIXES[number[2].lower()]
    if amount.denominator != 1:
        raise ValueError(
            f"budget {text!r}: expected a whole number of parameters, got {float(amount)!r}"
        )
    return amount.numerator


def objective_from(text: str) -> str | Objective:
    """Read an objective: `frobenius`, `nuclear`, `operator`, `schatten:P` or `log:NOISE`.

    Raises:
        ValueError: the objective is unknown, or its parameter isn't a number it can take.
    """
    name, colon, parameter = text.strip().partition(":")
    if not colon and name in ("frobenius", "nuclear", "operator"):
        return name
    if name in ("schatten", "log") and colon:
        try:
            value = float(parameter)
        except ValueError:
            raise ValueError(
                f"objective {text!r}: expected a number after '{name}:', got {parameter!r}"
            ) from None
        return schatten(value) if name == "schatten" else log(value)
    raise ValueError(
        f"objective {text!r}: expected frobenius, nuclear, operator, schatten:P (such as "
        "schatten:1.5) or log:NOISE (such as log:0.01)"
    )
