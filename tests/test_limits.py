"""Which ranks a layer may take: bounds, multiples, lists and ties, and what is refused."""

import re

import numpy as np
import pytest

from lorambo_alloc import Problem, solve
from lorambo_alloc.testing import brute_force
from tests.checks import check_optimum

SPECTRA = {"a": [3.0, 2.0, 1.0], "b": [2.5, 0.5]}


def ranks_of(problem: Problem) -> list[list[int]]:
    return [problem.allowed_ranks(i).tolist() for i in range(len(problem.names))]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [[0, 1, 2, 3], [0, 1, 2]]),
        ({"min_rank": 1}, [[1, 2, 3], [1, 2]]),
        ({"min_rank": {"a": 2}}, [[2, 3], [0, 1, 2]]),
        ({"min_rank": None}, [[0, 1, 2, 3], [0, 1, 2]]),
        ({"max_rank": 2}, [[0, 1, 2], [0, 1, 2]]),
        ({"max_rank": 0}, [[0], [0]]),
        ({"max_rank": 10**30}, [[0, 1, 2, 3], [0, 1, 2]]),
        ({"max_rank": {"b": 1}}, [[0, 1, 2, 3], [0, 1]]),
        ({"max_rank": {"b": 10**30}}, [[0, 1, 2, 3], [0, 1, 2]]),
        ({"min_rank": 1, "max_rank": 1}, [[1], [1]]),
        ({"multiple_of": 2}, [[0, 2], [0, 2]]),
        ({"multiple_of": 2, "min_rank": 1}, [[2], [2]]),
        ({"multiple_of": 3}, [[0, 3], [0]]),
        ({"multiple_of": 10**30}, [[0], [0]]),
        ({"multiple_of": 2.0}, [[0, 2], [0, 2]]),
        ({"allowed_ranks": [2, 1, 1]}, [[1, 2], [1, 2]]),
        ({"allowed_ranks": (0, 2, 3, 99)}, [[0, 2, 3], [0, 2]]),
        ({"allowed_ranks": np.array([0, 2])}, [[0, 2], [0, 2]]),
        ({"allowed_ranks": {"a": [0, 3, 10**30]}}, [[0, 3], [0, 1, 2]]),
        ({"allowed_ranks": [0, 1, 2], "multiple_of": 2}, [[0, 2], [0, 2]]),
        ({"allowed_ranks": [0, 1, 2], "max_rank": 1}, [[0, 1], [0, 1]]),
        ({"allowed_ranks": [0, 1, 2], "min_rank": {"a": 1}}, [[1, 2], [0, 1, 2]]),
        ({"tied": [["a", "b"]]}, [[0, 1, 2], [0, 1, 2]]),
        ({"tied": [["a", "b"]], "min_rank": {"b": 1}}, [[1, 2], [1, 2]]),
        ({"tied": [["a", "b"]], "max_rank": {"a": 1}}, [[0, 1], [0, 1]]),
        ({"tied": [["a", "b"]], "allowed_ranks": {"a": [0, 2, 3]}}, [[0, 2], [0, 2]]),
        ({"tied": [["b", "a"]], "allowed_ranks": {"a": [0, 2], "b": [1, 2]}}, [[2], [2]]),
        ({"tied": [["a"], []]}, [[0, 1, 2, 3], [0, 1, 2]]),
        ({"tied": iter([iter(["a", "b"])])}, [[0, 1, 2], [0, 1, 2]]),
    ],
)
def test_what_is_allowed(limits, expected):
    problem = Problem(SPECTRA, 100, **limits)
    assert ranks_of(problem) == expected
    assert problem.lower.tolist() == [ranks[0] for ranks in expected]
    assert problem.upper.tolist() == [ranks[-1] for ranks in expected]
    check_optimum(solve(problem), brute_force(problem)[0])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"min_rank": -1}, "min_rank: expected a whole number >= 0, got -1"),
        ({"min_rank": 1.5}, "min_rank: expected a whole number >= 0, got 1.5"),
        ({"min_rank": "1"}, "min_rank: expected a whole number >= 0, got '1'"),
        ({"min_rank": True}, "min_rank: expected a whole number >= 0, got True"),
        ({"min_rank": [1, 1]}, "min_rank: expected a whole number >= 0, got [1, 1]"),
        ({"min_rank": {"b": -1}}, "min_rank: layer 'b': expected a whole number >= 0, got -1"),
        ({"min_rank": {"z": 1}}, "min_rank: layer 'z' is not among the spectra"),
        (
            {"min_rank": 3},
            "min_rank: layer 'b': expected at most 2, the ranks its curve has, got 3",
        ),
        (
            {"min_rank": 10**30},
            "min_rank: layer 'a': expected at most 3, the ranks its curve has, got",
        ),
        ({"min_rank": 2, "max_rank": 1}, "layer 'a': min_rank 2 is above max_rank 1"),
        ({"min_rank": {"b": 2}, "max_rank": {"b": 1}}, "layer 'b': min_rank 2 is above max_rank 1"),
        ({"max_rank": -1}, "max_rank: expected a whole number >= 0, got -1"),
        ({"max_rank": {"b": 0.5}}, "max_rank: layer 'b': expected a whole number >= 0, got 0.5"),
        (
            {"max_rank": {"b": False}},
            "max_rank: layer 'b': expected a whole number >= 0, got False",
        ),
        ({"max_rank": {"z": 1}}, "max_rank: layer 'z' is not among the spectra"),
        ({"max_rank": float("nan")}, "max_rank: expected a whole number >= 0, got nan"),
        ({"multiple_of": 0}, "multiple_of: expected a whole number >= 1, got 0"),
        ({"multiple_of": 2.5}, "multiple_of: expected a whole number >= 1, got 2.5"),
        ({"multiple_of": None}, "multiple_of: expected a whole number >= 1, got None"),
        ({"multiple_of": "8"}, "multiple_of: expected a whole number >= 1, got '8'"),
        ({"allowed_ranks": 5}, "allowed_ranks: layer 'a': expected a list of ranks, got 5"),
        ({"allowed_ranks": {"b": 5}}, "allowed_ranks: layer 'b': expected a list of ranks, got 5"),
        ({"allowed_ranks": {"z": [1]}}, "allowed_ranks: layer 'z' is not among the spectra"),
        (
            {"allowed_ranks": {"b": [1, -1]}},
            "allowed_ranks: layer 'b': expected a whole number >= 0, got -1",
        ),
        (
            {"allowed_ranks": [0, 0.5]},
            "allowed_ranks: layer 'a': expected a whole number >= 0, got 0.5",
        ),
        (
            {"allowed_ranks": ["1"]},
            "allowed_ranks: layer 'a': expected a whole number >= 0, got '1'",
        ),
        ({"allowed_ranks": []}, "layer 'a': no rank satisfies min_rank, max_rank, multiple_of,"),
        ({"allowed_ranks": {"b": []}}, "layer 'b': no rank satisfies"),
        ({"allowed_ranks": [3]}, "layer 'b': no rank satisfies"),
        ({"allowed_ranks": [1], "multiple_of": 2}, "layer 'a': no rank satisfies"),
        ({"allowed_ranks": [0, 1], "min_rank": {"b": 2}}, "layer 'b': no rank satisfies"),
        ({"min_rank": 1, "multiple_of": 4}, "layer 'a': no rank satisfies"),
        ({"min_rank": {"b": 1}, "multiple_of": 3}, "layer 'b': no rank satisfies"),
        ({"tied": [["a", "b"]], "min_rank": {"a": 3}}, "layer 'a': no rank satisfies"),
        (
            {"tied": [["a", "b"]], "allowed_ranks": {"a": [0, 2], "b": [1]}},
            "layer 'a': no rank satisfies",
        ),
        ({"tied": [["a", "z"]]}, "tied: layer 'z' is not among the spectra"),
        ({"tied": [["a", "a"]]}, "tied: layer 'a' appears twice"),
        ({"tied": [["a", "b"], ["b"]]}, "tied: layer 'b' appears twice"),
        ({"tied": "ab"}, "tied: expected groups of layer names, got 'ab'"),
        ({"tied": ["ab"]}, "tied: expected groups of layer names, got 'ab'"),
        ({"tied": 5}, "tied: expected groups of layer names, got 5"),
        ({"tied": [5]}, "tied: expected groups of layer names, got 5"),
        ({"tied": None}, "tied: expected groups of layer names, got None"),
        ({"tied": [["a", ["b"]]]}, "tied: layer ['b'] is not among the spectra"),
        ({"tied": [["a", 1]]}, "tied: layer 1 is not among the spectra"),
    ],
)
def test_what_is_no_limit(limits, expected):
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        Problem(SPECTRA, 100, **limits)


def test_tied_names():
    problem = Problem({**SPECTRA, "c": [1.0]}, 9, tied=[["c", "a"], ["b"]])
    assert problem.tied == (("c", "a"),)
    assert problem.variables == [(1,), (2, 0)]


def test_lists_reach_through_ties():
    problem = Problem(SPECTRA, 9, tied=[["a", "b"]], allowed_ranks={"a": [0, 1]})
    assert ranks_of(problem) == [[0, 1], [0, 1]]
