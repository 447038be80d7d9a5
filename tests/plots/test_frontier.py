"""Value and price over the budget: what is drawn where, read back from the figure."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install 'lorambo-alloc[plot]'")

from lorambo_alloc import GainCurves, minimize_budget
from lorambo_alloc import frontier as frontier_of
from lorambo_alloc.plots import frontier
from lorambo_alloc.plots.frontier import budget_of_share
from tests.plots.drawn import axes_of, legend, subplots

SPECTRA = {"q": [3.0, 2.0, 1.0], "v": [2.0]}
CURVE = frontier_of(SPECTRA, costs={"q": 2, "v": 1})  # budgets 0 2 3 5 7, values 0 9 13 17 18


def of(ax: Any) -> dict[str, Any]:
    """Lines by their labels."""
    return {line.get_label(): line for line in ax.lines}


def test_values_are_shares_of_the_greatest():
    upper, lower = axes_of(frontier(CURVE))
    hull = of(upper)["upper hull"]
    np.testing.assert_array_equal(hull.get_xdata(), CURVE.budgets)
    np.testing.assert_allclose(hull.get_ydata(), 100 * CURVE.values / 18)
    assert upper.get_ylabel() == "value (% of the greatest)"
    assert lower.get_xlabel() == "budget (parameters)"
    (price,) = lower.lines
    np.testing.assert_array_equal(price.get_xdata(), CURVE.budgets)
    np.testing.assert_allclose(
        price.get_ydata(), np.array([4.5, 4.0, 2.0, 0.5, 0.5]) * 100 / 18 * 7 / 100
    )
    assert price.get_drawstyle() == "steps-post"
    assert lower.get_yscale() == "log"


def test_values_and_prices_in_units_of_gain():
    upper, lower = axes_of(frontier(CURVE, share=False, unit="bytes"))
    np.testing.assert_array_equal(of(upper)["upper hull"].get_ydata(), CURVE.values)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [4.5, 4.0, 2.0, 0.5, 0.5])
    assert upper.get_ylabel() == "value (gain)"
    assert lower.get_ylabel() == "price (gain per unit\nof budget)"
    assert lower.get_xlabel() == "budget (bytes)"


def test_knee_and_target_are_marked_where_they_are():
    upper = axes_of(frontier(CURVE, target=0.8))[0]
    marks = of(upper)
    knee, target = marks["knee: 3"], marks["80 %: 4"]
    assert (knee.get_xdata(), knee.get_ydata()) == ([3], [pytest.approx(100 * 13 / 18)])
    assert (list(target.get_xdata()), list(target.get_ydata())) == ([4], [pytest.approx(80.0)])
    assert legend(upper) == ["upper hull", "knee: 3", "80 %: 4"]
    assert legend(axes_of(frontier(CURVE, knee=False))[0]) == ["upper hull"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.72, 0.9, 1.0])
def test_the_budget_of_a_share_is_the_least_that_reaches_it_on_the_hull(share):
    budget = budget_of_share(CURVE, share)
    assert CURVE.at(budget) >= share * 18 - 1e-9
    if budget:
        assert CURVE.at(budget - 1) < share * 18
    cheapest = minimize_budget(SPECTRA, share or 1e-9, costs={"q": 2, "v": 1})
    assert budget <= cheapest.cost


def test_several_have_their_names_and_differ_without_colour():
    other = frontier_of(SPECTRA, costs={"q": 2, "v": 1}, objective="nuclear")
    upper, lower = axes_of(frontier({"squares": CURVE, "sums": other}, knee=False))
    assert legend(upper) == ["squares", "sums"]
    for ax in (upper, lower):
        assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
    np.testing.assert_allclose(of(upper)["sums"].get_ydata()[-1], 100.0)


def test_uniform_ranks_stand_at_their_costs():
    (top,) = axes_of(frontier(CURVE))[0].child_axes
    assert top.get_xticks().tolist() == [3.0, 6.0]
    assert [text.get_text() for text in top.get_xticklabels()] == ["1", "2"]
    assert "uniform rank" in top.get_xlabel()


def test_frontiers_of_other_costs_have_no_common_uniform_ranks():
    other = frontier_of(SPECTRA, costs={"q": 1, "v": 1})
    assert not axes_of(frontier({"a": CURVE, "b": other}))[0].child_axes
    assert axes_of(frontier({"a": CURVE, "b": CURVE}))[0].child_axes


def test_logarithmic_budgets_leave_out_0():
    upper, lower = axes_of(frontier(CURVE, log=True))
    assert upper.get_xscale() == lower.get_xscale() == "log"
    np.testing.assert_array_equal(of(upper)["upper hull"].get_xdata(), [2, 3, 5, 7])
    np.testing.assert_array_equal(lower.lines[0].get_xdata(), [2, 3, 5, 7])


def test_draws_the_values_into_given_axes():
    figure, (left, right) = subplots(2)
    assert frontier(CURVE, ax=right) is figure
    assert of(right)["upper hull"].get_xdata().tolist() == [0, 2, 3, 5, 7]
    assert right.get_xlabel() == "budget (parameters)"
    assert not left.lines


def test_a_frontier_of_one_point_and_one_below_0():
    nothing = frontier_of({"q": [0.0]})
    below = frontier_of(GainCurves({"q": [0.0, -3.0, -1.0]}), min_rank=1)
    for curve in (nothing, below):
        with pytest.raises(ValueError, match="expected a greatest value above 0"):
            frontier(curve)
        with pytest.raises(ValueError, match="expected a greatest value above 0"):
            frontier(curve, share=False, target=0.5)
        upper = axes_of(frontier(curve, share=False))[0]
        np.testing.assert_array_equal(of(upper)["upper hull"].get_ydata(), curve.values)
        one = len(curve) == 1
        assert of(upper)["upper hull"].get_marker() == ("." if one else "None")


def test_over_logarithmic_budgets_one_point_is_a_dot_and_a_knee_at_0_is_left_out():
    upper, lower = axes_of(frontier(frontier_of({"q": [1.0]}), log=True))
    assert legend(upper) == ["upper hull"]
    assert [line.get_marker() for line in (*upper.lines, *lower.lines)] == [".", "."]
    assert legend(axes_of(frontier(frontier_of({"q": [1.0]})))[0]) == ["upper hull", "knee: 0"]


def test_budgets_have_whole_ticks():
    upper, _ = axes_of(frontier(frontier_of({"q": [2.0, 1.0]})))
    assert all(float(tick).is_integer() for tick in upper.get_xticks())


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="log: expected a budget above 0, got 0 alone"):
        frontier(frontier_of({"q": [0.0]}), share=False, log=True)
    with pytest.raises(ValueError, match="frontiers: expected at least one, got none"):
        frontier({})
    wrong: Any = {"a": 3}
    with pytest.raises(ValueError, match="frontiers: 'a': expected a Frontier, got 3"):
        frontier(wrong)
    wrong = None
    with pytest.raises(ValueError, match=r"frontiers: expected a Frontier or a .* got None"):
        frontier(wrong)
    for target in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="target: expected a share between 0 and 1"):
            frontier(CURVE, target=target)
