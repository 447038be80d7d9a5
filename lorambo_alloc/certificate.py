"""The certificate: how good an allocation is proved to be, and an independent check of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias, get_args

import numpy as np

from lorambo_alloc.arithmetic import round_down, round_up
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

Status: TypeAlias = Literal["optimal_exact", "optimal_within_rounding", "gap_certified"]

MEANING: dict[Status, str] = {
    "optimal_exact": "optimal: no other rank vector within the budget has a greater value",
    "optimal_within_rounding": "optimal to within the rounding of the sums, stated as the gap",
    "gap_certified": "stopped early: the gap is proved, optimality is not; more time may close it",
}

# Every finite double is a whole multiple of 2^-1074.
_PLACES = 1074


# A gap above this share of the value is not called rounding.
_ROUNDING = Fraction(1, 1 << 40)


class CertificateError(ValueError):
    """A certificate claims what is not so."""


@dataclass(frozen=True)
class Verification:
    """What `Certificate.verify` re-derived.

    Attributes:
        value: the exact value of the ranks.
        price_bound: the exact Lagrangian bound at the certificate's price.
        proof: `price` (the price alone proves the claimed bound), `search` (a search repeated in
            integers proves it), or `unfinished` (the arithmetic is right and the price bound
            holds, but repeating the search would take more than the effort allowed).
    """

    value: Fraction
    price_bound: Fraction
    proof: Literal["price", "search", "unfinished"]


@dataclass(frozen=True)
class Certificate:
    """A proved statement about the value of an allocation.

    No rank vector within the budget and the limits has a value above `upper_bound`. The bound at
    a price p >= 0 is Lagrangian duality (Everett 1963): for every feasible r,

        sum_i F_i(r_i) <= sum_i max_s (F_i(s) - p cost_i(s)) + p budget

    and a search that closed lowers it to the optimum itself.

    Attributes:
        status: `optimal_exact`, `optimal_within_rounding` or `gap_certified`; see `MEANING`.
        value: the value of the ranks in units of gain, rounded down. For the objective
            `operator`, minus the largest discarded singular value.
        upper_bound: rounded up.
        gap: what a better answer could gain at most, rounded up; 0.0 if `optimal_exact`.
        price: gain per unit of cost at the margin; what one more unit of budget is worth.
        method: the solver that made it.
    """

    status: Status
    value: float
    upper_bound: float
    gap: float
    price: float
    method: str

    @classmethod
    def of(
        cls, value: Fraction, gap: Fraction, price: float, method: str, closed: bool
    ) -> Certificate:
        """Round a proved statement outwards.

        Args:
            value: the exact value of the ranks.
            gap: a proved bound on the optimum minus the value.
            price: the price the proof used.
            method: the solver's name.
            closed: whether the search closed, so that the gap is rounding alone.
        """
        if gap == 0:
            return cls(
                "optimal_exact", round_down(value), round_up(value), 0.0, float(price), method
            )
        upper = round_up(value + gap)
        rounding = closed and gap <= _ROUNDING * abs(value)
        status: Status = "optimal_within_rounding" if rounding else "gap_certified"
        stated = round_up(Fraction(upper) - value)
        return cls(status, round_down(value), upper, stated, float(price), method)

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
            effort: how many states the repeated search may look at (2e6 take some seconds).

        Raises:
            CertificateError: the ranks break a limit or the budget, the value or a bound is not
                as claimed, or a better rank vector exists.
        """
        if self.status not in get_args(Status):
            raise CertificateError(f"unknown status {self.status!r}")
        ranks = np.asarray(ranks)
        try:
            problem.check(ranks)
        except ValueError as error:
            raise CertificateError(str(error)) from error
        if problem.objective.kind == "operator":
            return self._verify_bottleneck(problem, ranks)
        if not (math.isfinite(self.price) and self.price >= 0):
            raise CertificateError(f"expected a finite price >= 0, got {self.price}")
        responses = list(_responses(problem, ranks, self.price))
        scale = 1 << _PLACES
        value = Fraction(sum(r.value for r in responses), scale)
        self._check_claims(value)
        price = _integer(self.price)
        bound = Fraction(sum(r.best for r in responses) + price * problem.budget, scale)
        claimed = value if self.status == "optimal_exact" else Fraction(self.upper_bound)
        if claimed >= bound:
            return Verification(value, bound, "price")
        window = bound - claimed
        classes = [
            alternatives
            for response in responses
            if (alternatives := response.alternatives(price, window))
        ]
        left = problem.budget - sum(r.best_cost for r in responses)
        found = _better_exists(classes, left, price, int(window * scale), effort)
        if found:
            raise CertificateError(
                f"a rank vector within the budget has a value above the claimed bound "
                f"{self.upper_bound!r}"
            )
        return Verification(value, bound, "unfinished" if found is None else "search")

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
        worst = float(-value)
        least_cost = 0
        for group in problem.variables:
            allowed = problem.allowed_ranks(group[0])
            candidates = np.zeros(len(problem.names), dtype=np.int64)
            for rank in allowed.tolist():
                candidates[list(group)] = rank
                if np.max(problem.tails(candidates)[list(group)]) < worst:
                    least_cost += problem.cost_of(candidates)
                    break
            else:
                return Verification(value, value, "search")  # this layer cannot go below
        if worst > 0 and least_cost <= problem.budget:
            raise CertificateError(
                f"ranks of cost {least_cost} discard nothing as large as {worst!r}"
            )
        return Verification(value, value, "search")


