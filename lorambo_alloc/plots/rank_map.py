"""Ranks by block and module type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.plots.rank_grid import RankGrid, grid_of
from lorambo_alloc.plots.style import (
    FONT,
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

_HIGHEST = 8.0  # inches that the rows of one map may take
_BESIDE = 1.6  # inches for labels of rows and the scale
_ROOMY = 32  # cells in a row of all maps up to which each expert has a full cell
_GAP = 0.4  # rows between the grid and the layers outside it
_MOST_RANK = 2**53


def rank_map(
    ranks: Mapping[str, int] | Mapping[str, Mapping[str, int]],
    *,
    ax: Axes | None = None,
    numbers: bool | None = None,
) -> Figure:
    """Ranks as a heat map: a row a block, a column a module type; several share one scale.

    The block is the first number in a layer's name. Layers of a block that differ only in further
    numbers (experts) lie side by side, narrow where they are many. Layers without a number have a
    row of their own, as wide as the map. Rank 0 is white; a cell is crossed out where an
    allocation has no such layer.

    Args:
        ranks: layer name to rank, such as an `Allocation`; or title to such a mapping, to draw
            several side by side.
        ax: where to draw one map; None: a new figure.
        numbers: whether to write the ranks into the cells; None: where there is room.

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: there are no layers, a rank is not a whole number from 0 to 2^53, or several
            maps were to go into one `ax`.

    Example:
        >>> ranks = {"layers.0.q": 4, "layers.0.v": 8, "layers.1.q": 0, "layers.1.v": 2, "head": 1}
        >>> rank_map(ranks).savefig("ranks.png")  # doctest: +SKIP
        >>> rank_map({"ours": ranks, "uniform": dict.fromkeys(ranks, 3)})  # doctest: +SKIP
    """
    maps = _maps(ranks)
    if ax is not None and len(maps) > 1:
        raise ValueError(f"ax: expected one map for given axes, got {len(maps)}")
    grid = grid_of(list(dict.fromkeys(name for chosen in maps.values() for name in chosen)))
    layout = _new_layout(grid, len(maps)) if ax is None else _given_layout(grid, ax)
    colours = RankColours(max(rank for chosen in maps.values() for rank in chosen.values()))
    mesh: Any = None
    for k, (title, chosen) in enumerate(maps.items()):
        axis = layout.axes[k]
        mesh = _draw(axis, grid, chosen, layout, colours)
        if numbers or numbers is None:
            _write(axis, grid, chosen, layout, colours, always=bool(numbers))
        label(axis, title=title)
        axis.tick_params(length=0)
        _label_columns(axis, grid, layout)
        if k % layout.per_row == 0:
            _label_rows(axis, grid, layout)
        else:
            axis.set_yticks([])
    absent = any(len(chosen) < len(grid.places) + len(grid.alone) for chosen in maps.values())
    crossed = absent or len(grid.places) < len(grid.blocks) * sum(c.count for c in grid.columns)
    width = layout.cell[0] * layout.width * layout.per_row
    height = layout.cell[1] * _rows(grid) * -(-len(maps) // layout.per_row)
    notes = "crossed out: no such layer" if crossed else ""
    colours.bar(mesh, layout.axes, size=(width, height), notes=notes)
    return figure_of(layout.axes[0])


@dataclass(frozen=True)
class _Layout:
    """Axes, how many stand in a row, the edges of each column's cells, points of a unit cell."""

    axes: list[Any]
    per_row: int
    edges: list[FloatArray]
    cell: tuple[float, float]

    @property
    def width(self) -> float:
        return float(self.edges[-1][-1])


