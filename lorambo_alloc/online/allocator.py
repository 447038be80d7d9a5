"""Ranks that follow running estimates of what they gain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.caps import Caps
from lorambo_alloc.costs import UniformRank, whole_number
from lorambo_alloc.curves import GainCurves, Spectra, check_names
from lorambo_alloc.limits import AllowedRanks, Limit
from lorambo_alloc.objectives import FloatArray, real_number
from lorambo_alloc.online.budget_schedule import BudgetSchedule
from lorambo_alloc.online.completed_curves import completed_curves
from lorambo_alloc.online.curve_estimates import LARGEST, CurveEstimates
from lorambo_alloc.online.layers import Layers
from lorambo_alloc.online.proposal import Proposal
from lorambo_alloc.online.switching import Move, best_move
from lorambo_alloc.online.timetable import Timetable
from lorambo_alloc.problem import InfeasibleError
from lorambo_alloc.solve import parse_time_limit

_VERSION = 1


class OnlineAllocator:
    """Keeps running estimates of each layer's gain curve, and from time to time solves again.

    A proposal is the exact optimum (`solve`, with its certificate) of

        sum_i  F_i(r_i) + optimism - s_i |r_i - r_i^now|

    within the budget, where F_i are discounted, bias-corrected means of what was observed
    (`running_curves`), and s_i is what moving a rank of layer i costs: optimiser state is lost, and
    a new direction is cold. That cost alone keeps ranks from going to and fro; nothing else does.

    The clock counts training steps. Proposals are made at step `warmup` and every `period` steps
    after it, before step `freeze`. Each keeps to the least budget of all steps up to the next, so
    that the present ranks never cost more than `budget_at(step)`; if they do, or exceed a cap (at
    the start, or as a proposal was not carried out), one is due at once, at any time.

    Where estimates are missing:

    - A layer never observed keeps its rank (and those tied to it keep theirs), unless the present
      ranks exceed the budget, limits or caps cannot be met otherwise, or `exploration` is on.
    - Where it may change, it does not grow beyond its present or its least rank, and a stand-in
      values its j-th rank at c_i rho / j, with rho the mean over observed layers of the first
      rank's gain per cost (0 where that is negative; 1 if all are 0): so equal ranks are best.
    - Ranks that no observation reached are not proposed; those that are there already are valued
      as the last one that some observation reached.
    - A curve with NaN or infinity is left out, with a warning, and counted in `rejected`.

    Args:
        costs: name to the cost of one rank, whole numbers >= 1: the layers, in their order.
        budget: a whole number in the units of the costs, `uniform_rank(r)`, or `cubic_budget(...)`.
        ranks: the present ranks; layers left out, and by default all, have 0.
        min_rank: as `allocate` takes it.
        max_rank: likewise.
        multiple_of: likewise.
        allowed_ranks: likewise.
        tied: likewise.
        caps: likewise.
        fixed_costs: likewise.
        discount: the weight of a round of observations beside that of the next one, above 0 and at
            most 1. A round is a call of `observe`. 1 makes plain means, for curves that do not
            drift.
        warmup: the first step at which to propose.
        period: steps from one proposal to the next.
        freeze: the first step at which not to propose any more; None: never.
        switching_cost: gain that moving one rank costs, in the units of the curves, for all layers
            or by name (layers left out: 0).
        switching_share: a further such cost, as a share of the price of the rank: of c_i times the
            price per unit of cost at the optimum without switching cost. So a rank moves only to
            where its cost gains that share more, whatever the unit of the curves is.
        max_moves: at most this many ranks move in a proposal (`best_move` says how, and what can be
            lost by it); None: any number. An exchange moves two ranks or more, so that 1 stops them
            all while the budget is spent. Budget and limits go before it.
        exploration: the optimism of a rank is `exploration` times sigma (log(1 + T) / N)^1/2, with
            N its discounted number of observations, T that of all rounds and sigma the standard
            deviation of an observation (after a single one, its magnitude). It grows while a rank
            is not observed, down to N = 2^-40, so that a layer of rank 0 is tried again; and a
            layer never observed may get its first rank, with rho that of the best layer. 0: none.
        time_limit: seconds for each solution, after which it stops with a certified gap; then a
            restart need not repeat a run. None: no limit.

    Raises:
        ValueError: an argument is not of this form; the message names it, and the layer.
        InfeasibleError: the minimum ranks cost more than the least budget, or than a cap.

    Attributes:
        names: the layers' names.
        costs: cost of one rank by name.
        budget: the `BudgetSchedule` (a constant one where a number was given).
        timetable: when to propose.
        steps: how many training steps were made.

    References:
        Chen, Wang, Yuan, Combinatorial multi-armed bandit, ICML 2013 (optimism in each part, and an
        exact solver for the whole); Garivier and Moulines, On upper-confidence bound policies for
        switching bandit problems, ALT 2011 (discounted counts). Their regret bounds assume
        independent rewards of a bounded range, and are not claimed here.

    Example:
        >>> online = OnlineAllocator({"q": 16, "v": 12}, 44, ranks={"q": 1, "v": 1}, period=10)
        >>> online.observe({"q": [0.0, 9.0, 13.0, 14.0], "v": [0.0, 6.25, 6.5]})
        >>> proposal = online.propose()
        >>> proposal.moves, proposal.allocation.certificate.status
        ({'q': 1}, 'optimal_exact')
        >>> online.accept(proposal)
        >>> online.ranks, online.cost, online.next_due
        ({'q': 2, 'v': 1}, 44, 10)
    """

    def __init__(
        self,
        costs: Mapping[str, int],
        budget: int | UniformRank | BudgetSchedule,
        *,
        ranks: Mapping[str, int] | None = None,
        min_rank: Limit = 0,
        max_rank: Limit = None,
        multiple_of: int = 1,
        allowed_ranks: AllowedRanks = None,
        tied: Iterable[Sequence[str]] = (),
        caps: Caps | None = None,
        fixed_costs: Mapping[str, int] | None = None,
        discount: float = 0.9,
        warmup: int = 0,
        period: int = 1,
        freeze: int | None = None,
        switching_cost: float | Mapping[str, float] = 0.0,
        switching_share: float = 0.0,
        max_moves: int | None = None,
        exploration: float = 0.0,
        time_limit: float | None = None,
    ) -> None:
        self._layers = Layers(
            costs, fixed_costs, min_rank, max_rank, multiple_of, allowed_ranks, tied, caps
        )
        self.names = self._layers.names
        none = np.zeros(len(self.names), dtype=np.int64)
        self._now = none if ranks is None else self._layers.parse_ranks(ranks, none)
        self.timetable = Timetable(
            whole_number(warmup, "warmup", 0),
            whole_number(period, "period", 1),
            None if freeze is None else whole_number(freeze, "freeze", 0),
        )
        self._estimates = CurveEstimates(
            self.names, _between(discount, "discount", 1.0, open_below=True)
        )
        named = switching_cost if isinstance(switching_cost, Mapping) else None
        for name in named or {}:
            if name not in costs:
                raise ValueError(f"switching_cost: layer {name!r} is not among the layers")
        self._switching = np.array(
            [
                _between(
                    switching_cost if named is None else named.get(name, 0.0),
                    f"switching_cost: layer {name!r}",
                    LARGEST,
                )
                for name in self.names
            ]
        )
        self.switching_share = _between(switching_share, "switching_share", LARGEST)
        self.max_moves = None if max_moves is None else whole_number(max_moves, "max_moves", 1)
        self.exploration = _between(exploration, "exploration", LARGEST)
        self.time_limit = parse_time_limit(time_limit)
        self.steps = 0
        if not isinstance(budget, BudgetSchedule):
            number = budget
            if not isinstance(budget, UniformRank):
                number = whole_number(budget, "budget", least=0)
            budget = BudgetSchedule(number, number, 0, 1)
        self.budget = budget.with_costs(self._layers.costs, self._layers.fixed_costs)
        self._layers.check_budget(self.budget.least(0, None))

    # -- the clock -------------------------------------------------------------------------------

    def step(self) -> None:
        """Say that one training step was made."""
        self.steps += 1

    def budget_at(self, step: int) -> int:
        """The budget of a step, in the units of the costs."""
        return self.budget.at(step)

    @property
    def next_due(self) -> int | None:
        """The next step, after this one, with a proposal on schedule; None if there is none."""
        return self.timetable.after(self.steps)

    @property
    def due(self) -> bool:
        """Whether it is time for a proposal: on schedule, or because a budget is exceeded."""
        return self.timetable.has(self.steps) or self.over_budget

    @property
    def over_budget(self) -> bool:
        """Whether the present ranks exceed a cap, or some budget up to the next proposal."""
        return bool(self._layers.excess(self._now, self._budget_ahead()))

    def _budget_ahead(self) -> int:
        following = self.next_due
        return self.budget.least(self.steps, None if following is None else following - 1)

    # -- ranks -----------------------------------------------------------------------------------

    @property
    def costs(self) -> dict[str, int]:
        """The cost of one rank, by name."""
        return self._layers.named(self._layers.costs)

    @property
    def fixed_costs(self) -> dict[str, int]:
        """The cost of a rank above 0, charged once, by name."""
        return self._layers.named(self._layers.fixed_costs)

    @property
    def ranks(self) -> dict[str, int]:
        """The present ranks, by name."""
        return self._layers.named(self._now)

    @property
    def cost(self) -> int:
        """What the present ranks cost."""
        return self._layers.cost_of(self._now)

    def accept(self, proposal: Proposal | Mapping[str, int]) -> None:
        """Say that these are the present ranks from now on.

        Args:
            proposal: or ranks by name; layers left out keep theirs.

        Raises:
            ValueError: a layer is unknown, or a rank is not a whole number from 0 to 2^53.
        """
        ranks = proposal.ranks if isinstance(proposal, Proposal) else proposal
        self._now = self._layers.parse_ranks(ranks, self._now)

    # -- estimates -------------------------------------------------------------------------------

    def observe(self, curves: GainCurves | Spectra | Mapping[str, Any]) -> None:
        """Take in one round of observed curves, of all layers or some.

        Args:
            curves: `GainCurves`; or `Spectra`, whose gains are the squares; or a mapping of layer
                name to the total gains F(0) = 0, F(1), ..., F(R), as any array in host memory.
                Curves may be of any length, also of another one each time: only ranks up to R are
                observed. Standard errors need gains above 1e-150 or so.

        Raises:
            ValueError: a layer is unknown, or a curve is not a 1-D array that begins with 0.

        Warns:
            UserWarning: a layer's curve is not finite (or beyond 1e140), and was left out.
        """
        self._estimates.observe(curves, stacklevel=2)

    def means(self) -> dict[str, FloatArray]:
        """The estimated curves F(0), ..., F(R) of the layers observed so far."""
        return self._estimates.means()

    def standard_errors(self) -> dict[str, FloatArray]:
        """Of the mean gain of each single rank, by layer observed; NaN where it was but once.

        They hold for independent observations of curves that do not drift.
        """
        return self._estimates.standard_errors()

    @property
    def rounds(self) -> int:
        """How many times `observe` was called."""
        return self._estimates.rounds

    @property
    def rejected(self) -> dict[str, int]:
        """By layer, how many curves were left out because they were not finite."""
        return dict(self._estimates.rejected)

    # -- proposals -------------------------------------------------------------------------------

    def propose(self) -> Proposal:
        """The best ranks by the present estimates, or the reason why to stay.

        Returns:
            A `Proposal`; carry it out and `accept` it, or leave it.

        Raises:
            ValueError: all gains are so small (below 1e-289) that they underflow.
        """
        budget = self._budget_ahead()
        excess = self._layers.excess(self._now, budget)
        if not excess and not self.timetable.has(self.steps):
            return self._stay(self.timetable.why_not(self.steps))
        if not excess and not self._estimates.curves and self._layers.allows(self._now):
            return self._stay("no layer has been observed yet")
        try:
            found, notes = self._move(budget, all_move=self.cost > budget)
        except InfeasibleError:  # limits or caps force changes that the others must pay for
            found, notes = self._move(budget, all_move=True)
        return Proposal(
            self.steps,
            self.ranks,
            self._layers.named(found.ranks),
            budget,
            "" if found.moved else self._why_stay(found),
            (*([excess] if excess else []), *notes, *found.notes(self.max_moves)),
            found.allocation,
            round_up(found.lost),
        )

    def _move(self, budget: int, *, all_move: bool) -> tuple[Move, tuple[str, ...]]:
        layers, estimates = self._layers, self._estimates
        completed = completed_curves(
            estimates.curves, layers.limits, layers.costs, self._now, all_move=all_move,
            exploration=self.exploration, rounds=estimates.total,
        )  # fmt: skip

        def move(switching: FloatArray, max_moves: int | None) -> Move:
            return best_move(
                self.names, completed.gains, self._now, switching,
                lambda curves: layers.problem(curves, budget, completed.lower, completed.upper),
                max_moves=max_moves, time_limit=self.time_limit,
            )  # fmt: skip

        switching = self._switching
        if self.switching_share:
            price = move(0 * switching, None).allocation.certificate.price
            switching = switching + (self.switching_share * price) * layers.costs.astype(np.float64)
        return move(switching, self.max_moves), completed.notes

    def _why_stay(self, found: Move) -> str:
        if found.limited:
            return f"no move within max_moves = {self.max_moves} gains anything"
        priced = self.switching_share or self._switching.any()
        return f"no move {'is worth its switching cost' if priced else 'gains anything'}"

    def _stay(self, reason: str) -> Proposal:
        return Proposal(self.steps, self.ranks, self.ranks, self._budget_ahead(), reason)

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Clock, ranks and estimates, as what JSON can hold; a restart goes on to the bit."""
        return {
            "version": _VERSION,
            "costs": self.costs,
            "steps": self.steps,
            "ranks": self.ranks,
            "estimates": self._estimates.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another allocator of the same layers and costs stood.

        Budget, limits and settings stay those that this one was made with.

        Raises:
            ValueError: the state is of another version or of other layers, or damaged.
        """
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"state: expected a mapping, got {state!r}")
        if state.get("version") != _VERSION:
            raise ValueError(f"state: expected version {_VERSION}, got {state.get('version')!r}")
        try:
            check_names(state["costs"], self.names, "costs")
            for name, cost in self.costs.items():
                if state["costs"][name] != cost:
                    raise ValueError(
                        f"layer {name!r}: expected a cost of {cost} for a rank, got "
                        f"{state['costs'][name]!r}"
                    )
            check_names(state["ranks"], self.names, "ranks")
            ranks = self._layers.parse_ranks(state["ranks"], self._now)
            steps = whole_number(state["steps"], "steps", 0)
            estimates = self._estimates.with_state(state["estimates"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state: {error}") from error
        self._now, self.steps, self._estimates = ranks, steps, estimates


def _between(value: object, where: str, greatest: float, *, open_below: bool = False) -> float:
    number = real_number(value)
    if not 0 <= number <= greatest or (open_below and not number):
        least = "above 0" if open_below else ">= 0"
        raise ValueError(
            f"{where}: expected a finite number {least} and at most {greatest:g}, got {value!r}"
        )
    return number
