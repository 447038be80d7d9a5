"""Which solver for which problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.objectives import real_number
from lorambo_alloc.problem import Problem

Solver: TypeAlias = Callable[[Problem, float | None], Allocation]

# By module and function, imported when first asked for: `import lorambo_alloc` stays quick.
SOLVERS: dict[str, tuple[str, str]] = {
    "exact": ("lorambo_alloc.solvers.exact", "solve_exact"),
    "water_filling": ("lorambo_alloc.solvers.water_filling", "solve_water_filling"),
    "bottleneck": ("lorambo_alloc.solvers.bottleneck", "solve_bottleneck"),
    "milp": ("lorambo_alloc.solvers.milp", "solve_milp"),
}


def solve(problem: Problem, solver: str = "auto", time_limit: float | None = None) -> Allocation:
    """Solve a problem.

    `auto` decides so:

    | problem                                          | solver          | what it does         |
    |--------------------------------------------------|-----------------|----------------------|
    | objective `operator`                             | `bottleneck`    | threshold, leximax   |
    | single ranks of descending gain, no fixed costs, | `exact`         | water-filling, then  |
    | multiples, lists or ties                         |                 | classes of one cost  |
    | anything else                                    | `exact`         | multiple choice      |

    `water_filling` stops at the break solution, filled up, with the gap of its price: the quick
    answer. `milp` (scipy's HiGHS) is there to check the others; it takes far longer, and its
    answer is certified with the price's bound, not with its own word.

    Args:
        problem: the problem.
        solver: "auto", "exact", "water_filling", "bottleneck" or "milp".
        time_limit: seconds after which to stop with a certified gap; None: no limit.

    Raises:
        ValueError: an unknown solver (the message lists the known ones), one that does not fit
            the objective, or a time limit that is not a number >= 0.
    """
    if time_limit == math.inf:
        time_limit = None
    if time_limit is not None and not 0 <= real_number(time_limit):
        raise ValueError(f"time_limit: expected seconds >= 0 or None, got {time_limit!r}")
    operator = problem.objective.kind == "operator"
    if solver == "auto":
        solver = "bottleneck" if operator else "exact"
    if not isinstance(solver, str) or solver not in SOLVERS:  # pyright: ignore[reportUnnecessaryIsInstance]
        known = ", ".join(map(repr, ["auto", *SOLVERS]))
        raise ValueError(f"method: expected one of {known}, got {solver!r}")
    if operator != (solver == "bottleneck"):
        raise ValueError(
            f"method {solver!r} does not fit objective {str(problem.objective)!r}: "
            "'bottleneck' is for 'operator', and only that is"
        )
    module, name = SOLVERS[solver]
    function: Solver = getattr(import_module(module), name)
    return function(problem, time_limit)
