"""Six rules for ranks, as their authors state them, followed as far as the budget allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Protocol

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.baselines.path import Arrivals, certified, follow
from lorambo_alloc.baselines.signals import (
    mean_gains,
    parse_importance,
    parse_scores,
    single_gains,
    variance_ratios,
    whole_gains,
)
from lorambo_alloc.costs import PerLayer, whole_number
from lorambo_alloc.objectives import FloatArray, IntArray, real_number
from lorambo_alloc.problem import Problem

MLP = (
    r"(?i)^(?!.*att(n|ention))(.*[._])?"
    r"(mlps?|ffn?|feed_?forward|intermediate|experts?|densereludense|"
    r"c_fc|fc\d+|(gate|up|down|gate_up)_proj|dense_(h_to_4h|4h_to_h)|\d+\.output)([._].*)?$"
)
"""Matches the names that common models give to layers of an MLP, outside any attention."""


class Rule(Protocol):
    """A rule that needs nothing but the problem."""

    def __call__(self, problem: Problem, *, fill: bool = False) -> Allocation:
        """Ranks by the rule; see the package."""
        ...


def uniform(problem: Problem, *, fill: bool = False) -> Allocation:
    """The same rank in every layer, the largest that fits.

    A layer whose greatest allowed rank is smaller keeps that one.

    Args:
        problem: any problem.
        fill: give one more rank to the first layers in order, as far as the rest of the budget
            goes.

    Example:
        >>> problem = Problem({"q": [3.0, 2.0], "v": [2.0, 1.0]}, 9, costs=[3, 2])
        >>> dict(uniform(problem)), dict(uniform(problem, fill=True))
        ({'q': 1, 'v': 1}, {'q': 2, 'v': 1})
    """
    return _followed(problem, _same_rank, "uniform", fill)


def mlp_only(problem: Problem, *, pattern: str = MLP, fill: bool = False) -> Allocation:
    """The same rank in every layer of an MLP, the largest that fits, and none elsewhere.

    The other layers stay at their minimum rank, which is 0 unless the problem says more. At an
    equal count of parameters a strong baseline in PEFT's own comparison of methods.

    Args:
        problem: any problem.
        pattern: a regular expression, searched for in the layers' names.
        fill: as in `uniform`.

    Raises:
        ValueError: the pattern matches no layer, or is no regular expression.

    Example:
        >>> spectra = {"0.mlp.fc1": [3.0, 2.0], "0.attn.q": [9.0, 9.0], "0.mlp.fc2": [2.0, 1.0]}
        >>> dict(mlp_only(Problem(spectra, 3)))
        {'0.mlp.fc1': 1, '0.attn.q': 0, '0.mlp.fc2': 1}
    """
    try:
        matches = [bool(re.search(pattern, name)) for name in problem.names]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"pattern: expected a regular expression, got {pattern!r}: {error}"
        ) from error
    if not any(matches):
        raise ValueError(
            f"pattern: expected a match among the names of the {len(matches)} layers, got none "
            f"({', '.join(map(repr, problem.names[:3]))}, ...)"
        )

    def arrivals(i: int, allowed: IntArray) -> FloatArray:
        moments = _same_rank(i, allowed)
        return moments if matches[i] else np.full_like(moments, np.inf)

    return _followed(problem, arrivals, "mlp_only", fill)


def eva(
    problem: Problem,
    *,
    ratios: object = None,
    rho: float = 2.0,
    rank: int | None = None,
    fill: bool = False,
) -> Allocation:
    """EVA: the greatest explained variance ratios of all layers, up to rho r of each.

    PEFT takes the first round(rho r) ratios of every layer, sorts all of them together, and gives
    a rank for each of the first L r. That counts ranks. Here the same order is followed until the
    next rank would exceed the budget, whatever the ranks cost. Of equal ratios the first layer's
    comes first (PEFT: any, but of layers with one input the first is given the most).

    Args:
        problem: any problem.
        ratios: by layer, `explained_variance_ratio_` of an incremental PCA of the layer's
            inputs, as EVA has it. None: a stand-in from the problem's own spectra, sigma_j^2 over
            the layer's energy (for gain curves, a rank's gain over the layer's).
        rho: >= 1.
        rank: r. None: the uniform rank that the budget pays for, at least 1.
        fill: pass over ranks that do not fit.

    Raises:
        ValueError: an argument is not of this form.

    References:
        Paischer et al., One initialization to rule them all: fine-tuning via explained variance
        adaptation (2024); PEFT 0.21.2, `tuners/lora/eva.py`, `_get_rank_distribution`.

    Example:
        >>> problem = Problem({"q": [3.0, 3.0, 1.0], "v": [9.0, 1.0]}, 3)
        >>> dict(eva(problem))
        {'q': 2, 'v': 1}
    """
    if not 1 <= real_number(rho) < np.inf:
        raise ValueError(f"rho: expected a finite number >= 1, got {rho!r}")
    rank = _uniform_rank(problem) if rank is None else whole_number(rank, "rank", least=1)
    # More than the longest curve caps nothing, and might be too much for a double.
    longest = int(np.max(problem.max_lengths, initial=1))
    most = round(min(min(rank, longest) * float(rho), float(longest)))
    rows = variance_ratios(problem) if ratios is None else parse_scores(ratios, problem, "ratios")
    rows = [row[:most] for row in rows]
    flat = np.concatenate([np.zeros(0), *rows])
    places = np.empty(len(flat))
    places[np.argsort(-flat, kind="stable")] = np.arange(len(flat))
    ends = [0, *np.cumsum([len(row) for row in rows], dtype=np.int64).tolist()]
    arrivals = _counted([places[start:stop] for start, stop in pairwise(ends)])
    return _followed(problem, arrivals, "eva", fill)


def adalora(problem: Problem, *, scores: object = None, fill: bool = False) -> Allocation:
    """AdaLoRA: every single rank above one threshold on importance.

    PEFT masks all triplets whose score is not above the (init - target)-th least of all; a
    layer's rank is how many it keeps. The budget counts ranks. Here the threshold is the lowest
    at which the ranks fit the budget, whatever they cost. As in PEFT, equal scores are kept
    together or not at all.

    Args:
        problem: any problem.
        scores: by layer, the importance of each of its triplets, in any order: in AdaLoRA the
            smoothed sensitivity of E plus the means of those of A and B. A layer gets no more
            ranks than it has scores. None: a stand-in, the gain of each rank (for `operator` the
            weighted singular value).
        fill: of equal scores the first layers', then pass over ranks that do not fit.

    Raises:
        ValueError: the scores are not of this form.

    References:
        Zhang et al., Adaptive budget allocation for parameter-efficient fine-tuning, ICLR 2023,
        section 3.2; PEFT 0.21.2, `tuners/adalora/layer.py`, `RankAllocator.mask_to_budget`.

    Example:
        >>> problem = Problem({"q": [3.0, 2.0], "v": [2.5, 1.0]}, 9, costs=[5, 1])
        >>> dict(adalora(problem))
        {'q': 1, 'v': 1}
    """
    rows = single_gains(problem) if scores is None else parse_scores(scores, problem, "scores")
    return _followed(problem, _counted([-row for row in rows]), "adalora", fill)


def gora(
    problem: Problem,
    *,
    importance: PerLayer[float] | None = None,
    features: str = "linear",
    fill: bool = False,
) -> Allocation:
    """GoRA: a share of the budget in proportion to importance, over the cost of a rank.

    Its code gives floor(s a_i / g(d_i + k_i)), a_i the layer's share of the importance and s the
    sum of r g(d + k) at a uniform rank r, cut to a least and a greatest rank. What cutting and
    rounding leave over or lack is not made up for. Here s is the largest at which the ranks fit
    the budget. Layers of importance 0 stay at their minimum.

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

    return _followed(problem, arrivals, "gora", fill)


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

    return _followed(problem, arrivals, "square_root", fill)


