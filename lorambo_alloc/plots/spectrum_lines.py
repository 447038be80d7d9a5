"""Lines of spectra: how they tell layers apart, and thousands of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from lorambo_alloc.objectives import FloatArray
from lorambo_alloc.plots.layer_names import Depth, split
from lorambo_alloc.plots.style import COLOURS, FONT, TITLE, colour, dashes, figure_of

NAMED = len(COLOURS)  # layers that a legend can name
_END = 3.5  # points: the circle at a line's end

Curves: TypeAlias = Mapping[str, tuple[FloatArray, FloatArray]]
"""Layer name to ranks, and what to draw at them."""


class LayerStyles:
    """How lines tell layers apart: by name where these are few, else by the number of the block."""

    def __init__(self, names: list[str]) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap

        self.names = names
        self.named = len(names) <= NAMED
        self.depths: dict[str, Depth] = dict(zip(names, split(names)[2], strict=True))
        numbers = [number for _, number in self.depths.values() if number >= 0]
        self.least, self.most = min(numbers, default=0), max(numbers, default=0)
        self.stacks = list(dict.fromkeys(stack for stack, n in self.depths.values() if n >= 0))
        shades: Any = colormaps["viridis"](np.linspace(0.0, 0.85, 256))  # beyond is too pale
        self.shades = ListedColormap(shades)

    def line(self, name: str) -> dict[str, Any]:
        """Keywords for a layer's line."""
        if self.named:
            k = self.names.index(name)
            return {"color": colour(k), "linestyle": dashes(k), "linewidth": 1.2}
        stack, number = self.depths[name]
        if number < 0:
            return {"color": "black", "linestyle": dashes(3), "linewidth": 1.0}
        share = (number - self.least) / max(self.most - self.least, 1)
        style = dashes(self.stacks.index(stack))
        return {"color": self.shades(share), "linestyle": style, "linewidth": 0.7}

    def key(self, axes: list[Any]) -> None:
        """A legend of the names, or the scale of the blocks' numbers."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.ticker import MaxNLocator
        from matplotlib.transforms import ScaledTranslation

        if self.named:
            # Clear of the label of the axis, however high the axes are.
            inches: Any = figure_of(axes[0]).dpi_scale_trans
            below = axes[0].transAxes + ScaledTranslation(0, -28 / 72, inches)
            axes[0].legend(
                fontsize=FONT, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.0),
                bbox_transform=below,
            )  # fmt: skip
            return
        if self.most == self.least:
            return
        scale = ScalarMappable(Normalize(self.least, self.most), self.shades)
        shared = axes if len(axes) > 1 else axes[0]
        ticks = MaxNLocator(8, integer=True)
        bar = axes[0].figure.colorbar(
            scale, ax=shared, ticks=ticks, fraction=0.04, pad=0.02, aspect=40
        )
        bar.ax.tick_params(labelsize=FONT)
        others = ", ".join(self.stacks[1:])
        bar.set_label(f"block ({others}: broken lines)" if others else "block", fontsize=TITLE)


def draw_lines(ax: Any, curves: Curves, cut: Mapping[str, float], styles: LayerStyles) -> None:
    """Layers' lines into one axes, with an open circle at the end where `cut` is above 0.

    One value alone, which has no line, is a dot.
    """
    if not styles.named:
        _draw_together(ax, curves, cut, styles)
        return
    for name, (x, y) in curves.items():
        end: dict[str, Any] = {}
        if len(x) and (cut[name] or len(x) == 1):
            face = {"markerfacecolor": "white", "markeredgewidth": 0.7} if cut[name] else {}
            end = {"marker": "o", "markevery": [-1], "markersize": _END, **face}
        ax.plot(x, y, label=name, **styles.line(name), **end)


def _draw_together(ax: Any, curves: Curves, cut: Mapping[str, float], styles: LayerStyles) -> None:
    """All lines as one artist and their ends as another: thousands take seconds, not minutes."""
    from matplotlib.collections import LineCollection

    drawn = [name for name, (x, _) in curves.items() if len(x)]
    looks = {name: styles.line(name) for name in drawn}
    lines = LineCollection(
        [np.column_stack(curves[name]) for name in drawn],
        colors=[looks[name]["color"] for name in drawn],
        linestyles=[looks[name]["linestyle"] for name in drawn],
        linewidths=[looks[name]["linewidth"] for name in drawn],
    )
    ax.add_collection(lines)
    ended = [name for name in drawn if cut[name] or len(curves[name][0]) == 1]
    if ended:
        ax.scatter(
            [curves[name][0][-1] for name in ended], [curves[name][1][-1] for name in ended],
            s=_END**2, edgecolors=[looks[name]["color"] for name in ended], linewidths=0.7,
            facecolors=["white" if cut[name] else looks[name]["color"] for name in ended],
            zorder=lines.get_zorder() + 0.1,
        )  # fmt: skip
    ax.autoscale_view()
