"""The same rank everywhere, or everywhere in the MLP: rules that look at no signal."""

from __future__ import annotations

import re

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.baselines.path import followed
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

MLP = (
    r"(?i)^(?!.*att(n|ention)(?!s))(.*[._])?"
    r"(mlps?|ffn?|feed_?forward|intermediate|experts?|densereludense|"
    r"c_fc|fc\d+|(gate|up|down|gate_up)_proj|dense_(h_to_4h|4h_to_h)|\d+\.output)([._].*)?$"
)
"""Matches the names that common models give to layers of an MLP, outside any attention.

Diffusion models call blocks that hold an MLP too `attentions`: that plural rules nothing out.
"""


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
    return followed(problem, _same_rank, "uniform", fill)


def mlp_only(problem: Problem, *, pattern: str = MLP, fill: bool = False) -> Allocation:
    """The same rank in every layer of an MLP, the largest that fits, and none elsewhere.

    The other layers stay at their minimum rank, which is 0 unless the problem says more. At about
    the same count of parameters a strong baseline in PEFT's own comparison of methods.

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
        shown = [*map(repr, problem.names[:3]), *["..."][: len(matches) > 3]]
        raise ValueError(
            f"pattern: expected a match among the names of the {len(matches)} layers, got none"
            + (f" ({', '.join(shown)})" if shown else "")
        )

    def arrivals(i: int, allowed: IntArray) -> FloatArray:
        moments = _same_rank(i, allowed)
        return moments if matches[i] else np.full_like(moments, np.inf)

    return followed(problem, arrivals, "mlp_only", fill)


def _same_rank(i: int, allowed: IntArray) -> FloatArray:
    return allowed[1:].astype(np.float64)
