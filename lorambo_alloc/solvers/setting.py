"""A core in a fixed point that holds its price: exact integers for the core program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.solvers.core import Core, Form, Price

MAX_DEVIATIONS = 2_000_000  # more are not searched; the bound of the price stands alone

# Losses are capped here, in units, so that sums of a few of them stay within 64 bits.
CAP = 1 << 58


@dataclass(frozen=True)
class Choice:
    """Deviations at a price.

    Attributes:
        items: the deviations, in the form's own terms.
        window: penalties above it do not matter.
        beyond: no deviation that is not among the items has a smaller penalty.
    """

    items: Any
    window: float
    beyond: float = math.inf


Chooser: TypeAlias = Callable[[float, IntArray], Choice]


@dataclass(frozen=True)
class Setting:
    """A core in its fixed point.

    Attributes:
        price: the price and the exponent of the unit.
        core: best responses and deviations, their penalties in units.
        left: reduced units of budget that the best responses leave over (may be negative).
        window: losses above it are not looked for.
        beyond: no deviation outside the core has a smaller penalty.
        step: what the core can reach differs in value by multiples of so many units.
    """

    price: Price
    core: Core
    left: int
    window: float
    beyond: Fraction | None
    step: int

    @cached_property
    def unit(self) -> Fraction:
        """The unit of the fixed point, in units of gain."""
        return unit_of(self.price)

    @property
    def whole(self) -> bool:
        """Whether all deviations below the window are in the core."""
        return self.beyond is None

    @property
    def wide(self) -> bool:
        """Whether the core has so many classes that states are soon too many."""
        return len(self.core.classes) > 128


def unit_of(price: Price) -> Fraction:
    """2^exponent, exactly."""
    exponent = price.exponent
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def fit(form: Form, price: float, ranks: IntArray, choose: Chooser) -> Setting | None:
    """Choose deviations and put their core into a fixed point.

    Large penalties need a coarse unit. Where the price has finer bits than that, it gives up
    some: every price has a valid bound, and its own best responses.

    Args:
        form: the problem.
        price: the price that the deviations are seen at.
        ranks: best responses to it, up to rounding.
        choose: the deviations at a price.

    Returns:
        The setting; None if there are too many deviations, or costs are so large that no bit of
        the price is left.
    """
    for _ in range(8):
        choice = choose(price, ranks)
        if form.size(choice.items) > MAX_DEVIATIONS:
            return None
        last_bit = form.last_bit(choice.items)
        reach = form.reach(choice.items, price, ranks)
        if choice.beyond == math.inf:
            # All solutions below the window are to be found. Among the nearest deviations, one
            # that loses little is good enough, and the price keeps its bits.
            reach = max(reach, choice.window)
        if not math.isfinite(reach):
            return None
        fixed = Price.of(price, reach, last_bit)
        if fixed.value == price:
            return _set(form, fixed, ranks, choice, last_bit)
        price = fixed.value
        if not price:
            return None
        ranks = form.respond(price)
    return None


def _set(form: Form, price: Price, ranks: IntArray, choice: Choice, last_bit: int) -> Setting:
    unit = unit_of(price)
    limit = min(math.floor(Fraction(choice.window) / unit) + 1, CAP)
    core = form.core(choice.items, price, ranks, limit)
    beyond = None if choice.beyond == math.inf else Fraction(choice.beyond)
    if Fraction(choice.window) > CAP * unit:
        beyond = min(CAP * unit, CAP * unit if beyond is None else beyond)
    # In a core that is not whole, or rounded, the incumbent may differ by less than a step.
    exact = beyond is None and not core.low
    step = 1 << max(last_bit - price.exponent, 0) if exact else 1
    left = (form.problem.spendable - form.problem.cost_of(core.ranks)) // form.unit
    return Setting(price, core, left, choice.window, beyond, step)