def _maps(ranks: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Title to ranks, checked; one mapping without a title has the title ""."""
    if not isinstance(ranks, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"ranks: expected a mapping of layer name to rank, got {ranks!r}")
    nested = [isinstance(value, Mapping) for value in ranks.values()]
    if any(nested) and not all(nested):
        raise ValueError("ranks: expected ranks, or mappings of layer name to rank, got both")
    given = cast(Mapping[str, Mapping[str, Any]], ranks if any(nested) else {"": ranks})
    maps: dict[str, dict[str, int]] = {}
    for title, chosen in given.items():
        where = f"{title}: " if title else ""
        maps[title] = {
            name: whole_number(rank, f"ranks: {where}layer {name!r}", 0)
            for name, rank in chosen.items()
        }
        for name, rank in maps[title].items():
            if rank > _MOST_RANK:
                raise ValueError(
                    f"ranks: {where}layer {name!r}: expected at most {_MOST_RANK}, got {rank}"
                )
        if not maps[title]:
            raise ValueError(f"ranks: {where}expected at least one layer, got none")
    return maps


def _rows(grid: RankGrid) -> float:
    """The height of a map in rows."""
    gap = _GAP if grid.blocks and grid.alone else 0.0
    return len(grid.blocks) + gap + len(grid.alone)


def _edges(grid: RankGrid, per_row: int) -> list[FloatArray]:
    """Of each column the edges of its cells, in units of a single column's width."""
    if not grid.columns:
        return [np.array([0.0, 4.0])]
    roomy = per_row * sum(column.count for column in grid.columns) <= _ROOMY
    edges: list[FloatArray] = []
    start = 0.0
    for column in grid.columns:
        width = column.count if roomy else min(column.count, max(2.0, min(column.count / 8, 6.0)))
        edges.append(np.linspace(start, start + width, column.count + 1))
        start += width
    return edges


def _new_layout(grid: RankGrid, count: int) -> _Layout:
    # As many side by side as leave 0.16 inches to a column.
    room = WIDTH - _BESIDE
    per_row = max(1, min(count, int(room / (0.16 * _edges(grid, count)[-1][-1]))))
    edges = _edges(grid, per_row)
    wide = float(edges[-1][-1])
    unit = min(0.42, room / (per_row * wide))
    high = _rows(grid)
    row = min(0.18 * max(1.0, 6 / high), _HIGHEST / high)
    below = 0.3 + max((len(column.label) for column in grid.columns), default=0) * FONT * 0.6 / 72
    deep = -(-count // per_row)
    figure = new_figure(_BESIDE + per_row * wide * unit, deep * (row * high + below + 0.25))
    drawn: Any = figure.subplots(deep, per_row, squeeze=False)
    axes = list(drawn.flat)
    for spare in axes[count:]:
        spare.remove()
    return _Layout(axes[:count], per_row, edges, (72 * unit, 72 * row))


def _given_layout(grid: RankGrid, ax: Any) -> _Layout:
    edges = _edges(grid, 1)
    width, height = points(ax)
    return _Layout([ax], 1, edges, (width / float(edges[-1][-1]), height / _rows(grid)))


def _draw(
    ax: Any, grid: RankGrid, chosen: Mapping[str, int], layout: _Layout, colours: RankColours
) -> Any:
    """Meshes of the grid and of the layers outside it; the last one, for the scale."""
    from matplotlib.collections import LineCollection

    lines: dict[str, Any] = {"edgecolors": "0.8", "linewidth": 0.3}
    mesh: Any = None
    crosses: list[list[tuple[float, float]]] = []
    high = len(grid.blocks)
    if high:
        table = [np.full((high, column.count), -1, dtype=np.int64) for column in grid.columns]
        for name, (row, column, cell) in grid.places.items():
            table[column][row, cell] = chosen.get(name, -1)
        ranks = np.concatenate(table, axis=1)
        x = np.append(0.0, np.concatenate([edges[1:] for edges in layout.edges]))
        fine = min(layout.cell[0] * float(np.diff(x).min()), layout.cell[1]) < 4
        mesh = colours.mesh(
            ax, x, np.arange(high + 1) - 0.5, np.ma.masked_less(ranks, 0),
            **({} if fine else lines),
        )  # fmt: skip
        for edges, cells in zip(layout.edges, table, strict=True):
            crosses += _crosses(edges, cells)
        for column, edges in zip(grid.columns, layout.edges, strict=True):
            if column.count > 1:  # a frame around what belongs to one label
                for place in (edges[0], edges[-1]):
                    ax.plot([place] * 2, [-0.5, high - 0.5], color="black", linewidth=0.9)
    if grid.alone:
        y = _top(grid) + np.arange(len(grid.alone) + 1)
        ranks = np.array([[chosen.get(name, -1)] for name in grid.alone])
        mesh = colours.mesh(
            ax, [0.0, layout.width], y, np.ma.masked_less(ranks, 0),
            **({} if layout.cell[1] < 4 else lines),
        )  # fmt: skip
        crosses += _crosses(np.array([0.0, layout.width]), ranks, float(y[0]) + 0.5)
    ax.add_collection(LineCollection(crosses, colors="0.6", linewidths=0.5), autolim=False)
    ax.set_xlim(0, layout.width)
    ax.set_ylim(_rows(grid) - 0.5, -0.5)
    return mesh


def _crosses(
    edges: FloatArray, cells: IntArray, first: float = 0.0
) -> list[list[tuple[float, float]]]:
    """Lines through the cells of a column that no layer has; one where a whole row has none."""
    lines: list[list[tuple[float, float]]] = []
    for row, found in enumerate(cells.tolist()):
        missing = [k for k, rank in enumerate(found) if rank < 0]
        spans = [(k, k + 1) for k in missing]
        if len(missing) == len(found):
            spans = [(0, len(found))]
        lines += [
            [(float(edges[left]), first + row + 0.5), (float(edges[right]), first + row - 0.5)]
            for left, right in spans
        ]
    return lines


def _top(grid: RankGrid) -> float:
    """The upper edge of the first layer outside the grid."""
    return len(grid.blocks) - 0.5 + (_GAP if grid.blocks else 0.0)


def _write(
    ax: Any,
    grid: RankGrid,
    chosen: Mapping[str, int],
    layout: _Layout,
    colours: RankColours,
    always: bool,
) -> None:
    """The ranks in their cells, in those kinds of cells where all of them have room."""
    size = FONT - 0.5
    digits = len(str(max(chosen.values())))
    if layout.cell[1] < size + 1 and not always:
        return
    below = {name: _top(grid) + k + 0.5 for k, name in enumerate(grid.alone)}
    for name, rank in chosen.items():
        left, right = 0.0, layout.width
        if name in grid.places:
            row, column, cell = grid.places[name]
            left, right = layout.edges[column][cell : cell + 2].tolist()
            y = float(row)
        else:
            y = below[name]
        if always or layout.cell[0] * (right - left) >= digits * size * 0.62 + 2:
            ax.text(
                (left + right) / 2, y, str(rank), color=colours.ink(rank), fontsize=size,
                ha="center", va="center_baseline", clip_on=True,
            )  # fmt: skip


def _label_columns(ax: Any, grid: RankGrid, layout: _Layout) -> None:
    """Labels of columns: of groups across where they fit, of single ones across if all fit."""
    if not grid.columns:
        ax.set_xticks([])
        return
    labels = [
        column.label if column.count == 1 else f"{column.label}\n(x {column.count})"
        for column in grid.columns
    ]
    ax.set_xticks([(edges[0] + edges[-1]) / 2 for edges in layout.edges], labels, fontsize=FONT)
    wide = [layout.cell[0] * float(edges[-1] - edges[0]) for edges in layout.edges]
    fits = [
        room >= max(map(len, text.split("\n"))) * FONT * 0.6 + 4
        for room, text in zip(wide, labels, strict=True)
    ]
    single = [column.count == 1 for column in grid.columns]
    all_fit = all(fit for fit, alone in zip(fits, single, strict=True) if alone)
    for text, fit, alone in zip(ax.get_xticklabels(), fits, single, strict=True):
        text.set_rotation(0 if (all_fit if alone else fit) else 90)


def _label_rows(ax: Any, grid: RankGrid, layout: _Layout) -> None:
    """Labels of blocks, as many as there is room for, and of the layers outside the grid."""
    labels = grid.row_labels
    each = max(1, math.ceil((FONT + 0.5) / layout.cell[1]))
    places = [float(k) for k in range(0, len(labels), each)]
    outside = [_top(grid) + k + 0.5 for k in range(0, len(grid.alone), each)]
    ax.set_yticks([*places, *outside], [*labels[::each], *grid.alone[::each]], fontsize=FONT)
    label(ax, y="block" if labels else "layer")
