"""The exact solver: relax, keep what the gap cannot rule out, search that, certify.

1. Water-filling finds the price at which best responses cross the budget; the Lagrangian there is
   an upper bound, and the filled-up break solution a first incumbent.
2. A short run of the core program over the nearest deviations improves the incumbent. Often it
   proves it too, as any other deviation alone would lose more.
3. If not: only deviations with a penalty below the incumbent's loss can be in a better solution.
   The core program runs over all of them, holding more states each time, until nothing better
   can have been dropped. Exchanges and a price on the number of ranks help where gains follow
   the costs.
4. Small problems that no 64-bit fixed point holds are searched once more in longer integers.
5. If time or states run out, what was dropped is part of the bound: the gap stays proved.
"""

from __future__ import annotations

import time

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.search import Search, form_of


def solve_exact(problem: Problem, time_limit: float | None = None) -> Allocation:
    """Optimal ranks with a certificate, for every objective but `operator`.

    Args:
        problem: any problem with gains.
        time_limit: seconds after which the search stops and certifies the gap that is left;
            None: it stops when it is done, or when the last stage has dropped states, which may
            take minutes on problems made to be hard.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    form = form_of(problem)
    search = Search(form, deadline)
    while not search.finished and search.advance():
        pass
    if not search.finished:
        search.settle_in_integers()
    return search.allocation(form.name)
