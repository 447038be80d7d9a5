"""Cumulative regret: what is drawn where, read back from the figure."""

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from matplotlib.figure import Figure

from lorambo_alloc.plots import regret_by_round
from tests.plots.drawn import axes_of


class TestRegret:
    def test_mean_and_interval(self):
        table = np.array([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]])
        figure = regret_by_round({"exact": table, "alone": np.array([1.0, 1.0])}, log=False)
        (ax,) = axes_of(figure)
        both, one = ax.lines[:2]
        np.testing.assert_array_equal(both.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(both.get_ydata(), [2.0, 4.0, 6.0])
        np.testing.assert_array_equal(one.get_ydata(), [1.0, 1.0])
        (band,) = ax.collections
        top = band.get_paths()[0].vertices[:, 1].max()
        assert top == pytest.approx(6 + 1.96 * math.sqrt(2) / math.sqrt(2))
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["exact", "alone"]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("round", "cumulative regret")

    def test_logarithmic_axes_leave_out_what_is_not_positive(self):
        figure = Figure()
        ax: Any = figure.subplots()
        assert regret_by_round({"a": np.array([-1.0, 0.0, 4.0])}, ax=ax) is figure
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), [math.nan, math.nan, 4.0])
        slopes = [
            np.log(line.get_ydata()[1] / line.get_ydata()[0])
            / np.log(line.get_xdata()[1] / line.get_xdata()[0])
            for line in ax.lines[1:]
        ]
        assert slopes == pytest.approx([1.0, 0.5])

    def test_what_cannot_be_drawn(self):
        with pytest.raises(ValueError, match="expected at least one array"):
            regret_by_round({})
        with pytest.raises(ValueError, match=r"'a': expected runs x rounds, got shape \(1, 1, 2\)"):
            regret_by_round({"a": np.zeros((1, 1, 2))})
        wrong: Any
        for wrong, message in (
            (None, "regrets: expected a mapping of name to array, got None"),
            ({"a": "x"}, "regrets: 'a': expected numbers, got 'x'"),
            ({"a": [[1.0, 2.0], [1.0, math.nan]]}, "'a': expected finite .* nan in run 1, round 2"),
            ({"a": [math.inf]}, "'a': expected finite numbers, got inf in run 0, round 1"),
            ({"a": [-1.0, 0.0]}, "log: expected a mean regret above 0, got 0 at most"),
        ):
            with pytest.raises(ValueError, match=message):
                regret_by_round(wrong)
        assert regret_by_round({"a": np.array([-1.0, 0.0])}, log=False).axes

    def test_a_round_alone_is_a_dot(self):
        for values in ([2.0], [-1.0, 2.0, -1.0]):
            (ax,) = axes_of(regret_by_round({"a": np.array(values)}))
            assert ax.lines[0].get_marker() == "."
            assert min(min(line.get_ydata()) for line in ax.lines[1:]) > 0
