"""The search behind the exact solver: an incumbent, and a proved gap that runs narrow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.cardinality import cardinality_cut, swaps_at_limit
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.core import Core, Form, Price, Relaxed
from lorambo_alloc.solvers.core_program import Outcome, solve_core
from lorambo_alloc.solvers.exchange import best_exchange
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm

_NEAREST = 64  # deviations in the first run
_STATES = (256, 512, 4096, 1 << 16, 1 << 20)  # states held, run by run
# With so many states, or where the core has so many classes that states are soon too many, other
# means are tried: exchanges, and a price on the number of ranks.
_MANY = 4096
_WIDE = 128
_MAX_DEVIATIONS = 2_000_000  # above, the bound of the price stands alone
_LIMIT = 1 << 59  # units of loss; larger ones could overflow in sums


def form_of(problem: Problem) -> Form:
    """The special form for single ranks of descending gain, else the general one."""
    return ConcaveForm(problem) if problem.concave_unit_steps else MultipleChoiceForm(problem)


# Deviations, a lower bound on the penalty of all others, and the window of the options.
_Choice: TypeAlias = tuple[Any, float, float]


@dataclass(frozen=True)
class _Setting:
    """A core in its fixed point.

    Attributes:
        price: the price and the exponent of the unit.
        core: best responses and deviations.
        left: reduced units of budget that the best responses leave over (may be negative).
        loss: what the incumbent lacks to the Lagrangian value of the best responses, exactly.
        step: what the core can reach differs from the incumbent by multiples of so many units.
        beyond: no deviation outside the core has a smaller penalty.
    """

    price: Price
    core: Core
    left: int
    loss: Fraction
    step: int
    beyond: float

    @cached_property
    def unit(self) -> Fraction:
        """The unit of the fixed point, in units of gain."""
        exponent = self.price.exponent
        return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)

    @property
    def searchable(self) -> bool:
        """Whether sums of losses stay within 64 bits."""
        return self.loss < _LIMIT * self.unit


class Search:
    """An incumbent, and a proved gap above it, that further runs of the core program narrow.

    Attributes:
        ranks: the incumbent.
        closed: whether the incumbent is optimal, to rounding at least.
    """

    def __init__(self, form: Form, deadline: float | None = None) -> None:
        self._form = form
        self._problem = form.problem
        self._deadline = deadline
        self._relaxed = form.relax()
        self._runs = iter(_STATES)
        self._cut: tuple[float, float] | None = None
        self._gap: Fraction | None = None
        self._known_loss: tuple[float, IntArray, Fraction] | None = None
        self.ranks = self._relaxed.feasible
        self.closed = self._relaxed.price == 0
        if self.closed:
            self._gap = Fraction(0)

    @property
    def gap(self) -> Fraction:
        """A proved bound on the optimum minus the incumbent's value."""
        if self._gap is None:
            self._gap = self._price_gap()
        return self._gap

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to prove, not even below rounding."""
        return self.closed and self.gap == 0

    def widen(self) -> bool:
        """Search the core once more with more states; False where that is the end of it."""
        states = next(self._runs, None)
        if states is None or self._late():
            return False
        core = self._nearest() if states == _STATES[0] else self._deviations()
        if core is None:
            return False
        self._search(core, states)
        whole = core.beyond == math.inf
        wide = len(core.core.classes) > _WIDE
        if not self.closed and whole and (states == _MANY or (states < _MANY and wide)):
            self._exchange(core, rounds=64 if states == _MANY else 3)
            if wide == (states < _MANY):
                self._price_ranks(core)
        return True

    def allocation(self, method: str) -> Allocation:
        """The incumbent with its certificate, made out by the named method."""
        if self.gap < 0:
            raise RuntimeError("the search contradicts itself; please report this problem")
        certificate = Certificate.of(
            self._problem.value_of(self.ranks),
            self.gap,
            self._relaxed.price / self._form.unit,
            method,
            closed=self.closed,
            cut=self._cut,
        )
        return Allocation(self._problem, self.ranks, certificate)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _price_gap(self) -> Fraction:
        """What the incumbent lacks to the bound of the price alone."""
        setting = self._set_within(0.0)
        if setting is not None:
            return setting.loss + setting.core.low * setting.unit
        # Each best response that `ranks` is not gains less than the reach over it.
        price, ranks = self._relaxed.price, self._relaxed.ranks
        items = self._form.within(price, ranks, 0.0)
        hidden = Fraction(self._form.reach(items, price, ranks)) * self._form.size(items)
        return self._loss(price, ranks) + hidden

    def _nearest(self) -> _Setting | None:
        """The core of the nearest deviations, and how little any other could lose."""

        def nearest(price: float, ranks: IntArray) -> _Choice:
            window = self._window()
            items, beyond = self._form.nearest(price, ranks, _NEAREST, window)
            return items, beyond, window

        return self._set_at(nearest)

    def _deviations(self) -> _Setting | None:
        """The core of all deviations that a better solution may use; None: too many."""
        window = self._window()
        for _ in range(8):
            setting = self._set_within(window)
            if setting is None or setting.loss <= Fraction(window):
                return setting
            window = round_up(setting.loss) * (1 + 2.0**-20)
        return None

    def _set_within(self, window: float) -> _Setting | None:
        """The core of all deviations of penalty below the window; None: too many."""

        def within(price: float, ranks: IntArray) -> _Choice:
            return self._form.within(price, ranks, window), math.inf, window

        return self._set_at(within)

    def _set_at(self, choose: Callable[[float, IntArray], _Choice]) -> _Setting | None:
        """A core at a price that is exact in the core's fixed point; None: too many deviations.

        Args:
            choose: what to take at a price.
        """
        for _ in range(8):
            price, ranks = self._relaxed.price, self._relaxed.ranks
            items, beyond, window = choose(price, ranks)
            if self._form.size(items) > _MAX_DEVIATIONS:
                return None
            reach = max(self._form.reach(items, price, ranks), window)
            last_bit = self._form.last_bit(items)
            fixed = Price.of(price, reach, last_bit)
            if not fixed.holds(price):
                # Costs so large that the price would have no bit left: no core at all.
                if not (price := fixed.coarser()):
                    return None
                self._relaxed = Relaxed(price, self._form.respond(price), self._relaxed.feasible)
                continue
            limit = int(math.ldexp(window, -fixed.exponent)) + 1
            core = self._form.core(items, fixed, ranks, limit)
            # The incumbent's deviations lie in a complete core, but not always in the nearest.
            whole = beyond == math.inf and not core.low
            step = 1 << max(last_bit - fixed.exponent, 0) if whole else 1
            left, loss = self._left(core.ranks), self._loss(price, core.ranks)
            if loss > Fraction(window):
                beyond = min(beyond, window)  # options above the window were left out
            return _Setting(fixed, core, left, loss, step, beyond)
        return None

    def _search(self, setting: _Setting, states: int) -> None:
        """Run the core program; update incumbent, gap and `closed`."""
        if not setting.searchable:
            return
        outcome = self._run(setting, states)
        # Exact losses against the same best responses; the program's may be low by `low`.
        loss = setting.loss
        if outcome.choices is not None:
            loss -= self.offer(self._form.apply(setting.core, outcome.choices))
        if setting.beyond <= 0:
            return  # the ranks may be no best responses: the incumbent counts, the bound does not
        low = setting.core.low * setting.unit
        # A solution with a deviation outside the core loses at least what that one does.
        bound = outcome.bound
        if setting.beyond < math.inf:
            bound = min(bound, math.floor(Fraction(setting.beyond) / setting.unit))
        gap = max(loss - bound * setting.unit + low, Fraction(0))
        self._gap = gap if self._gap is None else min(self._gap, gap)
        self.closed = bound == outcome.loss or self._gap == 0

    def _window(self) -> float:
        """No solution that loses more than this matters."""
        if self._gap is None:
            loss = self._loss(self._relaxed.price, self._relaxed.ranks)
        else:
            loss = self._gap
        return max(round_up(loss), 0.0) * (1 + 2.0**-20)

    def _exchange(self, setting: _Setting, rounds: int) -> None:
        """Look for a better incumbent among exchanges of a few deviations."""
        core, price = setting.core, setting.price
        loss = self._loss(price.value, core.ranks)
        incumbent, target = (math.ceil(x / setting.unit) for x in (loss, loss - self.gap))
        if setting.searchable:
            choices = best_exchange(
                core.classes,
                setting.left,
                price.units,
                incumbent,
                target,
                rounds=rounds,
                deadline=self._deadline,
            )
            if choices is not None:
                self.offer(self._form.apply(core, choices))
        self.closed = self.gap == 0

    def _price_ranks(self, setting: _Setting) -> None:
        """Tighten the gap by a price on the number of ranks, where that number is limited."""
        form, price = self._form, setting.price.value
        if self.closed or not isinstance(form, ConcaveForm):
            return
        if form.size_of_all() > _MAX_DEVIATIONS:
            return
        # A better solution wastes less budget than the incumbent's whole loss is worth.
        loss = self._loss(price, setting.core.ranks) + setting.core.low * setting.unit
        cut = cardinality_cut(form, math.floor(loss / Fraction(price)))
        if cut is None:
            return
        swapped = swaps_at_limit(form, cut)
        if swapped is not None:
            self.offer(swapped)
        # Values are whole multiples of a step, and so is what a better one has more.
        step = Fraction(2) ** form.last_bit_of_all()
        ahead = cut.bound - self._problem.value_of(self.ranks)
        gap = max(math.floor(ahead / step) * step, Fraction(0))
        if gap < self.gap:
            self._gap = gap
            self._cut = cut.price / form.unit, cut.rank_price
        self.closed = self.gap == 0

    def _left(self, ranks: IntArray) -> int:
        """Reduced units of budget that a rank vector leaves over."""
        return (self._problem.spendable - self._problem.cost_of(ranks)) // self._form.unit

    def _loss(self, price: float, best: IntArray) -> Fraction:
        """How far the incumbent falls short of the Lagrangian value of the best responses."""
        known = self._known_loss
        if known is None or known[0] != price or known[1] is not best:
            short = self._problem.value_difference(best, self.ranks)
            known = self._known_loss = price, best, short + Fraction(price) * self._left(best)
        return known[2]

    def _run(self, setting: _Setting, states: int) -> Outcome:
        """The core program against the incumbent's loss, which is rounded up to whole units."""
        core, price = setting.core, setting.price.units
        incumbent = math.ceil(setting.loss / setting.unit)
        # Every solution moves the cost by a multiple of the moves' common divisor; the budget
        # that is left over at least is lost to all of them.
        divisor = math.gcd(*(move for group in core.classes for move in group.moves.tolist()))
        lost = setting.left % divisor if divisor else max(setting.left, 0)
        base = price * lost
        # What is better than the incumbent is better by a whole step at least.
        target = incumbent - base - setting.step + 1
        if target <= 0:
            return Outcome(incumbent, None, incumbent, 0)
        outcome = solve_core(
            core.classes, setting.left - lost, price, target, states, self._deadline
        )
        if outcome.choices is None:
            outcome.loss = incumbent - base
        if outcome.bound == target:
            outcome.bound = outcome.loss
        outcome.loss += base
        outcome.bound += base
        return outcome

    def offer(self, ranks: IntArray) -> Fraction:
        """Take a rank vector as the incumbent if it is feasible and better; what it gained."""
        if self._problem.cost_of(ranks) > self._problem.spendable:
            return Fraction(0)
        gained = self._problem.value_difference(ranks, self.ranks)
        if gained <= 0:
            return Fraction(0)
        self.ranks = ranks
        self._known_loss = None
        if self._gap is not None:
            self._gap -= gained
        return gained
