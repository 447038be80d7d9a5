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
from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.core import Core, Form, Price, Relaxed
from lorambo_alloc.solvers.core_program import Outcome, solve_core
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm

_NEAREST = 64  # deviations in the first, heuristic run, and the states it may hold
_FIRST_STATES = 256
_STATES = (4096, 1 << 16, 1 << 20)  # states held in the runs that prove
_MAX_DEVIATIONS = 2_000_000  # above, the bound of the price stands alone
_LIMIT = 1 << 59  # units of loss; larger ones could overflow in sums


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
            self._prove(None)

    def widen(self) -> bool:
        """Search the core once more with more states; False where that is the end of it."""
        states = next(self._runs, None)
        if states is None or self._late():
            return False
        if states == _STATES[0]:
            self._improve_nearby()
        return self._prove(states)

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

    def _improve_nearby(self) -> None:
        """A short run over the deviations nearest to the price: a better incumbent, no proof."""
        price, window = self._relaxed.price, self._window()
        items = self._form.nearest(price, self._relaxed.ranks, _NEAREST, window)
        fixed, core, loss = self._core(items, price, window)
        if not fixed.holds(price):
            fixed, core, loss = self._core(items, fixed.coarser(), window)
        if loss < _LIMIT * _unit(fixed):
            self._accept(core, self._run(core, fixed, loss, _FIRST_STATES))

    def _prove(self, states: int | None) -> bool:
        """Tighten the gap by a run over all deviations that matter; None: by the price alone.

        Returns:
            False if there are too many of them.
        """
        price, ranks = self._relaxed.price, self._relaxed.ranks
        window = self._window() if states else 0.0
        for _ in range(8):
            items = self._form.within(price, ranks, window)
            if self._form.size(items) > _MAX_DEVIATIONS:
                break
            fixed, core, loss = self._core(items, price, window)
            if not fixed.holds(price):
                price = fixed.coarser()
            elif states and loss > Fraction(window):
                window = round_up(loss) * (1 + 2.0**-20)
            else:
                self._relaxed = Relaxed(price, ranks, self._relaxed.feasible)
                self._settle(fixed, core, loss, states)
                return True
        if states is None:
            # Each best response that `ranks` is not gains less than the reach over it.
            price = self._relaxed.price
            items = self._form.within(price, ranks, 0.0)
            hidden = Fraction(self._form.reach(items, price, ranks)) * self._form.size(items)
            self.gap = self._loss(price, ranks) + hidden
        return False

    def _settle(self, fixed: Price, core: Core, loss: Fraction, states: int | None) -> None:
        """Run the core program and update incumbent, gap and `closed`."""
        unit = _unit(fixed)
        if states is None:
            self.gap = loss + core.low * unit
            return
        if loss >= _LIMIT * unit:
            return
        before = self.ranks
        outcome = self._run(core, fixed, loss, states)
        self._accept(core, outcome)
        # Exact losses against the same best responses; the program's may be low by `low`.
        short = loss - self._problem.value_difference(self.ranks, before)
        self.gap = min(self.gap, max(short - (outcome.bound - core.low) * unit, Fraction(0)))
        self.closed = outcome.bound == outcome.loss

    def _window(self) -> float:
        return round_up(self.gap) * (1 + 2.0**-20)

    def _core(self, items: Any, price: float, window: float) -> tuple[Price, Core, Fraction]:
        """The fixed point, the core with options up to the window, and the incumbent's loss."""
        ranks = self._relaxed.ranks
        reach = max(self._form.reach(items, price, ranks), window)
        fixed = Price.of(price, reach, self._form.finest(items))
        limit = int(math.ldexp(window, -fixed.exponent)) + 1
        core = self._form.core(items, fixed, ranks, limit)
        return fixed, core, self._loss(fixed.value, core.ranks)

    def _loss(self, price: float, best: IntArray) -> Fraction:
        """How far the incumbent falls short of the Lagrangian value of the best responses."""
        left = (self._problem.budget - self._problem.cost_of(best)) // self._form.unit
        return self._problem.value_difference(best, self.ranks) + Fraction(price) * left

    def _run(self, core: Core, price: Price, loss: Fraction, states: int) -> Outcome:
        """The core program against the incumbent's loss, which is rounded up to whole units."""
        incumbent = math.ceil(loss / _unit(price))
        left = (self._problem.budget - self._problem.cost_of(core.ranks)) // self._form.unit
        # Every solution moves the cost by a multiple of the moves' common divisor; the budget
        # that is left over at least is lost to all of them.
        divisor = math.gcd(*(move for group in core.classes for move in group.moves.tolist()))
        lost = left % divisor if divisor else left
        base = price.units * lost
        if incumbent <= base:
            return Outcome(incumbent, None, incumbent, 0)
        outcome = solve_core(
            core.classes, left - lost, price.units, incumbent - base, states, self._deadline
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
