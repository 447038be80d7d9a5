"""A caller's own function."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lorambo_alloc.submodular import Cardinality, Function, select


def test_each_set_is_asked_about_once():
    asked = []
    f = Function(3, lambda s: asked.append(s) or len(s))
    state = f.start()
    assert state.gains().tolist() == [1, 1, 1]
    assert state.gains(np.array([2])).tolist() == [1]
    state.add(1)
    assert state.gains().tolist() == [1, 0, 1]
    assert f.value([1]) == 1
    assert len(asked) == len(set(asked)) == f.evaluations == 6
    assert not f.incremental


def test_what_a_caller_claims():
    assert Function(2, len).kind == "submodular"
    assert Function(2, len, submodular=False).kind == "weakly submodular"


def test_without_submodularity_only_the_whole_is_a_bound():
    f = Function(3, lambda s: len(s) ** 2, submodular=False)
    assert [(base, w.tolist()) for base, w in f.ceilings([0], Cardinality(1))] == [(9.0, [0, 0, 0])]
    base, weights = f.sketch(f.start())
    assert (base, weights.tolist()) == (9.0, [0, 0, 0])


def test_with_submodularity_both_are():
    f = Function(3, lambda s: min(len(s), 2))
    (whole, nothing), (base, weights) = f.ceilings([0], Cardinality(1))
    assert (whole, nothing.tolist()) == (2.0, [0, 0, 0])
    assert base == 1.0
    assert weights == pytest.approx([0, 1, 1], rel=1e-15)
    assert (weights >= [0, 1, 1]).all()


def test_a_negative_gain_is_no_weight():
    f = Function(2, lambda s: {0: 0, 1: 1, 2: 0}[len(s)])
    assert f.ceilings([0], Cardinality(1))[1][1].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", None, True, 1j])
def test_what_is_no_value(bad):
    f = Function(2, lambda s: bad if s == {1} else 0)
    with pytest.raises(ValueError, match=r"^f\(\[1\]\): expected a finite number, got "):
        f.value([1])


def test_numbers_of_any_real_type():
    f = Function(1, lambda s: Fraction(len(s), 2))
    assert f.value([0]) == 0.5


def test_the_empty_set_is_worth_nothing():
    with pytest.raises(ValueError, match=r"^f\(frozenset\(\)\): expected 0, got 1.0$"):
        Function(2, lambda s: 1 + len(s))
    with pytest.raises(ValueError, match=r"^n: expected a whole number >= 0, got -1$"):
        Function(-1, len)


def test_what_is_no_function():
    with pytest.raises(ValueError, match=r"^f: expected a function of a frozenset, got 5$"):
        Function(2, 5)  # pyright: ignore[reportArgumentType]


def test_values_near_the_largest_double():
    f = Function(3, lambda s: 1e308 * bool(s))
    selection = select(f, budget=2)
    assert selection.value == 1e308
    assert selection.upper_bound == pytest.approx(1e308, rel=1e-14)
