"""Prices in fixed point."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc.solvers.core import Price

positive = st.floats(1e-300, 1e300)


@given(positive, positive, st.integers(-1074, 900))
def test_penalties_fit_and_bits_are_kept_where_they_can_be(price, reach, last_bit):
    fixed = Price.of(price, reach, last_bit)
    assert fixed.units >= 1
    # No penalty reaches 2^58 units.
    assert math.ldexp(reach, -fixed.exponent) <= 2.0**58 if fixed.exponent > -1000 else True
    if fixed.units < 2**59 and fixed.exponent <= math.frexp(price)[1] - 53:
        assert fixed.holds(price)
        assert fixed.value == price


@given(positive, positive)
def test_a_unit_holds_the_bits_of_gains_where_it_can(price, reach):
    last_bit = math.frexp(price)[1] - 55
    fixed = Price.of(price, min(reach, price), last_bit)
    assert fixed.exponent <= last_bit
    assert fixed.holds(price)


@given(positive, positive, st.integers(-1074, 900))
def test_a_coarser_price_is_held_in_the_end(price, reach, last_bit):
    fixed = Price.of(price, reach, last_bit)
    if fixed.holds(price):
        return
    for _ in range(64):
        price = fixed.coarser()
        if price == 0:  # not a bit of it can be held
            return
        assert price <= fixed.value
        fixed = Price.of(price, reach, last_bit)
        if fixed.holds(price):
            return
    pytest.fail("no price is ever held")


def test_no_reach_at_all():
    fixed = Price.of(3.0, 0.0, 1024)
    assert fixed.holds(3.0)
    assert Price.of(0.1, 0.0, -60).value == 0.1
