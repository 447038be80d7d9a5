"""Non-oblivious local search."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.submodular import (
    Coverage,
    Function,
    Knapsack,
    LaminarMatroid,
    Modular,
    PartitionMatroid,
    greedy,
    local_search,
)
from lorambo_alloc.submodular.local_search import potential_gains, potential_weights
from tests.strategies import examples
from tests.submodular import drawn, exact


def integral(a: int, b: int) -> float:
    """The integral of e^p / (e - 1) p^b (1 - p)^(a - b), by Gauss and Legendre: exact enough."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    p = (nodes + 1) / 2
    return float(weights @ (np.exp(p) * p**b * (1 - p) ** (a - b))) / 2 / math.expm1(1)


@pytest.mark.parametrize("size", range(12))
def test_weights_are_the_integrals(size):
    weights = potential_weights(size)
    assert weights == pytest.approx([integral(size, b) for b in range(size + 1)], rel=1e-12)
    # A distribution over the subsets.
    total = sum(math.comb(size, b) * m for b, m in enumerate(weights))
    assert total == pytest.approx(1, rel=1e-12)


@given(st.data())
def test_gains_of_the_potential_follow_the_definition(data):
    f = data.draw(drawn.coverage())
    chosen = data.draw(st.permutations(range(f.n)))[: data.draw(st.integers(1, min(f.n, 4)))]
    gains = potential_gains(f, list(chosen))
    assert gains.shape == (len(chosen), f.n)
    weights = potential_weights(len(chosen) - 1)
    for i in range(len(chosen)):
        rest = [*chosen[:i], *chosen[i + 1 :]]
        for e in range(f.n):
            expected = 0.0
            for size in range(len(rest) + 1):
                for subset in combinations(rest, size):
                    gain = exact.value(f, tuple({*subset, e})) - exact.value(f, subset)
                    expected += weights[size] * float(gain)
            assert gains[i, e] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=examples(1.0))
@given(st.data())
def test_the_theorem_holds(data):
    """f(S) >= (1 - 1/e - epsilon) OPT, in rational arithmetic, and never below greedy."""
    f = data.draw(drawn.coverage())
    matroid = data.draw(drawn.matroids(f.n))
    run = local_search(f, matroid)
    assert run.complete
    assert run.items == run.trace
    assert exact.feasible(matroid, run.items)
    value = exact.value(f, run.items)
    assert value >= exact.value(f, greedy(f, matroid).items)
    assert value >= Fraction(1 - math.exp(-1) - 0.001) * exact.optimum(f, matroid)


def test_it_beats_greedy_at_one_half():
    f = Coverage([[0], [1], [0]], weights=[1.0, 1 - 2.0**-10])
    matroid = PartitionMatroid("aab", 1)
    assert f.value(greedy(f, matroid).items) == 1
    assert f.value(local_search(f, matroid).items) == 2 - 2.0**-10


def test_what_adds_nothing_is_left_out():
    f = Coverage([[0], [0], [1], []], weights=[1.0, 2.0])
    assert local_search(f, PartitionMatroid("abcd", 1)).items == (2, 0)
    assert local_search(f, PartitionMatroid("abcd", 0)).items == ()


def test_exchanged_items_come_in_greedy_order():
    f = Coverage([[0], [1], [0], [2]], weights=[1.0, 0.9, 5.0])
    run = local_search(f, PartitionMatroid("aabc", 1))
    assert run.items == (3, 2, 1)
    assert run.trace == run.items


def test_a_rank_too_large_is_refused():
    free = LaminarMatroid(17, [], [])
    with pytest.raises(
        ValueError,
        match=r"^local search: the matroid has rank 17, and its potential 2\^17 terms; expected a "
        r"rank of at most 16; use 'greedy'$",
    ):
        local_search(Modular(np.ones(17)), free)
    # Of rank 16, but the time is over before the first exchange.
    run = local_search(Modular(np.ones(16)), LaminarMatroid(16, [], []), time_limit=0)
    assert run.items == tuple(range(16))
    assert not run.complete


def test_a_long_limit_changes_nothing():
    f, matroid = Coverage([[0], [1], [0]], weights=[1.0, 0.9]), PartitionMatroid("aab", 1)
    assert local_search(f, matroid, time_limit=1e9) == local_search(f, matroid)


def test_an_exchange_may_leave_useless_elements_behind():
    # After the exchange of 0 for 1, 3 covers nothing that 2 does not.
    f = Coverage([[0], [1], [0, 2], [2]], weights=[1.0, 0.9, 0.5])
    run = local_search(f, PartitionMatroid("aabc", 1))
    assert run.items == (2, 1)
    assert f.value(run.items) == 2.4


@pytest.mark.parametrize(("weight", "exchanged"), [(0.41, False), (0.4184, False), (0.4187, True)])
def test_an_exchange_must_gain_enough_potential(weight, exchanged):
    """Beside 2, the potential counts 0 (covered by 2 too) with m(1, 0) = 0.41802, and 1 fully.

    An exchange has to gain more than epsilon f / k = 0.001 / 2.
    """
    f = Coverage([[0], [1], [0]], weights=[1.0, weight])
    run = local_search(f, PartitionMatroid("aab", 1))
    assert run.items == ((2, 1) if exchanged else (0,))


def test_the_search_ends_even_if_the_function_lies():
    """Values fall, so that no exchange gains nothing, measured against a value below 0."""
    f = Function(3, lambda s: -len(s))
    run = local_search(f, PartitionMatroid("aab", 1))
    assert (run.items, run.complete) == ((), False)


def test_a_knapsack_is_no_matroid():
    with pytest.raises(ValueError, match=r"^local search: expected a matroid, got a knapsack"):
        local_search(Modular([1.0]), Knapsack([1], 1))


def test_the_answer_is_never_below_greedy():
    """Weakly submodular: in greedy's order, elements of use only together drop out."""

    def f(s):
        return 10.0 * ({0, 1} <= s) + (2 in s)

    weak = Function(4, f, submodular=False)
    matroid = PartitionMatroid("aabb", {"a": 2, "b": 1})
    start, found = greedy(weak, matroid), local_search(weak, matroid)
    assert weak.value(found.items) >= weak.value(start.items) == 1
