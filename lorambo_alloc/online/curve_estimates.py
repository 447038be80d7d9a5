"""The running estimates of all layers' curves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorambo_alloc.arrays import flatten
from lorambo_alloc.costs import whole_number
from lorambo_alloc.curves import GainCurves, Spectra, check_names
from lorambo_alloc.objectives import FloatArray, real_number
from lorambo_alloc.online.running_curves import RunningCurve

LARGEST = 1e140
"""Of a gain: its square, and sums of squares, stay finite."""


class CurveEstimates:
    """Discounted means of what was observed of each layer, round by round.

    Args:
        names: of the layers.
        discount: of a round beside the next one, in (0, 1].

    Attributes:
        rounds: how many there were.
        total: the same, discounted.
        rejected: by layer, how many curves were left out because they were not finite.
        curves: by layer observed.
    """

    def __init__(self, names: tuple[str, ...], discount: float) -> None:
        self._names, self._known, self._discount = names, frozenset(names), discount
        self.rounds, self.total = 0, 0.0
        self.rejected: dict[str, int] = {}
        self.curves: dict[str, RunningCurve] = {}

    def observe(self, curves: GainCurves | Spectra | Mapping[str, Any], stacklevel: int) -> None:
        """Take in one round; `OnlineAllocator.observe`."""
        found = self._gains_of(curves)
        for curve in self.curves.values():
            curve.discount(self._discount)
        self.rounds += 1
        self.total = self.total * self._discount + 1
        faults: list[str] = []
        for name, gains in found.items():
            usable = np.abs(gains) <= LARGEST  # and not NaN
            if not np.all(usable):
                self.rejected[name] = self.rejected.get(name, 0) + 1
                rank = int(np.argmin(usable))
                faults.append(
                    f"layer {name!r}: expected finite gains of at most {LARGEST:g}, got "
                    f"{gains[rank]} for rank {rank + 1}; this curve is left out"
                )
            elif len(gains):
                self.curves.setdefault(name, RunningCurve()).add(gains)
        for fault in faults:  # last: where warnings are errors, the round is whole all the same
            warnings.warn(fault, stacklevel=stacklevel + 1)

    def _gains_of(self, curves: GainCurves | Spectra | Mapping[str, Any]) -> dict[str, FloatArray]:
        if not isinstance(curves, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"curves: expected a mapping of layer name to curve, got {curves!r}")
        for name in curves:
            if name not in self._known:
                raise ValueError(f"curves: layer {name!r} is not among the layers")
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is left out
            if isinstance(curves, Spectra):
                return {name: np.square(curves[name]) for name in curves}
            if isinstance(curves, GainCurves) and curves.increments is not None:
                rows = curves.increments
                return {name: rows.row(i) for i, name in enumerate(rows.names)}
            rows = flatten(curves, "gain curve", "gain curves")
            found: dict[str, FloatArray] = {}
            for i, name in enumerate(rows.names):
                row = rows.row(i)
                if row[0] != 0 and not math.isnan(row[0]):
                    raise ValueError(
                        f"layer {name!r}: expected a curve that starts with F(0) = 0, got {row[0]}"
                    )
                found[name] = np.diff(row)
        return found

    def means(self) -> dict[str, FloatArray]:
        """F(0), ..., F(R) by layer observed."""
        return {
            name: np.concatenate([[0.0], np.cumsum(self.curves[name].means)])
            for name in self._names
            if name in self.curves
        }

    def standard_errors(self) -> dict[str, FloatArray]:
        """Of the mean gain of each single rank, by layer observed."""
        return {
            name: self.curves[name].standard_errors() for name in self._names if name in self.curves
        }

    def state_dict(self) -> dict[str, Any]:
        """What JSON can hold, to the bit."""
        return {
            "rounds": self.rounds,
            "total": self.total,
            "rejected": dict(self.rejected),
            "curves": {name: curve.state_dict() for name, curve in self.curves.items()},
        }

    def with_state(self, state: Mapping[str, Any]) -> CurveEstimates:
        """Estimates of the same layers and discount that stand where others stood.

        Raises:
            KeyError: something is missing.
            ValueError: a layer is unknown, or something is damaged.
        """
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"estimates: expected a mapping, got {state!r}")
        loaded = CurveEstimates(self._names, self._discount)
        loaded.rounds = whole_number(state["rounds"], "rounds", 0)
        loaded.total = real_number(state["total"])
        if not 0 <= loaded.total <= loaded.rounds:
            raise ValueError(f"total: expected a number up to the rounds, got {state['total']!r}")
        for what in ("rejected", "curves"):
            check_names({**dict.fromkeys(self._names), **state[what]}, self._names, what)
        for name, count in state["rejected"].items():
            loaded.rejected[name] = whole_number(count, f"rejected: layer {name!r}", 0)
        for name, moments in state["curves"].items():
            try:
                loaded.curves[name] = RunningCurve.from_state(moments)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        return loaded