RULES: Mapping[str, Rule] = {
    "uniform": uniform,
    "mlp_only": mlp_only,
    "eva": eva,
    "adalora": adalora,
    "gora": gora,
    "square_root": square_root,
}
"""The rules by name."""


def _followed(problem: Problem, arrivals: Arrivals, name: str, fill: bool) -> Allocation:
    return certified(problem, follow(problem, arrivals, fill=fill), name)


def _uniform_rank(problem: Problem) -> int:
    """The rank of every layer that the budget pays for; at least 1."""
    layers = range(len(problem.names))
    first, second = problem.cost_at(layers, 1), problem.cost_at(layers, 2)
    return max(1, 1 + (problem.budget - first) // max(second - first, 1))


def _same_rank(i: int, allowed: IntArray) -> FloatArray:
    return allowed[1:].astype(np.float64)


def _over(ranks: IntArray | FloatArray, weight: float) -> FloatArray:
    """The scales at which weight times scale reaches the ranks; never for weight 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(ranks, dtype=np.float64) / weight


def _counted(moments: list[FloatArray]) -> Arrivals:
    """A layer's rank is how many of its moments have come."""
    ascending = [np.sort(row) for row in moments]

    def arrivals(i: int, allowed: IntArray) -> FloatArray:
        row = ascending[i]
        wanted = allowed[1:] - 1
        return np.where(wanted < len(row), row[np.minimum(wanted, len(row) - 1)], np.inf)

    return arrivals
