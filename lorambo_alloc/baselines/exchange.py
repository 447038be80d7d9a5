"""One rank at a time from where it is worth least to where it is worth most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.baselines.path import certified
from lorambo_alloc.curves import check_names
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem


def one_rank_exchange(
    problem: Problem, ranks: Mapping[str, int] | Sequence[int] | IntArray
) -> Allocation:
    """Ranks after one step of the greedy rule that tools which adapt ranks in training follow.

    One rank (or step between allowed ranks, of a tied group as a whole) goes to the layer with the
    greatest gain per cost of the next rank: out of what is left of the budget if it fits, else in
    exchange for one rank of the layer with the least gain per cost of its last rank. A pair that
    does not fit, or gains nothing, is passed over for the next donor, then the next receiver.

    Repeated on unchanging curves it ends where no such exchange gains: with unequal costs, or
    curves that are not concave, that need not be the optimum. From far away it takes one period for
    every rank that has to move, where solving the problem takes one in all.

    Args:
        problem: any problem but one with the objective `operator`.
        ranks: the present ranks, by name or in layer order; feasible.

    Returns:
        The ranks after the step, or the same; with a proved bound on what they lack.

    Raises:
        ValueError: the ranks are not feasible, or the objective is `operator`.

    Example:
        >>> problem = Problem({"q": [3.0, 2.0], "v": [1.0, 0.5]}, 2)
        >>> dict(one_rank_exchange(problem, {"q": 1, "v": 1}))
        {'q': 2, 'v': 0}
    """
    if problem.objective.kind == "operator":
        raise ValueError("objective: expected a sum of gains, got 'operator'")
    given: object = ranks
    if isinstance(ranks, Mapping):
        check_names(ranks, problem.names, "ranks")
        given = [ranks[name] for name in problem.names]
    now = problem.parse_ranks(given)
    problem.check(now)
    up, down = _steps(problem, now, 1), _steps(problem, now, -1)
    donors = sorted(down, key=lambda step: step[0])
    for density, gain, receiver, more in sorted(up, key=lambda step: -step[0]):
        if gain <= 0:
            break
        if problem.fits(more):
            return certified(problem, more, "one_rank_exchange")
        for least, loss, donor, fewer in donors:
            if least >= density:
                break
            both = now + (more - now) + (fewer - now)
            if donor != receiver and gain + loss > 0 and problem.fits(both):
                return certified(problem, both, "one_rank_exchange")
    return certified(problem, now, "one_rank_exchange")


def _steps(
    problem: Problem, now: IntArray, direction: int
) -> list[tuple[float, float, int, IntArray]]:
    """For each tied group that has a next rank: gain per cost, gain, its number, and all ranks."""
    steps: list[tuple[float, float, int, IntArray]] = []
    for v, layers in enumerate(problem.variables):
        allowed = problem.allowed_ranks(layers[0])
        place = int(np.count_nonzero(allowed < now[layers[0]])) + direction
        if 0 <= place < len(allowed):
            ranks = now.copy()
            ranks[list(layers)] = allowed[place]
            gain = float(problem.value_difference(ranks, now))
            cost = problem.cost_of(ranks) - problem.cost_of(now)
            steps.append((gain / cost, gain, v, ranks))
    return steps
