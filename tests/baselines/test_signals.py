"""What the rules look at: stand-ins from the gains, and the caller's own numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, Spectra
from lorambo_alloc.baselines.signals import (
    mean_gains,
    parse_importance,
    parse_scores,
    single_gains,
    variance_ratios,
    whole_gains,
)
from tests.strategies import examples, instances

PROBLEM = Problem({"a": [3.0, 2.0], "b": [1.0]}, 1)


def as_lists(rows):
    return [row.tolist() for row in rows]


def test_single_gains():
    values = {"a": [3.0, 2.0], "b": [1.0]}
    weights = [2.0, 5.0]
    assert as_lists(single_gains(PROBLEM)) == [[9.0, 4.0], [1.0]]
    assert as_lists(single_gains(Problem(values, 1, weights=weights))) == [[18.0, 8.0], [5.0]]
    nuclear = Problem(values, 1, objective="nuclear")
    assert as_lists(single_gains(nuclear)) == [[3.0, 2.0], [1.0]]
    operator = Problem(values, 1, objective="operator")
    assert as_lists(single_gains(operator)) == [[3.0, 2.0], [1.0]]
    operator = Problem(values, 1, objective="operator", weights=weights)
    assert as_lists(single_gains(operator)) == [[6.0, 4.0], [5.0]]


def test_single_gains_of_curves_whose_increments_are_no_doubles():
    curves = GainCurves({"a": [0.0, 1.0, 1e-30], "b": [0.0, 0.25]})
    problem = Problem(curves, 1, weights=[2.0, 4.0])
    assert problem.gains is None
    assert as_lists(single_gains(problem)) == [[2.0, 2e-30 - 2.0], [1.0]]


def test_mean_and_whole_gains_are_relative_to_the_largest():
    curves = GainCurves.from_increments({"a": [8.0, 2.0], "b": [3.0] * 4, "c": [-1.0, -1.0]})
    problem = Problem(curves, 1)
    assert mean_gains(problem).tolist() == [1.0, 0.6, 0.0]
    assert whole_gains(problem).tolist() == pytest.approx([10 / 12, 1.0, 0.0])


def test_layers_without_gains():
    problem = Problem(GainCurves({"a": [0.0], "b": [0.0, 0.0]}), 1)
    assert mean_gains(problem).tolist() == [0.0, 0.0]
    assert whole_gains(problem).tolist() == [0.0, 0.0]
    assert as_lists(variance_ratios(problem)) == [[], [0.0]]
    nothing = Problem({}, 0)
    assert mean_gains(nothing).tolist() == whole_gains(nothing).tolist() == []
    assert variance_ratios(nothing) == []


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_scales_change_nothing(scale):
    spectra = {"a": [3.0 * scale, 2.0 * scale], "b": [1.0 * scale]}
    problem = Problem(spectra, 1, objective="operator")
    assert mean_gains(problem).tolist() == pytest.approx([1.0, 0.4])
    assert whole_gains(problem).tolist() == pytest.approx([1.0, 0.2])
    ratios = variance_ratios(problem)
    assert ratios[0].tolist() == pytest.approx([9 / 13, 4 / 13])
    assert ratios[1].tolist() == [1.0]


def test_the_greatest_singular_values_do_not_overflow():
    top = float(np.finfo(np.float64).max)
    problem = Problem({"a": [top, top], "b": [top]}, 1, objective="operator")
    assert whole_gains(problem).tolist() == [1.0, 0.5]
    assert mean_gains(problem).tolist() == [1.0, 1.0]
    assert as_lists(variance_ratios(problem)) == [[0.5, 0.5], [1.0]]


def test_variance_ratios_of_spectra():
    spectra = Spectra({"a": [2.0, 1.0], "b": [0.0, 0.0], "c": [1e-200]}, unresolved={"a": 3.0})
    rows = variance_ratios(Problem(spectra, 1))
    assert rows[0].tolist() == pytest.approx([0.5, 0.125])
    assert rows[1].tolist() == [0.0, 0.0]
    assert rows[2].tolist() == [1.0]
    spectra = Spectra({"a": [1.0], "c": [1e-200]}, unresolved={"c": 1e300})
    assert as_lists(variance_ratios(Problem(spectra, 1))) == [[1.0], [0.0]]


def test_variance_ratios_of_gain_curves():
    curves = GainCurves.from_increments({"a": [3.0, -5.0, 1.0], "b": [-1.0, -2.0]})
    assert as_lists(variance_ratios(Problem(curves, 1))) == [[0.75, 0.0, 0.25], [0.0, 0.0]]


@settings(max_examples=examples(1))
@given(st.one_of(instances(), instances(objective="operator")))
def test_stand_ins_are_shares(instance):
    problem = instance.problem()
    for row in variance_ratios(problem):
        assert np.all((row >= 0) & (row <= 1))
        assert row.sum() == pytest.approx(1.0) or not row.any()
    for values in (mean_gains(problem), whole_gains(problem)):
        assert np.all((values >= 0) & (values <= 1))
        assert values.max() == 1.0 or not values.any()


@pytest.mark.parametrize(
    "scores",
    [
        {"b": [7.0], "a": [1.0, 2.0]},
        {"b": np.array([7]), "a": (1, 2)},
        [[1.0, 2.0], [7.0]],
    ],
)
def test_scores_by_name_or_in_order(scores):
    assert as_lists(parse_scores(scores, PROBLEM, "scores")) == [[1.0, 2.0], [7.0]]


def test_scores_as_a_table():
    rows = parse_scores(np.array([[1.0, 2.0], [7.0, 8.0]]), PROBLEM, "scores")
    assert as_lists(rows) == [[1.0, 2.0], [7.0, 8.0]]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"a": [1.0]}, "^scores: layer 'b' is missing$"),
        ({"a": [1.0], "b": [1.0], "c": [1.0]}, "^scores: layer 'c' is not among the spectra$"),
        ([[1.0]], "^scores: expected 2 sequences, got 1$"),
        ({"a": [1.0], "b": []}, "^layer 'b': expected a non-empty sequence of scores, got one"),
        (
            {"a": [1.0, math.nan], "b": [1.0]},
            "^layer 'a': expected a sequence of scores of finite numbers, got nan at index 1",
        ),
        ({"a": ["x"], "b": [1.0]}, "^layer 'a': expected a 1-D sequence of scores of real numbers"),
        (5, "^the scores: expected a mapping of layer name to 1-D array, a sequence of 1-D arrays"),
    ],
)
def test_scores_that_are_none(scores, expected):
    with pytest.raises(ValueError, match=expected):
        parse_scores(scores, PROBLEM, "scores")


def test_importance_is_relative_to_the_largest():
    assert parse_importance({"b": 1, "a": 4}, PROBLEM, "x").tolist() == [1.0, 0.25]
    assert parse_importance([0.0, 0.0], PROBLEM, "x").tolist() == [0.0, 0.0]
    tiny = parse_importance([5e-324, 1e-323], PROBLEM, "x")
    assert tiny.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ({"a": 1.0}, "^x: layer 'b' is missing$"),
        ([1.0], "^x: expected 2 values, got 1$"),
        ([1.0, math.nan], "^x: layer 'b': expected a finite number >= 0, got nan$"),
        ([math.inf, 1.0], "^x: layer 'a': expected a finite number >= 0, got inf$"),
        ([-0.5, 1.0], "^x: layer 'a': expected a finite number >= 0, got -0.5$"),
        (["1", 1.0], "^x: layer 'a': expected a finite number >= 0, got '1'$"),
    ],
)
def test_importance_that_is_none(importance, expected):
    with pytest.raises(ValueError, match=expected):
        parse_importance(importance, PROBLEM, "x")
