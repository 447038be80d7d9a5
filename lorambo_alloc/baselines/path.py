"""From the order in which a rule gives ranks to ranks within the budget, and what they lack."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solve import solve

Arrivals: TypeAlias = Callable[[int, IntArray], FloatArray]
"""When a rule gives a layer each of its allowed ranks.

From a layer's index and its allowed ranks (ascending) to one moment for every rank but the first;
infinity: never. Thresholds and scales are moments alike: the later, the more ranks are given.
"""


def follow(problem: Problem, arrivals: Arrivals, *, fill: bool = False) -> IntArray:
    """The ranks at the last moment of a rule at which they fit the budget and the caps.

    Ranks that arrive at the same moment are given together or not at all.

    Args:
        problem: the limits and budgets.
        arrivals: when the rule gives which rank. A tied group waits for the last of its layers.
        fill: go on, one rank at a time (of equal moments the first layer's), past ranks that do
            not fit, until nothing that the rule ever gives fits.

    Returns:
        int64 by layer, feasible.
    """
    variables = problem.variables
    allowed = [problem.allowed_ranks(layers[0]) for layers in variables]
    moments: list[FloatArray] = [np.zeros(0)]
    for layers, ranks in zip(variables, allowed, strict=True):
        latest = np.max([arrivals(i, ranks) for i in layers], axis=0)
        moments.append(np.maximum.accumulate(latest))
    counts = np.array([len(ranks) - 1 for ranks in allowed], dtype=np.int64)
    owners = np.repeat(np.arange(len(variables)), counts)
    moment = np.concatenate(moments)
    order = np.argsort(moment, kind="stable")
    order = order[: np.count_nonzero(moment < np.inf)]
    moment, owners = moment[order], owners[order]

    starts = np.cumsum(counts + 1) - (counts + 1)
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *allowed])
    variable_of = np.zeros(len(problem.names), dtype=np.int64)
    for v, layers in enumerate(variables):
        variable_of[list(layers)] = v

    def ranks_at(steps: IntArray) -> IntArray:
        """The ranks after so many steps of each variable."""
        return flat[starts + steps][variable_of]

    def steps_of(count: int) -> IntArray:
        """The steps of each variable among the first `count`."""
        return np.bincount(owners[:count], minlength=len(variables))

    # Costs grow with the moments: the last end of a moment that fits is found by bisection.
    ends = [0, *(np.flatnonzero(moment[1:] > moment[:-1]) + 1).tolist(), len(owners)]
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if problem.fits(ranks_at(steps_of(ends[middle]))):
            low = middle
        else:
            high = middle - 1
    steps = steps_of(ends[low])
    if fill:
        # What does not fit now never will: the rest of the budget only shrinks.
        full: set[int] = set()
        for v in owners[ends[low] :].tolist():
            if v not in full:
                steps[v] += 1
                if not problem.fits(ranks_at(steps)):
                    steps[v] -= 1
                    full.add(v)
    return ranks_at(steps)


def followed(problem: Problem, arrivals: Arrivals, method: str, fill: bool) -> Allocation:
    """The ranks of `follow`, certified under the rule's name."""
    return certified(problem, follow(problem, arrivals, fill=fill), method)


def certified(problem: Problem, ranks: IntArray, method: str) -> Allocation:
    """Ranks from anywhere, with a proved bound on what they lack to the optimum.

    The bound is that of the price at which best responses cross the budget (Everett 1963), and
    of one for each cap; for the objective `operator` it is the optimum. The status is
    `gap_certified`, or `optimal_exact` where the ranks reach the bound.

    Args:
        problem: the problem.
        ranks: one whole number a layer, in layer order; within the limits and the budget.
        method: what the certificate calls their origin.

    Raises:
        ValueError: the ranks break a limit, the budget or a cap; or the problem has caps and the
            objective `operator`, which no solver takes together.

    References:
        Everett, Generalized Lagrange multiplier method, Operations Research 11, 1963, theorem 1.

    Example:
        >>> import numpy as np
        >>> problem = Problem({"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}, 3)
        >>> mine = certified(problem, np.array([3, 0]), "by hand")
        >>> mine.value, mine.certificate.upper_bound, mine.certificate.gap
        (14.0, 19.25, 5.25)
    """
    ranks = problem.parse_ranks(ranks)
    problem.check(ranks)
    if problem.objective.kind == "operator":
        reference = solve(problem)
    elif problem.caps:
        reference = solve(problem, "exact", time_limit=0.0)
    else:
        reference = solve(problem, "water_filling")
    bound = Fraction(reference.certificate.upper_bound)
    if reference.certificate.status == "optimal_exact":
        bound = problem.value_of(reference.ranks)
    value = problem.value_of(ranks)
    certificate = Certificate.of(
        value,
        bound - value,
        reference.certificate.price,
        method,
        closed=False,
        cap_prices=reference.certificate.cap_prices,
    )
    return Allocation(problem, ranks, certificate)
