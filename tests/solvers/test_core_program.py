"""The core program against enumeration of all choices."""

import time
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.solvers import core_program
from lorambo_alloc.solvers.core_program import Class, promising_first, solve_core
from tests.strategies import core_classes, examples

FAR = 1 << 40


def classes_of(drawn: list[tuple[list[int], list[int]]]) -> list[Class]:
    return [Class(np.array(moves), np.array(penalties)) for moves, penalties in drawn]


def loss_of(classes: list[Class], choices: Sequence[int], residual: int, price: int) -> int | None:
    """The loss of one choice a class; None if it costs more than there is."""
    left, loss = residual, 0
    for group, choice in zip(classes, choices, strict=True):
        if choice:
            left -= int(group.moves[choice - 1])
            loss += int(group.penalties[choice - 1])
    return None if left < 0 else loss + price * left


def least_loss(classes: list[Class], residual: int, price: int) -> int | None:
    every = product(*(range(len(group.moves) + 1) for group in classes))
    losses = [loss_of(classes, choices, residual, price) for choices in every]
    return min((loss for loss in losses if loss is not None), default=None)


residuals, prices = st.integers(-15, 25), st.integers(1, 9)


@given(core_classes(), residuals, prices, st.integers(0, 120))
@settings(max_examples=examples(2))
def test_the_least_loss_is_found(drawn, residual, price, incumbent):
    classes = classes_of(drawn)
    best = least_loss(classes, residual, price)
    outcome = solve_core(classes, residual, price, incumbent, 10**6)
    if best is None or best >= incumbent:
        assert (outcome.loss, outcome.choices, outcome.bound) == (incumbent, None, incumbent)
    else:
        assert outcome.loss == outcome.bound == best
        assert outcome.choices is not None
        assert loss_of(classes, outcome.choices, residual, price) == best


@given(core_classes(), residuals, prices, st.integers(1, 4))
@settings(max_examples=examples(2))
def test_what_is_dropped_is_part_of_the_bound(drawn, residual, price, states):
    classes = classes_of(drawn)
    best = least_loss(classes, residual, price)
    outcome = solve_core(classes, residual, price, FAR, states)
    assert outcome.bound <= outcome.loss <= FAR
    if best is not None:
        assert outcome.bound <= best <= outcome.loss
    if outcome.choices is not None:
        assert loss_of(classes, outcome.choices, residual, price) == outcome.loss
    # One state more than allowed may be kept for the walk back.
    assert outcome.states <= states + 1


@given(core_classes(), residuals, prices)
@settings(max_examples=examples(1))
def test_no_time_still_gives_a_bound(drawn, residual, price):
    classes = classes_of(drawn)
    best = least_loss(classes, residual, price)
    outcome = solve_core(classes, residual, price, FAR, 10**6, time.monotonic() - 1.0)
    assert outcome.bound <= outcome.loss
    if best is not None:
        assert outcome.bound <= best <= outcome.loss
    # Doing nothing is looked at all the same.
    if residual >= 0:
        assert outcome.loss == residual * price
        assert outcome.choices == [0] * len(classes)


def test_a_deadline_that_is_not_reached_changes_nothing():
    classes = [Class(np.array([3]), np.array([1])), Class(np.array([4]), np.array([2]))]
    outcome = solve_core(classes, 7, 5, 100, 10**6, time.monotonic() + 3600)
    assert (outcome.loss, outcome.bound, outcome.choices) == (3, 3, [1, 1])


def test_no_classes():
    assert solve_core([], 3, 2, 100, 10).loss == 6
    assert solve_core([], 3, 2, 100, 10).choices == []
    nothing = solve_core([], -1, 2, 100, 10)
    assert (nothing.loss, nothing.choices, nothing.bound) == (100, None, 100)


@pytest.mark.parametrize("states", [1, 4, 16, 64])
def test_no_more_states_than_allowed(states):
    # Every subset of these moves is a state of its own.
    classes = [Class(np.array([3**k]), np.array([1])) for k in range(9)]
    residual, price = 3**8 + 3**7 + 3**3, 10
    outcome = solve_core(classes, residual, price, FAR, states)
    assert outcome.states <= states + 1
    assert outcome.bound <= 3 <= outcome.loss
    whole = solve_core(classes, residual, price, FAR, 10**6)
    assert whole.loss == whole.bound == 3
    assert whole.states > 64


