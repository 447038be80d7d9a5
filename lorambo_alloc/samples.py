"""Several estimates of the same layers' curves, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from lorambo_alloc.arrays import FlatLayers
from lorambo_alloc.costs import UniformRank
from lorambo_alloc.curves import GainCurves, Spectra
from lorambo_alloc.problem import InfeasibleError, Problem

_EXPECTED = (
    "samples: expected a sequence of what `allocate` takes as spectra, a mapping of layer name to "
    "2-D array (samples x ranks) or a 3-D array (samples x layers x ranks)"
)


def sample_problems(
    samples: object, budget: int | UniformRank, **keywords: Any
) -> tuple[list[Problem], dict[str, Any]]:
    """One problem a sample: the same layers, ranks, costs and limits, other gains.

    Args:
        samples: at least two, as `stability` takes them.
        budget: as `Problem` takes it.
        keywords: the other arguments of `Problem`.

    Returns:
        The problems; and the arguments of `Problem`, but for objective and weights, that give
        the same layers in gains of their own the same costs and limits.

    Raises:
        ValueError: there are fewer than two samples, one is not valid, or two differ in their
            layers, in the number of a layer's ranks or in its cost. The message names the sample,
            counted from 0.
        InfeasibleError: the minimum ranks cost more than the budget or a cap.
    """
    listed = _listed(samples)
    if len(listed) < 2:
        raise ValueError(f"samples: expected at least 2, got {len(listed)}")
    first: Problem | None = None
    problems: list[Problem] = []
    for s, sample in enumerate(listed):
        try:
            curves = sample if isinstance(sample, (Spectra, GainCurves)) else Spectra(sample)
            if first is not None:
                curves = _matched(curves, first)
            problem = Problem(curves, budget, **keywords)
        except InfeasibleError:
            raise
        except ValueError as error:
            raise ValueError(f"samples[{s}]: {error}") from error
        if first is None:
            first = problem
            # An iterator is spent by now.
            keywords["tied"] = problem.tied
        for i in np.flatnonzero(problem.costs != first.costs)[:1].tolist():
            raise ValueError(
                f"samples[{s}]: layer {first.names[i]!r}: expected the cost {first.costs[i]} a "
                f"rank, as in samples[0], got {problem.costs[i]}"
            )
        problems.append(problem)
    assert first is not None
    same = {key: value for key, value in keywords.items() if key not in _OF_GAINS}
    return problems, same | {"costs": first.costs.tolist()}


_OF_GAINS = ("objective", "weights", "shapes", "costs")


def _listed(samples: object) -> list[object]:
    """The samples one by one."""
    if isinstance(samples, (Spectra, GainCurves)):
        raise ValueError(f"{_EXPECTED}, got one {type(samples).__name__}")
    if isinstance(samples, Mapping):
        return _by_layer(cast(Mapping[str, object], samples))
    if isinstance(samples, Sequence) and not isinstance(samples, (str, bytes)):
        return list(cast(Sequence[object], samples))
    try:
        array = np.asarray(samples)
    except Exception as error:  # whatever another library's array raises
        raise ValueError(f"{_EXPECTED}, got {type(samples).__name__}: {error}") from error
    if array.ndim != 3:
        got = f"an array of shape {array.shape}" if array.ndim else type(samples).__name__
        raise ValueError(f"{_EXPECTED}, got {got}")
    return list(array)


def _by_layer(samples: Mapping[str, object]) -> list[object]:
    """Samples from one 2-D array a layer."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    count: int | None = None
    for name, values in samples.items():
        where = f"samples: layer {name!r}"
        try:
            array = np.asarray(values)
        except Exception as error:  # whatever another library's array raises
            raise ValueError(
                f"{where}: expected a 2-D array (samples x ranks), got {type(values).__name__}: "
                f"{error}"
            ) from error
        if array.ndim != 2:
            raise ValueError(
                f"{where}: expected a 2-D array (samples x ranks), got one of shape {array.shape}"
            )
        count = len(array) if count is None else count
        if len(array) != count:
            raise ValueError(
                f"{where}: expected {count} samples, as of the first layer, got {len(array)}"
            )
        arrays[name] = array
    return [{name: array[s] for name, array in arrays.items()} for s in range(count or 0)]


def _matched(curves: Spectra | GainCurves, first: Problem) -> Spectra | GainCurves:
    """The curves with their layers in the first sample's order; ValueError if they differ."""
    names = curves.layers.names
    known = set(first.names)
    for name in names:
        if name not in known:
            raise ValueError(f"layer {name!r} is not in samples[0]")
    for name in first.names:
        if name not in curves:
            raise ValueError(f"layer {name!r} of samples[0] is missing")
    if names != first.names:
        curves = _in_order(curves, first.names)
    lengths = curves.layers.lengths - (1 if isinstance(curves, GainCurves) else 0)
    for i in np.flatnonzero(lengths != first.max_lengths)[:1].tolist():
        raise ValueError(
            f"layer {first.names[i]!r}: expected {first.max_lengths[i]} ranks, as in samples[0], "
            f"got {lengths[i]}"
        )
    return curves


def _in_order(curves: Spectra | GainCurves, names: tuple[str, ...]) -> Spectra | GainCurves:
    """The same curves with their layers in another order."""
    if isinstance(curves, Spectra):
        return Spectra({name: curves[name] for name in names}, shapes=curves.shapes)
    increments: FlatLayers | None = curves.increments
    if increments is None or not np.all(increments.lengths):
        return GainCurves({name: curves[name] for name in names})
    place = {name: i for i, name in enumerate(increments.names)}
    return GainCurves.from_increments({name: increments.row(place[name]) for name in names})
