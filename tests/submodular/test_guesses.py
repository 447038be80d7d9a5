"""Partial enumeration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.submodular import (
    CoupledQuadratic,
    Function,
    Knapsack,
    Modular,
    density_greedy_or_best_single,
    guesses,
    one_guess,
    two_guesses,
)
from tests.strategies import examples
from tests.submodular import drawn, exact


@settings(max_examples=examples(0.5))
@given(st.data())
def test_guesses_only_help(data):
    f = data.draw(st.one_of(drawn.coverage(), drawn.coupled()))
    knapsack = data.draw(drawn.knapsacks(f.n))
    none = density_greedy_or_best_single(f, knapsack)
    one, two = one_guess(f, knapsack), two_guesses(f, knapsack)
    values = [f.value(run.items) for run in (none, one, two)]
    slack = 1e-9 * max(values)
    assert values[0] <= values[1] + slack
    assert values[1] <= values[2] + slack
    for run in (one, two):
        assert run.complete
        assert run.trace == none.trace
        assert exact.feasible(knapsack, run.items)
        assert len(set(run.items)) == len(run.items)


def test_pairs_are_all_tried():
    """Greedy from any one element goes wrong; the best is the pair that fills the budget."""
    f = Modular([3.0, 7.0, 7.0, 7.1])
    knapsack = Knapsack([2, 5, 5, 6], budget=10)
    assert density_greedy_or_best_single(f, knapsack).items == (0, 1)
    assert set(one_guess(f, knapsack).items) == {1, 2}
    # Three are needed: with two guesses, the third comes of itself.
    f = Modular([4.0, 5.0, 5.0, 5.0])
    knapsack = Knapsack([3, 4, 4, 4], budget=12)
    assert one_guess(f, knapsack).items != (1, 2, 3)
    assert two_guesses(f, knapsack).items == (1, 2, 3)


def test_the_best_addition_on_the_way_counts():
    """From 0, density goes to the small 1; the large 2 beside 0 is better, and is tried."""
    values = {(0,): 3, (0, 1): 4, (0, 2): 9, (1,): 2, (2,): 6, (1, 2): 7, (): 0, (0, 1, 2): 9}
    f = Function(3, lambda s: values[tuple(sorted(s))])
    run = one_guess(f, Knapsack([5, 1, 10], budget=15))
    assert set(run.items) == {0, 2}


def test_small_gains_are_gains():
    f = Modular([0.03, 0.04, 0.04])
    assert one_guess(f, Knapsack([2, 3, 3], budget=6)).items == (1, 2)
    assert two_guesses(f, Knapsack([2, 3, 3], budget=6)).items == (1, 2)


def test_useless_guesses_are_passed_over():
    f = CoupledQuadratic([1.0, 1.0, 0.0], [[1.0, 1.0, 0], [1.0, 1.0, 0], [0, 0, 1.0]])
    assert two_guesses(f, Knapsack([1, 1, 1], budget=3)).items == (0,)
    assert two_guesses(f, Knapsack([1, 1, 1], budget=0)).items == ()


def test_too_many_runs_need_a_time_limit():
    f, knapsack = Modular([1.0] * 500), Knapsack([1] * 500, budget=2)
    with pytest.raises(
        ValueError,
        match=r"^two guesses: 500 elements take 125250 greedy runs, more than 100000; pass time_l",
    ):
        two_guesses(f, knapsack)
    run = two_guesses(f, knapsack, time_limit=0)
    assert not run.complete
    assert run.items == density_greedy_or_best_single(f, knapsack).items
    assert one_guess(f, Knapsack([1] * 500, budget=0)).complete


def test_how_many_runs_are_too_many(monkeypatch):
    f, knapsack = Modular([1.0, 2.0, 3.0]), Knapsack([1, 1, 1], budget=2)
    monkeypatch.setattr(guesses, "RUNS_WITHOUT_A_LIMIT", 6)
    assert two_guesses(f, knapsack).complete
    monkeypatch.setattr(guesses, "RUNS_WITHOUT_A_LIMIT", 5)
    with pytest.raises(ValueError, match=r"^two guesses: 3 elements take 6 greedy runs"):
        two_guesses(f, knapsack)
    assert one_guess(f, knapsack).complete
    monkeypatch.setattr(guesses, "RUNS_WITHOUT_A_LIMIT", 2)
    with pytest.raises(ValueError, match=r"^one guess: 3 elements take 3 greedy runs"):
        one_guess(f, knapsack)


def test_a_long_limit_changes_nothing():
    f, knapsack = Modular([3.0, 4.0, 4.0]), Knapsack([2, 3, 3], budget=6)
    assert two_guesses(f, knapsack, time_limit=1e9) == two_guesses(f, knapsack)
    with pytest.raises(ValueError, match=r"^costs: expected one for each of 3 elements, got 1$"):
        one_guess(f, Knapsack([1], 1))
