"""Ranks over the steps of a training run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from lorambo_alloc.history import RankHistory
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.plots.layer_names import Row, rows
from lorambo_alloc.plots.style import (
    FONT,
    ROW,
    TALLEST,
    WIDTH,
    RankColours,
    figure_of,
    label,
    new_figure,
    points,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def rank_history(
    history: RankHistory,
    *,
    ax: Axes | None = None,
    group: str | Callable[[str], str] = "block",
    unit: str = "parameters",
) -> Figure:
    """A heat map of the ranks over the steps, with what they cost and may cost below it.

    A column reaches from its entry's step to the next one's; the last is as wide as the median. A
    last entry whose event is "end" has no column: the run ends at its step. Rank 0 is white. Rows
    are labelled where there is room for it (up to about 75 layers in a figure of its own), else
    only their groups.

    Args:
        history: with at least one entry.
        ax: where to draw the heat map, without the costs; None: a new figure with both.
        group: how rows are sorted and labelled: "block" (by the first number in the layers' names,
            then by module), "module" (by module, then by block), or a function from a layer's name
            to that of its group.
        unit: of the costs.

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: the history is empty, or `group` is not of this form.

    Example:
        >>> history = RankHistory({"layers.0.q": 16, "layers.1.q": 16})
        >>> history.record(0, {"layers.0.q": 2, "layers.1.q": 0}, budget=32)
        >>> rank_history(history).savefig("ranks.png")  # doctest: +SKIP
    """
    if not isinstance(history, RankHistory):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"history: expected a RankHistory, got {history!r}")
    if not len(history) or not history.names:
        raise ValueError(f"history: expected entries of layers, got {history!r}")
    ordered = rows(history.names, group)
    if ax is not None:
        _heat_map(history, ordered, ax, group)
        label(ax, x="training step")
        return figure_of(ax)
    height = min(TALLEST - 2.0, max(1.6, len(ordered) * ROW / 72))
    figure = new_figure(WIDTH, height + 2.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.2])
    _costs(history, lower, unit)
    _heat_map(history, ordered, upper, group)
    label(lower, x="training step")
    return figure


def _columns(history: RankHistory) -> tuple[IntArray, FloatArray]:
    """The entries to draw (of one step the last), and the edges of their columns."""
    steps = history.steps
    kept = np.flatnonzero(np.append(steps[1:] > steps[:-1], True))
    steps = steps[kept]
    if len(steps) > 1 and history.events[-1]["event"] == "end":
        return kept[:-1], steps.astype(np.float64)
    last = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    return kept, np.append(steps, steps[-1] + last).astype(np.float64)


def _heat_map(
    history: RankHistory, ordered: list[Row], ax: Any, group: str | Callable[[str], str]
) -> None:
    kept, edges = _columns(history)
    ranks = history.ranks[kept][:, [row[2] for row in ordered]].T
    colours = RankColours(int(ranks.max()))
    mesh = colours.mesh(ax, edges, np.arange(len(ordered) + 1) - 0.5, ranks)
    ax.set_ylim(len(ordered) - 0.5, -0.5)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(labelsize=FONT)
    colours.bar(mesh, [ax])
    _label_rows(ordered, ax, group if isinstance(group, str) else "group of layers")


def _label_rows(ordered: list[Row], ax: Any, kind: str) -> None:
    """Rows labelled on the left and groups, of a `kind`, on the right, as far as there is room."""
    height = points(ax)[1]
    groups = [(group, len(list(part))) for group, part in groupby(ordered, key=lambda row: row[0])]
    ends = np.cumsum([count for _, count in groups])
    middles = ends - np.array([count for _, count in groups]) / 2 - 0.5
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="0.25", linewidth=0.4)
    labels = [group for group, _ in groups]
    alone = len(groups) == len(ordered)
    if alone:
        labels = [" ".join(filter(None, row[:2])) for row in ordered]
    roomy = height >= len(ordered) * FONT
    if roomy and not alone:
        ax.set_yticks(range(len(ordered)), [row[1] for row in ordered])
        if len(groups) > 1:
            side = ax.secondary_yaxis("right")
            side.set_yticks(middles, labels)
            side.tick_params(length=0, labelsize=FONT + 1)
            label(side, y=kind)
        label(ax, y="layer")
        return
    each = -(-len(labels) * FONT // max(height, 1.0))  # every so manieth label has room
    chosen = slice(None, None, max(1, int(each)))
    ax.set_yticks(middles[chosen], labels[chosen])
    label(ax, y="layer" if alone else kind)


def _costs(history: RankHistory, ax: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    kept, edges = _columns(history)
    spent, budgets = (np.append(row[kept], row[-1]) for row in (history.spent, history.budgets))
    ax.fill_between(edges, spent, step="post", color="#9db4cf", linewidth=0, label="spent")
    ax.step(
        edges, budgets, where="post", color="black", linestyle="--", linewidth=1, label="budget"
    )
    failed = np.array([event["event"].startswith("failed") for event in history.events])
    if failed.any():
        ax.plot(
            history.steps[failed], history.spent[failed], color="#b03a00", marker="x",
            linestyle="none", markersize=5, label="failed", clip_on=False,
        )  # fmt: skip
    ax.set_ylim(0, 1.1 * max(1, int(budgets.max()), int(spent.max())))
    ax.set_xlim(edges[0], edges[-1])
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    label(ax, y=f"cost\n({unit})")
    ax.legend(fontsize=FONT, loc="lower right", ncols=3)
