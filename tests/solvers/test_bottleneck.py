"""The operator norm: the least threshold, then the next largest value, and so on."""

from typing import Any

import numpy as np
import pytest

from lorambo_alloc import Problem, allocate, solve
from lorambo_alloc.testing import brute_force_bottleneck
from tests.checks import check_answer


def tails_of(problem: Problem) -> tuple[float, ...]:
    allocation = solve(problem)
    check_answer(allocation)
    return tuple(sorted(problem.tails(allocation.ranks).tolist(), reverse=True))


def test_the_worst_layer_comes_first():
    spectra = {"a": [5.0, 4.0, 1.0], "b": [3.0, 2.0]}
    found = [allocate(spectra, b, objective="operator").ranks.tolist() for b in range(6)]
    assert found == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [3, 2]]


def test_value_is_minus_the_largest_discarded_value():
    allocation = allocate({"a": [5.0, 4.0], "b": [3.0]}, 1, objective="operator")
    assert allocation.value == allocation.certificate.upper_bound == -4.0
    assert allocation.certificate.status == "optimal_exact"
    assert allocation.certificate.price == 0.0


def test_what_is_left_goes_to_the_next_worst():
    # The threshold 3.5 needs two ranks of a; c is too dear, and b takes what is left.
    spectra = {"a": [5.0, 4.0], "b": [3.0, 2.0], "c": [3.5]}
    problem = Problem(spectra, 10, costs=[4, 2, 9], objective="operator")
    assert tails_of(problem) == (3.5, 2.0, 0.0)
    assert solve(problem).ranks.tolist() == [2, 1, 0]


def test_a_layer_that_is_too_dear_is_set_aside():
    spectra = {"a": [5.0], "b": [3.0]}
    problem = Problem(spectra, 10, costs=[100, 2], objective="operator")
    assert solve(problem).ranks.tolist() == [0, 1]


def test_a_rank_that_lowers_nothing_is_not_taken():
    # Equal values: only taking all three lowers what is discarded.
    spectra = {"a": [2.0, 2.0, 2.0], "b": [1.0]}
    assert allocate(spectra, 2, objective="operator").ranks.tolist() == [0, 1]
    assert allocate(spectra, 3, objective="operator").ranks.tolist() == [3, 0]


def test_weights_are_on_the_singular_values():
    spectra = {"a": [5.0], "b": [3.0]}
    problem = Problem(spectra, 1, weights=[1.0, 2.0], objective="operator")
    assert solve(problem).ranks.tolist() == [0, 1]
    assert solve(problem).value == -5.0


@pytest.mark.parametrize(
    "limits",
    [
        {"min_rank": {"b": 1}},
        {"max_rank": {"a": 1}},
        {"multiple_of": 2},
        {"allowed_ranks": {"a": [0, 3], "b": [0, 1]}},
        {"tied": [["a", "b"]]},
        {"tied": [["a", "c"]], "allowed_ranks": {"a": [1, 2]}},
        {"fixed_costs": [3, 5, 0]},
        {"weights": [0.3, 1.7, 0.0]},
    ],
)
def test_limits(limits):
    spectra = {"a": [5.0, 4.0, 1.0], "b": [3.0, 2.5], "c": [4.5, 0.7]}
    for budget in range(40):
        try:
            problem = Problem(spectra, budget, costs=[3, 2, 5], objective="operator", **limits)
        except ValueError:
            continue
        # No two values are equal, so that the whole vector is the best.
        assert tails_of(problem) == brute_force_bottleneck(problem)[0]


def test_tied_layers_are_raised_for_the_worst_of_them():
    spectra = {"a": [5.0, 1.0], "b": [4.0, 3.5, 0.5], "c": [2.0]}
    keywords = {"tied": [["a", "b"]], "objective": "operator"}
    for budget, expected in ((1, [0, 0, 1]), (2, [1, 1, 0]), (3, [1, 1, 1]), (4, [2, 2, 0])):
        assert allocate(spectra, budget, **keywords).ranks.tolist() == expected


def test_a_tied_layer_is_lowered_by_the_others_too():
    # Nothing pays for d. Raising the pair for a lowers b as well; next come a again, and c.
    spectra = {"a": [5.0, 4.0, 3.0], "b": [3.5, 0.5, 0.2], "c": [2.0, 1.0], "d": [5.5]}
    keywords: dict[str, Any] = {"tied": [["a", "b"]], "costs": [1, 1, 1, 50]}
    for budget, expected in (
        (2, [1, 1, 0, 0]),
        (4, [2, 2, 0, 0]),
        (5, [2, 2, 1, 0]),
        (6, [3, 3, 0, 0]),
        (8, [3, 3, 2, 0]),
    ):
        problem = Problem(spectra, budget, objective="operator", **keywords)
        assert solve(problem).ranks.tolist() == expected
        assert tails_of(problem) == brute_force_bottleneck(problem)[0]


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_of_equal_values_the_cheapest_to_lower_goes_first(names):
    costs = dict(zip(names, [5, 2], strict=True))
    problem = Problem({name: [3.0, 1.0] for name in names}, 6, costs=costs, objective="operator")
    # Of 6, the layer of cost 5 would leave nothing for the other.
    assert solve(problem).ranks.tolist() == [0, 2]


def test_no_layers_and_no_values():
    for spectra in ({}, {"a": [0.0, 0.0]}, {"a": [2.0]}):
        allocation = solve(Problem(spectra, 3, objective="operator"))
        check_answer(allocation)
        assert allocation.value == 0.0
        assert allocation.certificate.method == "threshold and leximax"


def test_many_layers():
    rng = np.random.default_rng(0)
    values = -np.sort(-rng.random((300, 40)), axis=1)
    costs = rng.integers(1, 50, 300)
    problem = Problem(values, int(costs.sum()) * 10, costs=costs.tolist(), objective="operator")
    allocation = solve(problem)
    check_answer(allocation)
    # Lowering the worst layer further breaks the budget.
    worst = int(np.argmax(problem.tails(allocation.ranks)))
    assert allocation.cost + int(costs[worst]) > problem.budget
