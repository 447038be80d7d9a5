"""Ranks over the steps: what is drawn where, read back from the figure."""

import builtins
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lorambo_alloc.history import RankHistory
from lorambo_alloc.plots import rank_history
from tests.plots.drawn import axes_of, labels

MODULES = ("attention.self.query", "output.dense")
NAMES = [f"encoder.layer.{block}.{module}" for block in (0, 10, 2) for module in MODULES]


def run(names=NAMES, most=4, steps=(0, 100, 200)) -> RankHistory:
    history = RankHistory(dict.fromkeys(names, 10))
    rng = np.random.default_rng(0)
    for step in steps:
        ranks = dict(zip(names, rng.integers(0, most + 1, len(names)).tolist(), strict=True))
        ranks[names[0]] = most
        history.record(step, ranks, budget=10 * most * len(names))
    return history


def drawn(ax) -> np.ma.MaskedArray:
    (mesh,) = ax.collections
    return mesh.get_array()


class TestRankHistory:
    def test_rows_are_blocks_by_depth_and_modules_in_them(self):
        history = run()
        figure = rank_history(history)
        upper, lower, bar = axes_of(figure)
        rows = [history.names.index(f"encoder.layer.{b}.{m}") for b in (0, 2, 10) for m in MODULES]
        np.testing.assert_array_equal(drawn(upper), history.ranks[:, rows].T)
        assert labels(upper) == [*MODULES] * 3
        (side,) = upper.child_axes
        assert labels(side) == ["block 0", "block 2", "block 10"]
        np.testing.assert_array_equal(side.get_yticks(), [0.5, 2.5, 4.5])
        assert (upper.get_ylabel(), side.get_ylabel()) == ("layer", "block")
        assert lower.get_xlabel() == "training step"
        assert lower.get_ylabel() == "cost\n(parameters)"
        assert bar.get_ylabel() == "rank"
        assert labels(bar) == ["0", "1", "2", "3", "4"]

    def test_rows_by_module(self):
        history = run()
        upper = axes_of(rank_history(history, group="module"))[0]
        assert labels(upper) == ["block 0", "block 2", "block 10"] * 2
        assert labels(upper.child_axes[0]) == [*MODULES]
        np.testing.assert_array_equal(drawn(upper), history.ranks[:, [0, 4, 2, 1, 5, 3]].T)

    def test_rows_by_a_function(self):
        history = run()
        upper = axes_of(rank_history(history, group=lambda name: name.rpartition(".")[2]))[0]
        assert labels(upper.child_axes[0]) == ["query", "dense"]
        assert upper.child_axes[0].get_ylabel() == "group of layers"
        assert labels(upper)[:2] == [
            "block 0 attention.self.query",
            "block 10 attention.self.query",
        ]
        np.testing.assert_array_equal(drawn(upper), history.ranks[:, [0, 2, 4, 1, 3, 5]].T)

    def test_stacks_of_one_model_are_told_apart(self):
        names = [f"{stack}.block.{b}.{m}" for stack in ("encoder", "decoder") for b in (0, 1)
                 for m in "qv"]  # fmt: skip
        upper = axes_of(rank_history(run(names)))[0]
        assert labels(upper.child_axes[0]) == [
            "decoder.block.0", "decoder.block.1", "encoder.block.0", "encoder.block.1",
        ]  # fmt: skip

    @pytest.mark.parametrize("names", [["q", "v"], ["head"], ["0", "1", "2"]])
    def test_few_layers_are_labelled_whole(self, names):
        upper = axes_of(rank_history(run(names)))[0]
        expected = [f"block {name}" if name.isdigit() else name for name in names]
        assert labels(upper) == expected
        assert upper.get_ylabel() == "layer"
        assert not upper.child_axes

    def test_of_many_layers_only_groups_are_labelled(self):
        names = [f"layers.{block}.{module}" for block in range(32) for module in "qkvogud"]
        upper = axes_of(rank_history(run(names)))[0]
        assert labels(upper) == [f"block {block}" for block in range(32)]
        assert upper.get_ylabel() == "block"
        assert not upper.child_axes

    def test_of_many_groups_every_so_manieth(self):
        names = [f"layers.{block}.{module}" for block in range(300) for module in "qv"]
        shown = labels(axes_of(rank_history(run(names)))[0])
        assert shown[0] == "block 0"
        assert 20 < len(shown) < 110

    def test_columns_reach_to_the_next_entry_and_the_last_of_a_step_counts(self):
        history = run(["q"], steps=(0, 10, 10, 50))
        upper, lower, _ = axes_of(rank_history(history))
        edges = upper.collections[0].get_coordinates()[0, :, 0]
        np.testing.assert_array_equal(edges, [0, 10, 50, 75])  # as wide as the median of 10 and 40
        np.testing.assert_array_equal(drawn(upper), history.ranks[[0, 2, 3]].T)
        assert lower.get_xlim() == (0, 75)

    def test_the_end_of_a_run_has_no_width(self):
        history = run(["q"], steps=(0, 20, 40))
        history.record(50, {"q": 3}, budget=40, event="end")
        upper, lower, _ = axes_of(rank_history(history))
        edges = upper.collections[0].get_coordinates()[0, :, 0]
        np.testing.assert_array_equal(edges, [0, 20, 40, 50])
        np.testing.assert_array_equal(drawn(upper), history.ranks[:3].T)
        assert lower.get_xlim() == (0, 50)
        np.testing.assert_array_equal(lower.lines[0].get_ydata(), history.budgets)

    def test_an_end_at_the_step_of_the_last_look_hides_it_and_one_alone_is_drawn(self):
        history = run(["q"], steps=(0, 20, 40))
        history.record(40, {"q": 3}, budget=40, event="end")
        assert axes_of(rank_history(history))[1].get_xlim() == (0, 40)
        history = RankHistory({"q": 10})
        history.record(7, {"q": 3}, budget=40, event="end")
        assert axes_of(rank_history(history))[1].get_xlim() == (7, 8)

    @pytest.mark.parametrize("most", [3, 40])
    def test_rank_0_is_white_and_more_is_darker(self, most):
        history = RankHistory({"q": 1})
        for rank in range(most + 1):
            history.record(rank, {"q": rank}, budget=most)
        figure = rank_history(history)
        figure.canvas.draw()
        mesh = axes_of(figure)[0].collections[0]
        shades = mesh.to_rgba(mesh.get_array()).reshape(-1, 4)
        if most == 3:
            assert to_hex(shades[0]) == "#ffffff"
        else:
            assert mesh.get_array().mask[0, 0]
            assert to_hex(axes_of(figure)[0].get_facecolor()) == "#ffffff"
            assert axes_of(figure)[2].get_ylabel() == "rank (0 is white)"
        lightness = shades[1:, :3] @ [0.2126, 0.7152, 0.0722]
        assert lightness[0] < 0.85  # not taken for white in grey print
        assert np.all(np.diff(lightness) < 0)

    def test_costs_budget_and_failures(self):
        history = RankHistory({"q": 10})
        history.record(0, {"q": 1}, budget=40)
        history.record(5, {"q": 2}, budget=30, event="moved")
        history.record(9, {"q": 2}, budget=20, event="failed: out of memory")
        _, lower, _ = axes_of(rank_history(history, unit="bytes"))
        budget, failed = lower.lines
        np.testing.assert_array_equal(budget.get_ydata(), [40, 30, 20, 20])
        np.testing.assert_array_equal(failed.get_xdata(), [9])
        np.testing.assert_array_equal(failed.get_ydata(), [20])
        heights = lower.collections[0].get_paths()[0].vertices[:, 1]
        assert set(heights.tolist()) == {0.0, 10.0, 20.0}
        assert lower.get_ylabel() == "cost\n(bytes)"
        assert [t.get_text() for t in lower.get_legend().get_texts()] == [
            "spent", "budget", "failed",
        ]  # fmt: skip

    def test_draws_into_given_axes(self):
        figure = Figure()
        axes: Any = figure.subplots(1, 2)
        left, right = axes
        assert rank_history(run(), ax=right) is figure
        assert drawn(right).shape == (6, 3)
        assert right.get_xlabel() == "training step"
        assert not left.collections

    def test_writes_a_picture(self, tmp_path):
        rank_history(run()).savefig(tmp_path / "ranks.png")
        assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")

    def test_what_cannot_be_drawn(self):
        with pytest.raises(ValueError, match="history: expected entries of layers"):
            rank_history(RankHistory({"q": 1}))
        empty = RankHistory({})
        empty.record(0, {}, budget=0)
        with pytest.raises(ValueError, match="history: expected entries of layers"):
            rank_history(empty)
        wrong: Any = None
        with pytest.raises(ValueError, match="history: expected a RankHistory, got None"):
            rank_history(wrong)
        with pytest.raises(ValueError, match="group: expected 'block', 'module' or a function"):
            rank_history(run(), group="blocks")

    def test_says_what_to_install(self, monkeypatch):
        original = builtins.__import__

        def absent(name, *arguments, **keywords):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return original(name, *arguments, **keywords)

        monkeypatch.setattr(builtins, "__import__", absent)
        with pytest.raises(ImportError, match=r"pip install 'lorambo-alloc\[plot\]'"):
            rank_history(run())
