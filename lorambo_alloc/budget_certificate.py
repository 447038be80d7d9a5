"""The certificate of a cheapest budget: the value is reached, and nothing cheaper reaches it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias, get_args

from lorambo_alloc.certificate import Verification
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.verification import (
    SCALE,
    CertificateError,
    Charges,
    better_exists,
    integer,
    lefts_and_prices,
    responses,
)

_Status: TypeAlias = Literal["optimal_exact", "gap_certified"]


@dataclass(frozen=True)
class BudgetCertificate:
    """A proved statement about the cost of reaching a value.

    The ranks have at least the target's value, and no rank vector that costs less than
    `lower_bound` has. That rests on Lagrangian duality at the price, for a budget of one unit less
    than the bound, and where the price alone does not prove it, on a search.

    Attributes:
        status: `optimal_exact` (cost and lower bound are equal) or `gap_certified` (the search
            stopped early; the least cost lies between the two).
        target: the value to reach, exactly.
        value: the exact value of the ranks.
        cost: what the ranks cost.
        lower_bound: no ranks of a lower cost reach the target.
        price: gain per unit of cost, as the proof uses it; 1 / price is about what one more unit
            of gain costs here.
        cap_prices: gain per unit of each cap.
    """

    status: _Status
    target: Fraction
    value: Fraction
    cost: int
    lower_bound: int
    price: float
    cap_prices: tuple[float, ...] = ()

    def verify(self, problem: Problem, ranks: IntArray, effort: int = 2_000_000) -> Verification:
        """Re-derive the certificate from the problem alone, in rational arithmetic.

        Args:
            problem: the problem, at any budget.
            ranks: the rank vector, int by layer.
            effort: how many states a repeated search may look at.

        Raises:
            CertificateError: the ranks break a limit, value or cost are not as claimed, or ranks
                cheaper than the lower bound reach the target.
        """
        try:
            problem.with_budget(self.cost).check(ranks)
        except ValueError as error:
            raise CertificateError(str(error)) from error
        cost, value = problem.cost_of(ranks), problem.value_of(ranks)
        if (cost, value) != (self.cost, self.value) or value < self.target:
            raise CertificateError(
                f"the ranks cost {cost} and have value {float(value)!r}; the certificate claims "
                f"{self.cost} and {float(self.value)!r}, for a target of {float(self.target)!r}"
            )
        if self.status not in get_args(_Status):
            raise CertificateError(f"unknown status {self.status!r}")
        if self.lower_bound > cost or (self.status == "optimal_exact" and self.lower_bound < cost):
            raise CertificateError(
                f"expected a lower bound up to the cost {cost}, equal to it if that is optimal, "
                f"got {self.lower_bound}"
            )
        if self.lower_bound <= problem.cost_of(problem.lower):
            return Verification(value, value, "price")
        cheaper = problem.with_budget(self.lower_bound - 1)
        prices = (self.price, *(self.cap_prices or (0.0,) * len(problem.caps)))
        if not all(0 <= price < math.inf for price in prices) or len(prices) != len(problem.rows):
            raise CertificateError(f"expected finite prices >= 0, one a budget, got {prices!r}")
        answers = list(responses(cheaper, ranks, Charges.of(cheaper, prices)))
        bound = sum(r.best for r in answers)
        for price, row in zip(prices, cheaper.rows, strict=True):
            bound += integer(price) * row.budget
        # A value of the target or more loses no more than this to the bound.
        window = bound - math.ceil(self.target * SCALE) + 1
        if window <= 0:
            return Verification(value, Fraction(bound, SCALE), "price")
        found = better_exists(
            [
                moves
                for response in answers
                if (moves := response.moves(cheaper.rows, Fraction(window, SCALE)))
            ],
            *lefts_and_prices(cheaper.rows, prices, answers),
            window,
            effort,
        )
        if found:
            raise CertificateError(
                f"ranks that cost less than {self.lower_bound} reach the target too"
            )
        proof = "unfinished" if found is None else "search"
        return Verification(value, Fraction(bound, SCALE), proof)
