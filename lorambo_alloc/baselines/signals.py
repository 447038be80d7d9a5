"""What the rules look at: signals from the caller, or stand-ins made from the gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from lorambo_alloc.arrays import flatten
from lorambo_alloc.costs import PerLayer, per_layer
from lorambo_alloc.curves import GainCurves, check_finite, check_names
from lorambo_alloc.objectives import FloatArray, real_number
from lorambo_alloc.problem import Problem


def single_gains(problem: Problem) -> list[FloatArray]:
    """By layer, the gain of each single rank; for `operator`, the weighted singular values."""
    rows = range(len(problem.names))
    if problem.objective.kind == "operator":
        weights = np.ones(len(rows)) if problem.weights is None else problem.weights
        return [problem.curves.layers.row(i) * weights[i] for i in rows]
    if problem.gains is not None:
        return [problem.gains.row(i) for i in rows]
    return [np.diff(problem.curve(i)) for i in rows]


def mean_gains(problem: Problem) -> FloatArray:
    """By layer, the mean gain of a rank over its whole curve, 0 for a loss; the largest is 1."""
    return _relative(np.array([row.sum() / max(len(row), 1) for row in _scaled_gains(problem)]))


def whole_gains(problem: Problem) -> FloatArray:
    """By layer, the gain of its whole curve, 0 for a loss; the largest is 1."""
    return _relative(np.array([row.sum() for row in _scaled_gains(problem)]))


def variance_ratios(problem: Problem) -> list[FloatArray]:
    """By layer, each rank's share of the layer's own energy.

    sigma_j^2 / (sum of all sigma^2 + what the spectrum leaves unresolved). For gain curves: a
    rank's gain over the sum of the layer's gains; losses count as 0.
    """
    curves = problem.curves
    if isinstance(curves, GainCurves):
        return [_shares(np.maximum(row, 0.0)) for row in single_gains(problem)]
    return [
        _shares(curves.layers.row(i), math.sqrt(curves.unresolved[name]), power=2)
        for i, name in enumerate(problem.names)
    ]


def parse_scores(values: object, problem: Problem, what: str) -> list[FloatArray]:
    """By layer, the caller's number for each single rank.

    Args:
        values: name to a 1-D array of finite numbers; or a sequence of such, in layer order.
        problem: whose layers.
        what: the argument's name.

    Raises:
        ValueError: a layer is missing or unknown, or its numbers are not of this form.
    """
    names = problem.names
    if isinstance(values, Mapping):
        check_names(cast(Mapping[str, Any], values), names, what)
        values = {name: cast(Mapping[str, object], values)[name] for name in names}
    layers = flatten(values, f"sequence of {what}", what)
    if len(layers) != len(names):
        raise ValueError(f"{what}: expected {len(names)} sequences, got {len(layers)}")
    check_finite(layers, f"sequence of {what}")
    return [layers.row(i) for i in range(len(names))]


def parse_importance(values: PerLayer[float], problem: Problem, what: str) -> FloatArray:
    """By layer, the caller's number >= 0, in units of the largest.

    Raises:
        ValueError: a layer is missing or unknown, or its number is not finite or below 0.
    """

    def parse(value: object, where: str) -> float:
        number = real_number(value)
        if not 0 <= number < math.inf:
            raise ValueError(f"{where}: expected a finite number >= 0, got {value!r}")
        return number

    return _relative(np.array(per_layer(values, problem.names, what, parse), dtype=np.float64))


def _shares(values: FloatArray, rest: float = 0.0, power: int = 1) -> FloatArray:
    """Powers of values >= 0 over the sum of them all and of the rest; 0 where there is nothing."""
    top = np.max(values, initial=0.0)
    if top == 0:
        return np.zeros(len(values))
    # In units of the largest no power of a value overflows; that of the rest may, to 0 shares.
    with np.errstate(over="ignore"):
        energy = (values / top) ** power
        return energy / (energy.sum() + (rest / top) ** power)


def _scaled_gains(problem: Problem) -> list[FloatArray]:
    """Gains in units of the largest magnitude of any, so that no sum overflows."""
    rows = single_gains(problem)
    top = max((float(np.max(np.abs(row), initial=0.0)) for row in rows), default=0.0)
    return [row / top if top > 0 else row for row in rows]


def _relative(values: FloatArray) -> FloatArray:
    """Values >= 0 in units of the largest; what is below 0 becomes 0."""
    values = np.maximum(values, 0.0)
    top = float(np.max(values, initial=0.0))
    return values / top if top > 0 else values
