"""Exact sums, directed rounding and fixed point, against Python's fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc.arithmetic import exact_sum, last_bit, round_down, round_up, to_fixed

finite = st.floats(allow_nan=False, allow_infinity=False)
LARGEST = math.nextafter(math.inf, 0.0)
fractions = st.one_of(
    st.fractions(),
    st.builds(lambda n, e: Fraction(n) * Fraction(2) ** e, st.integers(), st.integers(-1200, 1000)),
)


@given(st.lists(finite, max_size=30))
def test_exact_sum_is_the_sum_of_fractions(values):
    assert exact_sum(np.array(values)) == sum(map(Fraction, values), Fraction(0))


@pytest.mark.parametrize("value", [5e-324, LARGEST, -LARGEST, 1.5, -3.0, 2.0**-1030])
def test_exact_sum_of_many_chunks(value):
    count = (1 << 20) + 3
    assert exact_sum(np.full(count, value)) == count * Fraction(value)


def test_exact_sum_keeps_what_doubles_lose():
    values = np.array([1e300, 1.0, -1e300, 1e-300])
    assert exact_sum(values) == 1 + Fraction(1e-300)


@given(fractions)
def test_rounding_down_gives_the_largest_double_not_above(value):
    low = round_down(value)
    assert low == -math.inf or Fraction(low) <= value
    above = math.nextafter(low, math.inf)
    assert math.isinf(above) or Fraction(above) > value


@given(fractions)
def test_rounding_up_gives_the_smallest_double_not_below(value):
    high = round_up(value)
    assert high == math.inf or Fraction(high) >= value
    below = math.nextafter(high, -math.inf)
    assert math.isinf(below) or Fraction(below) < value


@given(finite)
def test_a_double_is_not_rounded(value):
    assert round_down(Fraction(value)) == round_up(Fraction(value)) == value


def test_zero_is_never_negative():
    assert math.copysign(1.0, round_up(Fraction(0))) == 1.0
    assert math.copysign(1.0, round_down(Fraction(0))) == 1.0


def test_what_no_double_reaches_is_rounded_outwards():
    beyond = Fraction(2) ** 2000
    assert (round_down(beyond), round_up(beyond)) == (LARGEST, math.inf)
    assert (round_down(-beyond), round_up(-beyond)) == (-math.inf, -LARGEST)


@given(st.lists(finite, min_size=1, max_size=8))
def test_last_bit_divides_all_values_and_is_the_greatest(values):
    exponent = last_bit(np.array(values))
    unit = Fraction(2) ** exponent
    assert all((Fraction(v) / unit).denominator == 1 for v in values)
    if any(values):
        assert any((Fraction(v) / (2 * unit)).denominator != 1 for v in values)
    else:
        assert exponent == 1024


@given(st.lists(finite, min_size=1, max_size=8), st.integers(-1100, 1000))
def test_fixed_point_is_the_floor_modulo_2_64(values, exponent):
    fixed, exact = to_fixed(np.array(values), exponent)
    scaled = [Fraction(v) / Fraction(2) ** exponent for v in values]
    assert [int(f) % 2**64 for f in fixed] == [math.floor(s) % 2**64 for s in scaled]
    assert exact == all(s.denominator == 1 for s in scaled)


def test_differences_of_wrapped_fixed_points_are_exact():
    values = np.array([2.0**80 + 2.0**40, 2.0**80])
    fixed, exact = to_fixed(values, 0)
    assert exact
    assert int(fixed[0] - fixed[1]) == 2**40
