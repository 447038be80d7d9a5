"""Which solver for which problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.caps import Constraints
from lorambo_alloc.objectives import real_number
from lorambo_alloc.problem import Problem

Solver: TypeAlias = Callable[..., Allocation]

# By module and function, imported when first asked for: `import lorambo_alloc` stays quick.
SOLVERS: dict[str, tuple[str, str]] = {
    "exact": ("lorambo_alloc.solvers.exact", "solve_exact"),
    "water_filling": ("lorambo_alloc.solvers.water_filling", "solve_water_filling"),
    "bottleneck": ("lorambo_alloc.solvers.bottleneck", "solve_bottleneck"),
    "side_budgets": ("lorambo_alloc.solvers.side_budgets", "solve_side_budgets"),
    "relaxation": ("lorambo_alloc.solvers.relaxation", "solve_relaxation"),
    "greedy": ("lorambo_alloc.solvers.greedy", "solve_greedy"),
    "milp": ("lorambo_alloc.solvers.milp", "solve_milp"),
}


# Those that know of caps.
_WITH_CAPS = ("side_budgets", "relaxation", "greedy", "milp")


def solve(
    problem: Problem,
    solver: str = "auto",
    time_limit: float | None = None,
    constraints: Constraints | None = None,
) -> Allocation:
    """Solve a problem.

    `auto` decides so:

    | problem                                          | solver          | what it does         |
    |--------------------------------------------------|-----------------|----------------------|
    | constraints of the caller's own                  | `relaxation`    | convex, then rounded |
    | objective `operator`                             | `bottleneck`    | threshold, leximax   |
    | caps                                             | `side_budgets`  | prices, then parts   |
    | single ranks of descending gain, no fixed costs, | `exact`         | water-filling, then  |
    | multiples, lists or ties                         |                 | classes of one cost  |
    | anything else                                    | `exact`         | multiple choice      |

    `water_filling` stops at the break solution, filled up, with the gap of its price: the quick
    answer. `greedy` is the textbook algorithm with its textbook ratio. `milp` (scipy's HiGHS) is
    there to check the others; it takes far longer, and its answer is certified with the prices'
    bound, not with its own word.

    Args:
        problem: the problem.
        solver: "auto", "exact", "water_filling", "side_budgets", "relaxation", "greedy",
            "bottleneck" or "milp".
        time_limit: seconds after which to stop with a certified gap; None: no limit.
        constraints: for `relaxation`: from the cvxpy expression of each layer's rank, by name, to
            a list of cvxpy constraints.

    Raises:
        ValueError: an unknown solver (the message lists the known ones), one that does not fit
            the problem, or a time limit that is not a number >= 0.
    """
    time_limit = parse_time_limit(time_limit)
    operator = problem.objective.kind == "operator"
    if solver == "auto":
        solver = "bottleneck" if operator else "relaxation" if constraints else "exact"
    if not isinstance(solver, str) or solver not in SOLVERS:  # pyright: ignore[reportUnnecessaryIsInstance]
        known = ", ".join(map(repr, ["auto", *SOLVERS]))
        raise ValueError(f"method: expected one of {known}, got {solver!r}")
    if operator != (solver == "bottleneck"):
        raise ValueError(
            f"method {solver!r} does not fit objective {str(problem.objective)!r}: "
            "'bottleneck' is for 'operator', and only that is"
        )
    if problem.caps:
        solver = "side_budgets" if solver == "exact" else solver
        if solver not in _WITH_CAPS:
            raise ValueError(
                f"method {solver!r} takes no caps; those that do are "
                + ", ".join(map(repr, ["exact", *_WITH_CAPS]))
            )
    if constraints is not None and solver != "relaxation":
        raise ValueError(f"method {solver!r} takes no constraints; 'relaxation' does")
    module, name = SOLVERS[solver]
    function: Solver = getattr(import_module(module), name)
    if constraints is not None:
        return function(problem, time_limit, constraints)
    return function(problem, time_limit)


def parse_time_limit(time_limit: float | None) -> float | None:
    """Seconds, or None for no limit.

    Raises:
        ValueError: it is not a number >= 0.
    """
    if time_limit == math.inf:
        return None
    if time_limit is not None and not 0 <= real_number(time_limit):
        raise ValueError(f"time_limit: expected seconds >= 0 or None, got {time_limit!r}")
    return time_limit
