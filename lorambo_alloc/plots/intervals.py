"""Differences with their intervals: a forest plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np

from lorambo_alloc.objectives import real_number
from lorambo_alloc.plots.style import FONT, TALLEST, TITLE, WIDTH, figure_of, label, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IntervalRows: TypeAlias = (
    Iterable[tuple[str, str, float, float, float]]
    | Mapping[str, Mapping[str, tuple[float, float, float]]]
)
"""(group, label, mean, low, high); or group to label to (mean, low, high)."""

_MOST_LINES = 100  # rows and headings up to which each has room for its label
_GREATEST = 1e150  # so that no limit of an axis overflows
_BETTER, _WORSE, _OPEN = "#0072b2", "#d55e00", "#444444"


class _Interval(NamedTuple):
    group: str
    name: str
    mean: float
    low: float
    high: float


def intervals(
    rows: IntervalRows,
    *,
    ax: Axes | None = None,
    quantity: str = "paired difference in held-out loss",
    against: str = "the baseline",
    better: str = "lower",
    level: float = 0.95,
    numbers: bool = True,
) -> Figure:
    """A forest plot: a mean with its interval a row, by groups, and a line at 0.

    Words above the axes say which side is better. An interval clear of 0 has a filled marker, a
    disc on the better side and a square on the worse; one that holds 0 has an open diamond. Of more
    than 100 rows only the groups are labelled.

    Args:
        rows: (group, label, mean, low, high) from top to bottom, low <= mean <= high; or group to
            label to (mean, low, high). A group "" has no heading.
        ax: where to draw; None: a new figure.
        quantity: what the differences are of, with its unit.
        against: what the arms are compared with.
        better: "lower" or "higher": the better side of 0.
        level: of the intervals, for the label.
        numbers: whether to write mean and interval beside each row.

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: there are no rows, a row is not of this form, or an argument is not.

    Example:
        >>> rows = [("rank 1", "ours", -0.006, -0.008, -0.004), ("rank 8", "ours", 0.0, -0.1, 0.1)]
        >>> intervals(rows, against="uniform ranks").savefig("evidence.png")  # doctest: +SKIP
    """
    drawn = _rows(rows)
    if better not in ("lower", "higher"):
        raise ValueError(f"better: expected 'lower' or 'higher', got {better!r}")
    if not 0 < real_number(level) < 1:
        raise ValueError(f"level: expected a share between 0 and 1, got {level!r}")
    places, headings = _places(drawn)
    lines = places[-1] + 1
    roomy = lines <= _MOST_LINES
    if ax is None:
        longest = max([len(row.name) for row in drawn] + [len(name) for name, _ in headings])
        width = min(WIDTH, 3.2 + longest * FONT * 0.55 / 72 + 1.5 * numbers)
        ax = new_figure(width, 0.85 + min(0.16 * lines, TALLEST)).subplots()
    axes: Any = ax
    axes.axvline(0, color="0.3", linewidth=0.8, zorder=1)
    sign = -1 if better == "lower" else 1
    _draw(axes, drawn, places, sign)
    _limits(axes, drawn, lines)
    _name(axes, drawn if roomy else [], places if roomy else [], headings)
    if numbers and roomy:
        _write(axes, drawn, places)
    _say_sides(axes, better)
    label(axes, x=f"{quantity}\nagainst {against}, with {100 * level:g} % interval")
    return figure_of(axes)


def _rows(rows: Any) -> list[_Interval]:
    if isinstance(rows, Mapping):
        groups = cast(Mapping[str, Mapping[str, Any]], rows)
        rows = [(group, name, *values) for group, members in groups.items()
                for name, values in members.items()]  # fmt: skip
    if not isinstance(rows, Iterable):
        raise ValueError(f"rows: expected rows or a mapping of groups, got {rows!r}")
    drawn: list[_Interval] = []
    for k, row in enumerate(cast(Iterable[Any], rows)):
        try:
            group, name, *values = row
            mean, low, high = map(real_number, values)
        except (TypeError, ValueError):
            raise ValueError(
                f"rows: row {k}: expected (group, label, mean, low, high), got {row!r}"
            ) from None
        if not -_GREATEST <= low <= mean <= high <= _GREATEST:
            raise ValueError(
                f"rows: {f'{group} {name}'.strip()!r}: expected finite low <= mean <= high of size "
                f"at most {_GREATEST:g}, got mean {mean}, low {low}, high {high}"
            )
        drawn.append(_Interval(str(group), str(name), mean, low, high))
    if not drawn:
        raise ValueError("rows: expected at least one, got none")
    return drawn


def _places(rows: list[_Interval]) -> tuple[list[float], list[tuple[str, float]]]:
    """The height of each row, and headings of groups with theirs."""
    places: list[float] = []
    headings: list[tuple[str, float]] = []
    place, before = 0.0, ""
    for row in rows:
        if row.group != before:
            place += 0.5 * bool(places)
            if row.group:
                headings.append((row.group, place))
                place += 1.0
        before = row.group
        places.append(place)
        place += 1.0
    return places, headings


def _draw(ax: Any, rows: list[_Interval], places: list[float], sign: int) -> None:
    """All intervals of one look at once."""
    looks: dict[tuple[str, str, str], list[tuple[float, _Interval]]] = {}
    for place, row in zip(places, rows, strict=True):
        look = (_OPEN, "D", "white")
        if row.low > 0 or row.high < 0:
            good = (row.mean > 0) == (sign > 0)
            look = (_BETTER, "o", _BETTER) if good else (_WORSE, "s", _WORSE)
        looks.setdefault(look, []).append((place, row))
    for (shade, marker, fill), members in looks.items():
        ax.errorbar(
            [row.mean for _, row in members], [place for place, _ in members],
            xerr=np.array([[row.mean - row.low, row.high - row.mean] for _, row in members]).T,
            color=shade, linestyle="none", elinewidth=1.2, capsize=1.5,
            marker=marker, markersize=4, markerfacecolor=fill,
        )  # fmt: skip


def _limits(ax: Any, rows: list[_Interval], lines: float) -> None:
    least = min(0.0, *(row.low for row in rows))
    most = max(0.0, *(row.high for row in rows))
    span = (most - least) or 1.0
    # Either side of 0 keeps room for the word that says what it means.
    low, high = least - 0.06 * span, most + 0.06 * span
    ax.set_xlim(min(low, -0.25 * span), max(high, 0.25 * span))
    ax.set_ylim(lines - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=5)  # so few that labels of four digits have room


def _name(
    ax: Any, rows: list[_Interval], places: list[float], headings: list[tuple[str, float]]
) -> None:
    names = [row.name for row in rows]
    ax.set_yticks(
        [*places, *(place for _, place in headings)], [*names, *(name for name, _ in headings)],
        fontsize=FONT + 0.5,
    )  # fmt: skip
    ax.tick_params(axis="y", length=0)
    for text in ax.get_yticklabels()[len(names) :]:
        text.set_fontweight("bold")
    for _, place in headings[1:]:
        ax.axhline(place - 0.75, color="0.85", linewidth=0.5)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(True, axis="x", color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)


def _write(ax: Any, rows: list[_Interval], places: list[float]) -> None:
    """Mean and interval to the right of the axes, all with the same number of digits."""
    widest = max(max(abs(row.low), abs(row.high)) for row in rows) or 1.0
    form = "+.2e"
    if 1e-6 <= widest < 1e9:
        form = f"+.{max(0, 2 - math.floor(math.log10(widest)))}f"
    side = ax.secondary_yaxis("right")
    said = [f"{row.mean:{form}}  [{row.low:{form}}, {row.high:{form}}]" for row in rows]
    signed = [text.replace("-", "\N{MINUS SIGN}") for text in said]  # as the ticks have it
    side.set_yticks(places, signed, fontsize=FONT)
    side.tick_params(length=0)
    side.spines["right"].set_visible(False)


def _say_sides(ax: Any, better: str) -> None:
    left, right = "better", "worse"
    if better == "higher":
        left, right = right, left
    arrows = (
        (f"\N{LEFTWARDS ARROW} {left}", -4, "right"),
        (f"{right} \N{RIGHTWARDS ARROW}", 4, "left"),
    )
    for said, offset, side in arrows:
        ax.annotate(
            said, (0, 1), xytext=(offset, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=TITLE - 1, ha=side, va="bottom",
            annotation_clip=False,
        )  # fmt: skip
