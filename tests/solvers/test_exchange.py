"""Exchanges: a heuristic, so what it returns is checked, and that it finds what it is made for."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.solvers import exchange as exchanges
from lorambo_alloc.solvers.core_program import Class
from lorambo_alloc.solvers.exchange import best_exchange as exchange
from tests.solvers.test_core_program import classes_of, least_loss, loss_of
from tests.strategies import core_classes, examples


def best_exchange(
    classes: list[Class], residual: int, price: int, incumbent: int, target: int
) -> list[int] | None:
    return exchange(classes, residual, price, incumbent, target, rounds=4)


@given(core_classes(), st.integers(-15, 25), st.integers(1, 9), st.integers(0, 200))
@settings(max_examples=examples(1))
def test_choices_beat_the_incumbent_or_there_are_none(drawn, residual, price, incumbent):
    classes = classes_of(drawn)
    choices = best_exchange(classes, residual, price, incumbent, 0)
    best = least_loss(classes, residual, price)
    if choices is None:
        # With so few deviations, a better single one is never overlooked.
        singles = [loss_of(classes, [0] * len(classes), residual, price)]
        for n, group in enumerate(classes):
            for option in range(1, len(group.moves) + 1):
                one = [option if k == n else 0 for k in range(len(classes))]
                singles.append(loss_of(classes, one, residual, price))
        assert all(loss is None or loss >= incumbent for loss in singles)
    else:
        loss = loss_of(classes, choices, residual, price)
        assert loss is not None
        assert best is not None
        assert best <= loss < incumbent


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_of_a_few_that_fills_the_budget_is_found(count, sign):
    # Powers of three: only one subset sums to the residual.
    classes = [Class(np.array([sign * 3**k]), np.array([0])) for k in range(12)]
    wanted = sorted([1, 5, 8, 11, 0, 6][:count])
    residual = sign * sum(3**k for k in wanted)
    choices = best_exchange(classes, residual, 10, 10**6, 0)
    assert choices is not None
    assert [k for k, choice in enumerate(choices) if choice] == wanted


def test_spending_and_freeing_make_up_for_each_other():
    classes = [Class(np.array([m]), np.array([0])) for m in (100, 41, -63, -7)]
    choices = best_exchange(classes, 30, 5, 10**6, 0)
    assert choices is not None
    # 100 - 63 - 7 = 30.
    assert choices == [1, 0, 1, 1]


def test_more_deviations_than_are_looked_at():
    rng = np.random.default_rng(0)
    moves = rng.integers(10**5, 10**6, 1500) * 2
    classes = [Class(np.array([m]), np.array([0])) for m in moves]
    residual, price = int(moves[700:704].sum()), 3
    choices = best_exchange(classes, residual, price, price * residual, 0)
    assert choices is not None
    loss = loss_of(classes, choices, residual, price)
    assert loss is not None
    # Pairs of pairs are so many that the budget is filled almost to the last unit.
    assert loss <= price * 100


@pytest.mark.parametrize("seed", range(3))
def test_few_deviations_of_large_costs_fill_the_budget_by_triples(seed):
    rng = np.random.default_rng(seed)
    moves = rng.integers(9 * 10**8, 11 * 10**8, 100) * np.tile([1, -1], 50)
    classes = [Class(np.array([m]), np.array([0])) for m in moves]
    residual = int(rng.integers(0, 2 * 10**8))
    choices = exchange(classes, residual, 1, 10**12, 0, rounds=4)
    assert choices is not None
    loss = loss_of(classes, choices, residual, 1)
    assert loss is not None
    assert loss <= 10  # pairs of pairs alone leave 44 to 550


@pytest.mark.parametrize("seed", range(4))
def test_moves_near_the_end_of_64_bits(seed):
    rng = np.random.default_rng(seed)
    moves = rng.integers(2**57, 2**62, 60) * np.tile([1, -1], 30)
    classes = [Class(np.array([m]), np.array([0])) for m in moves]
    residual = int(rng.integers(0, 2**61))
    choices = exchange(classes, residual, 1, 2**58, 0, rounds=8)
    if choices is not None:
        spent = sum(int(m) for m, choice in zip(moves, choices, strict=True) if choice)
        assert 0 <= residual - spent < 2**58


def test_a_target_is_good_enough():
    classes = [Class(np.array([m]), np.array([0])) for m in range(2, 900)]
    choices = best_exchange(classes, 1, 7, 100, 7)
    assert choices == [0] * len(classes)
    assert best_exchange(classes, 1, 7, 7, 7) is None


def test_one_option_a_class():
    group = Class(np.array([2, 3]), np.array([0, 0]))
    # 2 + 3 would fill the budget, but they exclude each other.
    assert best_exchange([group], 5, 1, 100, 0) == [2]


def test_no_deviations():
    assert best_exchange([], 4, 3, 100, 0) == []
    assert best_exchange([], 4, 3, 12, 0) is None
    assert best_exchange([], -1, 3, 100, 0) is None


def test_balanced_exchanges_spend_as_often_as_they_free():
    moves = [8, 11, 17, 23, 31, -5, -7, -9, -13, -20]
    classes = [Class(np.array([m]), np.array([0])) for m in moves]
    for residual in range(30):
        choices = exchange(classes, residual, 3, 10**6, 0, rounds=2, balanced=True)
        assert choices is not None
        signs = [np.sign(m) for m, choice in zip(moves, choices, strict=True) if choice]
        assert sum(signs) == 0
        loss = loss_of(classes, choices, residual, 3)
        assert loss is not None
        assert loss <= 3 * residual


def test_rounds_that_bring_nothing_end(monkeypatch):
    calls = []
    monkeypatch.setattr(exchanges, "_best_two_bundles", lambda *_: calls.append(1))
    assert exchange([Class(np.array([5]), np.array([0]))], 7, 1, 100, 0, rounds=99) is None
    assert len(calls) == 24


def test_no_rounds_and_no_time():
    classes = [Class(np.array([5]), np.array([0]))]
    assert exchange(classes, 5, 1, 100, 0, rounds=0) is None
    assert exchange(classes, 5, 1, 100, 0, rounds=9, deadline=time.monotonic() - 1) is None
    assert exchange(classes, 5, 1, 100, 0, rounds=1, deadline=time.monotonic() + 999) == [1]
