"""Predictions against what came true: what is drawn where, read back from the figure."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from lorambo_alloc.plots import predicted_against_real
from lorambo_alloc.plots.predicted_against_real import rank_correlation
from tests.plots.drawn import axes_of, legend, subplots

PREDICTED = {"0.q": 2.0, "0.v": 8.0, "1.q": 3.0, "1.v": 4.0}
REAL = {"1.v": 2.0, "1.q": 3.0, "0.v": 4.0, "0.q": 1.0}


def points(ax: Any) -> dict[str, list[tuple[float, float]]]:
    """By label, real and predicted."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in ax.lines
        if line.get_linestyle() == "None"
    }


def test_points_are_matched_by_name():
    (ax,) = axes_of(predicted_against_real(PREDICTED, REAL, unit="nats"))
    assert points(ax) == {"q": [(1.0, 2.0), (3.0, 3.0)], "v": [(4.0, 8.0), (2.0, 4.0)]}
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel() == "real decrease of the loss (nats)"
    assert ax.get_ylabel() == "predicted decrease of the loss (nats)"
    assert legend(ax) == ["equal", "q", "v"]
    markers = [line.get_marker() for line in ax.lines if line.get_linestyle() == "None"]
    assert len(set(markers)) == 2


@pytest.mark.parametrize("log", [True, False])
def test_the_line_of_equals_goes_through_equal_axes(log):
    (ax,) = axes_of(predicted_against_real(PREDICTED, REAL, log=log))
    (line,) = [line for line in ax.lines if line.get_label() == "equal"]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[0] < 1.0 < 8.0 < ax.get_xlim()[1]
    assert ax.get_aspect() == 1.0


def test_how_well_they_agree_is_said():
    (ax,) = axes_of(predicted_against_real(PREDICTED, REAL))
    assert ax.get_title(loc="left") == "rank correlation 0.80\nmedian predicted / real 2"


def test_what_is_not_above_0_makes_the_axes_linear_or_is_left_out():
    real = REAL | {"0.q": -1.0}
    (ax,) = axes_of(predicted_against_real(PREDICTED, real))
    assert ax.get_xscale() == "linear"
    assert points(ax)["q"] == [(-1.0, 2.0), (3.0, 3.0)]
    (ax,) = axes_of(predicted_against_real(PREDICTED, real, log=True))
    assert points(ax)["q"] == [(3.0, 3.0)]
    assert ax.get_title(loc="left").endswith("1 layers not above 0 left out")


def test_constant_numbers_have_no_correlation():
    (ax,) = axes_of(predicted_against_real({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}))
    assert ax.get_title(loc="left") == "median predicted / real 0.75"


def test_the_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, (2, 12)).astype(float)  # with equals
        assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)


def test_twelve_types_differ_and_more_share_one_look():
    names = [f"0.m{k}" for k in range(12)]
    (ax,) = axes_of(predicted_against_real(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0)))
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines[1:]}
    assert len(looks) == 12
    names.append("0.m12")
    (ax,) = axes_of(predicted_against_real(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0)))
    assert legend(ax) == ["equal", "layers"]


def test_draws_into_given_axes():
    figure, (left, right) = subplots(2)
    assert predicted_against_real(PREDICTED, REAL, ax=right) is figure
    assert points(right)["q"] == [(1.0, 2.0), (3.0, 3.0)]
    assert not left.lines


def test_the_largest_and_smallest_numbers_are_drawn():
    figure = predicted_against_real({"a": 1e150, "b": 1e-150}, {"a": 1e-300, "b": 1.0})
    figure.draw_without_rendering()
    figure = predicted_against_real({"a": 1e150, "b": -1e150}, {"a": 1.0, "b": 0.0})
    figure.draw_without_rendering()


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"real: layer '0\.q' is missing"):
        predicted_against_real({"0.q": 1.0}, {})
    with pytest.raises(ValueError, match=r"predicted: layer '0\.q' is missing"):
        predicted_against_real({}, {"0.q": 1.0})
    with pytest.raises(ValueError, match="predicted: expected at least one layer, got none"):
        predicted_against_real({}, {})
    with pytest.raises(
        ValueError, match=r"real: layer 'a': expected a finite .* at most 1e\+150, got nan"
    ):
        predicted_against_real({"a": 1.0}, {"a": float("nan")})
    with pytest.raises(ValueError, match="log: expected a layer with both numbers above 0"):
        predicted_against_real({"a": 1.0}, {"a": -1.0}, log=True)
    with pytest.raises(ValueError, match=r"layer 'a': expected .* at most 1e\+150, got -1e\+200"):
        predicted_against_real({"a": -1e200}, {"a": 1.0})
    wrong: Any = [1.0]
    with pytest.raises(ValueError, match="predicted: expected a mapping of layer name to number"):
        predicted_against_real(wrong, {"a": 1.0})
    with pytest.raises(ValueError, match="real: expected a mapping of layer name to number"):
        predicted_against_real({"a": 1.0}, wrong)
