"""Singular values by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorambo_alloc.curves import Spectra
from lorambo_alloc.objectives import FloatArray
from lorambo_alloc.plots.layer_names import module_type, shortest, split
from lorambo_alloc.plots.spectrum_lines import NAMED, LayerStyles, draw_lines
from lorambo_alloc.plots.style import (
    FONT,
    TALLEST,
    WIDTH,
    figure_of,
    label,
    new_figure,
    plain_log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Literal["values", "energy", "captured"]
"""The singular values, their shares of the layer's energy, or the share of all up to each."""

_LABELS = {
    "values": "singular value",
    "energy": "energy of one value\n(% of the layer's)",
    "captured": "energy of the first values\n(% of the layer's)",
}
_MOST_PANELS = 24
_GREATEST = 1e200  # beyond, ticks of a logarithmic axis overflow


def spectra(
    spectra: object,
    *,
    ax: Axes | None = None,
    layers: Iterable[str] | None = None,
    quantity: Quantity = "values",
) -> Figure:
    """Spectra by layer, over logarithmic axes: up to 7 with their names, more by module type.

    More than 7 layers have a panel for each module type, with lines coloured by the number of the
    block; lines of layers without a number, and of a second stack of blocks, are dashed. In axes
    of the caller's, or of more than 24 module types, all lies in one panel.

    Where a spectrum leaves energy unresolved, its line ends in an open circle and the panel says
    how much: shares are of the layer's whole energy, the unresolved part with it. Values of 0 and
    layers without any energy are left out.

    Args:
        spectra: `Spectra`, or what makes them: a mapping of layer name to singular values,
            descending, a sequence of arrays or a 2-D array.
        ax: where to draw; None: a new figure.
        layers: names of those to draw; None: all.
        quantity: "values" (the singular values), "energy" (the share of the layer's energy that
            each holds) or "captured" (the share that all up to each hold: what a rank keeps).

    Returns:
        The figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib is absent.
        ValueError: an argument is not of this form, or there is nothing to draw.

    Example:
        >>> values = {"layers.0.q": [3.0, 1.0], "layers.1.q": [2.0, 0.5]}
        >>> spectra(values, quantity="captured").savefig("spectra.png")  # doctest: +SKIP
    """
    given = spectra if isinstance(spectra, Spectra) else Spectra(spectra)
    if quantity not in _LABELS:
        raise ValueError(f"quantity: expected one of {', '.join(_LABELS)}, got {quantity!r}")
    chosen = list(given) if layers is None else list(dict.fromkeys(layers))
    for name in chosen:
        if name not in given:
            raise ValueError(f"layers: {name!r} is not among the spectra")
    if not chosen:
        raise ValueError("layers: expected at least one, got none")
    for name in chosen:
        if quantity == "values" and given[name][0] > _GREATEST:
            raise ValueError(
                f"spectra: layer {name!r}: expected values of at most {_GREATEST:g} to draw, got "
                f"{given[name][0]:g}"
            )
    curves = {name: _curve(given, name, quantity) for name in chosen}
    if not any(len(drawn) for _, drawn in curves.values()):
        raise ValueError("spectra: expected a layer with a value above 0, got zeros alone")
    cut = {name: _unresolved(given, name) for name in chosen}
    panels = {"": chosen}
    if ax is None and len(chosen) > NAMED:
        panels = _panels(chosen)
    axes: list[Any] = [ax] if ax is not None else _new_axes(len(panels))
    styles = LayerStyles(chosen)
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        draw_lines(axis, {name: curves[name] for name in names}, cut, styles)
        label(axis, title=title)
        longest = max(len(curves[name][0]) for name in names)
        _scales(axis, quantity, longest)
        _say_unresolved(axis, [cut[name] for name in names], quantity)
    for axis in axes:
        last_row, lowest, left = _outer(axis, ax is not None)
        label(axis, x="rank" * last_row, y=_LABELS[quantity] * left)
        if lowest:
            axis.tick_params(labelbottom=True)
        if quantity != "captured":
            plain_log_ticks(axis.yaxis)
    styles.key(axes)
    return figure_of(axes[0])


def _curve(spectra: Spectra, name: str, quantity: str) -> tuple[FloatArray, FloatArray]:
    """Ranks and what to draw at them, without zeros."""
    values = spectra[name]
    ranks = np.arange(1.0, len(values) + 1)
    most = float(values[0])
    if quantity == "values" or not most:
        return ranks[values > 0], values[values > 0]
    # Of values over the largest, so that no square overflows.
    energy = np.square(values / most)
    shares = 100 * energy / (float(energy.sum()) + spectra.unresolved[name] / most / most)
    drawn = np.cumsum(shares) if quantity == "captured" else shares
    return ranks[drawn > 0], drawn[drawn > 0]


def _unresolved(spectra: Spectra, name: str) -> float:
    """The share of a layer's energy that its values leave out."""
    values, left = spectra[name], spectra.unresolved[name]
    if not left:
        return 0.0
    most = max(float(values[0]), math.sqrt(left))
    left = left / most / most
    return left / (left + float(np.square(values / most).sum()))


def _panels(names: list[str]) -> dict[str, list[str]]:
    """Names of layers by module type; all in one if there are too many types."""
    modules = split(names)[1]
    kinds: dict[str, list[str]] = {}
    for name, module in zip(names, modules, strict=True):
        kinds.setdefault(module_type(module), []).append(name)
    if len(kinds) > _MOST_PANELS:
        return {"": names}
    short = shortest(kinds)
    return {short[kind]: found for kind, found in kinds.items()}


def _new_axes(count: int) -> list[Any]:
    if count == 1:
        return [new_figure(0.65 * WIDTH, 3.4).subplots()]
    across = count if count < 4 else 3 if count in (5, 6, 9) else 4
    down = -(-count // across)
    figure = new_figure(WIDTH, min(TALLEST, 0.4 + 1.7 * down))
    drawn: Any = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    axes = list(drawn.flat)
    for spare in axes[count:]:
        spare.remove()
    return axes[:count]


def _outer(ax: Any, given: bool) -> tuple[bool, bool, bool]:
    """Whether axes are in the last row, have none below them, and have none to their left."""
    place = ax.get_subplotspec()
    if given or place is None:
        return True, True, True
    below = [
        other for other in figure_of(ax).axes
        if (spec := other.get_subplotspec()) is not None
        and spec.colspan == place.colspan and spec.rowspan.start > place.rowspan.start
    ]  # fmt: skip
    return place.is_last_row(), not below, place.is_first_col()


def _scales(ax: Any, quantity: str, longest: int) -> None:
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    ax.set_xscale("log")
    if longest == 1:  # else ticks would go below rank 1
        ax.set_xlim(0.9, max(ax.get_xlim()[1], 2.0))
    ax.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if quantity == "captured":
        ax.set_ylim(0, 103)
    else:
        ax.set_yscale("log")
    ax.grid(True, color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)


def _say_unresolved(ax: Any, shares: list[float], quantity: str) -> None:
    cut = [100 * share for share in shares if share > 0]
    if not cut:
        return
    low, high = f"{min(cut):.2g}", f"{max(cut):.2g}"
    said = f"{low} %" if low == high else f"{low} to {high} %"
    place, side = (0.97, "right") if quantity == "captured" else (0.03, "left")
    ax.text(
        place, 0.04, f"\N{WHITE CIRCLE} {said} unresolved", transform=ax.transAxes, ha=side,
        fontsize=FONT, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
