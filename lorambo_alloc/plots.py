"""Pictures of a training run (extra `plot`: matplotlib), for print and for any eyes.

Ranks are drawn in viridis, whose lightness falls steadily, so that neither a grey printer nor a
colour-blind reader loses their order. Figures are made without pyplot: no window, no global state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lorambo_alloc.history import RankHistory
from lorambo_alloc.objectives import FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 7.0  # inches: the text of a printed page
_ROW = 9.0  # points for a row with a label
_FONT = 6.5  # points, of a row's label
_TALLEST = 10.0  # inches
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 1)))

_Row: TypeAlias = tuple[str, str, int]  # label of the group, label in it, index of the layer


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
    if not len(history) or not history.names:
        raise ValueError(f"history: expected entries of layers, got {history!r}")
    rows = _rows(history.names, group)
    figure_class = _figure_class()
    if ax is not None:
        given: Any = ax
        _heat_map(history, rows, given)
        given.set_xlabel("training step", fontsize=8)
        return ax.figure.figure  # pyright: ignore[reportReturnType]  also of a subfigure
    height = min(_TALLEST - 2.0, max(1.6, len(rows) * _ROW / 72))
    figure = figure_class(figsize=(_WIDTH, height + 2.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.2])
    _costs(history, lower, unit)
    _heat_map(history, rows, upper)
    lower.set_xlabel("training step", fontsize=8)
    return figure


def regret_by_round(
    regrets: Mapping[str, FloatArray], *, ax: Axes | None = None, log: bool = True
) -> Figure:
    """Cumulative regret over the rounds: the mean of some runs, and its 95 % interval as a band.

    Args:
        regrets: by what is to stand in the legend, an array runs x rounds (or rounds alone).
        ax: where to draw; None: a new figure.
        log: both axes logarithmic, with dotted lines for t and t^1/2; values <= 0 are left out.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: there is nothing to draw, or an array has neither one nor two axes.
    """
    tables = {
        label: np.atleast_2d(np.asarray(table, dtype=np.float64))
        for label, table in regrets.items()
    }
    for label, table in tables.items():
        if table.ndim != 2 or not table.size:
            raise ValueError(f"regrets: {label!r}: expected runs x rounds, got shape {table.shape}")
    if not tables:
        raise ValueError("regrets: expected at least one array, got none")
    figure_class = _figure_class()
    if ax is None:
        figure = figure_class(figsize=(_WIDTH / 2, 3.6), layout="constrained")
        ax = figure.subplots()
    axes: Any = ax
    for k, (label, table) in enumerate(tables.items()):
        rounds = np.arange(1, table.shape[1] + 1, dtype=np.int64)
        mean = table.mean(axis=0)
        if log:
            mean = np.where(mean > 0, mean, np.nan)
        colour, dashes = _COLOURS[k % len(_COLOURS)], _DASHES[k % len(_DASHES)]
        axes.plot(rounds, mean, color=colour, linestyle=dashes, linewidth=1.2, label=label)
        if len(table) > 1:
            half = 1.96 * table.std(axis=0, ddof=1) / np.sqrt(len(table))
            low = np.maximum(mean - half, mean / 10) if log else mean - half
            axes.fill_between(rounds, low, mean + half, color=colour, alpha=0.15, linewidth=0)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        last = max(table.shape[1] for table in tables.values())
        top = max(float(table.mean(axis=0)[-1]) for table in tables.values())
        for power, name in ((1.0, "t"), (0.5, "t$^{1/2}$")):
            ends = np.array([max(1.0, last / 100), last])
            line = 2 * top * (ends / last) ** power
            axes.plot(ends, line, color="0.5", linestyle=":", linewidth=0.8)
            axes.annotate(name, (ends[0], line[0]), color="0.4", fontsize=_FONT, ha="right")
    else:
        axes.axhline(0.0, color="0.5", linewidth=0.6)
    axes.set_xlabel("round", fontsize=8)
    axes.set_ylabel("cumulative regret", fontsize=8)
    axes.tick_params(which="both", labelsize=_FONT)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    axes.legend(fontsize=_FONT, frameon=False, **below)
    return axes.figure.figure


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lorambo-alloc[plot]'") from error
    return Figure


def _rows(names: tuple[str, ...], group: str | Callable[[str], str]) -> list[_Row]:
    """The rows from top to bottom."""
    blocks, modules, depths = _split(names)
    order_of = {module: k for k, module in enumerate(dict.fromkeys(modules))}
    places = [order_of[module] for module in modules]
    layers = range(len(names))
    if group == "block":
        ordered = sorted(layers, key=lambda i: (depths[i], places[i]))
        return [(blocks[i], modules[i], i) for i in ordered]
    if group == "module":
        ordered = sorted(layers, key=lambda i: (places[i], depths[i]))
        return [(modules[i], blocks[i], i) for i in ordered]
    if not callable(group):
        raise ValueError(f"group: expected 'block', 'module' or a function, got {group!r}")
    groups = [str(group(name)) for name in names]
    first = {key: k for k, key in enumerate(dict.fromkeys(groups))}
    ordered = sorted(layers, key=lambda i: first[groups[i]])
    return [(groups[i], f"{blocks[i]} {modules[i]}".strip(), i) for i in ordered]


def _split(names: tuple[str, ...]) -> tuple[list[str], list[str], list[tuple[str, int]]]:
    """Of each name the block, the module in it, and a key that sorts blocks by depth.

    The block is the first number in the name, with what stands before it where that differs.
    """
    matches = [re.match(r"^(?:(.*?)\.)?(\d+)(?:\.(.+))?$", name) for name in names]
    several = len({match[1] for match in matches if match}) > 1
    blocks: list[str] = []
    modules: list[str] = []
    depths: list[tuple[str, int]] = []
    for name, match in zip(names, matches, strict=True):
        stack, number, module = match.groups() if match else ("", "", name)
        stack = stack or ""
        place = f"{stack}.{number}" if several and stack else f"block {number}"
        blocks.append(place if match else "")
        modules.append(module or "")
        depths.append((stack, int(number) if match else -1))
    return blocks, modules, depths


def _columns(history: RankHistory) -> tuple[IntArray, FloatArray]:
    """The entries to draw (of one step the last), and the edges of their columns."""
    steps = history.steps
    kept = np.flatnonzero(np.append(steps[1:] > steps[:-1], True))
    steps = steps[kept]
    if len(steps) > 1 and history.events[-1]["event"] == "end":
        return kept[:-1], steps.astype(np.float64)
    last = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    return kept, np.append(steps, steps[-1] + last).astype(np.float64)


def _heat_map(history: RankHistory, rows: list[_Row], ax: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap, PowerNorm

    kept, edges = _columns(history)
    ranks = history.ranks[kept][:, [row[2] for row in rows]].T
    most = max(1, int(ranks.max()))
    shades: Any = colormaps["viridis_r"](np.linspace(0.06, 1.0, most if most <= 10 else 256))
    colours = ListedColormap(shades)
    ax.set_facecolor("white")  # behind rank 0, which is masked
    norm: Any = PowerNorm(0.5, 1, most)  # a few large ranks leave colours to the small ones
    ticks = [2**k for k in range(most.bit_length())]
    if most <= 10:
        colours = ListedColormap([(1.0, 1.0, 1.0, 1.0), *shades])
        norm = BoundaryNorm(np.arange(most + 2) - 0.5, most + 1)
        ticks = list(range(most + 1))
    shown = np.ma.masked_less(ranks, 1) if most > 10 else ranks
    mesh = ax.pcolormesh(
        edges, np.arange(len(rows) + 1) - 0.5, shown, cmap=colours, norm=norm, rasterized=True
    )
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(labelsize=_FONT)
    bar = ax.figure.colorbar(mesh, ax=ax, ticks=ticks, fraction=0.05, pad=0.02, aspect=30)
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels([str(tick) for tick in ticks], fontsize=_FONT)
    bar.set_label("rank" if most <= 10 else "rank (0 is white)", fontsize=8)
    _label_rows(rows, ax)


def _label_rows(rows: list[_Row], ax: Any) -> None:
    """Labels of the rows on the left and of their groups on the right, as far as there is room."""
    figure = ax.figure.figure
    points = ax.get_position().height * figure.get_size_inches()[1] * 72
    groups = [(label, len(list(part))) for label, part in groupby(rows, key=lambda row: row[0])]
    ends = np.cumsum([count for _, count in groups])
    middles = ends - np.array([count for _, count in groups]) / 2 - 0.5
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="0.25", linewidth=0.4)
    labels = [label for label, _ in groups]
    alone = len(groups) == len(rows)
    if alone:
        labels = [" ".join(filter(None, row[:2])) for row in rows]
    roomy = points >= len(rows) * _FONT
    if roomy and not alone:
        ax.set_yticks(range(len(rows)), [row[1] for row in rows])
        if len(groups) > 1:
            side = ax.secondary_yaxis("right")
            side.set_yticks(middles, labels)
            side.tick_params(length=0, labelsize=_FONT + 1)
        return
    each = -(-len(labels) * _FONT // max(points, 1.0))  # every so manieth label has room
    chosen = slice(None, None, max(1, int(each)))
    ax.set_yticks(middles[chosen], labels[chosen])


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
    ax.set_ylabel(f"cost\n({unit})", fontsize=8)
    ax.tick_params(labelsize=_FONT)
    ax.legend(fontsize=_FONT, loc="lower right", ncols=3)
