"""The search behind the exact solver: an incumbent, and a proved gap that stages narrow."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from fractions import Fraction

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.cardinality import cardinality_cut, swaps_at_limit
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.core import Form
from lorambo_alloc.solvers.core_program import Outcome, solve_core
from lorambo_alloc.solvers.exchange import best_exchange
from lorambo_alloc.solvers.integers import best_in_integers
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm
from lorambo_alloc.solvers.setting import CAP, MAX_DEVIATIONS, Choice, Setting, fit

# The window is wider than the loss by this much, for the rounding of thresholds and penalties.
_WIDER = 1 + 2.0**-20


@dataclass(frozen=True)
class _Stage:
    """One run of the core program.

    Attributes:
        states: how many it may hold.
        nearest: over so many of the nearest deviations; None: over all that matter.
        exchanges: rounds of exchanges to try if it proves nothing,
        only_wide: and whether only for wide cores (a narrow one soon closes with more states).
        classes: and of how many classes at least (fewer are soon proven with more states).
    """

    states: int
    nearest: int | None = None
    exchanges: int = 0
    only_wide: bool = False
    classes: int = 0


_STAGES = (
    _Stage(256, nearest=64),
    _Stage(512, exchanges=3, only_wide=True),
    _Stage(4096, exchanges=64, classes=24),
    _Stage(1 << 16),
    _Stage(1 << 20),
)


def form_of(problem: Problem) -> Form:
    """The special form for single ranks of descending gain, else the general one."""
    return ConcaveForm(problem) if problem.concave_unit_steps else MultipleChoiceForm(problem)


class Search:
    """An incumbent, and a proved gap above it, that stages narrow.

    Attributes:
        ranks: the incumbent.
        closed: whether the incumbent is optimal, to rounding at least.
    """

    def __init__(self, form: Form, deadline: float | None = None) -> None:
        self._form = form
        self._problem = form.problem
        self._deadline = deadline
        self._relaxed = form.relax()
        self._stages = iter(_STAGES)
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

    def advance(self) -> bool:
        """Go through one more stage; False where there is none, or no time for it."""
        stage = next(self._stages, None)
        late = self._deadline is not None and time.monotonic() > self._deadline
        if stage is None or late:
            return False
        setting = self._nearest(stage.nearest) if stage.nearest else self._whole()
        if setting is None:
            return stage.nearest is not None  # the costs may suit a whole core all the same
        self._search(setting, stage.states)
        stuck = setting.whole and not self.closed
        if stuck and stage.exchanges and (setting.wide or not stage.only_wide):
            if len(setting.core.classes) >= stage.classes:
                self._exchange(setting, stage.exchanges)
            self._price_ranks(setting)
        return True

    def settle_in_integers(self) -> None:
        """Where 64 bits were too few for a small problem, search it in integers of any length."""
        price = self._relaxed.price / self._form.unit
        row = self._problem.rows[0]
        ranks = best_in_integers(self._problem, [row], [price], self.ranks, self._deadline)
        if ranks is not None:
            self.offer(ranks)
            self._gap = Fraction(0)
            self.closed = True

    def allocation(self, method: str) -> Allocation:
        """The incumbent with its certificate, made out by the named method."""
        certificate = Certificate.of(
            self._problem.value_of(self.ranks),
            self.gap,
            self._relaxed.price / self._form.unit,
            method,
            closed=self.closed,
            cut=self._cut,
        )
        return Allocation(self._problem, self.ranks, certificate)

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
            if self._gap < 0:
                raise RuntimeError("the search contradicts itself; please report this problem")
        return gained

    def _price_gap(self) -> Fraction:
        """What the incumbent lacks to the bound of the relaxation's price alone."""
        price, ranks = self._relaxed.price, self._relaxed.ranks
        setting = fit(self._form, price, ranks, lambda p, r: self._choose(p, r, 0.0))
        if setting is not None and setting.price.value == price:
            return self._loss_in(setting) + setting.core.low * setting.unit
        # Without a core: each best response that `ranks` is not gains less than the reach over it.
        items = self._form.within(price, ranks, 0.0)
        hidden = Fraction(self._form.reach(items, price, ranks)) * self._form.size(items)
        return self._loss(price, ranks) + hidden

    def _nearest(self, count: int) -> Setting | None:
        """The core of the nearest deviations."""

        def choose(price: float, ranks: IntArray) -> Choice:
            window = self._window(price, ranks)
            items, beyond = self._form.nearest(price, ranks, count, window)
            return Choice(items, window, beyond)

        return fit(self._form, self._relaxed.price, self._relaxed.ranks, choose)

    def _whole(self) -> Setting | None:
        """The core of all deviations that a better solution may use."""
        least = 0.0
        for _ in range(4):
            setting = fit(
                self._form,
                self._relaxed.price,
                self._relaxed.ranks,
                lambda p, r, w=least: self._choose(p, r, max(self._window(p, r), w)),
            )
            if setting is None or self._loss_in(setting) <= setting.window:
                return setting
            # Best responses turned out better than `ranks` by rounding.
            least = round_up(self._loss_in(setting)) * _WIDER
        return None

    def _choose(self, price: float, ranks: IntArray, window: float) -> Choice:
        return Choice(self._form.within(price, ranks, window), window)

    def _window(self, price: float, ranks: IntArray) -> float:
        """No solution that loses more than this is better than the incumbent."""
        return max(round_up(self._loss(price, ranks)), 0.0) * _WIDER

    def _loss_in(self, setting: Setting) -> Fraction:
        return self._loss(setting.price.value, setting.core.ranks)

    def _loss(self, price: float, best: IntArray) -> Fraction:
        """How far the incumbent falls short of the Lagrangian value of the best responses."""
        known = self._known_loss
        if known is None or known[0] != price or known[1] is not best:
            left = (self._problem.spendable - self._problem.cost_of(best)) // self._form.unit
            short = self._problem.value_difference(best, self.ranks)
            known = self._known_loss = price, best, short + Fraction(price) * left
        return known[2]

    def _search(self, setting: Setting, states: int) -> None:
        """Run the core program; update incumbent, gap and `closed`."""
        loss = self._loss_in(setting)
        outcome = self._run(setting, loss, states)
        if outcome.choices is not None:
            loss -= self.offer(self._form.apply(setting.core, outcome.choices))
        bound = outcome.bound * setting.unit
        if setting.beyond is not None:
            if setting.beyond <= 0:
                # Ranks outside the core may be no best responses: the loss is not the whole one.
                return
            # They are, and a solution with a deviation outside loses at least what that one does.
            bound = min(bound, setting.beyond)
        if loss > setting.window:
            bound = min(bound, Fraction(setting.window))  # options above it were left out
        # The loss is exact; the program's losses may be low by so much.
        gap = max(loss - bound + setting.core.low * setting.unit, Fraction(0))
        self._gap = gap if self._gap is None else min(self._gap, gap)
        proved = bound >= outcome.loss * setting.unit
        self.closed = self.closed or proved or self._gap == 0

    def _run(self, setting: Setting, loss: Fraction, states: int) -> Outcome:
        """The core program against the incumbent's loss, which is rounded up to whole units."""
        core, price = setting.core, setting.price.units
        incumbent = math.ceil(loss / setting.unit)
        # Every solution moves the cost by a multiple of the moves' common divisor; the budget
        # that is left over at least is lost to all of them.
        divisor = math.gcd(*(move for group in core.classes for move in group.moves.tolist()))
        lost = setting.left % divisor if divisor else max(setting.left, 0)
        base = price * lost
        # What is better than the incumbent is better by a whole step at least.
        target = incumbent - base - setting.step + 1
        if target <= 0:
            return Outcome(incumbent, None, incumbent, 0)
        capped = min(target, CAP)
        outcome = solve_core(
            core.classes, setting.left - lost, price, capped, states, self._deadline
        )
        if outcome.choices is None:
            outcome.loss = incumbent - base
            if outcome.bound == target:
                outcome.bound = outcome.loss  # nothing is a step better, so nothing is better
        outcome.loss += base
        outcome.bound += base
        return outcome

    def _exchange(self, setting: Setting, rounds: int) -> None:
        """Look for a better incumbent among exchanges of a few deviations."""
        loss = self._loss_in(setting)
        incumbent, target = (math.ceil(x / setting.unit) for x in (loss, loss - self.gap))
        choices = best_exchange(
            setting.core.classes,
            setting.left,
            setting.price.units,
            min(incumbent, CAP),
            target,
            rounds=rounds,
            deadline=self._deadline,
        )
        if choices is not None:
            self.offer(self._form.apply(setting.core, choices))
        self.closed = self.closed or self.gap == 0

    def _price_ranks(self, setting: Setting) -> None:
        """Tighten the gap by a price on the number of ranks, where that number is limited."""
        form, price = self._form, setting.price.value
        if self.closed or self._cut is not None or not isinstance(form, ConcaveForm):
            return
        if form.size_of_all() > MAX_DEVIATIONS:
            return
        # A better solution wastes less budget than the incumbent's whole loss is worth.
        loss = self._loss_in(setting) + setting.core.low * setting.unit
        cut = cardinality_cut(form, math.floor(loss / Fraction(price)), self._deadline)
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
        self.closed = self.closed or self.gap == 0
