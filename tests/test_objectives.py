"""Objectives: gains, and what is refused."""

import math
import re
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import Objective, allocate, log, schatten
from lorambo_alloc.objectives import parse_objective, positive_number, real_number

SIGMA = np.array([1e3, 7.0, 1.0, 0.3, 1e-9, 0.0])


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("frobenius", SIGMA * SIGMA),
        ("nuclear", SIGMA),
        (schatten(2), SIGMA * SIGMA),
        (schatten(1), SIGMA),
        (schatten(3), SIGMA**3),
        (schatten(0.5), np.sqrt(SIGMA)),
    ],
)
def test_powers(objective, expected):
    assert parse_objective(objective).gains(SIGMA) == pytest.approx(expected, rel=1e-15)


def _log_gain(sigma: float, noise: float) -> Decimal:
    with localcontext(prec=80):
        power = Decimal(sigma) ** 2 / Decimal(noise)
        return ((1 + power).ln() if power > Decimal("1e-40") else power) / 2


@given(
    st.floats(1e-140, 1e180),
    st.one_of(st.floats(1e-3, 1e3), st.floats(1e-250, 1e-200), st.floats(1e200, 1e250)),
)
def test_log_is_accurate_at_every_scale(sigma, noise):
    found = float(log(noise).gains(np.array([sigma]))[0])
    exact = _log_gain(sigma, noise)
    # Below the normal doubles only the absolute error is bounded.
    assert abs(Decimal(found) - exact) <= Decimal(2.0**-48) * exact + Decimal("1e-300")


def test_log_grows_from_zero_without_a_jump():
    ratio = 2.0**100
    below, at, above = log(1.0).gains(np.array([ratio * (1 - 1e-15), ratio, ratio * (1 + 1e-15)]))
    assert below <= at <= above
    assert above - below < 1e-12
    assert log(1.0).gains(np.array([0.0])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ("frobenius", "frobenius"),
        ("nuclear", "nuclear"),
        ("operator", "operator"),
        (schatten(1.5), "schatten(1.5)"),
        (log(0.25), "log(noise=0.25)"),
    ],
)
def test_names(objective, text):
    assert str(parse_objective(objective)) == text


def test_only_correctly_rounded_products_are_taken_as_monotone():
    assert schatten(1).monotone_in_floats
    assert schatten(2).monotone_in_floats
    assert not schatten(1.5).monotone_in_floats
    assert not log(1.0).monotone_in_floats
    assert not log(2.0).monotone_in_floats


@pytest.mark.parametrize("bad", ["foo", "Frobenius", "", None, 3, 2.0, ["operator"], b"nuclear"])
def test_unknown_objectives_list_the_known_ones(bad):
    known = "expected one of 'frobenius', 'nuclear', 'operator', schatten(p) or log(noise), got "
    with pytest.raises(ValueError, match="objective: " + re.escape(known)):
        allocate({"a": [1.0]}, 1, objective=bad)


NO_POSITIVE_NUMBERS = [
    0, -1.0, math.nan, math.inf, "1", True, np.True_, None, 10**400, 1j, [1.0], np.array([1.0, 2.0])
]  # fmt: skip


@pytest.mark.parametrize("bad", NO_POSITIVE_NUMBERS)
def test_parameters_are_finite_numbers_above_0(bad):
    with pytest.raises(ValueError, match=r"^schatten\(p\): expected a finite number > 0, got "):
        schatten(bad)
    with pytest.raises(ValueError, match=r"^log\(noise\): expected a finite number > 0, got "):
        log(bad)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int8(2), np.float16(2)])
def test_numbers_of_any_type(value):
    assert positive_number(value, "") == 2.0
    assert schatten(value) == schatten(2)


def test_what_is_no_real_number_is_nan():
    assert all(math.isnan(real_number(x)) for x in ("1", True, np.True_, None, 1j, 10**400, [1]))
    assert real_number(-3) == -3.0


def test_kinds():
    with pytest.raises(ValueError, match="objective: unknown kind 'foo'"):
        Objective("foo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'operator' takes no parameter"):
        Objective("operator", 2.0)
    assert Objective("operator") == parse_objective("operator")


@pytest.mark.parametrize(
    ("objective", "sigma", "message"),
    [
        ("frobenius", 1e200, "a gain overflows"),
        (schatten(3), 1e150, "a gain overflows"),
        ("frobenius", 1e-200, "underflows"),
        (schatten(3), 1e-140, "underflows"),
        (log(1e300), 1e-160, "underflows"),
    ],
)
def test_gains_out_of_range_are_refused(objective, sigma, message):
    with pytest.raises(ValueError, match=f"layer 'a'.*{message}"):
        allocate({"a": [sigma]}, 1, objective=objective)


@pytest.mark.parametrize(
    ("objective", "sigma"),
    [
        (log(1.0), 1e200),
        (log(1e-10), 1e300),
        ("nuclear", 1e280),
        ("nuclear", 1e-250),
        ("operator", 1e300),
        ("operator", 5e-324),
        (schatten(0.5), 1e-300),
        (schatten(3), 1e90),
    ],
)
def test_gains_within_range_are_taken(objective, sigma):
    allocation = allocate({"a": [sigma]}, 1, objective=objective)
    assert allocation.ranks.tolist() == [1]
    assert math.isfinite(allocation.value)
