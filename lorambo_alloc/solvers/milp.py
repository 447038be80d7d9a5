"""The mixed-integer program, through scipy's HiGHS: slow, general, and written by others."""

from __future__ import annotations

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.options import OptionTable, option_table
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm
from lorambo_alloc.solvers.search import Search
from lorambo_alloc.solvers.side_budgets import SideSearch


def solve_milp(problem: Problem, time_limit: float | None = None) -> Allocation:
    """One binary a variable and option, exactly one of each variable, one row a budget.

    HiGHS works in doubles with tolerances, so its answer is only taken as an incumbent (if it is
    within every budget in integers); the certificate is the bound of the prices.

    Args:
        problem: any problem with gains.
        time_limit: seconds for HiGHS, or None.
    """
    if problem.caps:
        side = SideSearch(problem, None)
        side.relax()
        side.offer(_best_of_highs(problem, time_limit))
        return side.allocation("milp")
    search = Search(MultipleChoiceForm(problem))
    if not search.closed:
        search.offer(_best_of_highs(problem, time_limit))
    return search.allocation("milp")


def _best_of_highs(problem: Problem, time_limit: float | None) -> IntArray:
    """The ranks that HiGHS thinks are best; the least ranks if it found none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array

    table = option_table(problem)
    if not len(table.ranks):
        return problem.lower
    size = len(table.ranks)
    variables = np.repeat(np.arange(len(table.members)), np.diff(table.offsets))
    # HiGHS has returned wrong optima for gains of 1e-6 and smaller: scale to about 1 first.
    scale = float(np.abs(table.values).max()) or 1.0
    choose = csr_array(coo_array((np.ones(size), (variables, np.arange(size)))))
    result = milp(
        -table.values / scale,
        integrality=np.ones(size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(choose, 1, 1),
            LinearConstraint(_shares(problem, table, variables), -np.inf, 1.0),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": np.inf if time_limit is None else time_limit},
    )
    if result.x is None:
        return problem.lower
    weights = np.where(result.x > 0.5, 1, 0)
    chosen = [
        start + int(np.argmax(weights[start:stop]))
        for start, stop in zip(table.offsets[:-1], table.offsets[1:], strict=True)
    ]
    return table.ranks_of(np.array(chosen, dtype=np.int64))


def _shares(problem: Problem, table: OptionTable, variables: IntArray) -> FloatArray:
    """What each option costs in each row, as shares of its budget: one row a budget."""
    shares: list[FloatArray] = []
    for row in problem.rows:
        unit = np.array([sum(int(row.costs[i]) for i in group) for group in table.members])
        fixed = np.array([sum(int(row.fixed_costs[i]) for i in group) for group in table.members])
        costs = unit[variables] * table.ranks.astype(np.float64)
        costs += fixed[variables] * (table.ranks > 0)
        # With nothing to spend, any cost at all is too much.
        budget = min(row.budget, row.cost_of(problem.upper))
        shares.append(costs / budget if budget else 2.0 * costs)
    return np.array(shares)
