"""Value and price at every budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lorambo_alloc.costs import uniform_rank
from lorambo_alloc.objectives import FloatArray, real_number
from lorambo_alloc.plots.style import (
    FONT,
    TITLE,
    WIDTH,
    colour,
    dashes,
    figure_of,
    label,
    new_figure,
    plain_log_ticks,
)
from lorambo_alloc.upper_hull import Frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def frontier(
    frontiers: Frontier | Mapping[str, Frontier],
    *,
    ax: Axes | None = None,
    target: float | None = None,
    knee: bool = True,
    share: bool = True,
    log: bool = False,
    unit: str = "parameters",
) -> Figure:
    """What every budget buys, and below it the price: what one more unit of budget would gain.

    Ticks at the top are the budgets of uniform ranks, where all frontiers have the same costs.
    Between breakpoints the line is an upper bound on the best value; at them it is attained.

    Args:
        frontiers: what `lorambo_alloc.frontier` returned; or label to such, to draw several.
        ax: where to draw the value, without the price; None: a new figure with both.
        target: a share of the greatest value, between 0 and 1. Marked is the least budget at which
            the hull reaches it; `minimize_budget` finds what it really takes, which may be more.
        knee: whether to mark the knee of each (`Frontier.knee`).
        share: values in % of each frontier's greatest, prices in % for 1 % of its last budget;
            else both in units of gain.
        log: logarithmic budgets; a budget of 0, and a knee at 0, are then left out.
        unit: of the costs.

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: there is no frontier; `target` is not between 0 and 1; shares are asked for
            (as `share` or `target`) where the greatest value is not above 0; or with `log` no
            budget is above 0.

    Example:
        >>> from lorambo_alloc import frontier as frontier_of
        >>> curve = frontier_of({"q": [3.0, 2.0, 1.0], "v": [2.0]}, costs={"q": 2, "v": 1})
        >>> frontier(curve, target=0.9).savefig("frontier.png")  # doctest: +SKIP
    """
    if not isinstance(frontiers, (Frontier, Mapping)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"frontiers: expected a Frontier or a mapping to such, got {frontiers!r}")
    curves = {"": frontiers} if isinstance(frontiers, Frontier) else dict(frontiers)
    _check(curves, target, share)
    if log and not any(curve.budgets[-1] for curve in curves.values()):
        raise ValueError("log: expected a budget above 0, got 0 alone")
    if ax is not None:
        upper: Any = ax
        lower: Any = None
    else:
        figure = new_figure(0.75 * WIDTH, 4.6)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for k, (name, curve) in enumerate(curves.items()):
        look = {"color": colour(k), "linestyle": dashes(k), "linewidth": 1.2}
        kept = curve.budgets > 0 if log else np.ones(len(curve), dtype=bool)
        scale = 100 / float(curve.values[-1]) if share else 1.0
        alone = {"marker": "."} if int(kept.sum()) == 1 else {}  # one point has no line
        upper.plot(
            curve.budgets[kept], scale * curve.values[kept], label=name or "upper hull", **look,
            **alone,
        )  # fmt: skip
        if knee and (curve.knee() or not log):
            _mark_knee(upper, curve, scale, look)
        if target is not None:
            _mark_target(upper, curve, target, scale, look)
        if lower is not None:
            per = curve.budgets[-1] / 100 if share else 1.0
            # The last price, 0, is that of budgets beyond: the line ends with the one before it.
            prices = np.append(curve.prices[:-1], curve.prices[-2:-1])[: len(curve)]
            if len(curve) > 1:
                drawn = scale * per * prices[kept]
                lower.step(curve.budgets[kept], drawn, where="post", **look, **alone)
    _finish(upper, lower, curves, log=log, share=share, unit=unit)
    return figure_of(upper)


def _check(curves: Mapping[str, Frontier], target: float | None, share: bool) -> None:
    if not curves:
        raise ValueError("frontiers: expected at least one, got none")
    for name, curve in curves.items():
        where = f"frontiers: {name!r}" if name else "frontiers"
        if not isinstance(curve, Frontier):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{where}: expected a Frontier, got {curve!r}")
        greatest = float(curve.values[-1])
        if (share or target is not None) and not greatest > 0:
            raise ValueError(
                f"{where}: expected a greatest value above 0 to take shares of, got {greatest:g}; "
                "pass share=False and no target"
            )
    if target is not None and not 0 <= real_number(target) <= 1:
        raise ValueError(f"target: expected a share between 0 and 1, got {target!r}")


def budget_of_share(curve: Frontier, target: float) -> int:
    """The least whole budget at which the hull reaches a share of its greatest value."""
    value = target * float(curve.values[-1])
    if value <= curve.values[0]:
        return int(curve.budgets[0])
    k = int(np.searchsorted(curve.values, value))
    low, high = int(curve.budgets[k - 1]), int(curve.budgets[k])
    before, after = curve.values[k - 1 : k + 1].tolist()
    return min(low + math.ceil((value - before) / (after - before) * (high - low)), high)


def _mark_knee(ax: Any, curve: Frontier, scale: float, look: Mapping[str, Any]) -> None:
    budget = curve.knee()
    value = scale * curve.at(budget)
    ax.plot(
        [budget], [value], marker="o", color=look["color"], markersize=5, linestyle="none",
        label=f"knee: {budget:,}",
    )  # fmt: skip


def _mark_target(
    ax: Any, curve: Frontier, target: float, scale: float, look: Mapping[str, Any]
) -> None:
    budget = budget_of_share(curve, target)
    value = scale * target * float(curve.values[-1])
    start = float(curve.budgets[0])
    ax.plot([start, budget], [value, value], color="0.4", linestyle=":", linewidth=0.8)
    ax.plot([budget, budget], [0, value], color="0.4", linestyle=":", linewidth=0.8)
    ax.plot(
        [budget], [value], marker="s", markersize=5, linestyle="none", color=look["color"],
        markerfacecolor="white", label=f"{100 * target:g} %: {budget:,}",
    )  # fmt: skip


def _finish(
    upper: Any,
    lower: Any,
    curves: Mapping[str, Frontier],
    *,
    log: bool,
    share: bool,
    unit: str,
) -> None:
    from matplotlib.ticker import EngFormatter

    for ax in filter(None, (upper, lower)):
        if log:
            ax.set_xscale("log")
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.grid(True, color="0.9", linewidth=0.5)
        ax.set_axisbelow(True)
    last = max(int(curve.budgets[-1]) for curve in curves.values())
    if not log and last:
        upper.set_xlim(0, 1.02 * last)
    if share:
        upper.set_ylim(0, 104)
    label(upper, y="value (% of the greatest)" if share else "value (gain)")
    bottom = upper if lower is None else lower
    if lower is not None:
        lower.set_yscale("log")
        per = "% per 1 % of\nthe last budget" if share else "gain per unit\nof budget"
        label(lower, y=f"price ({per})")
        plain_log_ticks(lower.yaxis)
    label(bottom, x=f"budget ({unit})")
    # A concave curve leaves the lower right free; over logarithmic budgets the upper left.
    upper.legend(fontsize=FONT, loc="upper left" if log else "lower right")
    _uniform_ranks(upper, curves, log, last)


def _uniform_ranks(ax: Any, curves: Mapping[str, Frontier], log: bool, last: int) -> None:
    """Ticks at the top where uniform ranks cost so much, if all frontiers agree on that."""
    problems = [curve.problem for curve in curves.values()]
    costs, fixed = problems[0].costs, problems[0].fixed_costs
    for problem in problems[1:]:
        if not (
            np.array_equal(problem.costs, costs) and np.array_equal(problem.fixed_costs, fixed)
        ):
            return
    ranks = [2**k for k in range(31)]
    budgets = [uniform_rank(rank).cost(costs, fixed) for rank in ranks]
    shown: FloatArray = np.array([b for b in budgets if b <= 1.02 * last], dtype=np.float64)
    if not log:  # small ones would lie on each other
        shown = shown[shown >= 0.025 * last]
    if not len(shown):
        return
    names = {float(budget): str(rank) for budget, rank in zip(budgets, ranks, strict=True)}
    top = ax.secondary_xaxis("top")
    top.set_xticks(shown.tolist(), [names[budget] for budget in shown.tolist()])
    top.minorticks_off()
    top.set_xlabel("uniform rank of that cost", fontsize=TITLE)
    top.tick_params(labelsize=FONT)
