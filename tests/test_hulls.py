"""Concave hulls of options: against the hull's definition in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.hulls import concave_hulls
from lorambo_alloc.testing import Instance
from tests.strategies import instances


def _points(problem: Problem, group: tuple[int, ...]) -> list[tuple[int, int, Fraction]]:
    """Rank, cost and exact value of each option that hulls are made of."""
    points: list[tuple[int, int, Fraction]] = []
    for rank in problem.allowed_ranks(group[0]).tolist():
        ranks = np.zeros(len(problem.names), dtype=np.int64)
        ranks[list(group)] = rank
        cost = problem.cost_at(group, rank)
        # Single ranks are compared with what the least ranks leave, others with the whole budget.
        left = problem.spendable
        if problem.concave_unit_steps:
            left += points[0][1] - problem.cost_of(problem.lower) if points else 0
        if not points or cost <= left:
            points.append((rank, cost, problem.value_of(ranks)))
    return points


def _on_the_line(a: tuple[int, int, Fraction], b: tuple[int, int, Fraction], cost: int) -> Fraction:
    return a[2] + (b[2] - a[2]) * Fraction(cost - a[1], b[1] - a[1])


@given(instances(layers=3, ranks=6), st.integers(0, 3))
def test_no_option_is_above_the_hull_and_its_corners_are_options(instance: Instance, spare: int):
    problem = instance.problem().with_budget(instance.budget + spare)
    hulls = concave_hulls(problem)
    error = Fraction(hulls.error)
    assert np.all(np.diff(hulls.variables) >= 0)
    for v, group in enumerate(problem.variables):
        points = {point[0]: point for point in _points(problem, group)}
        own = np.flatnonzero(hulls.variables == v)
        corners = [int(points[min(points)][0]), *hulls.high[own].tolist()]
        assert hulls.low[own].tolist() == corners[:-1]
        assert corners == sorted(set(corners))
        for n, high in zip(own.tolist(), corners[1:], strict=True):
            low = int(hulls.low[n])
            gain = points[high][2] - points[low][2]
            assert abs(Fraction(float(hulls.gains[n])) - gain) <= error
            for rank, cost, value in points.values():
                if low < rank < high:
                    assert value <= _on_the_line(points[low], points[high], cost) + error
        assert corners[-1] == max(points)  # the dearest option is a corner, even if it loses
        for a, b, c in zip(corners, corners[1:], corners[2:], strict=False):
            # Each corner is above the line between its neighbours, to rounding.
            line = _on_the_line(points[a], points[c], points[b][1])
            assert points[b][2] >= line - 2 * error


def test_single_ranks_of_descending_gain_are_their_own_steps():
    problem = Problem({"q": [3.0, 2.0, 1.0], "v": [2.0, 0.0]}, 3, min_rank={"q": 1})
    hulls = concave_hulls(problem)
    assert hulls.variables.tolist() == [0, 0, 1, 1]
    assert hulls.low.tolist() == [1, 2, 0, 1]
    assert hulls.high.tolist() == [2, 3, 1, 2]
    assert hulls.gains.tolist() == [4.0, 1.0, 4.0, 0.0]
    assert hulls.error == 0


def test_by_hand():
    # Costs 5 + 2 r: the hull goes from 0 over rank 2 to rank 4; 1 and 3 are below it.
    curves = GainCurves.from_increments({"a": [1.0, 8.0, -1.0, 3.0], "b": [2.0, 2.0]})
    problem = Problem(curves, 99, costs=[2, 3], fixed_costs=[5, 0])
    hulls = concave_hulls(problem)
    # Points on one line may stay: they do no harm.
    assert hulls.variables.tolist() == [0, 0, 1, 1]
    assert hulls.low.tolist() == [0, 2, 0, 1]
    assert hulls.high.tolist() == [2, 4, 1, 2]
    assert hulls.gains.tolist() == [9.0, 2.0, 2.0, 2.0]
    assert 0 < hulls.error < 1e-12


def test_many_points_below_at_once():
    values = [0.0, -5.0, -4.0, -9.0, -1.0, -2.0, 6.0, 5.0, 4.0, 5.0]
    problem = Problem(GainCurves({"a": values}), 9)
    hulls = concave_hulls(problem)
    assert (hulls.low.tolist(), hulls.high.tolist()) == ([0, 6], [6, 9])
    assert hulls.gains.tolist() == [6.0, -1.0]


def test_tied_layers_are_one_variable():
    problem = Problem([[3.0, 1.0], [2.0, 1.0], [1.0]], 9, costs=[1, 2, 3], tied=[["0", "1"]])
    hulls = concave_hulls(problem)
    assert problem.variables == [(0, 1), (2,)]
    assert hulls.variables.tolist() == [0, 0, 1]
    assert hulls.gains.tolist() == [13.0, 2.0, 1.0]


def test_the_error_counts_every_variable():
    curves = GainCurves.from_increments({"a": [0.1, 0.3], "b": [0.7, 0.9]})
    both = concave_hulls(Problem(curves, 9)).error
    alone = GainCurves.from_increments({"a": [0.1, 0.3]})
    first = concave_hulls(Problem(alone, 9)).error
    assert both > first > 0
    # 4 x magnitude x (ranks + layers + 8) units in the last place
    assert first == pytest.approx(4 * 0.4 * 11 * 2.0**-52, rel=1e-12)


@pytest.mark.parametrize("exponent", [-1070, -1022, -960, 0, 900])
def test_slopes_of_any_size(exponent: int):
    # In a cost of 2^53 the slopes of small gains are subnormal, or nothing at all.
    gains = np.ldexp([1.0, 2.0, 3.0, 1.0], exponent)
    curves = GainCurves.from_increments({"a": gains, "b": [2.0 ** max(exponent, -959)]})
    hulls = concave_hulls(Problem(curves, 1 << 60, costs=[2**53, 1]))
    assert hulls.low.tolist() == [0, 3, 0]
    assert hulls.gains.tolist() == [
        float(np.ldexp(6.0, exponent)),
        float(gains[3]),
        2.0 ** max(exponent, -959),
    ]


def test_single_ranks_beyond_the_budget_are_left_out():
    problem = Problem({"q": [3.0, 2.0, 1.0], "v": [2.0, 1.0]}, 12, costs=[3, 9], min_rank={"q": 1})
    hulls = concave_hulls(problem)
    assert (hulls.variables.tolist(), hulls.high.tolist()) == ([0, 0, 1], [2, 3, 1])
    hulls = concave_hulls(problem.with_budget(11))
    assert (hulls.variables.tolist(), hulls.high.tolist()) == ([0, 0], [2, 3])


def test_options_beyond_the_budget_are_left_out():
    curves = GainCurves.from_increments({"a": [1.0, 2.0, 9.0], "b": [1.0, 2.0]})
    hulls = concave_hulls(Problem(curves, 5, costs=[2, 9]))
    assert (hulls.variables.tolist(), hulls.high.tolist()) == ([0], [2])


@pytest.mark.parametrize("keywords", [{}, {"multiple_of": 2}])
def test_no_layers(keywords):
    hulls = concave_hulls(Problem({}, 5, **keywords))
    assert (len(hulls.gains), len(hulls.variables), hulls.error) == (0, 0, 0.0)


def test_select():
    curves = GainCurves.from_increments({"a": [1.0, 2.0, -1.0], "b": [-1.0, -2.0]})
    hulls = concave_hulls(Problem(curves, 9))
    kept = hulls.select(hulls.gains > 0)
    assert kept.variables.tolist() == [0]
    assert (kept.low.tolist(), kept.high.tolist(), kept.gains.tolist()) == ([0], [2], [3.0])
    assert kept.error == hulls.error > 0