@dataclass(frozen=True)
class _Response:
    """One variable at a price: its exact best score, and what is needed to list the others."""

    problem: Problem
    group: tuple[int, ...]
    allowed: IntArray
    scores: FloatArray
    error: float
    value: int
    best: int
    best_cost: int

    def alternatives(self, price: int, window: Fraction) -> list[tuple[int, int]]:
        """Cost change and penalty of every option less than the window from the best."""
        limit = int(window * (1 << _PLACES))
        cut = float(np.max(self.scores)) - float(window) * (1 + 2.0**-40) - 4 * self.error
        near = self.allowed[self.scores >= cut].tolist()
        result: list[tuple[int, int]] = []
        for rank, total in zip(near, _exact_totals(self.problem, self.group, near), strict=True):
            cost = self.problem.cost_at(self.group, rank)
            penalty = self.best - (total - price * cost)
            if penalty < limit and cost != self.best_cost:
                result.append((cost - self.best_cost, penalty))
        return result


def _responses(problem: Problem, ranks: IntArray, price: float) -> Iterator[_Response]:
    """Each variable's best response to the price, exactly; doubles only narrow the choice."""
    price_units = _integer(price)
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0])
        unit = float(sum(int(problem.costs[i]) for i in group))
        fixed = float(sum(int(problem.fixed_costs[i]) for i in group))
        curve, magnitude = np.zeros(len(allowed)), 0.0
        for i in group:
            row = problem.curve(i)
            curve += row[allowed]
            magnitude += float(np.abs(np.diff(row)).sum()) + float(np.abs(row).max())
        cost = unit * allowed + fixed * (allowed > 0)
        scores = curve - price * cost
        terms = int(allowed[-1]) + len(group) + 8
        error = 2.0**-52 * terms * (magnitude + price * float(cost[-1])) + 2.0**-1070
        near = allowed[scores >= np.max(scores) - 4 * error].tolist()
        mine = int(ranks[group[0]])
        totals = _exact_totals(problem, group, [*near, mine])
        exact = [
            (total - price_units * (cost := problem.cost_at(group, rank)), -cost)
            for rank, total in zip(near, totals, strict=False)
        ]
        best, minus_cost = max(exact)
        yield _Response(
            problem, group, allowed, scores, error, totals[-1], best, -minus_cost
        )


def _better_exists(
    classes: list[list[tuple[int, int]]], left: int, price: int, window: int, effort: int
) -> bool | None:
    """Whether some choice of one option a class loses less than the window; None: too long.

    A plain dynamic program over the change of cost, one class after another, in integers.
    """
    unlimited = window + 1
    slopes = [
        (
            min((p // d for d, p in options if d > 0), default=unlimited),
            min((p // -d for d, p in options if d < 0), default=unlimited),
        )
        for options in classes
    ]
    order = sorted(range(len(classes)), key=lambda n: min(slopes[n]))
    spend, free = [price], [unlimited]
    for n in reversed(order):
        spend.append(min(spend[-1], slopes[n][0]))
        free.append(min(free[-1], slopes[n][1]))
    spend.reverse()
    free.reverse()
    states = {0: 0}
    if 0 <= left and price * left < window:
        return True
    looked = 0
    for depth, n in enumerate(order, start=1):
        fresh: dict[int, int] = {}
        for move, penalty in states.items():
            for change, extra in ((0, 0), *classes[n]):
                total, at = penalty + extra, move + change
                rest = left - at
                bound = total + (spend[depth] * rest if rest >= 0 else free[depth] * -rest)
                if bound >= window:
                    continue
                if rest >= 0 and total + price * rest < window:
                    return True
                if total < fresh.get(at, window):
                    fresh[at] = total
        looked += len(states) * (len(classes[n]) + 1)
        if looked > effort:
            return None
        states, least = {}, None
        for at in sorted(fresh):
            shortfall = fresh[at] - price * at
            if least is None or shortfall < least:
                states[at], least = fresh[at], shortfall
    return False


def _exact_totals(problem: Problem, group: tuple[int, ...], ranks: list[int]) -> list[int]:
    """F at some ranks, summed over the group, in units of 2^-1074."""
    totals = [0] * len(ranks)
    for i in group:
        if problem.gains is None:
            assert problem.totals is not None
            row = problem.totals.row(i)
            for n, rank in enumerate(ranks):
                totals[n] += _integer(float(row[rank]))
            continue
        gains = problem.gains.row(i)
        running, reached = 0, 0
        for n in sorted(range(len(ranks)), key=ranks.__getitem__):
            running += sum(map(_integer, gains[reached : ranks[n]].tolist()))
            reached = max(reached, ranks[n])
            totals[n] += running
    return totals


def _integer(value: float) -> int:
    """A double in units of 2^-1074, exactly."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (_PLACES - denominator.bit_length() + 1)
