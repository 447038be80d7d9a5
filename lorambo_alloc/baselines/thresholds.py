"""One order over the ranks of all layers, cut where the budget ends: EVA and AdaLoRA."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.baselines.path import Arrivals, followed
from lorambo_alloc.baselines.signals import parse_scores, single_gains, variance_ratios
from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import FloatArray, IntArray, real_number
from lorambo_alloc.problem import Problem


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
    return followed(problem, arrivals, "eva", fill)


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
    return followed(problem, _counted([-row for row in rows]), "adalora", fill)


def _uniform_rank(problem: Problem) -> int:
    """The rank of every layer that the budget pays for; at least 1."""
    layers = range(len(problem.names))
    first, second = problem.cost_at(layers, 1), problem.cost_at(layers, 2)
    return max(1, 1 + (problem.budget - first) // max(second - first, 1))


def _counted(moments: list[FloatArray]) -> Arrivals:
    """A layer's rank is how many of its moments have come."""
    ascending = [np.sort(row) for row in moments]

    def arrivals(i: int, allowed: IntArray) -> FloatArray:
        row = ascending[i]
        wanted = allowed[1:] - 1
        return np.where(wanted < len(row), row[np.minimum(wanted, len(row) - 1)], np.inf)

    return arrivals
