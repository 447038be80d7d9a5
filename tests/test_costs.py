"""Costs, budgets and one value a layer."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import allocate, uniform_rank
from lorambo_alloc.costs import exact_dot, per_layer, whole_number, whole_numbers

NAMES = ("a", "b")


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int8(3), np.uint64(3), np.float32(3), np.array(3), np.float64(3.0)]
)
def test_whole_numbers_of_any_type(value):
    number = whole_number(value, "here", least=3)
    assert number == 3
    assert type(number) is int


def test_whole_numbers_without_an_upper_end():
    assert whole_number(10**400, "here", least=0) == 10**400
    assert whole_number(1e300, "here", least=0) == int(1e300)


@pytest.mark.parametrize(
    "value",
    [
        *(2, -1, 3.5, math.nan, math.inf, -math.inf, np.float64("nan"), True, np.True_, "3"),
        *(None, [3], 3j, Fraction(7, 2), np.array([3, 4])),
    ],
)
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^here: expected a whole number >= 3, got "):
        whole_number(value, "here", least=3)


def test_one_value_a_layer_by_name_or_in_order():
    def parse(value, where):
        return f"{where} = {value}"

    expected = ["what: layer 'a' = 1", "what: layer 'b' = 2"]
    forms: list[Any] = [{"b": 2, "a": 1}, [1, 2], (1, 2), np.array([1, 2])]
    for form in forms:
        assert per_layer(form, NAMES, "what", parse) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"a": 1}, "what: layer 'b' is missing"),
        ({"b": 1}, "what: layer 'a' is missing"),
        ({"a": 1, "b": 2, "c": 3}, "what: layer 'c' is not among the spectra"),
        ({"a": 1, "c": 3}, "what: layer 'c' is not among the spectra"),
        ([1], "what: expected 2 values, got 1"),
        ([1, 2, 3], "what: expected 2 values, got 3"),
        (5, "what: expected one value per layer, by name or in order, got 5"),
        ("ab", "what: expected one value per layer, by name or in order, got 'ab'"),
        ({1, 2}, "what: expected one value per layer, by name or in order, got {1, 2}"),
        (iter([1, 2]), "what: expected one value per layer, by name or in order, got <list_it"),
        (
            {"a": 1, "b": 2**53 + 1},
            r"what: layer 'b': expected at most 2\^53, got 9007199254740993",
        ),
        ({"a": 1, "b": -1}, "what: layer 'b': expected a whole number >= 0, got -1"),
    ],
)
def test_values_that_are_not_one_a_layer(values, expected):
    with pytest.raises(ValueError, match=expected):
        whole_numbers(values, NAMES, "what", 0)


def test_whole_numbers_are_64_bit_and_reach_2_53():
    numbers = whole_numbers({"a": 0, "b": 2**53}, NAMES, "what", 0)
    assert numbers.dtype == np.int64
    assert numbers.tolist() == [0, 2**53]


whole = st.integers(0, 2**53)


@given(st.lists(st.tuples(whole, whole), max_size=20))
def test_exact_dot(pairs):
    a, b = (np.array([p[k] for p in pairs], dtype=np.int64) for k in (0, 1))
    assert exact_dot(a, b) == sum(x * y for x, y in pairs)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_exact_dot_around_the_end_of_64_bits(count):
    a = np.full(count, 2**31, dtype=np.int64)
    b = np.full(count, 2**30 - 1, dtype=np.int64)
    assert exact_dot(a, b) == count * 2**31 * (2**30 - 1)


@pytest.mark.parametrize("rank", [0, 1, 2, 7, np.int64(2), 2.0])
def test_uniform_rank_costs_what_uniform_ranks_would(rank):
    spectra = {"a": np.arange(9, 0, -1.0), "b": np.arange(9, 0, -1.0)}
    allocation = allocate(spectra, uniform_rank(rank), costs=[3, 5], fixed_costs=[10, 20])
    assert allocation.budget == (8 * int(rank) + 30 if rank else 0)
    ranks = np.full(2, int(rank))
    assert allocation.problem.cost_of(ranks) == allocation.budget
    allocation.problem.check(ranks)


def test_uniform_rank_charges_layers_whose_spectrum_is_shorter():
    assert allocate({"a": [1.0], "b": [3.0, 2.0]}, uniform_rank(2)).budget == 4


def test_uniform_rank_of_no_layers():
    assert allocate({}, uniform_rank(3)).budget == 0


@pytest.mark.parametrize("rank", [-1, 1.5, float("nan"), "2", None, True])
def test_uniform_rank_refuses(rank):
    with pytest.raises(ValueError, match=r"^uniform_rank: expected a whole number >= 0, got "):
        uniform_rank(rank)
