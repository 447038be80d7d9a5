"""Bounds on optima, scales, and regrets in rationals."""

from fractions import Fraction

import numpy as np
import pytest

from lorambo_alloc import GainCurves, Problem, allocate
from lorambo_alloc.baselines import certified
from lorambo_alloc.regret import exact_regrets, optimum_bounds, scales_of


def test_bounds_of_what_is_proved_and_of_what_is_not():
    curves = GainCurves.from_increments({"a": [1.0], "b": [2.0**-60]})
    value = 1 + Fraction(2) ** -60
    assert optimum_bounds(allocate(curves, 2)) == (value, value)
    open_ended = certified(Problem({"a": [3.0, 2.0], "b": [2.5]}, 2), np.array([2, 0]), "mine")
    assert optimum_bounds(open_ended) == (13, Fraction(open_ended.certificate.upper_bound))
    assert open_ended.certificate.upper_bound >= 15.25


def test_scales():
    own = [allocate({"a": [3.0]}, 1), allocate({"a": [2.0]}, 1)]
    assert scales_of(own, relative=False) == [1.0, 1.0]
    assert scales_of(own, relative=True) == [9.0, 4.0]
    own.append(allocate({"a": [0.0]}, 1))
    assert scales_of(own, relative=False) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"value is above 0, got 0\.0 in samples\[2\]$"):
        scales_of(own, relative=True)


def test_regrets_are_exact():
    problems = [Problem({"a": [0.1, 0.1]}, 2, objective="nuclear"), Problem({"a": [3.0, 1.0]}, 2)]
    optima = [(Fraction(0), Fraction(1)), (Fraction(5), Fraction(10))]
    regrets = exact_regrets(problems, optima, [1.0, 4.0], np.array([1]))
    assert regrets == [1 - Fraction(0.1), Fraction(1, 4)]
