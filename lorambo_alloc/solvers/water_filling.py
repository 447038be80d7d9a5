"""Water-filling: the break solution at the price that meets the budget, filled up."""

from __future__ import annotations

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.search import Search, form_of


def solve_water_filling(problem: Problem, time_limit: float | None = None) -> Allocation:
    """Ranks at one common price, and the gap that the price proves.

    With equal costs and single ranks of descending gain this is optimal. With unequal costs and
    such ranks it loses less than the first rank that no longer fitted gains. With steps of other
    kinds it may lose more. The certificate states what it lost at most.

    Args:
        problem: any problem with gains.
        time_limit: not needed; the time is that of a few passes over the layers.
    """
    return Search(form_of(problem)).allocation("water-filling")
