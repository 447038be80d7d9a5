"""Spectra by layer: what is drawn where, read back from the figure."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from lorambo_alloc import Spectra
from lorambo_alloc.plots import spectra
from tests.plots.drawn import axes_of, legend, subplots, texts

FEW = {"layers.0.q": [4.0, 2.0, 1.0, 0.0], "layers.1.q": [3.0, 3.0]}


def many(blocks=4, modules=("attn.q", "attn.v", "mlp.up"), stack="layers") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = [f"{stack}.{b}.{m}" for b in range(blocks) for m in modules]
    return {name: np.sort(rng.exponential(size=6))[::-1] for name in names}


def collection(ax: Any) -> Any:
    """The one artist that holds the lines of many layers."""
    (lines,) = [found for found in ax.collections if isinstance(found, LineCollection)]
    return lines


def drawn(ax: Any) -> list[Any]:
    """Of each of many layers its ranks and what is drawn at them."""
    return [np.asarray(segment).T for segment in collection(ax).get_segments()]


def ends(ax: Any) -> list[Any]:
    """The places of circles and dots."""
    found = [c for c in ax.collections if not isinstance(c, LineCollection)]
    return [offset for circles in found for offset in np.asarray(circles.get_offsets()).tolist()]


def solid(ax: Any) -> list[bool]:
    return [pattern is None for _, pattern in collection(ax).get_linestyle()]


def lightness(colour: Any) -> float:
    red, green, blue = (int(to_hex(colour)[k : k + 2], 16) for k in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_few_layers_are_named_and_zeros_are_left_out():
    (ax,) = axes_of(spectra(FEW))
    first, second = ax.lines
    np.testing.assert_array_equal(first.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(first.get_ydata(), [4.0, 2.0, 1.0])
    np.testing.assert_array_equal(second.get_ydata(), [3.0, 3.0])
    assert legend(ax) == list(FEW)
    assert first.get_linestyle() != second.get_linestyle()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rank", "singular value")


def test_energy_is_a_share_of_all_and_captured_its_sum():
    given = Spectra(FEW, unresolved={"layers.0.q": 4.0})
    energy = axes_of(spectra(given, quantity="energy"))[0]
    np.testing.assert_allclose(energy.lines[0].get_ydata(), [64.0, 16.0, 4.0])
    captured = axes_of(spectra(given, quantity="captured"))[0]
    np.testing.assert_allclose(captured.lines[0].get_ydata(), [64.0, 80.0, 84.0, 84.0])
    np.testing.assert_allclose(captured.lines[1].get_ydata(), [50.0, 100.0])
    assert (energy.get_yscale(), captured.get_yscale()) == ("log", "linear")
    assert "% of the layer's" in captured.get_ylabel()


def test_unresolved_energy_is_marked_and_said():
    given = Spectra(FEW, unresolved={"layers.0.q": 21.0})
    for quantity in ("values", "energy", "captured"):
        (ax,) = axes_of(spectra(given, quantity=quantity))
        cut, whole = ax.lines
        assert (cut.get_marker(), cut.get_markevery()) == ("o", [-1])
        assert whole.get_marker() == "None"
        assert texts(ax) == ["\N{WHITE CIRCLE} 50 % unresolved"]
    assert not texts(axes_of(spectra(FEW))[0])


def test_unresolved_energy_of_several_is_a_range():
    given = Spectra({"0.q": [1.0], "0.v": [2.0]}, unresolved={"0.q": 1.0, "0.v": 1.0})
    assert texts(axes_of(spectra(given))[0]) == ["\N{WHITE CIRCLE} 20 to 50 % unresolved"]


def test_many_layers_have_a_panel_for_each_module_type():
    values = many()
    *panels, bar = axes_of(spectra(values))
    assert [ax.get_title() for ax in panels] == ["q", "v", "up"]
    for ax, module in zip(panels, ("attn.q", "attn.v", "mlp.up"), strict=True):
        assert len(drawn(ax)) == 4
        for block, (ranks, shown) in enumerate(drawn(ax)):
            np.testing.assert_array_equal(shown, values[f"layers.{block}.{module}"])
            np.testing.assert_array_equal(ranks, np.arange(1, 7))
            assert ax.get_ylim()[0] < shown.min() <= shown.max() < ax.get_ylim()[1]
        assert ends(ax) == []
        shades = [lightness(colour) for colour in collection(ax).get_colors()]
        assert np.all(np.diff(shades) > 0)
        assert shades[-1] < 0.8 * 255  # can be seen on white
        assert ax.get_legend() is None
    assert bar.get_ylabel() == "block"
    assert bar.get_ylim() == (0, 3)
    assert [ax.get_ylabel() != "" for ax in panels] == [True, False, False]


def test_of_many_layers_too_the_unresolved_ones_end_in_a_circle():
    values = many(modules=("q",), blocks=8)
    given = Spectra(values, unresolved={"layers.3.q": 1.0})
    ax = axes_of(spectra(given))[0]
    assert ends(ax) == [[6.0, values["layers.3.q"][-1]]]
    (circle,) = [c for c in ax.collections if not isinstance(c, LineCollection)]
    assert to_hex(circle.get_facecolor()[0]) == "#ffffff"
    assert circle.get_edgecolor()[0] == pytest.approx(collection(ax).get_colors()[3])


def test_a_value_alone_is_a_dot():
    ax = axes_of(spectra({"q": [2.0], "v": [0.0]}))[0]
    assert (ax.lines[0].get_marker(), ax.lines[0].get_markerfacecolor()) == ("o", "#0072b2")
    assert ax.get_xlim()[0] >= 0.5  # no ticks below rank 1
    many_alone = {f"layers.{b}.q": [float(b)] for b in range(9)}
    assert ends(axes_of(spectra(many_alone))[0]) == [[1.0, float(b)] for b in range(1, 9)]


def test_thousands_of_layers_are_few_artists():
    values = {f"layers.{b}.experts.{e}.up": [2.0, 1.0] for b in range(10) for e in range(300)}
    ax, bar = axes_of(spectra(values))
    assert len(drawn(ax)) == 3000
    assert len(ax.get_children()) < 30
    assert bar.get_ylim() == (0, 9)


def test_only_the_lowest_panels_have_labels_below():
    *panels, _ = axes_of(spectra(many(modules=("a", "b", "c", "d", "e", "f", "g"))))
    assert [bool(ax.get_xlabel()) for ax in panels] == [False] * 4 + [True] * 3
    shown = [ax.xaxis.get_tick_params()["labelbottom"] for ax in panels]
    assert shown == [False] * 3 + [True] * 4


def test_experts_share_a_panel():
    values = many(modules=[f"experts.{e}.up" for e in range(4)] + ["attn.q"])
    *panels, _ = axes_of(spectra(values))
    assert [(ax.get_title(), len(drawn(ax))) for ax in panels] == [("up", 16), ("q", 4)]


def test_a_second_stack_and_layers_without_a_number_have_broken_lines():
    values = many(stack="encoder.block") | many(stack="decoder.block") | {"head": [2.0, 1.0]}
    *panels, bar = axes_of(spectra(values))
    assert solid(panels[0]) == [True] * 4 + [False] * 4
    assert len(drawn(panels[-1])) == 1
    assert solid(panels[-1]) == [False]
    assert to_hex(collection(panels[-1]).get_colors()[0]) == "#000000"
    assert bar.get_ylabel() == "block (decoder.block: broken lines)"


def test_too_many_module_types_share_one_panel():
    values = {f"part{k}": [2.0, 1.0] for k in range(30)}
    (ax,) = axes_of(spectra(values))
    assert len(drawn(ax)) == 30


def test_chosen_layers_are_drawn_in_the_order_asked_for():
    (ax,) = axes_of(spectra(many(), layers=["layers.2.attn.v", "layers.0.attn.q"]))
    assert legend(ax) == ["layers.2.attn.v", "layers.0.attn.q"]
    assert legend(axes_of(spectra(FEW, layers=["layers.0.q"] * 9))[0]) == ["layers.0.q"]


def test_draws_into_given_axes():
    figure, (left, right) = subplots(2)
    values = many()
    assert spectra(values, ax=right) is figure
    assert len(drawn(right)) == len(values)
    assert not left.collections


def test_a_layer_of_zeros_has_no_line():
    for quantity in ("values", "energy", "captured"):
        (ax,) = axes_of(spectra({"0.q": [0.0, 0.0], "0.v": [1.0]}, quantity=quantity))
        assert [len(line.get_xdata()) for line in ax.lines] == [0, 1]


def test_a_panel_of_zeros_is_drawn_beside_others():
    values = many() | {f"layers.{b}.zero": [0.0] for b in range(4)}
    figure = spectra(values)
    figure.draw_without_rendering()
    assert axes_of(figure)[3].get_title() == "zero"


def test_extreme_values_do_not_overflow():
    given = Spectra({"q": [1e200, 1e200], "v": [1e-200]}, unresolved={"v": 1e-300})
    (ax,) = axes_of(spectra(given, quantity="captured"))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [50.0, 100.0])
    assert len(ax.lines[1].get_ydata()) <= 1
    spectra({"q": [1e200, 1e-300], "v": [1e-300]}).draw_without_rendering()


def test_what_cannot_be_drawn():
    wrong: Any = "value"
    with pytest.raises(ValueError, match="quantity: expected one of values, energy, captured"):
        spectra(FEW, quantity=wrong)
    with pytest.raises(ValueError, match=r"layers: 'layers\.9\.q' is not among the spectra"):
        spectra(FEW, layers=["layers.9.q"])
    with pytest.raises(ValueError, match="layers: expected at least one, got none"):
        spectra({})
    for quantity in ("values", "energy", "captured"):
        with pytest.raises(ValueError, match="expected a layer with a value above 0"):
            spectra({"q": [0.0], "v": [0.0]}, quantity=quantity)
    with pytest.raises(ValueError, match=r"'q': expected values of at most 1e\+200 to draw"):
        spectra({"q": [1e201]})
    with pytest.raises(ValueError, match="layer 'q': expected singular values in descending"):
        spectra({"q": [1.0, 2.0]})
