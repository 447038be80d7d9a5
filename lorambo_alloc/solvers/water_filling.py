"""Water-filling: the break solution at the price that meets the budget, filled up."""

from __future__ import annotations

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.search import Search, form_of


def solve_water_filling(problem: Problem, time_limit: float | None = None) -> Allocation:
    """Ranks at one common price, and the gap that the price proves.

    With equal costs and single ranks of descending gain this is optimal. In general it loses at
    most the gain of one more step.

    Args:
        problem: any problem with gains.
        time_limit: not needed; the time is that of a few passes over the layers.
    """
    return Search(form_of(problem)).allocation("water-filling")
