"""One rank at a time: each step by definition, and where it ends."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, allocate
from lorambo_alloc.baselines import one_rank_exchange
from lorambo_alloc.baselines.equal import uniform
from lorambo_alloc.testing import brute_force
from tests.strategies import instances

GAINS = {"q": [9.0, 6.0, 3.0], "v": [4.0, 2.0, 1.0], "o": [5.0, 1.0, 0.5]}


def problem(budget=6, costs=None, gains=GAINS, **options) -> Problem:
    curves = GainCurves.from_increments(gains)
    return Problem(curves, budget, costs=costs or dict.fromkeys(gains, 1), **options)


def test_the_least_rank_goes_to_the_best_layer():
    assert dict(one_rank_exchange(problem(), {"q": 2, "v": 2, "o": 2})) == {"q": 3, "v": 2, "o": 1}


def test_what_is_left_of_the_budget_is_spent_first():
    answer = one_rank_exchange(problem(7), {"q": 2, "v": 2, "o": 2})
    assert dict(answer) == {"q": 3, "v": 2, "o": 2}


def test_gain_counts_per_cost():
    # q's next rank gains 6 for 3, v's 4 for 1; o's last rank loses 1 for 1.
    answer = one_rank_exchange(problem(5, {"q": 3, "v": 1, "o": 1}), [1, 0, 2])
    assert answer.ranks.tolist() == [1, 1, 1]


def test_a_donor_that_is_too_cheap_is_passed_over():
    # q's next rank gains most per cost, but costs 2: o's last rank, worth least, frees only 1.
    costs = {"q": 2, "v": 2, "o": 1}
    gains = {"q": [30.0, 20.0], "v": [8.0, 2.0], "o": [5.0, 0.5]}
    assert one_rank_exchange(problem(8, costs, gains), [1, 2, 2]).ranks.tolist() == [2, 1, 2]


def test_an_exchange_that_loses_is_not_made():
    # By density q (3 a unit) should take from v (2 a unit), but 3 for 6 is a loss.
    gains, costs = {"q": [5.0, 3.0], "v": [6.0]}, {"q": 1, "v": 3}
    assert one_rank_exchange(problem(4, costs, gains), [1, 1]).ranks.tolist() == [1, 1]


def test_a_donor_worth_more_per_cost_keeps_its_rank():
    # 6 for 3 against 3 for 1: the exchange would gain, but runs against the order.
    gains, costs = {"q": [9.0, 6.0], "v": [3.0]}, {"q": 3, "v": 1}
    assert one_rank_exchange(problem(6, costs, gains), [1, 1]).ranks.tolist() == [1, 1]


def test_no_layer_is_its_own_donor():
    gains = {"q": [1.0, 3.0], "v": [2.0]}  # q's curve is not concave: its last rank is worth least
    assert one_rank_exchange(problem(2, None, gains), [1, 1]).ranks.tolist() == [2, 0]


def test_no_rank_is_given_for_a_loss():
    gains = {"q": [1.0, -1.0], "v": [1.0, 0.0]}
    assert one_rank_exchange(problem(4, None, gains), [1, 1]).ranks.tolist() == [1, 1]


def test_it_stops_short_of_the_optimum_where_costs_differ():
    # Two ranks of v must go for one of q.
    gains, costs = {"q": [5.0], "v": [2.0, 2.0]}, {"q": 2, "v": 1}
    short = problem(2, costs, gains)
    answer = one_rank_exchange(short, [0, 2])
    assert answer.ranks.tolist() == [0, 2]
    assert brute_force(short)[0] == 5
    assert answer.certificate.gap >= 1


def test_a_tied_group_moves_as_one():
    answer = one_rank_exchange(problem(6, tied=[("q", "v")]), [2, 2, 2])
    assert answer.ranks.tolist() == [2, 2, 2]  # two ranks for one do not fit
    answer = one_rank_exchange(problem(7, tied=[("q", "v")]), [2, 2, 2])
    assert answer.ranks.tolist() == [3, 3, 1]


def test_what_is_refused():
    with pytest.raises(ValueError, match="budget"):
        one_rank_exchange(problem(), [3, 3, 3])
    with pytest.raises(ValueError, match="ranks: layer 'o' is missing"):
        one_rank_exchange(problem(), {"q": 1, "v": 1})
    with pytest.raises(ValueError, match="operator"):
        one_rank_exchange(Problem({"q": [1.0]}, 1, objective="operator"), [0])


@given(instance=instances(), data=st.data())
def test_each_step_is_feasible_and_gains(instance, data):
    small = Problem(instance.spectra, instance.budget, **instance.keywords)
    assume(small.objective.kind != "operator")
    now = uniform(small)
    for _ in range(50):
        after = one_rank_exchange(small, now)
        small.check(after.ranks)
        after.certificate.verify(small, after.ranks)
        if np.array_equal(after.ranks, now.ranks):
            break
        assert small.value_of(after.ranks) > small.value_of(now.ranks)
        now = after
    optimum = small.value_of(allocate(instance.spectra, instance.budget, **instance.keywords).ranks)
    assert small.value_of(now.ranks) <= optimum
