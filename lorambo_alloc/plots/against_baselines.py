"""What a comparison found: shares of the optimum and of the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorambo_alloc.comparison import Comparison
from lorambo_alloc.plots.style import (
    COLOURS,
    FONT,
    WIDTH,
    figure_of,
    label,
    new_figure,
    percent_down,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_NUMBERS = 104  # where they stand on the axis


def against_baselines(comparison: Comparison, *, ax: Axes | None = None) -> Figure:
    """Bars for each rule: its value in % of the optimum, beside it its cost in % of the budget.

    Rows are those of the comparison, best first; `allocate`'s own stands out in colour and in
    hatching. Percentages are rounded down, so that 100.00 % means all of it.

    Args:
        comparison: what `lorambo_alloc.compare` returned.
        ax: where to draw the values, without the costs; None: a new figure with both.

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: the comparison has no rows.

    Example:
        >>> from lorambo_alloc import compare
        >>> comparison = compare({"0.q": [3.0, 2.0], "0.v": [2.5]}, 2, rules=["uniform"])
        >>> against_baselines(comparison).savefig("rules.png")  # doctest: +SKIP
    """
    if not isinstance(comparison, Comparison):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"comparison: expected what compare returns, got {comparison!r}")
    rows = list(comparison)
    if not rows:
        raise ValueError("comparison: expected at least one row, got none")
    axes: list[Any]
    if ax is not None:
        axes = [ax]
    else:
        figure = new_figure(WIDTH, 0.9 + 0.24 * len(rows) + 0.13 * bool(comparison.skipped))
        axes = list(figure.subplots(1, 2, sharey=True, width_ratios=[2, 1]))
        _bars(axes[1], [row.spent for row in rows], "cost (% of the budget)")
    of = "optimum" if comparison.proven else "bound on the optimum"
    _bars(axes[0], [row.share for row in rows], f"value (% of the {of})")
    axes[0].set_yticks(range(len(rows)), [row.rule for row in rows], fontsize=FONT + 1)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    if comparison.skipped:
        said = f"do not apply: {', '.join(comparison.skipped)}"
        axes[0].annotate(
            said, (0, 0), xytext=(0, -30), xycoords="axes fraction", textcoords="offset points",
            fontsize=FONT, va="top", color="0.3",
        )  # fmt: skip
    return figure_of(axes[0])


def _bars(ax: Any, shares: list[float | None], title: str) -> None:
    for k, share in enumerate(shares):
        own = k == 0
        ax.barh(
            k, 100 * (share or 0.0), height=0.62, color=COLOURS[0] if own else "0.75",
            edgecolor="white" if own else "0.45", hatch="//" if own else None, linewidth=0.5,
        )  # fmt: skip
        said = "below 0" if share is None else percent_down(share)
        ax.text(_NUMBERS, k, said, fontsize=FONT, va="center")
    ax.set_xlim(0, 130)
    ax.set_xticks([0, 25, 50, 75, 100])
    ax.axvline(100, color="0.3", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    label(ax, x=title)
