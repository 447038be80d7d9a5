"""Prices in fixed point."""

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc.solvers.core import Price

positive = st.floats(1e-300, 1e300)


def unit(fixed: Price) -> Fraction:
    return Fraction(2) ** fixed.exponent


@given(positive, st.one_of(st.just(0.0), positive), st.integers(-1074, 1024))
def test_penalties_fit(price, reach, last_bit):
    fixed = Price.of(price, reach, last_bit)
    assert Fraction(reach) <= 2**58 * unit(fixed)
    assert 0 <= fixed.units < 2**62
    assert fixed.value == fixed.units * unit(fixed)


@given(positive, st.one_of(st.just(0.0), positive), st.integers(-1074, 1024))
def test_bits_are_held_where_they_can_be(price, reach, last_bit):
    fixed = Price.of(price, reach, last_bit)
    finest = Fraction(2) ** (math.frexp(price)[1] - 53)
    if Fraction(reach) <= 2**57 * finest:
        assert fixed.value == price
        # And the bits of the gains, down to a few below the price's own.
        if Fraction(reach) <= 2**51 * finest and Fraction(2) ** last_bit * 64 >= finest:
            assert unit(fixed) <= Fraction(2) ** last_bit


@given(positive, positive, st.integers(-1074, 1024))
def test_a_price_that_is_not_held_gives_way_to_one_that_is(price, reach, last_bit):
    fixed = Price.of(price, reach, last_bit)
    if fixed.value in (0.0, price):
        return
    # Close to it, to the unit that the reach allows.
    assert abs(Fraction(fixed.value) - Fraction(price)) <= unit(fixed) / 2
    again = Price.of(fixed.value, reach * 1.5, last_bit)
    assert again.value == fixed.value


def test_by_hand():
    assert Price.of(3.0, 0.0, 1024).value == 3.0
    assert Price.of(0.1, 0.0, -60).value == 0.1
    # A reach of 2^60 leaves units of 4 at least: 3 gives way.
    assert Price.of(3.0, 2.0**60, 0).value != 3.0
    assert Price.of(12.0, 2.0**59, 0) == Price(3, 2)
