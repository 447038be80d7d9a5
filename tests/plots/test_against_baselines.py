"""Bars of a comparison: what is drawn where, read back from the figure."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from lorambo_alloc import GainCurves, compare
from lorambo_alloc.plots import against_baselines
from tests.plots.drawn import axes_of, labels, subplots, texts

COMPARED = compare(
    {"0.attn.q": [3.0, 2.0, 1.0], "0.mlp.up": [2.5, 0.5]},
    44,
    costs=[16, 12],
    rules=["uniform", "mlp_only"],
)


def test_bars_are_shares_of_the_optimum_and_of_the_budget():
    left, right = axes_of(against_baselines(COMPARED))
    assert labels(left) == ["allocate", "uniform", "mlp_only"]
    for ax, shares in (
        (left, [row.share for row in COMPARED]),
        (right, [row.spent for row in COMPARED]),
    ):
        expected = [100 * (share or 0.0) for share in shares]
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(expected)
        assert [bar.get_x() for bar in ax.patches] == [0, 0, 0]
    assert texts(left) == ["100.00 %", "79.22 %", "33.76 %"]
    assert texts(right) == ["100.00 %", "63.63 %", "54.54 %"]
    assert left.get_ylim() == (2.6, -0.6)  # the first row on top
    assert left.get_xlabel() == "value (% of the optimum)"
    assert right.get_xlabel() == "cost (% of the budget)"


def test_the_own_row_stands_out_without_colour():
    bars = axes_of(against_baselines(COMPARED))[0].patches
    assert [bool(bar.get_hatch()) for bar in bars] == [True, False, False]


def test_shares_of_a_bound_are_called_so():
    left = axes_of(against_baselines(replace(COMPARED, proven=False)))[0]
    assert left.get_xlabel() == "value (% of the bound on the optimum)"


def test_a_value_below_0_has_no_bar_and_rules_left_out_are_named():
    compared = compare(GainCurves({"a.0.q": [0, -1, 3, 4], "b.0.v": [0, 1, 2]}), 3)
    left = axes_of(against_baselines(compared))[0]
    below = [k for k, row in enumerate(compared) if row.share is None]
    assert below
    for k in below:
        assert texts(left)[k] == "below 0"
        assert left.patches[k].get_width() == 0
    assert compared.skipped
    assert texts(left)[-1] == f"do not apply: {', '.join(compared.skipped)}"


def test_draws_the_values_into_given_axes():
    figure, (left, right) = subplots(2)
    assert against_baselines(COMPARED, ax=right) is figure
    assert len(right.patches) == 3
    assert not left.patches
    assert len(figure.axes) == 2


def test_what_is_no_comparison():
    wrong: Any = {"uniform": 1.0}
    with pytest.raises(ValueError, match="comparison: expected what compare returns, got"):
        against_baselines(wrong)


def test_no_rows():
    with pytest.raises(ValueError, match="comparison: expected at least one row, got none"):
        against_baselines(replace(COMPARED, rows=()))
