"""The mixed-integer program, through scipy's HiGHS: slow, general, and written by others."""

from __future__ import annotations

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.options import option_table
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm
from lorambo_alloc.solvers.search import Search


def solve_milp(problem: Problem, time_limit: float | None = None) -> Allocation:
    """One binary a variable and option, exactly one of each variable, one budget row.

    HiGHS works in doubles with tolerances, so its answer is only taken as an incumbent (if it is
    within the budget in integers); the certificate is the bound of the price.

    Args:
        problem: any problem with gains.
        time_limit: seconds for HiGHS, or None.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array

    search = Search(MultipleChoiceForm(problem))
    table = option_table(problem)
    if search.closed or not len(table.ranks):
        return search.allocation("milp")
    size = len(table.ranks)
    variables = np.repeat(np.arange(len(table.members)), np.diff(table.offsets))
    # HiGHS has returned wrong optima for gains of 1e-6 and smaller: scale to about 1 first.
    scale = float(np.abs(table.values).max()) or 1.0
    costs = table.costs / float(max(problem.spendable, 1))
    choose = csr_array(coo_array((np.ones(size), (variables, np.arange(size)))))
    result = milp(
        -table.values / scale,
        integrality=np.ones(size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(choose, 1, 1),
            LinearConstraint(costs[None, :], -np.inf, 1.0),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": np.inf if time_limit is None else time_limit},
    )
    if result.x is not None:
        weights = np.where(result.x > 0.5, 1, 0)
        chosen = [
            start + int(np.argmax(weights[start:stop]))
            for start, stop in zip(table.offsets[:-1], table.offsets[1:], strict=True)
        ]
        search.offer(table.ranks_of(np.array(chosen, dtype=np.int64)))
    return search.allocation("milp")