def test_an_incumbent_is_only_beaten_by_less():
    classes = [Class(np.array([5]), np.array([3]))]
    assert solve_core(classes, 5, 1, 4, 10).loss == 3
    assert solve_core(classes, 5, 1, 3, 10).choices is None


def test_a_wide_class_is_worked_off_in_blocks():
    rng = np.random.default_rng(0)
    # States times options exceed a block of 2^20.
    first = Class(rng.integers(1, 10**9, 3000), rng.integers(0, 10**6, 3000))
    second = Class(-rng.integers(1, 10**9, 3000), rng.integers(0, 10**6, 3000))
    residual, price = 5, 1000
    outcome = solve_core([first, second], residual, price, FAR, 10**7)
    left = residual - first.moves[:, None] - second.moves[None, :]
    loss = first.penalties[:, None] + second.penalties[None, :] + price * left
    best = min(int(loss[left >= 0].min()), residual * price)
    assert outcome.loss == outcome.bound == best
    assert outcome.choices is not None
    assert loss_of([first, second], outcome.choices, residual, price) == best


@pytest.mark.parametrize("scale", [1, 2**30])
def test_large_numbers(scale):
    rng = np.random.default_rng(3)
    classes = [
        Class(rng.integers(-9, 10, 4) * 2 + 1, rng.integers(0, 50, 4) * scale) for _ in range(5)
    ]
    best = least_loss(classes, 11, 7 * scale)
    assert solve_core(classes, 11, 7 * scale, 1 << 58, 10**6).loss == best


class TestOrder:
    @given(core_classes())
    def test_every_class_comes_once_by_ascending_slope(self, drawn):
        classes = classes_of(drawn)
        order = promising_first(classes)
        assert sorted(order) == list(range(len(classes)))
        slopes = [min(classes[n].slopes) for n in order]
        assert slopes == sorted(slopes)

    def test_slopes(self):
        group = Class(np.array([4, -3, 2, -1]), np.array([9, 8, 7, 6]))
        assert group.slopes == (2, 2)
        up, down = Class(np.array([4]), np.array([9])).slopes
        assert up == 2
        assert down > 1 << 60

    def test_equal_slopes_spend_and_free_in_turn(self):
        spend = [Class(np.array([m]), np.array([0])) for m in (5, 5, 5)]
        free = [Class(np.array([-m]), np.array([0])) for m in (5, 5, 5)]
        classes = [*spend, *free]
        moves = [int(classes[n].moves[0]) for n in promising_first(classes)]
        assert moves == [5, -5, 5, -5, 5, -5]
        assert max(abs(np.cumsum(moves))) == 5

    def test_one_sided_classes_are_taken_to_the_end(self):
        classes = [Class(np.array([-m]), np.array([0])) for m in (1, 2, 3)]
        assert sorted(promising_first(classes)) == [0, 1, 2]
        assert promising_first([]) == []


@given(core_classes(), st.integers(-15, 25), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=examples(2))
def test_small_blocks_and_early_pruning_change_nothing(drawn, residual, price, block):
    classes = classes_of(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_program, "_BLOCK", block)
        outcome = solve_core(classes, residual, price, 100, 10**6)
    best = least_loss(classes, residual, price)
    assert outcome.loss == outcome.bound == min(100, 100 if best is None else best)
    if outcome.choices is not None:
        assert loss_of(classes, outcome.choices, residual, price) == outcome.loss


@given(core_classes(), st.integers(-15, 25), st.integers(1, 5), st.integers(0, 8))
@settings(max_examples=examples(3))
def test_what_a_deadline_skips_is_part_of_the_bound(drawn, residual, price, looks):
    """The clock is looked at in the middle of a class too."""
    classes = classes_of(drawn)
    left = iter([False] * looks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_program, "_BLOCK", 1)
        patch.setattr(core_program, "_late", lambda deadline: next(left, True))
        outcome = solve_core(classes, residual, price, 100, 10**6, deadline=1.0)
    best = least_loss(classes, residual, price)
    assert outcome.bound <= min(100, 100 if best is None else best) <= outcome.loss
    if outcome.choices is not None:
        assert loss_of(classes, outcome.choices, residual, price) == outcome.loss
