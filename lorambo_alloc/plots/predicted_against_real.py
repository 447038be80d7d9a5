"""Predictions against what came true, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lorambo_alloc.objectives import FloatArray, real_number
from lorambo_alloc.plots.layer_names import module_type, shortest, split
from lorambo_alloc.plots.style import (
    FONT,
    WIDTH,
    colour,
    figure_of,
    label,
    marker,
    new_figure,
    plain_log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_KINDS = 12  # module types that markers tell apart
_GREATEST = 1e150  # so that neither limits of axes nor ratios overflow


def predicted_against_real(
    predicted: Mapping[str, float],
    real: Mapping[str, float],
    *,
    ax: Axes | None = None,
    log: bool | None = None,
    quantity: str = "decrease of the loss",
    unit: str = "",
) -> Figure:
    """A point a layer, predicted over real, with the line where both are equal.

    Both axes have the same limits. Markers are by module type, up to 12 of them. The text above
    says Spearman's rank correlation over all layers, and the median of predicted / real over those
    where both are above 0.

    Args:
        predicted: layer name to what was predicted.
        real: the same names to what came true, in the same unit.
        ax: where to draw; None: a new figure.
        log: both axes logarithmic; layers where either is not above 0 are then left out of the
            picture, and their number is said. None: if all are above 0.
        quantity: what both are.
        unit: of both.

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: there are no layers, names differ, a number is not finite or beyond 1e150 in
            size, or with `log` no layer has both above 0.

    Example:
        >>> predicted_against_real({"0.q": 2.0, "0.v": 1.0}, {"0.q": 1.5, "0.v": 1.1}).savefig(
        ...     "predicted.png"
        ... )  # doctest: +SKIP
    """
    for what, given in (("real", real), ("predicted", predicted)):
        if not isinstance(cast(object, given), Mapping):
            raise ValueError(f"{what}: expected a mapping of layer name to number, got {given!r}")
    names = list(predicted)
    x, y = _numbers(names, real, "real"), _numbers(names, predicted, "predicted")
    for name in real:
        if name not in predicted:
            raise ValueError(f"predicted: layer {name!r} is missing")
    if not names:
        raise ValueError("predicted: expected at least one layer, got none")
    both = (x > 0) & (y > 0)
    log = bool(both.all()) if log is None else log
    shown = both if log else np.ones(len(names), dtype=bool)
    if not shown.any():
        raise ValueError("log: expected a layer with both numbers above 0, got none")
    axes: Any = ax if ax is not None else new_figure(0.68 * WIDTH, 3.3).subplots()
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    _line(axes, np.concatenate([x[shown], y[shown]]), log)
    _scatter(axes, names, x, y, shown)
    _say(axes, x, y, both, int((~shown).sum()))
    suffix = f" ({unit})" if unit else ""
    if log:
        plain_log_ticks(axes.xaxis)
        plain_log_ticks(axes.yaxis)
    label(axes, x=f"real {quantity}{suffix}", y=f"predicted {quantity}{suffix}")
    return figure_of(axes)


def rank_correlation(x: FloatArray, y: FloatArray) -> float:
    """Spearman's rank correlation, with mean ranks for equals; NaN where one side is constant.

    Example:
        >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0]))
        0.5
    """
    a, b = (_mean_ranks(side) for side in (x, y))
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread else math.nan


def _mean_ranks(values: FloatArray) -> FloatArray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place.ravel()].astype(np.float64)


def _numbers(names: list[str], given: Mapping[str, float], what: str) -> FloatArray:
    numbers: list[float] = []
    for name in names:
        if name not in given:
            raise ValueError(f"{what}: layer {name!r} is missing")
        number = real_number(given[name])
        if not abs(number) <= _GREATEST:
            raise ValueError(
                f"{what}: layer {name!r}: expected a finite number of size at most {_GREATEST:g}, "
                f"got {given[name]!r}"
            )
        numbers.append(number)
    return np.array(numbers, dtype=np.float64)


def _line(ax: Any, values: FloatArray, log: bool) -> None:
    """Equal limits for both axes, and the line of equals through them."""
    low, high = float(values.min()), float(values.max())
    if log:
        low, high = low / 1.4, high * 1.4
    else:
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        low, high = low - room, high + room
        ax.axhline(0, color="0.85", linewidth=0.6, zorder=0)
        ax.axvline(0, color="0.85", linewidth=0.6, zorder=0)
    ax.plot([low, high], [low, high], color="0.4", linestyle="--", linewidth=0.8, label="equal")
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")


def _scatter(ax: Any, names: list[str], x: FloatArray, y: FloatArray, shown: Any) -> None:
    kinds = [module_type(module) for module in split(names)[1]]
    types = list(dict.fromkeys(kinds))
    if len(types) > _MOST_KINDS:
        types, kinds = ["layers"], ["layers"] * len(names)
    short = shortest(types)
    for k, kind in enumerate(types):
        chosen = shown & np.array([found == kind for found in kinds])
        # Seven colours and seven markers out of step tell twelve types apart.
        look = {"color": colour(k), "marker": marker(k + k // 7)}
        ax.plot(
            x[chosen], y[chosen], linestyle="none", markersize=4.5, markeredgecolor="white",
            markeredgewidth=0.4, label=short[kind] or "layers", **look,
        )  # fmt: skip
    ax.legend(fontsize=FONT, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _say(ax: Any, x: FloatArray, y: FloatArray, both: Any, left_out: int) -> None:
    lines: list[str] = []
    correlation = rank_correlation(x, y)
    if not math.isnan(correlation):
        lines.append(f"rank correlation {correlation:.2f}")
    if both.any():
        with np.errstate(over="ignore", under="ignore"):
            ratio = float(np.median(y[both] / x[both]))
        lines.append(f"median predicted / real {ratio:.3g}")
    if left_out:
        lines.append(f"{left_out} layers not above 0 left out")
    ax.set_title("\n".join(lines), loc="left", fontsize=FONT)
