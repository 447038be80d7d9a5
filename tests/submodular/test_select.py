"""The front door."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.submodular import (
    Cardinality,
    CoupledQuadratic,
    Coverage,
    Function,
    Knapsack,
    LaminarMatroid,
    LogDet,
    Modular,
    PartitionMatroid,
    density_greedy_or_best_single,
    guarantee,
    instance_bound,
    local_search,
    select,
)
from lorambo_alloc.submodular.select import (
    LOCAL_SEARCH_UP_TO,
    ONE_GUESS_UP_TO,
    TWO_GUESSES_UP_TO,
)
from tests.strategies import examples
from tests.submodular import drawn, exact

COUPLED = CoupledQuadratic(
    [2.0, 1.0, 1.0, 0.5],
    [[2.0, 1.0, 0, 0], [1.0, 2.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]],
    1.0,
    layers=["q", "q", "v", "o"],
)


@settings(max_examples=examples(2.0))
@given(drawn.objectives(), st.data())
def test_every_answer_is_what_it_says(f, data):
    constraint = data.draw(drawn.constraints(f.n))
    selection = select(f, constraint=constraint)
    assert exact.feasible(constraint, selection.items)
    assert len(set(selection.items)) == len(selection) == len(selection.items)
    assert selection.status == "ratio_certified"
    assert selection.value == f.value(selection.items)
    assert selection.cost == constraint.cost(selection.items)
    assert 0 <= selection.ratio <= 1
    assert selection.value <= selection.upper_bound
    assert len(selection.prefix_values) == len(selection) + 1
    for size, value in enumerate(selection.prefix_values):
        assert value == pytest.approx(f.value(selection.items[:size]), rel=1e-9, abs=1e-9)
    best = exact.optimum(f, constraint)
    if isinstance(f, LogDet):
        best = 0.5 * (math.log(best.numerator) - math.log(best.denominator))
        assert best <= selection.upper_bound + 1e-14 * (1 + best)
    elif selection.upper_bound < math.inf:
        assert best <= selection.upper_bound
    # The guarantee, against brute force; values are rounded.
    assert selection.value >= selection.guarantee.ratio * float(best) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("objective", "constraint", "algorithm"),
    [
        (Modular([1.0] * 3), Cardinality(2), "greedy"),
        (COUPLED, Cardinality(2), "greedy"),
        (Modular([1.0] * 3), PartitionMatroid("aab", 1), "greedy"),
        (Coverage([[0]] * 3), PartitionMatroid("aab", 1), "local search"),
        (COUPLED, PartitionMatroid("aabb", 1), "greedy"),
        (Coverage([[0]] * 40), LaminarMatroid(40, [range(40)], [11]), "local search"),
        (Coverage([[0]] * 40), LaminarMatroid(40, [range(40)], [12]), "greedy"),
        (Modular([1.0] * 40), Knapsack([1, 2] * 20, 3), "two guesses"),
        (COUPLED, Knapsack([1, 2, 3, 4], 3), "two guesses"),
        (Coverage([[0]] * 41), Knapsack([1] * 40 + [2], 3), "one guess"),
        (Coverage([[0]] * 200), Knapsack([1, 2] * 100, 3), "one guess"),
        (Coverage([[0]] * 201), Knapsack([1] * 200 + [2], 3), "density greedy or best single"),
        (Coverage([[0]] * 201), Knapsack([7] * 201, 20), "greedy"),
    ],
)
def test_the_automatic_choice(objective, constraint, algorithm):
    selection = select(objective, constraint=constraint)
    assert selection.guarantee.algorithm == algorithm
    assert selection.guarantee.objective == objective.kind


def test_thresholds_are_those_documented():
    assert (TWO_GUESSES_UP_TO, ONE_GUESS_UP_TO, LOCAL_SEARCH_UP_TO) == (40, 200, 100_000)


@pytest.mark.parametrize(
    ("constraint", "algorithm"),
    [
        (Cardinality(2), "greedy"),
        (PartitionMatroid("aab", 1), "greedy"),
        (PartitionMatroid("aab", 1), "local search"),
        (Knapsack([1, 2, 3], 4), "density greedy"),
        (Knapsack([1, 2, 3], 4), "density greedy or best single"),
        (Knapsack([1, 2, 3], 4), "one guess"),
        (Knapsack([1, 2, 3], 4), "two guesses"),
        (Knapsack([2, 2, 2], 4), "density greedy"),
    ],
)
def test_every_algorithm_by_name(constraint, algorithm):
    f = Coverage([[0, 1], [1, 2], [2, 3]])
    selection = select(f, constraint=constraint, algorithm=algorithm)
    assert selection.guarantee == guarantee(constraint.kind, algorithm, "submodular")
    assert selection.items


def test_equal_costs_only_count():
    f = Coverage([[0, 1], [1, 2], [2, 3]])
    for algorithm in ("auto", "greedy"):
        selection = select(f, [5, 5, 5], 14, algorithm=algorithm)
        assert (selection.items, selection.cost) == ((0, 2), 10)
        assert selection.guarantee == guarantee("cardinality", "greedy", "submodular")
    assert select(f, [5, 5, 5], 15).cost == 10  # the third adds nothing
    assert select(Modular([]), [], 3).items == ()
    with pytest.raises(ValueError, match=r"^no guarantee is known for 'knapsack', 'greedy', 'sub"):
        select(f, [5, 5, 4], 14, algorithm="greedy")


def test_a_budget_beyond_64_bits_is_spent():
    n = 1100
    knapsack = Knapsack([2**53] * (n - 1) + [2**53 - 1], n * 2**53)
    selection = select(Modular([1.0] * n), constraint=knapsack)
    assert len(selection) == n
    assert selection.cost == n * 2**53 - 1
    assert knapsack.feasible(range(n), n)
    assert not Knapsack([2**53] * n, n * 2**53 - 1).feasible(range(n), n)


def test_near_singular_candidates_are_promised_nothing():
    """Greedy takes the second for a copy of the first; together they are worth 2^40."""
    apart = 2.0**-40
    f = CoupledQuadratic([1.0, -1.0], [[1.0, 1 - apart], [1 - apart, 1.0]])
    selection = select(f, budget=2)
    best = exact.optimum(f, Cardinality(2))
    assert best == 2**40
    assert selection.guarantee.ratio == 0
    assert best <= selection.upper_bound < 1.1 * best


def test_what_is_no_objective_or_constraint():
    with pytest.raises(ValueError, match=r"^objective: expected a set function, got \[1.0\]$"):
        select([1.0], budget=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^constraint: expected a constraint, got 3$"):
        select(Modular([1.0]), constraint=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^costs: expected one an element, got 3$"):
        select(Modular([1.0]), 3, 3)  # pyright: ignore[reportArgumentType]


def test_a_budget_without_costs_counts():
    selection = select(Modular([1.0, 3.0, 2.0]), budget=2)
    assert (selection.items, selection.value, selection.cost) == ((1, 2), 5.0, 2)
    assert selection.guarantee.ratio == 1
    assert selection.ranks is None
    assert selection.prefix_values == (0.0, 3.0, 5.0)


def test_ranks_by_layer():
    selection = select(COUPLED, budget=2)
    assert selection.items == (0, 2)
    assert selection.ranks == {"q": 1, "v": 1, "o": 0}
    by_name = select(COUPLED, {"o": 1, "q": 3, "v": 2}, 5)
    assert by_name == select(COUPLED, [3, 3, 2, 1], 5)
    assert by_name.cost == 5


def test_a_diagonal_curvature_is_solved_as_well_as_separable_layers():
    f = CoupledQuadratic([3.0, 2.0, 1.0], np.eye(3))
    selection = select(f, budget=2)
    assert selection.items == (0, 1)
    assert selection.ratio > 1 - 1e-5


def test_the_submodularity_ratio_is_cited_where_it_is_proved():
    f = CoupledQuadratic([1.0, 1.0], [[1.0, 0.5], [0.5, 1.0]], 1.0)
    row = select(f, budget=1).guarantee
    assert row.ratio == pytest.approx(1 - math.exp(-0.75), rel=1e-4)
    assert row.note == "submodularity ratio at least 0.749"
    assert select(f, [1, 2], 2).guarantee.ratio == 0
    assert select(f, constraint=PartitionMatroid("ab", 1)).guarantee.ratio == 0
    unknown = Function(2, len, submodular=False)
    assert select(unknown, budget=1).guarantee.ratio == 0
    assert select(unknown, budget=1).upper_bound == pytest.approx(2, rel=1e-14)


def test_lazy_only_where_that_is_right_and_saves_work():
    lazy = Function(30, lambda s: float(sum(s)))
    select(lazy, budget=5)
    weak = Function(30, lambda s: float(sum(s)), submodular=False)
    select(weak, budget=5)
    assert weak.evaluations >= 1 + sum(30 - k for k in range(5))
    # Bounds look at every gain at up to 16 prefixes; with more there is something left to save.
    lazy = Function(60, lambda s: float(sum(s)))
    select(lazy, budget=50)
    weak = Function(60, lambda s: float(sum(s)), submodular=False)
    select(weak, budget=50)
    assert lazy.evaluations < 0.6 * weak.evaluations


def test_the_bound_comes_from_the_greedy_trace():
    """The best single element alone is a poor place for a bound."""
    f = Coverage([[0, 1], [1, 2], [2, 3], range(4, 12)])
    knapsack = Knapsack([1, 1, 1, 9], 9)
    selection = select(f, constraint=knapsack, algorithm="density greedy or best single")
    assert selection.items == (3,)
    trace = density_greedy_or_best_single(f, knapsack).trace
    assert trace != selection.items
    assert selection.upper_bound == instance_bound(f, knapsack, trace)


def test_a_stopped_search_cites_what_greedy_guarantees():
    f = Coverage([[0], [1], [0]], weights=[1.0, 0.9])
    matroid = PartitionMatroid("aab", 1)
    stopped = select(f, constraint=matroid, algorithm="local search", time_limit=0)
    assert stopped.guarantee == guarantee("matroid", "greedy", "submodular")
    assert local_search(f, matroid, time_limit=0).items == stopped.items
    whole = select(f, constraint=matroid, time_limit=1e9)
    assert whole.guarantee == guarantee("matroid", "local search", "submodular")
    for name in ("one guess", "two guesses"):
        stopped = select(f, [1, 2, 3], 4, algorithm=name, time_limit=0)
        assert stopped.guarantee.algorithm == "density greedy or best single"
        assert select(f, [1, 2, 3], 4, algorithm=name).guarantee.algorithm == name


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((), {}, r"^budget: expected a whole number >= 0, or a constraint; got neither$"),
        (([1, 2],), {}, r"^budget: expected a whole number >= 0, or a constraint; got neither$"),
        (
            (None, 1),
            {"constraint": Cardinality(1)},
            r"^constraint: expected either a constraint or costs and a budget$",
        ),
        (
            ([1, 1],),
            {"constraint": Cardinality(1)},
            r"^constraint: expected either a constraint or costs and a budget$",
        ),
        ((None, -1), {}, r"^budget: expected a whole number >= 0, got -1$"),
        (([1], 1), {}, r"^costs: expected one for each of 2 elements, got 1$"),
        (
            ({"q": 1}, 1),
            {},
            r"^costs: expected one an element; by name they need ",
        ),
        ((None, 1), {"algorithm": "best"}, r"^no guarantee is known for 'cardinality', 'best', 'm"),
        ((None, 1), {"algorithm": "one guess"}, r"^no guarantee is known for 'cardinality', 'one"),
        ((None, 1), {"time_limit": -1}, r"^time_limit: expected seconds >= 0, got -1$"),
        ((None, 1), {"time_limit": math.nan}, r"^time_limit: expected seconds >= 0, got nan$"),
        (
            (),
            {"constraint": PartitionMatroid("a", 1)},
            r"^constraint: expected 2 elements, as the objective, got 1$",
        ),
    ],
)
def test_what_is_refused(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        select(Modular([1.0, 2.0]), *arguments, **keywords)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"q": 1, "v": 1}, r"^costs: layer 'o' is missing$"),
        ({"q": 1, "v": 1, "o": 1, "x": 1}, r"^costs: layer 'x' is not among the objective's layer"),
    ],
)
def test_costs_by_name_must_fit(costs, message):
    with pytest.raises(ValueError, match=message):
        select(COUPLED, costs, 1)


def test_as_text():
    assert repr(select(COUPLED, budget=0)).splitlines()[:7] == [
        "layer  rank",
        "q         0",
        "v         0",
        "o         0",
        "-----------",
        "items       none",
        "value       0",
    ]
    text = repr(select(Modular(np.arange(1.0, 31.0)), [1000] * 30, 25_500))
    assert text.splitlines() == [
        "items       25: 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, "
        "11, 10, ... 5 more",
        "value       450",
        "cost        25,000",
        "upper bound 450",
        "status      ratio certified: at least 99.99% of the optimum by the instance's bound",
        f"guarantee   {guarantee('cardinality', 'greedy', 'modular')}",
    ]
    many = CoupledQuadratic(np.ones(22), np.eye(22), layers=[f"layer{j}" for j in range(22)])
    lines = repr(select(many, budget=1)).splitlines()
    assert lines[0] == "layer    rank"
    assert lines[1] == "layer0      1"
    assert lines[20:22] == ["layer19     0", "... 2 more"]
    twenty = CoupledQuadratic(np.ones(20), np.eye(20), layers=[f"layer{j}" for j in range(20)])
    assert "more" not in repr(select(twenty, budget=20))


def test_a_ratio_of_nothing():
    assert select(Modular([0.0]), budget=1).ratio == 1
    assert select(Modular([1.0]), budget=0).ratio == 1
