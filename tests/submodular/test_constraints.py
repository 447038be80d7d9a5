"""Constraints: what is feasible, and what feasible sets weigh."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.submodular import Cardinality, Knapsack, LaminarMatroid, PartitionMatroid
from tests.strategies import examples
from tests.submodular import drawn, exact


@st.composite
def constrained_weights(draw):
    n = draw(st.integers(1, 6))
    entry = draw(
        st.sampled_from(
            [st.integers(0, 4).map(float), st.floats(0, 1e6), st.integers(-99, 99).map(np.exp2)]
        )
    )
    weights = np.array(draw(st.lists(entry, min_size=n, max_size=n)), dtype=float)
    return draw(drawn.constraints(n)), weights


@settings(max_examples=examples(2.0))
@given(constrained_weights(), st.data())
def test_what_is_open_is_what_fits(drawing, data):
    constraint, weights = drawing
    n = len(weights)
    room, chosen = constraint.room(n), ()
    for element in data.draw(st.permutations(range(n))):
        for j in range(n):
            fits = j not in chosen and exact.feasible(constraint, (*chosen, j))
            assert room.open[j] == fits
        assert constraint.feasible([*chosen, element], n) == room.open[element]
        if room.open[element]:
            room.add(element)
            chosen = (*chosen, element)


@settings(max_examples=examples(2.0))
@given(constrained_weights())
def test_no_feasible_set_is_heavier(drawing):
    constraint, weights = drawing
    n = len(weights)

    def weigh(items) -> Fraction:
        return sum((Fraction(float(weights[i])) for i in items), Fraction(0))

    best = max(weigh(s) for s in exact.subsets(n) if exact.feasible(constraint, s))
    bound = constraint.heaviest(weights)
    shares = constraint.shares(weights)
    assert 0 <= shares.min() <= shares.max() <= 1
    assert bound >= best
    assert float(weights @ shares) == pytest.approx(bound, rel=1e-12)
    if isinstance(constraint, Knapsack):
        costs = constraint.costs.tolist()
        spent = sum(Fraction(float(s)) * c for s, c in zip(shares, costs, strict=True))
        assert spent <= constraint.budget * (1 + Fraction(1, 1 << 40))
        assert sum(0 < s < 1 for s in shares) <= 1
    else:
        assert bound <= best * (1 + Fraction(1, 1 << 40))
        assert set(shares.tolist()) <= {0.0, 1.0}
        assert exact.feasible(constraint, tuple(np.flatnonzero(shares).tolist()))


def test_the_fractional_knapsack():
    knapsack = Knapsack([2, 3, 4, 100], budget=6)
    weights = np.array([4.0, 3.0, 8.0, 900.0])  # the last fits no budget of 6
    assert knapsack.heaviest(weights) == pytest.approx(12, rel=1e-14)
    assert knapsack.shares(weights).tolist() == [1, 0, 1, 0]
    assert knapsack.shares(np.array([1.0, 3.0, 8.0, 0])).tolist() == [0, 2 / 3, 1, 0]
    assert knapsack.heaviest(np.array([1.0, 3.0, 8.0, 0])) == pytest.approx(10, rel=1e-14)
    assert knapsack.heaviest(np.array([1.0, np.inf, 0, 0])) == np.inf
    assert knapsack.heaviest(np.array([1.0, 0, 0, np.inf])) == pytest.approx(1, rel=1e-14)
    assert knapsack.heaviest(np.zeros(4)) == 0


def test_rooms_close():
    room = Knapsack([2, 3, 1, 4], budget=6).room(4)
    room.add(0)
    assert room.open.tolist() == [False, True, True, True]
    room.add(2)
    assert room.open.tolist() == [False, True, False, False]
    room = Cardinality(2).room(3)
    room.add(1)
    assert room.open.tolist() == [True, False, True]
    room.add(0)
    assert room.open.tolist() == [False, False, False]
    assert room.open.dtype == np.bool_


def test_a_budget_of_exactly_one_cost():
    knapsack = Knapsack([3, 4], budget=3)
    assert knapsack.shares(np.array([1.0, 9.0])).tolist() == [1, 0]
    assert knapsack.shares(np.array([0.0, 9.0])).tolist() == [0, 0]


def test_costs_beyond_64_bits_together():
    knapsack = Knapsack([2**53] * 1100, budget=2**63)
    assert knapsack.heaviest(np.ones(1100)) == pytest.approx(1024, rel=1e-12)
    assert knapsack.cost(range(1100)) == 1100 * 2**53
    assert Knapsack([1], budget=2**70).feasible([0], 1)


def test_costs():
    knapsack = Knapsack([2, 3], 4)
    assert (knapsack.kind, knapsack.budget) == ("knapsack", 4)
    assert knapsack.cost([1, 0]) == 5
    assert type(knapsack.cost([1])) is int
    assert Cardinality(3).cost([4, 5]) == 2
    assert Knapsack([4], 4).feasible([0], 1)
    assert not Knapsack([5], 4).feasible([0], 1)
    assert Knapsack([2**53], 4).costs.tolist() == [2**53]


@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [
        ([0], 1, r"^costs: element 0: expected a whole number >= 1, got 0$"),
        ([1, 1.5], 1, r"^costs: element 1: expected a whole number >= 1, got 1.5$"),
        ([1, 2**53 + 1], 1, r"^costs: element 1: expected at most 2\^53, got 9007199254740993$"),
        ([1], -1, r"^budget: expected a whole number >= 0, got -1$"),
    ],
)
def test_what_is_no_knapsack(costs, budget, message):
    with pytest.raises(ValueError, match=message):
        Knapsack(costs, budget)


def test_another_number_of_elements():
    with pytest.raises(ValueError, match=r"^costs: expected one for each of 2 elements, got 1$"):
        Knapsack([1], 1).room(2)
    with pytest.raises(ValueError, match=r"^constraint: expected 2 elements, as the objective, go"):
        LaminarMatroid(3, [], []).room(2)
    Cardinality(1).check(7)


def test_cardinality():
    assert Cardinality(2).kind == "cardinality"
    assert Cardinality(0).heaviest(np.ones(3)) == 0
    assert Cardinality(2).heaviest(np.array([1.0, 4.0, 2.0])) == pytest.approx(6, rel=1e-15)
    assert Cardinality(9).heaviest(np.array([1.0, 4.0])) == pytest.approx(5, rel=1e-15)
    assert Cardinality(1).shares(np.array([1.0, 4.0, 4.0])).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"^limit: expected a whole number >= 0, got 1.5$"):
        Cardinality(1.5)  # pyright: ignore[reportArgumentType]


def test_partition_is_laminar():
    matroid = PartitionMatroid(["b", "a", "b", "c"], {"a": 1, "b": 1, "c": 0, "unused": 5})
    assert matroid.kind == "matroid"
    assert matroid.groups == ("b", "a", "b", "c")
    assert matroid.names == ("b", "a", "c")
    assert matroid.room(4).open.tolist() == [True, True, True, False]
    assert matroid.shares(np.array([1.0, 1.0, 2.0, 9.0])).tolist() == [0, 1, 1, 0]
    assert matroid.heaviest(np.array([1.0, 1.0, 2.0, 9.0])) == pytest.approx(3, rel=1e-15)
    assert matroid.cost([0, 1]) == 2
    assert PartitionMatroid([1, 1, 2], 1).capacities == [1, 1]


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ({"a": 1}, r"^capacities: group 'b' is missing$"),
        ({"a": 1, "b": -1}, r"^capacities: group 'b': expected a whole number >= 0, got -1$"),
        (0.5, r"^capacities: group 'a': expected a whole number >= 0, got 0.5$"),
    ],
)
def test_what_is_no_partition(capacities, message):
    with pytest.raises(ValueError, match=message):
        PartitionMatroid(["a", "b"], capacities)


def test_crossing_sets_are_named():
    with pytest.raises(
        ValueError,
        match=r"^sets 'stage' and 'kind' cross: both hold 2, only 'stage' holds 0, only 'kind' "
        r"holds 3; a laminar matroid's sets are nested or disjoint$",
    ):
        LaminarMatroid(
            5,
            {"all": range(5), "kind": [2, 3], "stage": [0, 1, 2]},
            dict.fromkeys(["all", "kind", "stage"], 1),
        )
    with pytest.raises(ValueError, match=r"^sets 0 and 1 cross: both hold 1, only 0 holds 0, on"):
        LaminarMatroid(3, [[0, 1], [1, 2]], [1, 1])


@given(st.data())
def test_crossing_is_found_wherever_it_is(data):
    n = data.draw(st.integers(1, 6))
    sets = data.draw(st.lists(st.sets(st.integers(0, n - 1)), max_size=5))
    crossing = {
        (i, j) for i, a in enumerate(sets) for j, b in enumerate(sets) if a & b and a - b and b - a
    }
    if not crossing:
        assert LaminarMatroid(n, [sorted(s) for s in sets], [0] * len(sets)).capacities == (
            [0] * len(sets)
        )
    else:
        with pytest.raises(ValueError, match=r"^sets \d and \d cross") as error:
            LaminarMatroid(n, [sorted(s) for s in sets], [0] * len(sets))
        words = str(error.value).split()
        assert (int(words[1]), int(words[3])) in crossing


@pytest.mark.parametrize(
    ("sets", "capacities", "message"),
    [
        ([[0]], {"a": 1}, r"^capacities: expected names where the sets have names, else order$"),
        ({"a": [0]}, [1], r"^capacities: expected names where the sets have names, else order$"),
        ({"a": [0]}, {}, r"^capacities: 'a' is not among both sets and capacities$"),
        ({}, {"b": 1}, r"^capacities: 'b' is not among both sets and capacities$"),
        ([[0]], [], r"^capacities: expected 1, got 0$"),
        ([[0]], [-1], r"^capacities: set 0: expected a whole number >= 0, got -1$"),
        ({"a": [2]}, {"a": 1}, r"^set 'a': expected elements below 2, got 2$"),
        ([[0], ["x"]], [1, 1], r"^set 1: expected a whole number >= 0, got 'x'$"),
    ],
)
def test_what_is_no_laminar_family(sets, capacities, message):
    with pytest.raises(ValueError, match=message):
        LaminarMatroid(2, sets, capacities)


def test_the_heaviest_sum_has_the_same_bits_in_any_order_of_the_largest(monkeypatch):
    rng = np.random.default_rng(0)
    weights = rng.lognormal(size=5000)
    heaviest = Cardinality(700).heaviest(weights)

    def partition(values, kth):  # as good as any
        ascending = np.sort(values)
        return np.concatenate([ascending[:kth], rng.permutation(ascending[kth:])])

    monkeypatch.setattr(np, "partition", partition)
    assert {Cardinality(700).heaviest(weights) for _ in range(20)} == {heaviest}
