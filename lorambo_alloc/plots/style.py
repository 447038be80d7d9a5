"""What all pictures share: sizes, colours, and figures without pyplot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches: the text of a printed page
TALLEST = 10.0  # inches
ROW = 9.0  # points for a row with a label
FONT = 6.5  # points: ticks, legends and labels of rows
TITLE = 8.0  # points: labels of axes and titles

# Okabe and Ito's colours, the darkest and most different ones first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def colour(k: int) -> str:
    """The k-th colour, round and round."""
    return COLOURS[k % len(COLOURS)]


def dashes(k: int) -> Any:
    """The k-th line style, round and round."""
    return DASHES[k % len(DASHES)]


def marker(k: int) -> str:
    """The k-th marker, round and round."""
    return MARKERS[k % len(MARKERS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, laid out so that nothing is cut off.

    Raises:
        ImportError: matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lorambo-alloc[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def figure_of(ax: Any) -> Figure:
    """The figure that axes belong to, also where they are of a subfigure."""
    return ax.figure.figure


def points(ax: Any) -> tuple[float, float]:
    """Width and height of axes in points, about: a layout engine may still change them."""
    place = ax.get_position()
    width, height = figure_of(ax).get_size_inches()
    return place.width * width * 72, place.height * height * 72


def label(ax: Any, x: str = "", y: str = "", title: str = "") -> None:
    """Labels and ticks in the sizes of all pictures; an empty string leaves a label as it is."""
    if x:
        ax.set_xlabel(x, fontsize=TITLE)
    if y:
        ax.set_ylabel(y, fontsize=TITLE)
    if title:
        ax.set_title(title, fontsize=TITLE)
    ax.tick_params(which="both", labelsize=FONT)
    for axis in (ax.xaxis, ax.yaxis):  # a power of ten beside the ticks
        axis.get_offset_text().set_fontsize(FONT)


def percent_down(share: float) -> str:
    """A share in percent with two digits, rounded down, so that 100.00 % means all."""
    hundredths = math.floor(round(share * 10_000, 6))
    return f"{hundredths / 100:.2f} %"


def plain_log_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers where few powers of ten are in sight.

    Call it when all is drawn: it looks at the limits.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    if not 0 < low < high or not 1e-4 < low < high < 1e6:
        axis.set_minor_formatter(NullFormatter())
        return
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


class RankColours:
    """One scale of colours for ranks from 0 to `most`: 0 is white, more is darker.

    Up to 10 every rank has a colour of its own. Beyond, colours follow the square root of the rank,
    as a few large ranks would else leave none to the small ones; 0 is then masked, and axes need
    a white ground.
    """

    def __init__(self, most: int) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm, ListedColormap, PowerNorm

        most = max(1, most)
        self.few = most <= 10
        shades: Any = colormaps["viridis_r"](np.linspace(0.06, 1.0, most if self.few else 256))
        self.colours: Any = ListedColormap(shades)
        self.norm: Any = PowerNorm(0.5, 1, most)
        self.ticks = [2**k for k in range(most.bit_length())]
        if self.few:
            self.colours = ListedColormap([(1.0, 1.0, 1.0, 1.0), *shades])
            self.norm = BoundaryNorm(np.arange(most + 2) - 0.5, most + 1)
            self.ticks = list(range(most + 1))

    def mesh(self, ax: Any, x: Any, y: Any, ranks: Any, **options: Any) -> Any:
        """Cells with edges x and y in the colours of their ranks."""
        ax.set_facecolor("white")  # behind rank 0, where it is masked
        shown = ranks if self.few else np.ma.masked_less(ranks, 1)
        return ax.pcolormesh(
            x, y, shown, cmap=self.colours, norm=self.norm, rasterized=True, **options
        )

    def ink(self, rank: int) -> str:
        """Black or white, whichever can be read on the colour of a rank."""
        if rank == 0:
            return "black"
        shade: Any = self.colours(self.norm(rank))
        red, green, blue = shade[:3]
        return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else "black"

    def bar(
        self,
        mesh: Any,
        axes: list[Any],
        *,
        size: tuple[float, float] | None = None,
        notes: str = "",
    ) -> None:
        """The scale, beside axes.

        Args:
            mesh: one of the meshes in these colours.
            axes: that it belongs to.
            size: width and height of all axes in points, to make the scale as high and leave out
                ticks that would lie on each other; None if unknown.
            notes: what else the label should explain.
        """
        shared = axes if len(axes) > 1 else axes[0]
        ticks = self.ticks
        fraction, aspect = 0.05, 30.0
        if size is not None:
            ticks = self._apart(0.9 * size[1])
            fraction, aspect = min(9 / max(size[0], 1.0), 0.15), max(size[1] / 9, 3.0)
        bar = axes[0].figure.colorbar(
            mesh, ax=shared, ticks=ticks, fraction=fraction, pad=0.02, aspect=aspect
        )
        bar.ax.minorticks_off()
        bar.ax.set_yticklabels([str(tick) for tick in ticks], fontsize=FONT)
        said = ", ".join(filter(None, ["" if self.few else "0 is white", notes]))
        bar.set_label(f"rank ({said})" if said else "rank", fontsize=TITLE)

    def _apart(self, height: float) -> list[int]:
        """The ticks that have room in so many points, from the greatest down."""
        places = [height * float(self.norm(tick)) for tick in self.ticks]
        if self.few:
            places = [height * k / len(self.ticks) for k in range(len(self.ticks))]
        kept: list[int] = []
        above = math.inf
        for tick, place in reversed(list(zip(self.ticks, places, strict=True))):
            if above - place >= FONT:
                kept.append(tick)
                above = place
        return kept[::-1]
