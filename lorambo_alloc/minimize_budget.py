"""The inverse question: the cheapest ranks that capture enough, with a proof of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.budget_certificate import BudgetCertificate
from lorambo_alloc.caps import Caps
from lorambo_alloc.certificate import Certificate, Verification
from lorambo_alloc.costs import PerLayer
from lorambo_alloc.hulls import concave_hulls
from lorambo_alloc.limits import AllowedRanks, Limit
from lorambo_alloc.objectives import IntArray, Objective, real_number
from lorambo_alloc.problem import Problem
from lorambo_alloc.solve import solve
from lorambo_alloc.verification import (
    SCALE,
    Charges,
    integer,
    responses,
)


class CheapestRanks(Mapping[str, int]):
    """The cheapest ranks that reach a value: layer name to rank.

    Attributes:
        allocation: the ranks as an allocation at their own cost; of all ranks that cost no more,
            they have the greatest value (to the allocation's own certificate).
        certificate: the proof that less does not suffice.
    """

    def __init__(self, allocation: Allocation, certificate: BudgetCertificate) -> None:
        self.allocation = allocation
        self.certificate = certificate

    def __getitem__(self, name: str) -> int:
        return self.allocation[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.allocation)

    def __len__(self) -> int:
        return len(self.allocation)

    @property
    def ranks(self) -> IntArray:
        """Int64 by layer, in the order of the layers."""
        return self.allocation.ranks

    @property
    def cost(self) -> int:
        """What the ranks cost: the least budget that reaches the target."""
        return self.certificate.cost

    @property
    def value(self) -> float:
        """The sum of the gains, rounded down."""
        return self.allocation.value

    def verify(self) -> Verification:
        """Check the certificate; see `BudgetCertificate.verify`."""
        return self.certificate.verify(self.allocation.problem, self.ranks)

    def __repr__(self) -> str:
        own = self.certificate
        proof = f"no ranks that cost less than {own.lower_bound:,} reach it"
        return f"{self.allocation!r}\ntarget    {float(own.target):.6g} reached; {proof}"


def minimize_budget(
    spectra: object,
    target: float = 0.95,
    *,
    value: float | None = None,
    shapes: PerLayer[tuple[int, int]] | None = None,
    costs: PerLayer[int] | None = None,
    fixed_costs: PerLayer[int] | None = None,
    objective: str | Objective = "frobenius",
    weights: PerLayer[float] | None = None,
    min_rank: Limit = 0,
    max_rank: Limit = None,
    multiple_of: int = 1,
    allowed_ranks: AllowedRanks = None,
    tied: Iterable[Sequence[str]] = (),
    caps: Caps | None = None,
    time_limit: float | None = None,
) -> CheapestRanks:
    """The cheapest ranks that capture a share of the gain, and the proof of it.

    The relaxation's price bounds the least cost from below, and its whole steps from above. Between
    the two, the exact solver decides whether a budget suffices, from the lower bound upwards; each
    answer is a proof, so the result is exact.

    Args:
        spectra: as `allocate` takes it, and so are all limits.
        target: the share of the attainable gain to capture, from 0 to 1; attainable is what the
            limits (and caps) allow at any budget; where caps and a time limit leave that open, the
            greatest that was found.
        value: instead of a share, the value to reach, in units of gain.
        shapes: name to (d, k); a rank costs d + k parameters.
        costs: name to the cost of one rank, whole numbers >= 1.
        fixed_costs: name to a cost charged once if the layer's rank is above 0.
        objective: "frobenius", "nuclear", `schatten(p)` or `log(noise)`.
        weights: name to a factor >= 0 on the layer's gains.
        min_rank: the least rank, for all layers or by name.
        max_rank: the greatest rank, for all layers or by name.
        multiple_of: ranks are multiples of this.
        allowed_ranks: the ranks to choose from, for all layers or by name.
        tied: groups of layer names that share one rank.
        caps: side budgets on groups of layers.
        time_limit: seconds after which to stop with a certified gap; None: no limit.

    Returns:
        A `CheapestRanks`: a mapping of layer name to rank, with its certificate.

    Raises:
        ValueError: an argument is not of its form, no ranks reach the value (or none were found,
            where caps leave open whether any do), or the greatest ranks cost 2^62 or more.

    References:
        Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, section 13.3.3 (the minimisation
        knapsack).

    Example:
        >>> spectra = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}
        >>> cheapest = minimize_budget(spectra, 0.9, costs={"q": 16, "v": 12})
        >>> dict(cheapest), cheapest.cost, cheapest.certificate.status
        ({'q': 2, 'v': 1}, 44, 'optimal_exact')
    """
    problem = Problem(
        spectra,
        (1 << 62) - 1,
        shapes=shapes,
        costs=costs,
        fixed_costs=fixed_costs,
        objective=objective,
        weights=weights,
        min_rank=min_rank,
        max_rank=max_rank,
        multiple_of=multiple_of,
        allowed_ranks=allowed_ranks,
        tied=tied,
        caps=caps,
    )
    if problem.objective.kind == "operator":
        raise ValueError("objective: minimize_budget needs gains that add up; 'operator' has none")
    if problem.cost_of(problem.upper) >= 1 << 62:
        raise ValueError(
            "costs: expected greatest ranks that cost less than 2^62 together, got "
            f"{problem.cost_of(problem.upper)}; divide by a common factor or limit the ranks"
        )
    deadline = None if time_limit is None else time.monotonic() + real_number(time_limit)
    best = solve(problem, time_limit=time_limit)
    wanted = _wanted(problem, best, target, value)
    return _Bracket(problem, wanted, best, deadline).close()


def _wanted(problem: Problem, best: Allocation, target: float, value: float | None) -> Fraction:
    """The value to reach, exactly."""
    attainable = problem.value_of(best.ranks)
    if value is None:
        share = real_number(target)
        if not 0 <= share <= 1:
            raise ValueError(f"target: expected a share from 0 to 1, got {target!r}")
        if attainable < 0:
            raise ValueError(
                f"target: the limits allow {float(attainable)!r} at most; a share of a loss has "
                "no meaning; give `value` instead"
            )
        return Fraction(share) * attainable
    wanted = real_number(value)
    if not math.isfinite(wanted):
        raise ValueError(f"value: expected a finite number, got {value!r}")
    if Fraction(wanted) > attainable:
        most = best.certificate.upper_bound if best.certificate.gap else best.value
        if wanted <= most and best.certificate.gap:
            raise ValueError(
                f"value: no ranks of {value!r} were found; the best that were have {best.value!r}, "
                f"and the limits allow {most!r} at most"
            )
        raise ValueError(f"value: expected at most {most!r}, what the limits allow, got {value!r}")
    return Fraction(wanted)


class _Bracket:
    """A cost that is proved too little, less than one unit, and ranks that reach the target."""

    def __init__(
        self, problem: Problem, wanted: Fraction, best: Allocation, deadline: float | None
    ) -> None:
        self._problem = problem
        self._wanted = wanted
        self._deadline = deadline
        self._best = best
        self._step = _cost_step(problem)
        self._prices = (0.0,) * len(problem.rows)
        least = problem.cost_of(problem.lower)
        self.low = least
        if problem.value_of(problem.lower) >= wanted:
            self._best = solve(problem.with_budget(least))
        else:
            self._relax()
        self.high = self._best.cost

    def close(self) -> CheapestRanks:
        """Ask the exact solver from the lower bound upwards, in growing strides, till both meet."""
        stride = 0
        while self.low < self.high:
            budget = min(self.low + stride * self._step, self.high - self._step)
            answer = solve(self._problem.with_budget(budget), time_limit=self._left())
            certificate = answer.certificate
            if self._problem.value_of(answer.ranks) >= self._wanted:
                self._best, self.high = answer, answer.cost
                # Between the last budget that did not suffice and this one, halve.
                stride = (self.high - self.low) // (2 * self._step)
            elif Fraction(certificate.upper_bound) < self._wanted or (
                certificate.status == "optimal_exact"
            ):
                self.low = budget + self._step
                self._prices = (certificate.price, *(certificate.cap_prices or ()))
                stride = 2 * stride + 1 if stride else 1
            else:
                break  # undecided when the time was over
        return self._result()

    def _relax(self) -> None:
        """Lower bound and first ranks from the relaxation: steps along the hulls by density."""
        problem = self._problem
        hulls = concave_hulls(problem)
        hulls = hulls.select(hulls.gains > 0)
        members = problem.variables
        unit = np.array([sum(int(problem.costs[i]) for i in group) for group in members])
        fixed = np.array([sum(int(problem.fixed_costs[i]) for i in group) for group in members])
        costs = unit[hulls.variables] * (hulls.high - hulls.low)
        costs += fixed[hulls.variables] * (hulls.low == 0)
        shift = 900 - math.frexp(float(np.max(hulls.gains, initial=0.0)))[1]
        density = np.ldexp(hulls.gains, shift) / costs
        order = np.argsort(-density, kind="stable")
        values = float(problem.value_of(problem.lower)) + np.cumsum(hulls.gains[order])
        count = int(np.searchsorted(values, float(self._wanted)))
        if count == len(order):
            count = max(count - 1, 0)
        if not len(order):
            return
        price = float(np.ldexp(density[order[count]], -shift))
        ranks = problem.lower.copy()
        for n in order[: count + 1].tolist():
            ranks[list(members[hulls.variables[n]])] = hulls.high[n]
        # Caps may forbid these ranks, and rounding may leave them a trifle short.
        if problem.fits(ranks) and problem.value_of(ranks) >= self._wanted:
            self._best = self._best_beside(ranks)
        if price > 0:
            self._prices = (price, *(0.0 for _ in problem.caps))
            self.low = max(self.low, self._least_cost(price))

    def _least_cost(self, price: float) -> int:
        """By duality, what any ranks of the wanted value cost at least; caps could only add."""
        problem = self._problem
        answers = responses(problem, problem.lower, Charges.of(problem, self._prices))
        most = Fraction(sum(response.best for response in answers), SCALE)
        cost = math.ceil((self._wanted - most) / Fraction(price))
        least = problem.cost_of(problem.lower)
        return least + max(-(-(cost - least) // self._step), 0) * self._step

    def _best_beside(self, ranks: IntArray) -> Allocation:
        """The best ranks at what these cost; these themselves where the time was too short."""
        problem = self._problem.with_budget(self._problem.cost_of(ranks))
        best = solve(problem, time_limit=self._left())
        if problem.value_of(best.ranks) >= self._wanted:
            return best
        own = best.certificate
        prices = (own.price, *(own.cap_prices or (0.0,) * len(problem.caps)))
        answers = responses(problem, ranks, Charges.of(problem, prices))
        units = sum(response.best - response.value for response in answers)
        for price, row in zip(prices, problem.rows, strict=True):
            units += integer(price) * row.budget
        value, gap = problem.value_of(ranks), Fraction(units, SCALE)
        stated = Certificate.of(
            value, gap, own.price, own.method, closed=False, cap_prices=own.cap_prices
        )
        return Allocation(problem, ranks, stated)

    def _result(self) -> CheapestRanks:
        problem, best = self._problem, self._best
        if best.budget != best.cost:
            best = self._best_beside(best.ranks)
        certificate = BudgetCertificate(
            "optimal_exact" if self.low >= best.cost else "gap_certified",
            self._wanted,
            problem.value_of(best.ranks),
            best.cost,
            min(self.low, best.cost),
            self._prices[0],
            self._prices[1:],
        )
        return CheapestRanks(best, certificate)

    def _left(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)


def _cost_step(problem: Problem) -> int:
    """All rank vectors cost as much as the least ranks, and a multiple of this."""
    step = 0
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0])
        first = problem.cost_at(group, int(allowed[0]))
        if len(allowed) > 1:
            # The first step may carry the fixed cost; all others are multiples of the unit.
            unit = sum(int(problem.costs[i]) for i in group)
            widths = int(np.gcd.reduce(np.diff(allowed[1:]))) if len(allowed) > 2 else 0
            step = math.gcd(step, problem.cost_at(group, int(allowed[1])) - first, unit * widths)
    return step or 1
