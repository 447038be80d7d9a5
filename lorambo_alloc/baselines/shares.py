"""A share of the budget for each layer, by its importance: GoRA and the square-root rule."""

from __future__ import annotations

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.baselines.path import followed
from lorambo_alloc.baselines.signals import mean_gains, parse_importance, whole_gains
from lorambo_alloc.costs import PerLayer
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem


def gora(
    problem: Problem,
    *,
    importance: PerLayer[float] | None = None,
    features: str = "linear",
    fill: bool = False,
) -> Allocation:
    """GoRA: a share of the budget in proportion to importance, over the cost of a rank.

    Its code gives floor(s a_i / g(d_i + k_i)), the product s a_i made whole first: a_i is the
    layer's share of the importance, s the sum of r g(d + k) at a uniform rank r. Ranks are cut to
    a least and a greatest; what cutting and rounding leave over or lack is not made up for. Here s
    is the largest at which the ranks fit the budget, and s a_i is not rounded. Layers of importance
    0 stay at their minimum.

    Args:
        problem: any problem.
        importance: by layer, >= 0: in GoRA mean(abs(W * G)) of weight and gradient. None: a
            stand-in, the mean gain of a rank over the layer's curve.
        features: g: "linear" (the cost of a rank itself) or "sqrt" (its root), both in its code.
        fill: go on to the ranks that the next larger s would give, past those that do not fit.

    Raises:
        ValueError: an argument is not of this form.

    References:
        He et al., GoRA: gradient-driven adaptive low rank adaptation, arXiv 2502.12171 (2025).

    Example:
        >>> problem = Problem({"q": [1.0] * 8, "v": [1.0] * 8}, 48, costs=[4, 8])
        >>> dict(gora(problem, importance={"q": 1.0, "v": 2.0}))
        {'q': 4, 'v': 4}
    """
    if features not in ("linear", "sqrt"):
        raise ValueError(f"features: expected 'linear' or 'sqrt', got {features!r}")
    shares = (
        mean_gains(problem)
        if importance is None
        else parse_importance(importance, problem, "importance")
    )
    costs = problem.costs.astype(np.float64)
    weights = shares / (costs if features == "linear" else np.sqrt(costs))

    def arrivals(i: int, allowed: IntArray) -> FloatArray:
        return _over(allowed[1:], weights[i])

    return followed(problem, arrivals, "gora", fill)


def square_root(
    problem: Problem, *, sensitivity: PerLayer[float] | None = None, fill: bool = False
) -> Allocation:
    """The square-root rule of LoRAMBo's page: r_i in proportion to sqrt(s_i / (d + k)), rounded.

    The page sets r_i = round(B / L sqrt(s_i / (d_i + k_i)) / sum_j sqrt(s_j / (d_j + k_j))),
    which sums to about B / L ranks and meets no budget in parameters. Here the factor before the
    root is the largest at which the rounded ranks fit the budget.

    Args:
        problem: any problem.
        sensitivity: by layer, s_i >= 0: there the size of the layer's Hessian. None: a stand-in,
            the gain of the layer's whole curve.
        fill: go on to the ranks that a larger factor would give, past those that do not fit.

    Raises:
        ValueError: the sensitivity is not of this form.

    References:
        Cawley, LoRAMBo: fighting LoRA memory bottlenecks with optimized rank selection, project
        page (2024), "Matrix approximation foundations".

    Example:
        >>> problem = Problem({"q": [1.0] * 8, "v": [1.0] * 8}, 48, costs=[4, 16])
        >>> dict(square_root(problem, sensitivity={"q": 1.0, "v": 4.0}))
        {'q': 2, 'v': 2}
    """
    sensitivities = (
        whole_gains(problem)
        if sensitivity is None
        else parse_importance(sensitivity, problem, "sensitivity")
    )
    weights = np.sqrt(sensitivities / problem.costs)

    def arrivals(i: int, allowed: IntArray) -> FloatArray:
        # Halfway between two allowed ranks is where rounding goes over to the next.
        return _over((allowed[1:] + allowed[:-1]) / 2.0, weights[i])

    return followed(problem, arrivals, "square_root", fill)


def _over(ranks: IntArray | FloatArray, weight: float) -> FloatArray:
    """The scales at which weight times scale reaches the ranks; never for weight 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(ranks, dtype=np.float64) / weight
