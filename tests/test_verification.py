"""The arithmetic behind `Certificate.verify`, against enumeration and fractions."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.caps import Cap
from lorambo_alloc.testing import Instance
from lorambo_alloc.verification import (
    SCALE,
    Charges,
    better_exists,
    exact_totals,
    integer,
    lefts_and_prices,
    responses,
    two_price_bound,
    value_step,
)
from tests.checks import all_feasible
from tests.strategies import capped, core_classes, examples, instances

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(finite)
def test_integers_are_exact(value):
    assert Fraction(integer(value), SCALE) == Fraction(value)


def scores(problem: Problem, group, price: float, rank_price: float) -> dict[int, Fraction]:
    """Exact score of every allowed rank of a variable that fits beside the least ones."""
    found = {}
    spare = problem.budget - problem.cost_of(problem.lower)
    own = problem.cost_at(group, int(problem.lower[group[0]]))
    for rank in problem.allowed_ranks(group[0]).tolist():
        if problem.cost_at(group, rank) - own > spare:
            continue
        ranks = np.zeros(len(problem.names), dtype=np.int64)
        ranks[list(group)] = rank
        charge = Fraction(price) * problem.cost_at(group, rank)
        found[rank] = problem.value_of(ranks) - charge - Fraction(rank_price) * rank * len(group)
    return found


prices = st.one_of(st.just(0.0), st.floats(1e-12, 1e3), st.floats(1e-300, 1e-200))


@given(instances(), prices, st.one_of(st.just(0.0), st.floats(-5.0, 5.0)))
@settings(max_examples=examples(1))
def test_responses_are_exactly_the_best(instance: Instance, price: float, rank_price: float):
    problem = instance.problem()
    found = list(responses(problem, problem.lower, Charges.of(problem, [price], rank_price)))
    assert [response.group for response in found] == problem.variables
    for response in found:
        every = scores(problem, response.group, price, rank_price)
        best = max(every.values())
        assert Fraction(response.best, SCALE) == best
        # Of equal ones the cheapest.
        cheapest = min(rank for rank, score in every.items() if score == best)
        assert response.best_rank == cheapest
    total = sum(response.value for response in found)
    assert Fraction(total, SCALE) == problem.value_of(problem.lower)


@given(instances(), prices, st.floats(0.0, 1.5))
@settings(max_examples=examples(1))
def test_alternatives_are_all_below_the_window(instance: Instance, price: float, share: float):
    problem = instance.problem()
    for response in responses(problem, problem.upper, Charges.of(problem, [price])):
        every = scores(problem, response.group, price, 0.0)
        best = max(every.values())
        window = Fraction(share) * (best - min(every.values()))
        expected = sorted(
            (rank, best - score)
            for rank, score in every.items()
            if best - score < Fraction(int(window * SCALE), SCALE) and rank != response.best_rank
        )
        found = sorted(
            (rank, Fraction(penalty, SCALE)) for rank, penalty in response.alternatives(window)
        )
        assert found == expected
        own = problem.cost_at(response.group, response.best_rank)
        assert sorted(response.moves(problem.rows, window)) == sorted(
            ((problem.cost_at(response.group, rank) - own,), int(penalty * SCALE))
            for rank, penalty in expected
        )


@given(instances(), st.data())
def test_totals_in_any_order(instance: Instance, data):
    problem = instance.problem()
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0]).tolist()
        every = scores(problem, group, 0.0, 0.0)
        allowed = [rank for rank in allowed if rank in every]
        ranks = data.draw(st.lists(st.sampled_from(allowed), max_size=5))
        totals = exact_totals(problem, group, ranks)
        assert [Fraction(total, SCALE) for total in totals] == [every[rank] for rank in ranks]


@pytest.mark.parametrize("tied", [(), [["a", "b", "c"]], [["c", "a"]]])
def test_totals_of_tied_layers_whose_gains_are_no_doubles(tied):
    # 1 - 2^-60 is no double, so that only the totals are exact.
    curves = GainCurves({name: [0.0, 2.0**-60, 1.0 + k] for k, name in enumerate("abc")})
    problem = Problem(curves, 9, tied=tied)
    assert problem.gains is None
    for group in problem.variables:
        every = scores(problem, group, 0.0, 0.0)
        totals = exact_totals(problem, group, [2, 0, 1])
        assert [Fraction(total, SCALE) for total in totals] == [every[r] for r in (2, 0, 1)]


def one_row(classes, left, price, window, effort):
    moves = [[((move,), penalty) for move, penalty in options] for options in classes]
    return better_exists(moves, (left,), (price,), window, effort)


def brute(classes, left: int, price: int, window: int) -> bool:
    for choice in product(*([(0, 0), *options] for options in classes)):
        rest = left - sum(change for change, _ in choice)
        if rest >= 0 and sum(penalty for _, penalty in choice) + price * rest < window:
            return True
    return False


@given(core_classes(), st.integers(-15, 25), st.integers(0, 5), st.integers(0, 80))
@settings(max_examples=examples(5))
def test_a_better_choice_is_found_if_there_is_one(drawn, left, price, window):
    classes = [list(zip(moves, penalties, strict=True)) for moves, penalties in drawn]
    # The classes hold only penalties below the window, as `alternatives` makes them.
    classes = [[(m, p) for m, p in options if p < window] for options in classes]
    classes = [options for options in classes if options]
    assert one_row(classes, left, price, window, 10**6) == brute(classes, left, price, window)


@given(core_classes(), st.integers(-15, 25), st.integers(0, 5), st.integers(0, 80))
def test_little_effort_gives_no_wrong_answer(drawn, left, price, window):
    classes = [list(zip(moves, penalties, strict=True)) for moves, penalties in drawn]
    found = one_row(classes, left, price, window, 3)
    assert found in (None, brute(classes, left, price, window))


def test_effort_is_counted():
    classes = [[(3**k, 1)] for k in range(8)]
    # Every subset is a state of its own; none fills the budget within the window.
    assert one_row(classes, 3**8, 1, 50, 10**6) is False
    assert one_row(classes, 3**8 // 2, 1, 5, 10) in (None, False)
    assert one_row([], 4, 3, 12, 0) is False
    assert one_row([], 4, 3, 13, 0) is True
    assert one_row([], -1, 3, 13, 0) is False


def test_what_does_not_divide_stays_unspent():
    # All changes are even, so that one unit of an odd budget is lost: 2 * 5 < 10 is false.
    classes = [[(2, 0)], [(4, 0)], [(-2, 0)]]
    assert one_row(classes, 5, 10, 10, 10**6) is False
    assert one_row(classes, 5, 10, 11, 10**6) is True
    assert one_row(classes, -5, 10, 11, 10**6) is False


@given(instances(concave=True), st.floats(0.0, 20.0), st.floats(-20.0, 20.0), st.integers(0, 30))
@settings(max_examples=examples(1))
def test_two_prices_bound_what_wastes_little(instance: Instance, price, rank_price, waste):
    problem = instance.problem()
    bound = two_price_bound(problem, problem.lower, (price, rank_price), waste)
    for ranks in all_feasible(problem):
        if rank_price >= 0 or problem.budget - problem.cost_of(ranks) <= waste:
            assert problem.value_of(ranks) <= bound


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=3
    ),
    st.integers(0, 60),
    st.integers(0, 9),
)
@settings(max_examples=examples(3))
def test_the_number_of_ranks_in_the_bound_of_two_prices(drawn, budget, waste):
    """Where nothing gains anything, the bound is the rank price times a number of ranks."""
    costs, lower, upper = [c for c, _, _ in drawn], [], []
    for _, low, room in drawn:
        lower.append(low)
        upper.append(low + room)
    names = [f"{i}" for i in range(len(drawn))]
    curves = GainCurves.from_increments({name: [0.0] * 6 for name in names})
    budget += sum(c * low for c, low in zip(costs, lower, strict=True))
    problem = Problem(
        curves,
        budget,
        costs=costs,
        min_rank=dict(zip(names, lower, strict=True)),
        max_rank=dict(zip(names, upper, strict=True)),
    )
    feasible = list(all_feasible(problem))
    most = max(int(ranks.sum()) for ranks in feasible)
    # The price takes the fewest ranks; the number of ranks is the most that the budget holds.
    dear = two_price_bound(problem, problem.lower, (0.0, 3.0), waste)
    assert dear == 3 * (most - sum(lower))
    # The price takes the most ranks; the number is the fewest that leave over at most `waste`.
    spent = budget - waste
    enough = [
        int(sum(ranks))
        for ranks in product(*(range(lo, hi + 1) for lo, hi in zip(lower, upper, strict=True)))
        if sum(c * r for c, r in zip(costs, ranks, strict=True)) >= spent
    ]
    cheap = two_price_bound(problem, problem.lower, (0.0, -3.0), waste)
    # Each layer at the greatest rank that fits beside the least ranks of the others.
    spare = budget - sum(c * low for c, low in zip(costs, lower, strict=True))
    fitting = [min(hi, lo + spare // c) for c, lo, hi in zip(costs, lower, upper, strict=True)]
    assert cheap == 3 * (sum(fitting) - min(enough, default=sum(upper)))


@pytest.mark.parametrize(
    ("gains", "step"),
    [
        ({"a": [6.0, 4.0], "b": [10.0]}, 2),
        ({"a": [6.0, 4.5]}, Fraction(3, 2)),
        ({"a": [0.75]}, Fraction(3, 4)),
        ({"a": [0.0]}, 0),
        ({"a": [-4.0, -6.0]}, 2),
        ({}, 0),
    ],
)
def test_values_are_multiples_of_a_step(gains, step):
    assert value_step(Problem(GainCurves.from_increments(gains), 9)) == step


rows_of_classes = st.integers(1, 3).flatmap(
    lambda rows: st.tuples(
        st.lists(
            st.lists(
                st.tuples(
                    st.lists(st.integers(-6, 8), min_size=rows, max_size=rows).map(tuple),
                    st.integers(0, 30),
                ),
                min_size=1,
                max_size=3,
            ),
            max_size=4,
        ),
        st.lists(st.integers(-10, 16), min_size=rows, max_size=rows).map(tuple),
        st.lists(st.integers(0, 4), min_size=rows, max_size=rows).map(tuple),
    )
)


def brute_rows(classes, left, prices, window) -> bool:
    stay = (0,) * len(left)
    for choice in product(*([(stay, 0), *options] for options in classes)):
        rest = [own - sum(change[k] for change, _ in choice) for k, own in enumerate(left)]
        loss = sum(p for _, p in choice) + sum(p * r for p, r in zip(prices, rest, strict=True))
        if min(rest) >= 0 and loss < window:
            return True
    return False


@given(rows_of_classes, st.integers(0, 80), st.sampled_from([1, 1, 3]))
@settings(max_examples=examples(10))
def test_a_better_choice_under_several_budgets(drawn, window, factor):
    classes, left, prices = drawn
    # A common factor of all changes leaves some of each budget unspent.
    classes = [
        [
            (tuple(factor * c for c in change), p)
            for change, p in options
            if any(change) and p < window
        ]
        for options in classes
    ]
    classes = [options for options in classes if options]
    expected = brute_rows(classes, left, prices, window)
    assert better_exists(classes, left, prices, window, 10**6) == expected
    assert better_exists(classes, left, prices, window, 5) in (None, expected)


@pytest.mark.parametrize(
    ("left", "window", "expected"),
    [
        ((2, 5), 7, False),  # staying leaves 2, and 5 that nothing is ever spent on
        ((2, 5), 8, True),
        ((2, 0), 3, True),  # staying leaves 2
        ((2, 0), 2, False),
        ((2, -1), 99, False),
        ((1, 0), 2, True),
        ((1, 0), 1, False),
    ],
)
def test_a_budget_that_no_deviation_changes(left, window, expected):
    classes = [[((2, 0), 3)]]
    assert brute_rows(classes, left, (1, 1), window) is expected
    assert better_exists(classes, left, (1, 1), window, 10**6) is expected


def test_no_deviations_at_all():
    assert better_exists([], (3, 2), (1, 2), 8, 10**6) is True
    assert better_exists([], (3, 2), (1, 2), 7, 10**6) is False
    assert better_exists([], (-1, 2), (1, 2), 99, 10**6) is False


@given(capped(instances(layers=3, ranks=3)), st.data())
@settings(max_examples=examples(1))
def test_responses_to_several_prices(instance: Instance, data):
    problem = instance.problem()
    n = len(problem.rows)
    drawn = data.draw(st.lists(prices, min_size=n, max_size=n))
    weight = st.floats(-3.0, 3.0)
    weights = data.draw(
        st.one_of(
            st.just([]), st.lists(weight, min_size=len(problem.names), max_size=len(problem.names))
        )
    )
    rank_price = data.draw(st.sampled_from([0.0, 0.5, -0.25]))
    charges = Charges.of(problem, drawn, rank_price, weights)
    best_of_all = Fraction(0)
    for response in responses(problem, problem.lower, charges):
        scored: dict[int, Fraction] = {}
        for rank in problem.allowed_ranks(response.group[0]).tolist():
            ranks = np.zeros(len(problem.names), dtype=np.int64)
            ranks[list(response.group)] = rank
            charge = sum(
                (
                    Fraction(p) * row.cost_of(ranks)
                    for p, row in zip(drawn, problem.rows, strict=True)
                ),
                Fraction(rank_price) * rank * len(response.group),
            )
            for i in response.group if weights else ():
                charge += Fraction(weights[i]) * rank
            scored[rank] = problem.value_of(ranks) - charge
            assert Fraction(charges.at(response.group, rank), SCALE) == charge
        beside = problem.lower.copy()
        fitting: dict[int, Fraction] = {}
        for rank, score in scored.items():
            beside[list(response.group)] = rank
            if problem.fits(beside):
                fitting[rank] = score
        best = max(fitting.values())
        assert Fraction(response.best, SCALE) == best
        assert fitting[response.best_rank] == best
        mine = int(problem.lower[response.group[0]])
        assert Fraction(response.score, SCALE) == scored[mine]
        best_of_all += best
    assert best_of_all >= max(
        problem.value_of(ranks)
        - sum(
            (Fraction(p) * row.cost_of(ranks) for p, row in zip(drawn, problem.rows, strict=True)),
            Fraction(rank_price) * int(ranks.sum()),
        )
        - sum((Fraction(w) * int(r) for w, r in zip(weights, ranks, strict=False)), Fraction(0))
        for ranks in all_feasible(problem)
    )


def test_moves_and_what_is_left_by_row():
    curves = GainCurves.from_increments({"a": [4.0, 3.0], "b": [2.0]})
    caps = {"x": Cap(["a"], 9, [4], [1])}
    problem = Problem(curves, 20, costs=[2, 3], fixed_costs=[5, 0], caps=caps)
    answers = list(responses(problem, problem.lower, Charges.of(problem, [0.25, 0.5])))
    assert [r.best_rank for r in answers] == [2, 1]
    lefts, units = lefts_and_prices(problem.rows, (0.25, 0.5), answers)
    assert lefts == (20 - 9 - 3, 9 - 9)
    assert units == (SCALE // 4, SCALE // 2)
    # Rank 1 of a costs 2 and 4 less and loses 3 less 0.5 and 2; rank 0 7 and 4 + 1 + 4 less.
    moves = answers[0].moves(problem.rows, Fraction(99))
    assert [change for change, _ in moves] == [(-9, -9), (-2, -4)]
    assert dict(moves)[(-2, -4)] == SCALE // 2
    assert dict(moves)[(-9, -9)] == SCALE * 7 - SCALE * 9 // 4 - SCALE * 9 // 2
    assert answers[0].moves(problem.rows[1:], Fraction(99)) == [
        ((-9,), dict(moves)[(-9, -9)]),
        ((-4,), SCALE // 2),
    ]
    # b is not in the cap: none of its ranks changes that row.
    assert answers[1].moves(problem.rows[1:], Fraction(99)) == []
