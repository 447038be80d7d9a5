"""The front door: allocate(spectra, budget)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.caps import Caps, Constraints
from lorambo_alloc.costs import PerLayer, UniformRank
from lorambo_alloc.limits import AllowedRanks, Limit
from lorambo_alloc.objectives import Objective
from lorambo_alloc.problem import Problem
from lorambo_alloc.solve import solve


def allocate(
    spectra: object,
    budget: int | UniformRank,
    *,
    shapes: PerLayer[tuple[int, int]] | None = None,
    costs: PerLayer[int] | None = None,
    fixed_costs: PerLayer[int] | None = None,
    objective: str | Objective = "frobenius",
    weights: PerLayer[float] | None = None,
    min_rank: Limit = 0,
    max_rank: Limit = None,
    multiple_of: int = 1,
    allowed_ranks: AllowedRanks = None,
    tied: Iterable[Sequence[str]] = (),
    caps: Caps | None = None,
    method: str = "auto",
    time_limit: float | None = None,
    constraints: Constraints | None = None,
) -> Allocation:
    """The best rank of every layer within a budget, and the proof of it.

    Keeping rank r of a matrix keeps its r largest singular values (Eckart and Young 1936,
    Mirsky 1960), so the default objective keeps as much squared Frobenius norm as the budget
    can hold.

    Args:
        spectra: name to a 1-D array of singular values, descending; or `Spectra`; or a sequence
            of arrays or a 2-D array, whose layers are named "0", "1", ...; or `GainCurves`.
        budget: a whole number in the units of the costs (parameters, with `shapes`), or
            `uniform_rank(r)`: what uniform rank r would cost.
        shapes: name to (d, k); a rank costs d + k parameters.
        costs: name to the cost of one rank, whole numbers >= 1; takes precedence over `shapes`.
            With neither, a rank costs 1 and the budget counts ranks.
        fixed_costs: name to a cost charged once if the layer's rank is above 0.
        objective: "frobenius", "nuclear", "operator", `schatten(p)` or `log(noise)`.
        weights: name to a factor >= 0 on the layer's gains.
        min_rank: the least rank, for all layers or by name.
        max_rank: the greatest rank, for all layers or by name.
        multiple_of: ranks are multiples of this.
        allowed_ranks: the ranks to choose from, for all layers or by name.
        tied: groups of layer names that share one rank.
        caps: name to `Cap`, or to (layer names, budget): side budgets on groups of layers.
        method: "auto", "exact", "water_filling", "side_budgets", "relaxation", "greedy",
            "bottleneck" or "milp"; `solve` has the table.
        time_limit: seconds after which to stop with a certified gap; None: no limit.
        constraints: for the relaxation (extra `convex`): from a mapping of layer name to the
            cvxpy expression of its rank, to a list of convex cvxpy constraints.

    Returns:
        An `Allocation`: a mapping of layer name to rank.

    Raises:
        ValueError: an argument is not of this form; the message names the layer, what was
            expected and what came.
        InfeasibleError: the minimum ranks cost more than the budget or a cap.

    Example:
        >>> spectra = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}
        >>> shapes = {"q": (8, 8), "v": (8, 4)}
        >>> allocation = allocate(spectra, 44, shapes=shapes)
        >>> dict(allocation), allocation.cost, allocation.certificate.status
        ({'q': 2, 'v': 1}, 44, 'optimal_exact')
    """
    problem = Problem(
        spectra,
        budget,
        shapes=shapes,
        costs=costs,
        fixed_costs=fixed_costs,
        objective=objective,
        weights=weights,
        min_rank=min_rank,
        max_rank=max_rank,
        multiple_of=multiple_of,
        allowed_ranks=allowed_ranks,
        tied=tied,
        caps=caps,
    )
    return solve(problem, method, time_limit, constraints)
