"""The value at every budget: the upper hull of all budgets, from one sorted pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lorambo_alloc.costs import PerLayer
from lorambo_alloc.hulls import Hulls, concave_hulls
from lorambo_alloc.limits import AllowedRanks, Limit
from lorambo_alloc.objectives import FloatArray, IntArray, Objective
from lorambo_alloc.problem import InfeasibleError, Problem
from lorambo_alloc.upper_hull import Frontier

_GREATEST_BUDGET = (1 << 62) - 1


def frontier(
    spectra: object,
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
) -> Frontier:
    """What every budget would buy: the upper hull of the best value, from one sorted pass.

    Each variable's ranks are replaced by the upper hull of its curve over its cost (where single
    ranks have descending gains, by themselves), and the steps of all hulls are taken in order of
    their gain per cost. That is the linear relaxation's optimum at every budget at once.

    Steps of equal gain per cost stay apart, in the order of the layers, so that every breakpoint is
    attained by whole ranks. Steps that gain nothing are left out.

    `caps` are not taken: with more than one budget there is no one curve of the value.

    It takes a few times as long as one stable argsort of all gains. The result holds 32 bytes a
    breakpoint, of which there are at most as many as ranks to choose from; making it takes about
    110 bytes a rank.

    Args:
        spectra: as `allocate` takes it, and so are the limits: name to a 1-D array of singular
            values, descending; or `Spectra`, a sequence of arrays, a 2-D array or `GainCurves`.
        shapes: name to (d, k); a rank costs d + k parameters.
        costs: name to the cost of one rank, whole numbers >= 1; takes precedence over `shapes`.
            With neither, a rank costs 1 and budgets count ranks.
        fixed_costs: name to a cost charged once if the layer's rank is above 0.
        objective: "frobenius", "nuclear", `schatten(p)` or `log(noise)`; not "operator".
        weights: name to a factor >= 0 on the layer's gains.
        min_rank: the least rank, for all layers or by name.
        max_rank: the greatest rank, for all layers or by name.
        multiple_of: ranks are multiples of this.
        allowed_ranks: the ranks to choose from, for all layers or by name.
        tied: groups of layer names that share one rank.

    Returns:
        A `Frontier`.

    Raises:
        ValueError: an argument is not of this form, the objective is "operator", or the greatest
            ranks cost 2^62 or more.

    References:
        Dantzig 1957, Discrete-variable extremum problems; Sinha and Zoltners 1979, The
        multiple-choice knapsack problem, theorem 1 and its corollary (only the hull matters to
        the relaxation, which takes its steps in order of slope).

    Example:
        >>> curve = frontier({"q": [3.0, 2.0, 1.0], "v": [2.0]}, costs={"q": 2, "v": 1})
        >>> curve.budgets, curve.values
        (array([0, 2, 3, 5, 7]), array([ 0.,  9., 13., 17., 18.]))
        >>> curve.at(4), curve.price_at(4), dict(curve.allocation(4))
        (15.0, 2.0, {'q': 1, 'v': 1})
    """
    problem = _unlimited(
        spectra,
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
    )
    hulls = concave_hulls(problem)
    # Gains descend along a hull, so what gains nothing comes after all that does.
    hulls = hulls.select(hulls.gains > 0)
    costs_of = _step_costs(problem, hulls)
    # A power of two keeps quotients of tiny gains clear of the subnormal numbers.
    shift = 900 - math.frexp(float(np.max(hulls.gains, initial=0.0)))[1]
    densities = np.ldexp(hulls.gains, shift) / costs_of
    # Stable: equal steps of one variable must keep their order.
    order = np.argsort(-densities, kind="stable")
    base = float(problem.value_of(problem.lower))
    budgets = np.cumsum(np.concatenate([[problem.cost_of(problem.lower)], costs_of[order]]))
    values, error = _running_sums(base, hulls.gains[order])
    prices = np.append(np.ldexp(densities[order], -shift), 0.0)
    for array in (budgets, values, prices):
        array.flags.writeable = False
    steps = hulls.variables[order].astype(np.int32)
    ends = hulls.high.astype(np.int32)
    starts = np.searchsorted(hulls.variables, np.arange(len(problem.variables)))
    rounding = hulls.error + error
    return Frontier(problem, budgets, values, prices, rounding, steps, ends, starts)


def _step_costs(problem: Problem, hulls: Hulls) -> IntArray:
    """What each step along a hull costs."""
    variables = problem.variables
    unit = np.array([problem.costs[list(layers)].sum() for layers in variables], dtype=np.int64)
    fixed = np.array(
        [problem.fixed_costs[list(layers)].sum() for layers in variables], dtype=np.int64
    )
    costs = unit[hulls.variables] * (hulls.high - hulls.low)
    return costs + np.where(hulls.low == 0, fixed[hulls.variables], 0)


def _unlimited(spectra: object, **keywords: Any) -> Problem:
    """The problem with a budget that holds everything."""
    too_dear = "costs: expected greatest ranks that cost less than 2^62 together"
    try:
        problem = Problem(spectra, _GREATEST_BUDGET, **keywords)
    except InfeasibleError as error:
        raise ValueError(f"{too_dear}, got least ranks that cost {error.minimum_budget}") from None
    if problem.objective.kind == "operator":
        raise ValueError(
            "objective: a frontier needs gains that add up; 'operator' has none. For the largest "
            "value discarded at a budget call allocate(..., objective='operator')"
        )
    greatest = problem.cost_of(problem.upper)
    if greatest > _GREATEST_BUDGET:
        raise ValueError(f"{too_dear}, got {greatest}; divide the costs by a common factor")
    return problem


def _running_sums(base: float, gains: FloatArray) -> tuple[FloatArray, float]:
    """The base, plus the first 0, 1, 2, ... gains; and a bound on the error of any of them.

    Sums within blocks, then sums of blocks: an error of about 2 sqrt(n) last bits, not n.
    """
    count = len(gains)
    width = max(math.isqrt(count), 1)
    blocks = np.zeros((-(-count // width), width))
    blocks.ravel()[:count] = gains
    np.cumsum(blocks, axis=1, out=blocks)
    # A block ends where the next one starts, so the sums ascend across blocks too.
    before = np.cumsum(np.concatenate([[base], blocks[:, -1]]))
    sums = np.concatenate([[base], (blocks + before[:-1, None]).ravel()[:count]])
    # With what rounded quotients lose, which may put two steps in the wrong order.
    total = abs(base) + float(gains.sum())
    return sums, _ulps((2 * width + 16) * total)


def _ulps(magnitude: float) -> float:
    """Last bits of a magnitude, and of the subnormal numbers that it may be lost among."""
    return magnitude * 2.0**-52 + 2.0**-1060
