"""Cumulative regret of allocators that learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lorambo_alloc.objectives import FloatArray
from lorambo_alloc.plots.style import (
    FONT,
    WIDTH,
    colour,
    dashes,
    figure_of,
    label,
    new_figure,
    plain_log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def regret_by_round(
    regrets: Mapping[str, FloatArray], *, ax: Axes | None = None, log: bool = True
) -> Figure:
    """Cumulative regret over the rounds: the mean of some runs, and its 95 % interval as a band.

    Args:
        regrets: by what is to stand in the legend, an array runs x rounds (or rounds alone).
        ax: where to draw; None: a new figure.
        log: both axes logarithmic, with dotted lines for t and t^1/2; means <= 0 are left out.

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: there is nothing to draw (with `log` no mean above 0), an array has neither one
            nor two axes, or a number in it is not finite.
    """
    tables = _tables(regrets)
    greatest = max(float(table.mean(axis=0).max()) for table in tables.values())
    if log and not greatest > 0:
        raise ValueError(f"log: expected a mean regret above 0, got {greatest:g} at most")
    axes: Any = ax if ax is not None else new_figure(WIDTH / 2, 3.6).subplots()
    for k, (arm, table) in enumerate(tables.items()):
        rounds = np.arange(1, table.shape[1] + 1, dtype=np.int64)
        mean = table.mean(axis=0)
        if log:
            mean = np.where(mean > 0, mean, np.nan)
        point = "." if int(np.isfinite(mean).sum()) == 1 else None  # it has no line
        axes.plot(
            rounds, mean, color=colour(k), linestyle=dashes(k), linewidth=1.2, label=arm,
            marker=point,
        )  # fmt: skip
        if len(table) > 1:
            half = 1.96 * table.std(axis=0, ddof=1) / np.sqrt(len(table))
            low = np.maximum(mean - half, mean / 10) if log else mean - half
            axes.fill_between(rounds, low, mean + half, color=colour(k), alpha=0.15, linewidth=0)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        last = max(table.shape[1] for table in tables.values())
        top = max(float(table.mean(axis=0)[-1]) for table in tables.values())
        top = top if top > 0 else greatest
        for power, name in ((1.0, "t"), (0.5, "t$^{1/2}$")):
            ends = np.array([max(1.0, last / 100), last])
            line = 2 * top * (ends / last) ** power
            axes.plot(ends, line, color="0.5", linestyle=":", linewidth=0.8)
            axes.annotate(name, (ends[0], line[0]), color="0.4", fontsize=FONT, ha="right")
    else:
        axes.axhline(0.0, color="0.5", linewidth=0.6)
    label(axes, x="round", y="cumulative regret")
    if log:
        plain_log_ticks(axes.xaxis)
        plain_log_ticks(axes.yaxis)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    axes.legend(fontsize=FONT, frameon=False, **below)
    return figure_of(axes)


def _tables(regrets: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The arrays, runs x rounds, checked."""
    if not isinstance(cast(object, regrets), Mapping):
        raise ValueError(f"regrets: expected a mapping of name to array, got {regrets!r}")
    if not regrets:
        raise ValueError("regrets: expected at least one array, got none")
    tables: dict[str, FloatArray] = {}
    for arm, given in regrets.items():
        try:
            table = np.atleast_2d(np.asarray(given, dtype=np.float64))
        except (TypeError, ValueError):
            raise ValueError(f"regrets: {arm!r}: expected numbers, got {given!r}") from None
        if table.ndim != 2 or not table.size:
            raise ValueError(f"regrets: {arm!r}: expected runs x rounds, got shape {table.shape}")
        if not np.isfinite(table).all():
            run, at = np.argwhere(~np.isfinite(table))[0].tolist()
            raise ValueError(
                f"regrets: {arm!r}: expected finite numbers, got {table[run, at]} in run {run}, "
                f"round {at + 1}"
            )
        tables[arm] = table
    return tables
