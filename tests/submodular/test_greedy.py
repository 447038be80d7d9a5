"""Greedy algorithms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc.submodular import (
    Cardinality,
    CoupledQuadratic,
    Coverage,
    Function,
    Knapsack,
    Modular,
    PartitionMatroid,
    density_greedy,
    density_greedy_or_best_single,
    greedy,
    lazy_greedy,
)
from tests.submodular import drawn, exact


@given(st.data())
def test_greedy_follows_its_definition(data):
    f = data.draw(drawn.coverage())
    constraint = data.draw(drawn.constraints(f.n))
    items: tuple[int, ...] = ()
    while True:
        gains = {
            j: exact.value(f, (*items, j)) - exact.value(f, items)
            for j in range(f.n)
            if j not in items and exact.feasible(constraint, (*items, j))
        }
        if not gains or max(gains.values()) <= 0:
            break
        items = (*items, max(gains, key=lambda j: gains[j]))
    run = greedy(f, constraint)
    assert run.items == run.trace == items
    assert run.complete
    assert lazy_greedy(f, constraint).items == items


@given(st.data())
def test_density_greedy_follows_its_definition(data):
    f = data.draw(drawn.coverage())
    knapsack = data.draw(drawn.knapsacks(f.n))
    costs = knapsack.costs.tolist()
    items: tuple[int, ...] = ()
    run = density_greedy(f, knapsack)
    for item in run.items:
        densities = {
            j: (exact.value(f, (*items, j)) - exact.value(f, items)) / costs[j]
            for j in range(f.n)
            if j not in items and exact.feasible(knapsack, (*items, j))
        }
        assert densities[item] == max(densities.values()) > 0
        items = (*items, item)
    assert exact.feasible(knapsack, items)
    left = [j for j in range(f.n) if exact.feasible(knapsack, (*items, j)) and j not in items]
    assert all(exact.value(f, (*items, j)) == exact.value(f, items) for j in left)
    better = density_greedy_or_best_single(f, knapsack)
    singles = [exact.value(f, (j,)) for j in range(f.n) if costs[j] <= knapsack.budget]
    assert exact.value(f, better.items) == max(exact.value(f, items), *singles, 0)
    assert better.trace == items


def test_lazy_greedy_asks_seldom():
    weights = range(50)

    def total(s):
        return min(sum(weights[j] for j in s), 1000)

    lazy, plain = Function(50, total), Function(50, total)
    assert lazy_greedy(lazy, Cardinality(10)).items == greedy(plain, Cardinality(10)).items
    # The empty set, 50 single gains, and one look at the first of the heap in each later round.
    assert lazy.evaluations == 1 + 50 + 9
    assert plain.evaluations == 1 + sum(50 - k for k in range(10))


def test_a_gain_is_trusted_only_if_the_set_is_the_same():
    """After 0 the gain of 2 is still 3; after 1 it is 1, less than that of 3."""
    f = Coverage([[0, 1, 2, 3], [4, 5, 6], [4, 5, 7], [8, 9], [0, 8]])
    assert lazy_greedy(f, Cardinality(4)).items == (0, 1, 3, 2)


def test_lazy_greedy_is_wrong_where_gains_grow():
    """Weakly submodular: the second candidate's gain grows from 0.125 to 5.2 beside the first."""
    quadratic = CoupledQuadratic(
        [1.0, 0.5, 0.9], [[1.0, -0.9, 0.0], [-0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]
    )
    with pytest.raises(ValueError, match=r"^lazy greedy: expected a submodular objective, got a w"):
        lazy_greedy(quadratic, Cardinality(2))
    liar = Function(3, lambda s: quadratic.value(sorted(s)))
    assert lazy_greedy(liar, Cardinality(2)).items == (0, 2)
    right = greedy(quadratic, Cardinality(2)).items
    assert right == (0, 1)
    assert quadratic.value([0, 2]) < 0.2 * quadratic.value(right)


def test_elements_that_add_nothing_are_left_alone():
    f = Coverage([[0], [0], []])
    assert greedy(f, Cardinality(3)).items == (0,)
    assert lazy_greedy(f, Cardinality(3)).items == (0,)
    assert density_greedy(f, Knapsack([1, 1, 1], 3)).items == (0,)
    assert density_greedy_or_best_single(f, Knapsack([5, 5, 5], 3)).items == ()


def test_lazy_greedy_drops_what_no_longer_fits():
    f = Modular([5.0, 4.0, 3.0])
    assert lazy_greedy(f, PartitionMatroid("aab", 1)).items == (0, 2)
    assert lazy_greedy(f, PartitionMatroid("aab", {"a": 0, "b": 1})).items == (2,)


@pytest.mark.parametrize("algorithm", [greedy, lazy_greedy])
def test_constraints_must_fit(algorithm):
    with pytest.raises(ValueError, match=r"^constraint: expected 1 elements"):
        algorithm(Modular([1.0]), PartitionMatroid("ab", 1))


@pytest.mark.parametrize("algorithm", [density_greedy, density_greedy_or_best_single])
def test_knapsacks_must_fit(algorithm):
    with pytest.raises(ValueError, match=r"^costs: expected one for each of 1 elements, got 2$"):
        algorithm(Modular([1.0]), Knapsack([1, 1], 1))
    assert algorithm(Modular(np.zeros(0)), Knapsack([], 1)).items == ()


def test_density_needs_a_knapsack():
    with pytest.raises(ValueError, match=r"^knapsack: expected a Knapsack, got"):
        density_greedy(Modular([1.0]), Cardinality(1))  # pyright: ignore[reportArgumentType]
