"""What the frontier says at a budget, of any kind; its knee and its table."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

from lorambo_alloc import GainCurves, InfeasibleError, frontier
from lorambo_alloc.testing import Instance
from tests.strategies import instances
from tests.test_frontier import example, frontier_of


@given(instances())
def test_at_and_price_at_between_breakpoints(instance: Instance):
    curve = frontier_of(instance)
    budgets = curve.budgets.tolist()
    assert np.array_equal(curve.at(curve.budgets), curve.values)
    assert np.array_equal(curve.price_at(curve.budgets), curve.prices)
    for k in range(len(curve) - 1):
        middle = (budgets[k] + budgets[k + 1]) // 2
        share = Fraction(middle - budgets[k], budgets[k + 1] - budgets[k])
        low, high = Fraction(float(curve.values[k])), Fraction(float(curve.values[k + 1]))
        expected = low + share * (high - low)
        most = max(abs(low), abs(high))
        assert (
            abs(Fraction(curve.at(middle)) - expected)
            <= most * Fraction(2) ** -50 + Fraction(2) ** -1073
        )
        assert curve.price_at(middle) == curve.prices[k]
    assert curve.at(budgets[-1] + 1) == curve.at(1 << 80) == curve.values[-1]
    assert curve.price_at(1 << 80) == 0


def test_the_knee_does_not_depend_on_what_is_forced():
    spectra = {"q": [9.0, 6.0, 3.5, 1.0, 0.5, 0.1], "v": [2.0]}
    free = frontier(spectra, costs=[10, 1])
    assert free.knee() == 21
    forced = frontier({"w": [100.0], **spectra}, costs=[1000, 10, 1], min_rank={"w": 1})
    assert forced.knee() == 1021
    assert forced.values.tolist() == [10_000.0 + value for value in free.values.tolist()]


def test_budgets_of_any_shape_and_kind():
    curve = example()
    assert curve.at([[0, 1], [4, 100]]).tolist() == [[0.0, 4.5], [15.0, 18.0]]
    assert type(curve.at(4)) is type(curve.price_at(4)) is float
    assert type(curve.at(np.int64(4))) is type(curve.at(4.0)) is float  # pyright: ignore[reportArgumentType, reportCallIssue]
    for kind in (np.int8, np.uint8, np.uint64, np.float64, object):
        assert curve.at(np.array([4, 100], dtype=kind)).tolist() == [15.0, 18.0]
    assert curve.at(np.array([2**64 - 1], dtype=np.uint64)).tolist() == [18.0]
    assert curve.at([2**70, 3]).tolist() == [18.0, 13.0]
    assert curve.price_at([1, 2, 7]).tolist() == [4.5, 4.0, 0.0]
    for empty in ([], np.zeros((0, 2), dtype=np.int64)):
        assert curve.at(empty).size == 0


@pytest.mark.parametrize("budget", [-1, np.int64(-1), [3, -1], np.array([-1, 3])])
def test_budgets_below_nought(budget):
    with pytest.raises(ValueError, match=r"budget: expected a whole number >= 0, got -1"):
        example().at(budget)


@pytest.mark.parametrize("budget", [True, 1.5, "3", None, [1, 2.5], [True], math.nan])
def test_budgets_that_are_no_whole_numbers(budget):
    for method in (example().at, example().price_at):
        with pytest.raises(ValueError, match=r"budget: expected a whole number >= 0, got "):
            method(budget)


def test_budgets_below_the_least():
    curve = frontier([[2.0, 1.0], [1.0]], costs=[3, 4], min_rank=1)
    assert curve.at(7) == 5.0
    message = r"budget: the minimum ranks cost 7, more than the budget 6; .* budget is 7"
    for budget in (np.array(6), [9, 6, 7], [9.0, 6.0]):
        with pytest.raises(InfeasibleError, match=message) as caught:
            curve.at(budget)
        assert caught.value.minimum_budget == 7
    with pytest.raises(InfeasibleError, match=message):
        curve.price_at(6)
    with pytest.raises(InfeasibleError, match=message):
        curve.allocation(6)


def test_method_and_time_limit_reach_the_solver():
    curve = example()
    assert curve.allocation(4, method="water_filling").certificate.method == "water-filling"
    with pytest.raises(ValueError, match="method: expected one of"):
        curve.allocation(4, method="best")
    with pytest.raises(ValueError, match="time_limit"):
        curve.allocation(4, time_limit=-1.0)


def test_repr():
    assert repr(example()).splitlines() == [
        "Frontier(5 breakpoints, objective frobenius)",
        "of the gain  budget at least  of the cost  price",
        "------------------------------------------------",
        "        25%                1        14.3%    4.5",
        "        50%                2        28.6%      4",
        "        75%                4        57.1%      2",
        "        90%                5        71.4%    0.5",
        "        95%                6        85.7%    0.5",
        "        99%                7       100.0%      0",
        "       100%                7       100.0%      0",
        "knee at 3; values are the upper hull",
    ]


def test_repr_of_nothing_to_gain():
    curve = frontier([[0.0, 0.0]])
    assert repr(curve) == "Frontier(1 breakpoints, objective frobenius): nothing to gain"
    assert curve.knee() == 0
    assert curve.at(3) == 0.0
    assert curve.ranks_at_breakpoint(0).tolist() == [0]
    assert "of the gain" in repr(frontier([[0.5]]))
    empty = frontier({})
    assert (len(empty), empty.at(0), empty.budgets.tolist()) == (1, 0.0, [0])


def test_repr_with_forced_gain():
    text = repr(frontier([[2.0], [1.0]], min_rank=1, costs=[1000, 2000]))
    assert "        25%            3,000       100.0%      0" in text
    assert "Frontier(1 breakpoints" in text


@pytest.mark.parametrize("steps", range(1, 31))
@pytest.mark.parametrize("gain", [0.1, 1 / 3, 0.7])
def test_a_straight_hull_has_no_knee(steps: int, gain: float):
    # Its points lie above the chord or below by rounding alone.
    curve = frontier(GainCurves.from_increments({"a": [gain] * steps}), costs=[7], min_rank=1)
    assert len(curve) == steps
    assert curve.knee() == 7


def test_of_knees_that_rounding_cannot_tell_apart_the_first():
    # Between the first step and the last the hull runs along the chord's direction.
    curve = frontier(GainCurves.from_increments({"a": [1.1, *[0.7] * 9, 0.3]}))
    assert curve.knee() == 1


def test_breakpoints_that_there_are_not():
    for index in (5, -6):
        with pytest.raises(IndexError, match=rf"expected a breakpoint from -5 to 4, got {index}$"):
            example().ranks_at_breakpoint(index)
    assert example().ranks_at_breakpoint(-5).tolist() == [0, 0]
    assert example().ranks_at_breakpoint(-2).tolist() == [2, 1]


def test_lists_of_unequal_lengths():
    with pytest.raises(ValueError, match=r"^budget: expected an array of whole numbers: "):
        example().at([[1], [2, 3]])


def test_repr_of_gains_that_leave_a_loss():
    curve = frontier(GainCurves.from_increments([[-10.0, 5.0, 1.0]]), min_rank=1)
    assert repr(curve) == (
        "Frontier(3 breakpoints, objective frobenius): values from -10 to -4, none above 0"
    )
    even = frontier(GainCurves.from_increments([[-10.0, 10.0]]), min_rank=1)
    assert repr(even).endswith(": values from -10 to 0, none above 0")
    forced = frontier(GainCurves.from_increments([[-10.0, -5.0]]), min_rank=1)
    assert repr(forced) == "Frontier(1 breakpoints, objective frobenius): nothing to gain"
