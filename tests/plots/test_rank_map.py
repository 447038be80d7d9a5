"""Ranks by block and module type: what is drawn where, read back from the figure."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex

from lorambo_alloc import allocate, uniform_rank
from lorambo_alloc.plots import rank_map
from lorambo_alloc.plots.style import RankColours
from tests.plots.drawn import axes_of, columns, labels, subplots, texts

MODULES = ("attention.self.query", "attention.self.key", "output.dense")
NAMES = [f"encoder.layer.{block}.{module}" for block in (0, 10, 2) for module in MODULES]


def ranks_of(names=NAMES, most=9) -> dict[str, int]:
    values = np.random.default_rng(0).integers(1, most, len(names)).tolist()
    return dict(zip(names, values, strict=True)) | {names[0]: most}


def meshes(ax: Any) -> list[Any]:
    return [found for found in ax.collections if isinstance(found, QuadMesh)]


def crosses(ax: Any) -> list[Any]:
    (lines,) = [found for found in ax.collections if isinstance(found, LineCollection)]
    return [np.asarray(segment).tolist() for segment in lines.get_segments()]


def test_rows_are_blocks_and_columns_are_module_types():
    ranks = ranks_of()
    figure = rank_map(ranks)
    ax, bar = axes_of(figure)
    expected = [[ranks[f"encoder.layer.{b}.{m}"] for m in MODULES] for b in (0, 2, 10)]
    np.testing.assert_array_equal(meshes(ax)[0].get_array(), expected)
    assert labels(ax) == ["0", "2", "10"]
    assert columns(ax) == ["query", "key", "dense"]
    assert ax.get_ylabel() == "block"
    assert ax.get_ylim() == (2.5, -0.5)
    assert (bar.get_ylabel(), crosses(ax)) == ("rank", [])
    assert texts(ax) == [str(rank) for rank in ranks.values()]


def test_numbers_stand_in_their_cells():
    ranks = {"0.q": 3, "0.v": 5, "2.v": 70, "head": 9}
    ax = axes_of(rank_map(ranks))[0]
    found = {text.get_text(): text.get_position() for text in ax.texts}
    assert found["3"] == (0.5, 0.0)
    assert found["5"] == (1.5, 0.0)
    assert found["70"] == (1.5, 1.0)
    assert found["9"] == (1.0, pytest.approx(2.4))


@pytest.mark.parametrize("numbers", [True, False])
def test_numbers_can_be_asked_for_and_left_out(numbers):
    names = [f"layers.{b}.experts.{e}.w" for b in range(2) for e in range(128)]
    ax = axes_of(rank_map(ranks_of(names), numbers=numbers))[0]
    assert len(ax.texts) == (len(names) if numbers else 0)
    assert not axes_of(rank_map(ranks_of(names)))[0].texts


def test_several_share_one_scale_and_the_labels_of_their_rows():
    first = ranks_of()
    figure = rank_map({"ours": first, "uniform": dict.fromkeys(first, 2)})
    left, right, bar = axes_of(figure)
    assert [ax.get_title() for ax in (left, right)] == ["ours", "uniform"]
    assert meshes(left)[0].norm.boundaries.tolist() == meshes(right)[0].norm.boundaries.tolist()
    np.testing.assert_array_equal(meshes(right)[0].get_array(), np.full((3, 3), 2))
    assert labels(left) == ["0", "2", "10"]
    assert labels(right) == []
    assert labels(bar) == [str(rank) for rank in range(10)]


def test_many_maps_go_on_in_a_second_row():
    chosen = ranks_of([f"l.{b}.{m}" for b in range(3) for m in "qkvogud"])
    figure = rank_map({str(k): chosen for k in range(6)})
    axes = axes_of(figure)[:-1]
    rows = [ax.get_subplotspec().rowspan.start for ax in axes]
    assert rows == sorted(rows)
    assert rows[-1] > 0
    assert [bool(labels(ax)) for ax in axes] == [ax.get_subplotspec().is_first_col() for ax in axes]


def test_a_layer_that_is_missing_is_crossed_out():
    figure = rank_map({"all": {"0.q": 1, "0.v": 2, "1.q": 3}, "some": {"0.q": 1, "head": 4}})
    left, right, bar = axes_of(figure)
    assert meshes(left)[0].get_array().mask.tolist() == [[False, False], [False, True]]
    assert [[1.0, 1.5], [2.0, 0.5]] in crosses(left)
    assert len(crosses(left)) == 2  # and the head
    np.testing.assert_allclose(crosses(left)[-1], [[0.0, 2.9], [2.0, 1.9]])
    assert len(crosses(right)) == 3
    assert bar.get_ylabel() == "rank (crossed out: no such layer)"


def test_of_absent_experts_only_one_cross_is_drawn():
    names = ["0.up", *(f"1.experts.{e}.up" for e in range(8))]
    ax = axes_of(rank_map(ranks_of(names)))[0]
    assert crosses(ax) == [[[0.0, 1.5], [1.0, 0.5]], [[1.0, 0.5], [9.0, -0.5]]]


def test_many_experts_are_narrow_and_all_there():
    names = [f"layers.{b}.experts.{e}.{w}" for b in range(3) for e in range(64) for w in ("a", "b")]
    names += [f"layers.{b}.attn.q" for b in range(3)]
    ranks = ranks_of(names)
    ax = axes_of(rank_map(ranks))[0]
    (mesh,) = meshes(ax)
    expected = [
        [ranks[f"layers.{b}.experts.{e}.{w}"] for w in "ab" for e in range(64)]
        + [ranks[f"layers.{b}.attn.q"]]
        for b in range(3)
    ]
    np.testing.assert_array_equal(mesh.get_array(), expected)
    widths = np.diff(mesh.get_coordinates()[0, :, 0])
    assert widths[0] == pytest.approx(6 / 64)
    assert widths[-1] == pytest.approx(1.0)
    assert columns(ax) == ["a\n(x 64)", "b\n(x 64)", "q"]


def test_layers_outside_the_grid_have_rows_of_their_own():
    ax = axes_of(rank_map({"0.q": 1, "0.v": 2, "embed": 3, "head": 0}))[0]
    grid, alone = meshes(ax)
    np.testing.assert_array_equal(grid.get_array(), [[1, 2]])
    assert alone.get_array().tolist() == [[3], [0]]
    corners = alone.get_coordinates()
    np.testing.assert_allclose(corners[:, 0, 1], [0.9, 1.9, 2.9])
    np.testing.assert_allclose(corners[0, :, 0], [0.0, 2.0])
    assert labels(ax) == ["0", "embed", "head"]


def test_names_without_any_number():
    ax = axes_of(rank_map({"embed": 3, "head": 12}))[0]
    assert [mesh.get_array().tolist() for mesh in meshes(ax)] == [[[3], [12]]]
    assert labels(ax) == ["embed", "head"]
    assert ax.get_ylabel() == "layer"
    assert columns(ax) == []


def test_of_many_blocks_every_so_manieth_is_labelled():
    names = [f"layers.{b}.q" for b in range(300)]
    figure = rank_map(ranks_of(names))
    shown = labels(axes_of(figure)[0])
    assert shown[:2] == ["0", "4"]
    assert figure.get_size_inches()[1] < 10


@pytest.mark.parametrize("name", ["layers.{}.q", "layer{}"])
def test_edges_of_cells_are_left_out_where_they_would_hide_them(name):
    for count, edged in ((20, True), (400, False)):
        (mesh,) = meshes(axes_of(rank_map(ranks_of([name.format(k) for k in range(count)])))[0])
        assert bool(len(mesh.get_edgecolor())) == edged


@pytest.mark.parametrize("most", [4, 90])
def test_rank_0_is_white_and_numbers_can_be_read(most):
    ranks = {f"0.{k}.q": k for k in range(most + 1)}
    ax = axes_of(rank_map(ranks, numbers=True))[0]
    (mesh,) = meshes(ax)
    colours = mesh.to_rgba(mesh.get_array()).reshape(-1, 4)
    if most > 10:
        assert mesh.get_array().mask[0, 0]
        assert to_hex(ax.get_facecolor()) == "#ffffff"
    else:
        assert to_hex(colours[0]) == "#ffffff"
    for text, shade in list(zip(ax.texts, colours, strict=True))[1:]:
        lightness = float(shade[:3] @ [0.2126, 0.7152, 0.0722])
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        assert abs(ink - lightness) >= 0.5


def test_ticks_of_a_low_scale_do_not_lie_on_each_other():
    ticks = axes_of(rank_map({"a": 1, "b": 2000}))[-1].get_yticks()
    assert ticks[-1] == 1024
    places = RankColours(2000).norm(np.array(ticks))
    assert np.all(np.diff(places) > 0.05)
    assert len(ticks) < 11


def test_draws_an_allocation_into_given_axes():
    allocation = allocate({"0.q": [3.0, 1.0], "0.v": [2.0, 1.5]}, uniform_rank(1))
    figure, (left, right) = subplots(2)
    assert rank_map(allocation, ax=right) is figure
    assert meshes(right)[0].get_array().tolist() == [[allocation["0.q"], allocation["0.v"]]]
    assert not left.collections


def test_what_cannot_be_drawn():
    bad: Any
    for bad, message in (
        ({}, "ranks: expected at least one layer, got none"),
        ({"a": {"0.q": 1}, "b": {}}, "ranks: b: expected at least one layer"),
        ({"a": {"0.q": 1}, "0.q": 1}, "ranks: expected ranks, or mappings .* got both"),
        ({"0.q": 1.5}, "ranks: layer '0.q'.*whole number"),
        ({"ours": {"0.q": -1}}, "ranks: ours: layer '0.q'.*whole number"),
        ({"0.q": 10**30}, "ranks: layer '0.q': expected at most 9007199254740992, got 1000"),
        ([1, 2], "ranks: expected a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_map(bad)
    with pytest.raises(ValueError, match="ax: expected one map for given axes, got 2"):
        rank_map({"a": {"0.q": 1}, "b": {"0.q": 1}}, ax=subplots(1)[1][0])
