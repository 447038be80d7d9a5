"""The solvers a user would pick instead, on the same instances: OR-Tools, HiGHS and SCIP.

All three get the 0/1 form: one item for each rank of each layer, one row for the budget. On
concave curves an optimal set of items needs no precedence within a layer, so this is the smallest
model that is right, and the kindest to them. Each answer is turned into ranks, and only those are
compared: the value a peer reports is one of scaled or rounded gains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorambo_alloc import GainCurves
from lorambo_alloc.testing import Instance

_BITS = 52  # OR-Tools' gains are integers that sum to about 2^52
_SCIP_MOST_ITEMS = 300_000  # beyond this, building its model in Python takes minutes


@dataclass(frozen=True)
class Items:
    """An instance with concave curves and no limits as a 0/1 knapsack."""

    gains: npt.NDArray[np.float64]
    costs: npt.NDArray[np.int64]
    layer: npt.NDArray[np.int64]
    layers: int
    budget: int

    @classmethod
    def of(cls, instance: Instance) -> Items:
        """The items of an instance with the default objective.

        Raises:
            ValueError: the instance has limits, or curves that are not concave.
        """
        if set(instance.keywords) - {"costs", "shapes"}:
            raise ValueError(f"{instance.name}: expected no limits, got {set(instance.keywords)}")
        spectra = instance.spectra
        if isinstance(spectra, GainCurves):
            rows = [np.diff(curve) for curve in spectra.values()]
        else:
            values = spectra if isinstance(spectra, np.ndarray) else spectra.values()
            rows = [np.square(row) for row in values]
        if any(np.any(np.diff(row) > 1e-12 * row[0]) for row in rows):
            raise ValueError(f"{instance.name}: expected concave curves")
        names = list(spectra) if not isinstance(spectra, np.ndarray) else None
        if "costs" in instance.keywords:
            given = instance.keywords["costs"]
            costs = np.array([given[name] for name in (names or given)])
        else:
            costs = np.array([sum(instance.keywords["shapes"][name]) for name in names or ()])
        layer = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        return cls(np.concatenate(rows), costs[layer], layer, len(rows), instance.budget)

    def ranks(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """How many items of each layer are chosen."""
        return np.bincount(self.layer[chosen], minlength=self.layers).astype(np.int64)


@dataclass(frozen=True)
class PeerResult:
    """What a peer found.

    Attributes:
        peer: its name.
        ranks: the ranks it chose, or None where it found none within the budget.
        seconds: the call of the solver alone.
        build_seconds: what it took to bring the items into the peer's own form.
        proven: whether the peer claims optimality (of the gains as it was given them).
        note: why there are no ranks.
    """

    peer: str
    ranks: npt.NDArray[np.int64] | None
    seconds: float
    build_seconds: float
    proven: bool
    note: str = ""


def ortools(items: Items, time_limit: float) -> PeerResult:
    """OR-Tools' KnapsackSolver, branch and bound: the strongest peer. Integers only, no bound."""
    from ortools.algorithms.python import knapsack_solver as knapsack

    start = time.perf_counter()
    scaled = np.floor(items.gains * (2.0**_BITS / items.gains.sum())).astype(np.int64).tolist()
    costs = [items.costs.tolist()]
    built = time.perf_counter()
    solver = knapsack.KnapsackSolver(
        knapsack.SolverType.KNAPSACK_MULTIDIMENSION_BRANCH_AND_BOUND_SOLVER, "peer"
    )
    solver.set_time_limit(time_limit)
    solver.init(scaled, costs, [items.budget])
    solver.solve()
    done = time.perf_counter()
    chosen = np.fromiter(
        (solver.best_solution_contains(i) for i in range(len(scaled))), bool, len(scaled)
    )
    return PeerResult(
        "OR-Tools", items.ranks(chosen), done - built, built - start, solver.is_solution_optimal()
    )


def highs(items: Items, time_limit: float) -> PeerResult:
    """HiGHS, gap zero, gains scaled to at most 1.

    On gains around 1e-6 and below it returns wrong answers as optimal.
    """
    import highspy

    start = time.perf_counter()
    count = len(items.gains)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = count, 1
    model.col_cost_ = items.gains / items.gains.max()
    model.col_lower_, model.col_upper_ = np.zeros(count), np.ones(count)
    model.row_lower_ = np.array([-highspy.kHighsInf])
    model.row_upper_ = np.array([float(items.budget)])
    model.sense_ = highspy.ObjSense.kMaximize
    model.integrality_ = [highspy.HighsVarType.kInteger] * count
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.array([0, count])
    model.a_matrix_.index_ = np.arange(count)
    model.a_matrix_.value_ = items.costs.astype(np.float64)
    solver = highspy.Highs()
    solver.silent()
    for option, value in (
        ("threads", 1),
        ("time_limit", time_limit),
        ("mip_rel_gap", 0.0),
        ("mip_abs_gap", 0.0),
    ):
        solver.setOptionValue(option, value)
    solver.passModel(model)
    built = time.perf_counter()
    solver.run()
    done = time.perf_counter()
    proven = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    solution = np.array(solver.getSolution().col_value)
    if solver.getInfo().primal_solution_status != 2 or len(solution) != count:
        return PeerResult("HiGHS", None, done - built, built - start, False, "found none")
    return _within_budget("HiGHS", items, solution > 0.5, done - built, built - start, proven)


def scip(items: Items, time_limit: float) -> PeerResult:
    """SCIP, gap zero, gains scaled to at most 1."""
    import pyscipopt

    count = len(items.gains)
    if count > _SCIP_MOST_ITEMS:
        return PeerResult("SCIP", None, 0.0, 0.0, False, f"not run: {count:,} variables")
    start = time.perf_counter()
    model = pyscipopt.Model()
    model.hideOutput()
    model.setParam("limits/time", time_limit)
    model.setParam("parallel/maxnthreads", 1)
    model.setParam("lp/threads", 1)
    scaled = (items.gains / items.gains.max()).tolist()
    variables = [model.addVar(vtype="B", obj=gain) for gain in scaled]
    model.setMaximize()
    terms = zip(items.costs.tolist(), variables, strict=True)
    model.addCons(pyscipopt.quicksum(cost * x for cost, x in terms) <= items.budget)
    built = time.perf_counter()
    model.optimize()
    done = time.perf_counter()
    proven = model.getStatus() == "optimal"
    solution = model.getBestSol() if model.getNSols() else None
    if solution is None:
        return PeerResult("SCIP", None, done - built, built - start, False, "found none")
    chosen = np.fromiter((solution[x] > 0.5 for x in variables), bool, count)
    return _within_budget("SCIP", items, chosen, done - built, built - start, proven)


def _within_budget(
    peer: str,
    items: Items,
    chosen: npt.NDArray[np.bool_],
    seconds: float,
    build_seconds: float,
    proven: bool,
) -> PeerResult:
    over = int(items.costs[chosen].sum()) - items.budget
    if over > 0:
        note = f"over the budget by {over}"
        return PeerResult(peer, None, seconds, build_seconds, False, note)
    return PeerResult(peer, items.ranks(chosen), seconds, build_seconds, proven)


PEERS: dict[str, Callable[[Items, float], PeerResult]] = {
    "ortools": ortools,
    "highs": highs,
    "scip": scip,
}
