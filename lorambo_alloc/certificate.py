"""The certificate: how good an allocation is proved to be, and an independent check of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias, cast, get_args

import numpy as np

from lorambo_alloc.arithmetic import round_down, round_up
from lorambo_alloc.laminar import exchange_optimal
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.searched_caps import better_within
from lorambo_alloc.verification import (
    SCALE,
    CertificateError,
    Charges,
    better_exists,
    integer,
    lefts_and_prices,
    responses,
    two_price_bound,
    value_step,
)

Status: TypeAlias = Literal[
    "optimal_exact", "optimal_within_rounding", "gap_certified", "ratio_certified"
]

MEANING: dict[Status, str] = {
    "optimal_exact": "optimal: no rank vector within the budget and the limits has a greater value",
    "optimal_within_rounding": "optimal to within the rounding of the sums, stated as the gap",
    "gap_certified": "stopped early: the gap is proved, optimality is not; more time may close it",
    "ratio_certified": "within the stated ratio of the optimum by a theorem; the gap is proved too",
}


# A gap above this share of the value is not called rounding.
_ROUNDING = Fraction(1, 1 << 40)


@dataclass(frozen=True)
class Verification:
    """What `Certificate.verify` re-derived.

    Attributes:
        value: the exact value of the ranks.
        price_bound: the exact Lagrangian bound at the certificate's price.
        proof: `price` (the prices alone prove the claimed bound), `two prices` (with one on the
            number of ranks), `exchange` (no single exchange improves, which suffices in a
            matroid), `search` (a search repeated in integers proves it), or `unfinished` (the
            arithmetic is right and the price bound holds, but repeating the search would take
            more than the effort allowed).
        given_constraints: whether the bound speaks only of ranks that satisfy constraints of the
            caller's own, of which the problem knows nothing: what the certificate says of them
            is taken on trust.
    """

    value: Fraction
    price_bound: Fraction
    proof: Literal["price", "two prices", "exchange", "search", "unfinished"]
    given_constraints: bool = False

    @property
    def complete(self) -> bool:
        """Whether all that the certificate claims was proved again from the problem alone."""
        return self.proof != "unfinished" and not self.given_constraints


@dataclass(frozen=True)
class Certificate:
    """A proved statement about the value of an allocation.

    No rank vector within the budget and the limits has a value above `upper_bound`. The bound at
    a price p >= 0 is Lagrangian duality (Everett 1963): for every feasible r,

        sum_i F_i(r_i) <= sum_i max_s (F_i(s) - p cost_i(s)) + p budget

    with a price and a term of its own for every cap, and a search that closed lowers it to the
    optimum itself.

    Attributes:
        status: `optimal_exact`, `optimal_within_rounding`, `gap_certified` or `ratio_certified`;
            see `MEANING`.
        value: the value of the ranks in units of gain, rounded down. For the objective
            `operator`, minus the largest discarded singular value.
        upper_bound: rounded up.
        gap: what a better answer could gain at most, rounded up; 0.0 if `optimal_exact`.
        price: gain per unit of cost at which best responses cross the budget; about what one
            more unit of budget is worth. 0 where the budget does not bind.
        method: the solver that made it.
        cut: where the number of ranks is priced too (see `solvers.cardinality`): the price per
            unit of cost and the price per rank of that bound.
        cap_prices: gain per unit of each cap, in the order of the problem's caps; empty without.
        within: names of caps within which a search stood in for the cap's price, and how much
            another choice within it could gain at the prices of all other budgets.
        side: from constraints of the caller's own: the charge per rank of each layer, and what
            those of any ranks that satisfy the constraints sum up to at most. The bound is then
            one for such ranks only.
        ratio: of a greedy answer, the share of the optimum that the theorem promises; else 0.
        theorem: where that promise comes from.
    """

    status: Status
    value: float
    upper_bound: float
    gap: float
    price: float
    method: str
    cut: tuple[float, float] | None = None
    cap_prices: tuple[float, ...] = ()
    within: tuple[tuple[str, float], ...] = ()
    side: tuple[tuple[float, ...], float] | None = None
    ratio: float = 0.0
    theorem: str = ""

    @classmethod
    def of(
        cls,
        value: Fraction,
        gap: Fraction,
        price: float,
        method: str,
        *,
        closed: bool,
        cut: tuple[float, float] | None = None,
        cap_prices: Sequence[float] = (),
        within: Sequence[tuple[str, float]] = (),
        side: tuple[tuple[float, ...], float] | None = None,
    ) -> Certificate:
        """Round a proved statement outwards.

        Args:
            value: the exact value of the ranks.
            gap: a proved bound on the optimum minus the value.
            price: the price the proof used.
            method: the solver's name.
            closed: whether the search closed, so that the gap is rounding alone.
            cut: the prices of a bound with a price per rank, where one was used.
            cap_prices: the prices of the caps.
            within: the caps that were searched, and what that leaves open.
            side: a linear consequence of the caller's own constraints.
        """
        upper = round_up(value + gap)
        status: Status = "optimal_exact"
        stated = 0.0
        if gap:
            rounding = closed and gap <= _ROUNDING * abs(value)
            status = "optimal_within_rounding" if rounding else "gap_certified"
            stated = round_up(Fraction(upper) - value)
        return cls(
            status,
            round_down(value),
            upper,
            stated,
            float(price),
            method,
            cut,
            tuple(map(float, cap_prices)),
            tuple(within),
            side,
        )

    @property
    def relative_gap(self) -> float:
        """The gap as a share of the value."""
        if self.gap == 0:
            return 0.0
        return self.gap / abs(self.value) if self.value else math.inf

    def verify(self, problem: Problem, ranks: IntArray, effort: int = 2_000_000) -> Verification:
        """Re-derive the certificate from the problem alone, in rational arithmetic.

        Cost, value and the bound at the price are recomputed. A claimed bound below the price's
        bound rests on a search, which is repeated here by another, simpler program.

        Args:
            problem: the problem, as the allocation carries it.
            ranks: the rank vector, int by layer.
            effort: how many states the repeated search may look at (2e6 take some seconds); with
                searched caps, in each of them.

        Raises:
            CertificateError: the ranks break a limit or the budget, the value or a bound is not
                as claimed, or a better rank vector exists.
        """
        if self.status not in get_args(Status):
            raise CertificateError(f"unknown status {self.status!r}")
        try:
            ranks = problem.parse_ranks(ranks)
            problem.check(ranks)
        except ValueError as error:
            raise CertificateError(str(error)) from error
        prices = self._prices(problem)
        searched = self._searched(problem)
        if problem.objective.kind == "operator":
            return self._verify_bottleneck(problem, ranks)
        weights, limit = self._side(problem)
        charges = Charges.of(problem, prices, weights=weights)
        answers = list(responses(problem, ranks, charges))
        value = Fraction(sum(r.value for r in answers), SCALE)
        self._check_claims(value)
        terms = zip(map(integer, prices), problem.rows, strict=True)
        units = sum(r.best for r in answers) + sum(price * row.budget for price, row in terms)
        bound = Fraction(units + integer(limit), SCALE)
        if self.status == "ratio_certified" and not (
            _is_price(self.ratio) and value >= Fraction(self.ratio) * bound
        ):
            raise CertificateError(
                f"the value {self.value!r} is not proved to be {self.ratio!r} of the optimum"
            )
        given = self.side is not None
        claimed = value if self.status == "optimal_exact" else Fraction(self.upper_bound)
        if claimed >= bound:
            return Verification(value, bound, "price", given)
        if self._cut_proves(problem, ranks, claimed, bound):
            return Verification(value, bound, "two prices")
        if exchange_optimal(problem, ranks):
            return Verification(value, bound, "exchange")
        if searched:
            found = better_within(
                problem, ranks, prices, searched, answers, claimed - value, effort
            )
        else:
            window = bound - claimed
            found = better_exists(
                [moves for response in answers if (moves := response.moves(problem.rows, window))],
                *lefts_and_prices(problem.rows, prices, answers),
                int(window * SCALE),
                effort,
            )
        if found and given:  # what was found may break the constraints, which are not known here
            raise CertificateError(
                f"the charges do not prove the claimed bound {self.upper_bound!r}"
            )
        if found:
            raise CertificateError(
                f"a rank vector within the budget has a value above the claimed bound "
                f"{self.upper_bound!r}"
            )
        return Verification(value, bound, "unfinished" if found is None else "search", given)

    def _prices(self, problem: Problem) -> tuple[float, ...]:
        """The price of each of the problem's rows; CertificateError if they are no prices."""
        caps = self.cap_prices or (0.0,) * len(problem.caps)
        if not (
            isinstance(caps, tuple)  # pyright: ignore[reportUnnecessaryIsInstance]
            and all(map(_is_price, (self.price, *caps)))
            and len(caps) == len(problem.caps)
            and self._cut_is_well_formed()
        ):
            raise CertificateError(
                f"expected finite prices >= 0 per unit of cost, one a budget, got {self.price!r}, "
                f"{self.cap_prices!r}, {self.cut!r}"
            )
        return (self.price, *caps)

    def _side(self, problem: Problem) -> tuple[tuple[float, ...], float]:
        """The charges that come from the caller's constraints, and their limit."""
        if self.side is None:
            return (), 0.0
        if self.within:
            raise CertificateError("charges from constraints and searched caps do not go together")
        pair = cast(tuple[object, ...], self.side)
        if isinstance(self.side, tuple) and len(pair) == 2 and isinstance(pair[0], tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
            weights = cast(tuple[float, ...], pair[0])
            if len(weights) == len(problem.names) and all(map(_is_finite, (*weights, pair[1]))):
                return weights, cast(float, pair[1])
        raise CertificateError("expected finite charges from constraints, one a layer")

    def _searched(self, problem: Problem) -> list[tuple[int, float]]:
        """Row and slack of the searched caps; CertificateError if they are none."""
        rows = {row.name: k for k, row in enumerate(problem.rows) if row.name}
        searched: list[tuple[int, float]] = []
        if not isinstance(self.within, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CertificateError(f"expected names of searched caps, got {self.within!r}")
        for entry in cast(tuple[object, ...], self.within):
            match entry:
                case (str(name), float(slack)) if rows.get(name) and _is_price(slack):
                    searched.append((rows.pop(name), slack))
                case _:
                    raise CertificateError(
                        f"expected a search within different caps, got {entry!r}"
                    )
        return searched

    def _cut_is_well_formed(self) -> bool:
        match cast(object, self.cut):  # it may come from a file
            case None:
                return True
            case (float(price), float(rank_price)):
                return _is_price(price) and _is_price(abs(rank_price))
            case _:
                return False

    def _cut_proves(
        self, problem: Problem, ranks: IntArray, claimed: Fraction, bound: Fraction
    ) -> bool:
        """Whether the two prices show that no value above the claimed one is possible."""
        if self.cut is None or not problem.concave_unit_steps or self.price <= 0:
            return False
        if problem.caps or self.side is not None:
            return False
        # A value above `claimed` leaves so little of the price's bound for unspent budget.
        waste = math.floor((bound - claimed) / Fraction(self.price))
        proved = two_price_bound(problem, ranks, self.cut, waste)
        # Values are multiples of a step: the next one above `claimed` may already be too much.
        step = value_step(problem)
        return step > 0 and (math.floor(claimed / step) + 1) * step > proved

    def _check_claims(self, value: Fraction) -> None:
        """The rounded figures against the exact value."""
        if self.value != round_down(value):
            raise CertificateError(
                f"the ranks have value {round_down(value)!r}, the certificate claims {self.value!r}"
            )
        if self.status == "optimal_exact":
            if self.upper_bound != round_up(value) or self.gap != 0:
                raise CertificateError(
                    f"an optimal value {self.value!r} needs the bound {round_up(value)!r} and gap "
                    f"0, the certificate claims {self.upper_bound!r} and {self.gap!r}"
                )
        elif self.status == "optimal_within_rounding" and self.gap > _ROUNDING * abs(value) * 2:
            raise CertificateError(f"a gap of {self.gap!r} is more than rounding")
        elif not (
            math.isfinite(self.upper_bound)
            and self.upper_bound >= value
            and self.gap >= Fraction(self.upper_bound) - value
        ):
            raise CertificateError(
                f"the bound {self.upper_bound!r} and gap {self.gap!r} do not cover the value "
                f"{self.value!r}"
            )

    def _verify_bottleneck(self, problem: Problem, ranks: IntArray) -> Verification:
        value = problem.value_of(ranks)
        self._check_claims(value)
        # What a better answer than the claimed bound would have to stay below.
        worst = float(-value) if self.status == "optimal_exact" else -self.upper_bound
        least_cost = 0
        for group in problem.variables:
            allowed = problem.allowed_ranks(group[0])
            below = np.ones(len(allowed), dtype=bool)
            for i in group:
                discarded = np.append(problem.curves.layers.row(i), 0.0)[allowed]
                if problem.weights is not None:
                    discarded = discarded * problem.weights[i]
                below &= discarded < worst
            if not below.any():
                return Verification(value, value, "search")  # these layers cannot go below
            least_cost += problem.cost_at(group, int(allowed[np.argmax(below)]))
        if worst > 0 and least_cost <= problem.budget:
            raise CertificateError(
                f"ranks of cost {least_cost} discard nothing as large as {worst!r}"
            )
        return Verification(value, value, "search")


def _is_finite(value: object) -> bool:
    """Whether a figure of a certificate is a finite number."""
    return isinstance(value, float) and math.isfinite(value)


def _is_price(value: object) -> bool:
    """Whether a figure of a certificate is a finite number >= 0."""
    return isinstance(value, float) and 0 <= value < math.inf
