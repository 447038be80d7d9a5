"""What the exact solver asks of a problem's form: a relaxation, and its core near a price."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.core_program import Class


@dataclass(frozen=True)
class Relaxed:
    """The break solution at the price where best responses cross the budget.

    Attributes:
        price: gain per reduced unit of cost; 0 where the budget does not bind.
        ranks: best responses at that price (ties broken to fit), within the budget.
        feasible: `ranks` filled up greedily; the first incumbent.
    """

    price: float
    ranks: IntArray
    feasible: IntArray


@dataclass(frozen=True)
class Core:
    """Deviations from best responses, exact in units of 2^exponent.

    Attributes:
        ranks: best responses at the price, exactly (up to `low`).
        classes: the deviations, most promising first.
        decode: for each class, what its options do to the ranks; private to the form.
        low: by how many units, at most, a solution's loss may be understated (0: exact).
    """

    ranks: IntArray
    classes: list[Class]
    decode: list[Any]
    low: int


@dataclass(frozen=True)
class Price:
    """A price as an integer in a fixed point: `units * 2^exponent` per reduced unit of cost.

    The exponent is the unit of all gains in the core. It is small enough to hold every bit of
    the price and of the core's gains, and large enough for penalties to stay below 2^58; where
    both cannot be, the second wins.
    """

    units: int
    exponent: int

    @property
    def value(self) -> float:
        """The price as a double; exact."""
        return math.ldexp(self.units, self.exponent)

    @classmethod
    def of(cls, price: float, reach: float, last_bit: int) -> Price:
        """The finest fixed point that the reach allows, or one that holds every bit.

        Args:
            price: a double > 0.
            reach: no penalty above this occurs.
            last_bit: exponent of the last bit set in the core's gains.

        Returns:
            The price itself where the fixed point holds it; else one close to it with two bits
            less than could be held, so that a slightly coarser point will hold it too. It may be 0.
        """
        own = math.frexp(price)[1] - 53
        coarsest = math.frexp(reach)[1] - 58 if reach > 0 else own - 6
        exponent = max(min(own, last_bit), coarsest, own - 6)
        units = math.ldexp(price, -exponent)
        if units == round(units):
            return cls(round(units), exponent)
        return cls(round(units / 4), exponent + 2)


class Form(Protocol):
    """A problem seen as deviations from best responses. Costs are divided by `unit`."""

    problem: Problem
    unit: int
    name: str

    def relax(self) -> Relaxed:
        """Find the price and the break solution."""
        ...

    def respond(self, price: float) -> IntArray:
        """Best responses to a price, up to rounding; their cost may exceed the budget."""
        ...

    def nearest(
        self, price: float, ranks: IntArray, count: int, window: float
    ) -> tuple[Any, float]:
        """About `count` deviations of the smallest penalties below the window.

        Returns:
            The deviations, and a lower bound on the penalty of every other one.
        """
        ...

    def within(self, price: float, ranks: IntArray, window: float) -> Any:
        """All deviations of penalty below `window` (some above it may be among them)."""
        ...

    def size(self, items: Any) -> int:
        """How many deviations there are."""
        ...

    def reach(self, items: Any, price: float, ranks: IntArray) -> float:
        """No penalty among the deviations is larger in magnitude."""
        ...

    def last_bit(self, items: Any) -> int:
        """The greatest e such that all gains of the deviations are whole multiples of 2^e."""
        ...

    def core(self, items: Any, price: Price, ranks: IntArray, limit: int) -> Core:
        """Exact penalties, best responses and classes; options above the limit left out."""
        ...

    def apply(self, core: Core, choices: list[int]) -> IntArray:
        """The rank vector of one choice a class."""
        ...
