"""Parts of a problem: some variables under one budget, with all else priced or held fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lorambo_alloc.caps import Row
from lorambo_alloc.curves import GainCurves
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.exact import solve_exact

_GREATEST_COST = 1 << 53


@dataclass(frozen=True)
class Charge:
    """What is taken off the gains of each layer: so much per rank, and once for a rank above 0.

    Attributes:
        per_rank: float64 by layer.
        fixed: float64 by layer.
    """

    per_rank: FloatArray
    fixed: FloatArray

    @classmethod
    def of(cls, rows: Sequence[Row], prices: Sequence[float]) -> Charge:
        """The charges of the rows' prices, rounded down: never more than what is due."""
        per_rank, fixed = np.zeros(len(rows[0].costs)), np.zeros(len(rows[0].costs))
        for row, price in zip(rows, prices, strict=True):
            if price:
                per_rank += price * row.costs
                fixed += price * row.fixed_costs
        shrink = 1 - (len(rows) + 2) * 2.0**-52
        return cls(per_rank * shrink, fixed * shrink)


@dataclass(frozen=True)
class Part:
    """The best ranks of some variables under one row.

    Attributes:
        ranks: the whole rank vector, those of other variables as they were.
        bound: no choice within the row has a greater value less charges, exactly.
    """

    ranks: IntArray
    bound: Fraction


def within_range(variables: Sequence[tuple[int, ...]], row: Row) -> bool:
    """Whether what every variable costs in a row is a cost that a problem of its own may have."""
    return all(
        sum(int(costs[i]) for i in group) <= _GREATEST_COST
        for group in variables
        for costs in (row.costs, row.fixed_costs)
    )


def best_part(
    problem: Problem,
    variables: Sequence[tuple[int, ...]],
    row: Row,
    budget: int,
    ranks: IntArray,
    charge: Charge | None = None,
    time_limit: float | None = None,
) -> Part:
    """Solve for some variables alone.

    Args:
        problem: where they come from.
        variables: tied groups or single layers that the row charges, `within_range`.
        row: the budget that they share.
        budget: how much of it is theirs; at least what their least ranks cost.
        ranks: the whole rank vector, for all others.
        charge: taken off the gains; None: nothing.
        time_limit: seconds, or None.
    """
    layers = [i for group in variables for i in group]
    native = bool(np.all(row.costs[layers] > 0)) and (charge is None or problem.concave_unit_steps)
    own, shift = (
        _native(problem, layers, row, budget, charge)
        if native
        else _merged(problem, variables, row, budget, charge)
    )
    allocation = solve_exact(own, time_limit)
    certificate = allocation.certificate
    exact = certificate.status == "optimal_exact"
    bound = own.value_of(allocation.ranks) if exact else Fraction(certificate.upper_bound)
    bound *= Fraction(2) ** -shift
    result = ranks.copy()
    if native:
        result[layers] = allocation.ranks
    else:
        for group, rank in zip(variables, allocation.ranks.tolist(), strict=True):
            result[list(group)] = rank
    return Part(result, bound)


def _native(
    problem: Problem, layers: list[int], row: Row, budget: int, charge: Charge | None
) -> tuple[Problem, int]:
    """The same layers, curves and limits; and the power of two that their gains are scaled by."""
    names = {i: str(n) for n, i in enumerate(layers)}
    shift = 0
    rows: list[FloatArray]
    if problem.gains is not None:
        rows = [problem.gains.row(i) for i in layers]
        if charge is not None:
            # Rounded up, so that the part is worth no less than it is; still descending.
            rows = [
                np.nextafter(own - taken, np.inf) if (taken := charge.per_rank[i]) else own
                for own, i in zip(rows, layers, strict=True)
            ]
        rows, shift = _in_range(rows)
        curves = GainCurves.from_increments(rows)
    else:
        assert problem.totals is not None
        rows, shift = _in_range([problem.totals.row(i) for i in layers])
        curves = GainCurves(rows)
    limits = problem.limits
    lists = {names[i]: own.tolist() for i, own in limits.lists.items() if i in names}
    part = Problem(
        curves,
        budget,
        costs=row.costs[layers].tolist(),
        fixed_costs=row.fixed_costs[layers].tolist(),
        min_rank={names[i]: int(problem.lower[i]) for i in layers},
        max_rank={names[i]: int(problem.upper[i]) for i in layers},
        multiple_of=limits.multiple_of,
        allowed_ranks=lists or None,
        tied=[[names[i] for i in group] for group in limits.groups if group[0] in names],
    )
    return part, shift


def _merged(
    problem: Problem,
    variables: Sequence[tuple[int, ...]],
    row: Row,
    budget: int,
    charge: Charge | None,
) -> tuple[Problem, int]:
    """One layer a variable, with the sum of its curves less charges, rounded up; and the scale."""
    curves: list[FloatArray] = []
    allowed: dict[str, list[int]] = {}
    costs: list[int] = []
    fixed: list[int] = []
    for n, group in enumerate(variables):
        own = problem.allowed_ranks(group[0])
        total, magnitude = np.zeros(len(own)), 0.0
        for i in group:
            curve = problem.curve(i)
            total += curve[own]
            magnitude += float(np.abs(np.diff(curve)).sum())
        if charge is not None:
            members = list(group)
            per_rank, once = charge.per_rank[members].sum(), charge.fixed[members].sum()
            taken = (per_rank * own + once * (own > 0)) * (1 - (len(group) + 4) * 2.0**-52)
            total -= taken
            magnitude += float(taken[-1])
        # Rank 0 gains nothing and costs nothing, without any rounding.
        total += np.where(own > 0, magnitude * (int(own[-1]) + len(group) + 8) * 2.0**-52, 0.0)
        # Ranks that are not allowed are worth what the next lower one is that is.
        ranks = np.arange(max(int(own[-1]), 1) + 1)
        at = np.searchsorted(own, ranks, side="right") - 1
        curves.append(np.where(at >= 0, total[at], 0.0))
        allowed[str(n)] = own.tolist()
        costs.append(sum(int(row.costs[i]) for i in group))
        fixed.append(sum(int(row.fixed_costs[i]) for i in group))
    curves, shift = _in_range(curves)
    part = Problem(
        GainCurves(curves), budget, costs=costs, fixed_costs=fixed, allowed_ranks=allowed
    )
    return part, shift


def _in_range(rows: list[FloatArray]) -> tuple[list[FloatArray], int]:
    """Scale gains that would be refused as too tiny or too large; and the power of two that does.

    What the smallest ones lose where the largest are too large is rounded up.
    """
    largest = max(float(np.max(np.abs(row), initial=0.0)) for row in rows)
    if 0 < largest < 2.0**-900:
        return [np.ldexp(row, 1000) for row in rows], 1000
    if largest <= 2.0**900:
        return rows, 0
    scaled = [np.ldexp(row, -200) for row in rows]
    return [
        np.where(np.ldexp(low, 200) < row, np.nextafter(low, np.inf), low)
        for low, row in zip(scaled, rows, strict=True)
    ], -200
