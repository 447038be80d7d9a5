"""The exact solver: relax, keep what the gap cannot rule out, search that, certify.

1. Water-filling finds the price at which best responses cross the budget; the Lagrangian there is
   an upper bound, and the filled-up break solution a first incumbent.
2. A short run of the core program over the nearest deviations improves the incumbent.
3. Only deviations with a penalty below the incumbent's loss can be in a better solution. The core
   program runs over all of them, holding more states each time, until nothing was dropped.
4. If time or states run out, what was dropped is part of the bound: the gap stays proved.
"""

from __future__ import annotations

import math
import time
from fractions import Fraction
from typing import Any

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.core import Core, Form, Price
from lorambo_alloc.solvers.core_program import Outcome, solve_core
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm

_NEAREST = 64  # deviations in the first, heuristic run, and the states it may hold
_FIRST_STATES = 256
_STATES = (4096, 1 << 16, 1 << 20)  # states held in the runs that prove
_MAX_DEVIATIONS = 2_000_000  # above, the bound of the price stands alone


def solve_exact(problem: Problem, time_limit: float | None = None) -> Allocation:
    """Optimal ranks with a certificate, for every objective but `operator`.

    Args:
        problem: any problem with gains.
        time_limit: seconds after which the search stops and certifies the gap that is left;
            None: it stops when it is done, or holds more than a million states.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    form = form_of(problem)
    search = Search(form, deadline)
    while not search.closed and search.widen():
        pass
    return search.allocation(form.name)


def form_of(problem: Problem) -> Form:
    """The special form for single ranks of descending gain, else the general one."""
    return ConcaveForm(problem) if problem.concave_unit_steps else MultipleChoiceForm(problem)


class Search:
    """An incumbent, and a proved gap above it, that further runs of the core program narrow.

    Attributes:
        ranks: the incumbent.
        gap: a proved bound on the optimum minus the incumbent's value.
        closed: whether the incumbent is optimal, to rounding at least.
    """

    def __init__(self, form: Form, deadline: float | None = None) -> None:
        self._form = form
        self._problem = form.problem
        self._deadline = deadline
        self._relaxed = form.relax()
        self._runs = iter(_STATES)
        self.ranks = self._relaxed.feasible
        self.gap = Fraction(0)
        self.closed = self._relaxed.price == 0
        if not self.closed:
            self.gap = self._price_gap()

    def widen(self) -> bool:
        """Search the core once more with more states; False where that is the end of it."""
        states = next(self._runs, None)
        if states is None or self._late():
            return False
        if states == _STATES[0]:
            self._improve_nearby()
        price, items = self._deviations()
        if self._form.size(items) > _MAX_DEVIATIONS:
            return False
        core, loss = self._core(price, items)
        outcome = self._run(core, price, loss, states)
        self._accept(core, outcome)
        # Exact losses against the same best responses; the program's may be low by `core.low`.
        short = self._loss(price, core.ranks) - (outcome.bound - core.low) * _unit(price)
        self.gap = min(self.gap, max(short, Fraction(0)))
        self.closed = outcome.bound == outcome.loss
        return True

    def allocation(self, method: str) -> Allocation:
        """The incumbent with its certificate, made out by the named method."""
        certificate = Certificate.of(
            self._problem.value_of(self.ranks),
            self.gap,
            self._relaxed.price / self._form.unit,
            method,
            self.closed,
        )
        return Allocation(self._problem, self.ranks, certificate)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _price_gap(self) -> Fraction:
        """What the incumbent lacks to the Lagrangian bound of the price alone."""
        price = Price.of(self._relaxed.price, 0.0, 1024)
        # The increments that rounding may have put on the wrong side of the price.
        items = self._form.within(price.value, self._relaxed.ranks, 0.0)
        core = self._form.core(items, price, self._relaxed.ranks, 1 << 58)
        return self._loss(price, core.ranks) + core.low * _unit(price)

    def _improve_nearby(self) -> None:
        """A short run over the deviations nearest to the price: a better incumbent, no proof."""
        relaxed = self._relaxed
        items = self._form.nearest(relaxed.price, relaxed.ranks, _NEAREST)
        window = float(self._loss_at(relaxed.price, relaxed.ranks)) * (1 + 2.0**-20)
        price = Price.of(relaxed.price, window, self._form.finest(items))
        core, loss = self._core(price, items)
        self._accept(core, self._run(core, price, loss, _FIRST_STATES))

    def _deviations(self) -> tuple[Price, Any]:
        """All deviations that a better solution may use, and the price in a fitting fixed point."""
        relaxed = self._relaxed
        window = float(self.gap) * (1 + 2.0**-20)
        price = Price.of(relaxed.price, window, 1024)
        items = self._form.within(price.value, relaxed.ranks, window)
        return Price.of(relaxed.price, window, self._form.finest(items)), items

    def _core(self, price: Price, items: Any) -> tuple[Core, int]:
        """Exact core, and the incumbent's loss in it, rounded up to whole units."""
        limit = 1 << 59
        core = self._form.core(items, price, self._relaxed.ranks, limit)
        loss = math.ceil(self._loss(price, core.ranks) / _unit(price))
        return core, loss

    def _loss(self, price: Price, best: IntArray) -> Fraction:
        return self._loss_at(price.value, best)

    def _loss_at(self, price: float, best: IntArray) -> Fraction:
        """How far the incumbent falls short of the Lagrangian value of the best responses."""
        left = (self._problem.budget - self._problem.cost_of(best)) // self._form.unit
        return self._problem.value_difference(best, self.ranks) + Fraction(price) * left

    def _run(self, core: Core, price: Price, loss: int, states: int) -> Outcome:
        left = (self._problem.budget - self._problem.cost_of(core.ranks)) // self._form.unit
        # Every solution moves the cost by multiples of the moves' common divisor, so that what
        # does not divide is lost to all of them.
        divisor = math.gcd(*(int(m) for group in core.classes for m in group.moves[:1]))
        for group in core.classes:
            divisor = math.gcd(divisor, *group.moves.tolist())
        lost = left % divisor if divisor else left
        base = price.units * lost
        if loss <= base:
            return Outcome(loss, None, loss, 0)
        outcome = solve_core(
            core.classes, left - lost, price.units, loss - base, states, self._deadline
        )
        outcome.loss += base
        outcome.bound += base
        return outcome

    def _accept(self, core: Core, outcome: Outcome) -> None:
        """Offer the program's solution, if it found one."""
        if outcome.choices is not None:
            self.offer(self._form.apply(core, outcome.choices))

    def offer(self, ranks: IntArray) -> None:
        """Take a rank vector as the incumbent if it is feasible and better, exactly."""
        if self._problem.cost_of(ranks) > self._problem.budget:
            return
        gained = self._problem.value_difference(ranks, self.ranks)
        if gained > 0:
            self.ranks = ranks
            self.gap -= gained


def _unit(price: Price) -> Fraction:
    return Fraction(2) ** price.exponent
