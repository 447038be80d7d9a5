"""Steps, periods and budgets that change; state; what is refused."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import (
    BudgetSchedule,
    InfeasibleError,
    OnlineAllocator,
    Proposal,
    cubic_budget,
    uniform_rank,
)
from lorambo_alloc.online.timetable import Timetable

COSTS = {"a": 3, "b": 2, "c": 5}


def noisy(rng, length=8):
    return {
        name: np.concatenate([[0.0], np.cumsum(rng.exponential(size=length))]) for name in COSTS
    }


def adalora_budget(init, target, tinit, tfinal, total, step):
    """`RankAllocator.budget_schedule` of PEFT 0.21.2, as its formula says it."""
    if step <= tinit:
        return init
    if step > total - tfinal:
        return target
    share = 1 - (step - tinit) / (total - tfinal - tinit)
    return int((init - target) * share**3 + target)


def test_a_cubic_budget_is_adaloras():
    schedule = cubic_budget(1200, 700, begin=50, end=800)
    mine = [schedule.at(step) for step in range(1000)]
    theirs = [adalora_budget(1200, 700, 50, 200, 1000, step) for step in range(1000)]
    assert max(abs(x - y) for x, y in zip(mine, theirs, strict=True)) <= 1  # theirs is in doubles
    assert sum(x != y for x, y in zip(mine, theirs, strict=True)) < 5
    assert all(x >= y for x, y in pairwise(mine))


@given(
    st.integers(0, 10**15), st.integers(0, 10**15), st.integers(0, 50), st.integers(1, 60),
    st.integers(0, 120), st.none() | st.integers(0, 60),
)  # fmt: skip
def test_the_least_budget_of_some_steps(start, final, begin, length, first, more):
    schedule = cubic_budget(start, final, begin=begin, end=begin + length)
    last = 300 if more is None else first + more
    least = min(schedule.at(step) for step in range(first, last + 1))
    assert schedule.least(first, None if more is None else last) == least


@given(st.integers(0, 20), st.integers(1, 9), st.none() | st.integers(0, 40), st.integers(0, 50))
def test_the_timetable(warmup, period, freeze, step):
    on = [
        s for s in range(200) if s in range(warmup, 200, period) and (freeze is None or s < freeze)
    ]
    table = Timetable(warmup, period, freeze)
    assert table.has(step) == (step in on)
    assert table.after(step) == next((s for s in on if s > step), None)


@given(st.integers(0, 2**32 - 1), st.data())
def test_the_budget_is_never_exceeded(seed, data):
    """Whatever the schedule, and wherever proposals were not carried out: said, and made up for."""
    rng = np.random.default_rng(seed)
    start, final = data.draw(st.integers(10, 60)), data.draw(st.integers(10, 60))
    begin, end = data.draw(st.integers(0, 5)), data.draw(st.integers(6, 20))
    online = OnlineAllocator(
        COSTS,
        cubic_budget(start, final, begin=begin, end=end),
        ranks={name: int(rank) for name, rank in zip(COSTS, rng.integers(0, 9, 3), strict=True)},
        warmup=data.draw(st.integers(0, 8)), period=data.draw(st.integers(1, 6)),
        freeze=data.draw(st.none() | st.integers(5, 25)), min_rank=1,
        max_moves=data.draw(st.none() | st.integers(1, 3)),
        exploration=data.draw(st.sampled_from([0.0, 0.3])),
        switching_share=data.draw(st.sampled_from([0.0, 0.3])),
    )  # fmt: skip
    for step in range(30):
        assert online.steps == step
        if data.draw(st.booleans()):
            online.observe(noisy(rng, int(rng.integers(1, 9))))
        proposal = online.propose()
        assert bool(proposal) <= online.due
        failed = data.draw(st.sampled_from([False, False, False, True]))
        if online.over_budget or not failed:
            online.accept(proposal)
        assert online.cost <= online.budget_at(step)
        assert online.cost <= proposal.budget <= online.budget_at(step)
        online.step()


def test_a_proposal_that_was_not_carried_out_is_due_again_while_the_budget_is_exceeded():
    online = OnlineAllocator(COSTS, cubic_budget(40, 10, begin=0, end=10), ranks={"a": 9}, period=5)
    assert online.over_budget  # of step 4
    assert online.propose()
    online.step()
    assert online.due
    online.accept(online.propose())
    assert online.cost <= online.budget_at(4)
    online.step()
    assert not online.due
    assert online.propose().reason == "the next proposal is due at step 5"


def test_before_a_freeze_the_budget_of_all_that_follows_is_kept():
    online = OnlineAllocator(
        COSTS, cubic_budget(60, 10, begin=0, end=100), ranks={"a": 3}, period=10, freeze=25
    )
    online.observe(noisy(np.random.default_rng(0)))
    budgets = []
    for _ in range(25):
        proposal = online.propose()
        online.accept(proposal)
        budgets.append(proposal.budget)
        online.step()
    assert budgets[0] == online.budget_at(9)
    assert budgets[20] == 10
    assert online.propose().reason == "frozen since step 25"
    assert online.next_due is None


@pytest.mark.parametrize("exploration", [0.0, 0.5])
def test_a_restart_goes_on_to_the_bit(exploration):
    def make():
        return OnlineAllocator(
            COSTS, cubic_budget(50, 30, begin=3, end=20), ranks={"a": 4, "b": 4, "c": 4},
            period=3, warmup=2, exploration=exploration, switching_share=0.2, max_moves=4,
        )  # fmt: skip

    def run(online, steps, restart=None):
        found = []
        for step in steps:
            if step == restart:
                text = json.dumps(online.state_dict(), allow_nan=False)
                online = make()
                online.load_state_dict(json.loads(text))
            rng = np.random.default_rng(step)
            online.observe({n: c for n, c in noisy(rng).items() if rng.random() < 0.7})
            proposal = online.propose()
            online.accept(proposal)
            found.append((proposal.ranks, proposal.reason, proposal.price, proposal.lost))
            online.step()
        return found, online

    whole, one = run(make(), range(25))
    for restart in (1, 10, 24):
        again, other = run(make(), range(25), restart)
        assert again == whole
        assert other.state_dict() == one.state_dict()
    assert len({tuple(ranks.values()) for ranks, *_ in whole}) > 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=2), "expected version 1, got 2"),
        (lambda s: s["costs"].update(a=4), "layer 'a': expected a cost of 3 for a rank, got 4"),
        (lambda s: s["costs"].pop("b"), "state: costs: layer 'b' is missing"),
        (lambda s: s["ranks"].update(x=4), "state: ranks: layer 'x' is not among"),
        (lambda s: s["ranks"].update(a=-1), "ranks: layer 'a': expected a whole number >= 0"),
        (lambda s: s.pop("steps"), "state: 'steps'"),
        (lambda s: s["estimates"]["curves"]["a"].pop("means"), "state: layer 'a': 'means'"),
        (
            lambda s: s["estimates"]["curves"]["a"].update(means=[1.0]),
            "layer 'a': expected moments of one length",
        ),
        (lambda s: s["estimates"].update(total=99.0), "total: expected a number up to the rounds"),
        (lambda s: s.update(estimates=[]), "state: estimates: expected a mapping"),
        (
            lambda s: s["estimates"]["curves"]["a"].update(spreads=[-1.0] * 8),
            "layer 'a': spreads: expected numbers >= 0",
        ),
        (
            lambda s: s["estimates"]["curves"]["a"].update(weights=[0.0] * 8),
            "layer 'a': weights: expected numbers above 0",
        ),
        (
            lambda s: s["estimates"]["curves"].update(
                a={"weights": [], "squares": [], "means": [], "spreads": []}
            ),
            "layer 'a': weights: expected numbers >= 0, got",
        ),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(change, message):
    online = OnlineAllocator(COSTS, 30)
    online.observe(noisy(np.random.default_rng(0)))
    state = json.loads(json.dumps(online.state_dict()))
    change(state)
    other = OnlineAllocator(COSTS, 30, ranks={"a": 1})
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.state_dict() == before
    with pytest.raises(ValueError, match="state: expected a mapping, got None"):
        other.load_state_dict(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.5}, "budget: expected a whole number"),
        ({"ranks": {"x": 1}}, "ranks: layer 'x' is not among the layers"),
        ({"ranks": [1, 2, 3]}, "ranks: expected a mapping"),
        ({"ranks": {"a": -1}}, "ranks: layer 'a': expected a whole number >= 0, got -1"),
        ({"discount": 0.0}, "discount: expected a finite number above 0 and at most 1, got 0.0"),
        ({"discount": 1.1}, "discount: expected a finite number above 0 and at most 1, got 1.1"),
        ({"warmup": -1}, "warmup: expected a whole number >= 0"),
        ({"period": 0}, "period: expected a whole number >= 1"),
        ({"freeze": 0.5}, "freeze: expected a whole number"),
        ({"max_moves": 0}, "max_moves: expected a whole number >= 1"),
        ({"exploration": float("nan")}, "exploration: expected a finite number >= 0"),
        ({"switching_share": -0.1}, "switching_share: expected a finite number >= 0"),
        ({"switching_cost": {"x": 1.0}}, "switching_cost: layer 'x' is not among"),
        ({"switching_cost": {"a": -1.0}}, "switching_cost: layer 'a': expected a finite"),
        ({"switching_cost": 1e150}, "and at most 1e\\+140, got 1e\\+150"),
        ({"ranks": {"a": 10**30}}, "ranks: layer 'a': expected at most 2\\^53"),
        ({"tied": None}, "tied: expected groups"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"tied": [["a", "x"]]}, "tied: layer 'x'"),
        ({"min_rank": 5, "max_rank": 4}, "min_rank 5 is above max_rank 4"),
        ({"time_limit": "soon"}, "time_limit: expected seconds"),
    ],
)
def test_arguments_of_another_form_are_refused(options, message):
    options = {"budget": 30, **options}
    with pytest.raises(ValueError, match=message):
        OnlineAllocator(COSTS, **options)


def test_a_budget_below_the_least_ranks_is_refused_at_once():
    schedule = cubic_budget(30, 9, begin=0, end=10)
    with pytest.raises(InfeasibleError, match="the minimum ranks cost 10, more than the budget 9"):
        OnlineAllocator(COSTS, schedule, min_rank=1)
    with pytest.raises(InfeasibleError, match="small"):
        OnlineAllocator(COSTS, 30, min_rank=1, caps={"small": (["a"], 2)})
    with pytest.raises(ValueError, match="costs: expected a mapping"):
        OnlineAllocator({}, 1)


def test_schedules_of_another_form_are_refused():
    for options in ({"begin": 5, "end": 5}, {"begin": -1, "end": 5}):
        with pytest.raises(ValueError, match=r"begin|end"):
            cubic_budget(1, 2, **options)
    with pytest.raises(ValueError, match="with_costs"):
        cubic_budget(uniform_rank(2), 10, begin=0, end=5).at(0)


def as_any(number: int) -> Any:
    return np.int64(number)


def test_steps_and_budgets_of_numpy_do_not_overflow():
    start, final, begin, end = map(as_any, (10**12, 10, 0, 10**7))
    schedule = cubic_budget(start, final, begin=begin, end=end)
    expected = cubic_budget(10**12, 10, begin=0, end=10**7)
    assert schedule == expected
    for step in map(as_any, range(3)):
        assert type(schedule.at(step)) is int
        assert schedule.at(step) == expected.at(int(step))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 2, 0, 1), "start: expected a whole number >= 0, got 1.5"),
        ((5, -2, 0, 1), "final: expected a whole number >= 0, got -2"),
        ((5, 2, 3, 3), "end: expected a step above begin = 3, got 3"),
    ],
)
def test_schedules_made_without_cubic_budget_are_checked_too(arguments, message):
    with pytest.raises(ValueError, match=message):
        BudgetSchedule(*arguments)


def test_steps_before_the_first_are_refused():
    with pytest.raises(ValueError, match="step: expected a whole number >= 0, got -1"):
        cubic_budget(5, 1, begin=0, end=3).at(-1)


def test_nothing_is_said_to_be_frozen_before_it_is():
    online = OnlineAllocator(COSTS, 30, period=10, freeze=25)
    for _ in range(21):
        online.step()
    assert online.propose().reason == "no proposal is due before the freeze at step 25"
    never = OnlineAllocator(COSTS, 30, warmup=10, freeze=5)
    assert never.propose().reason == "no proposal is due before the freeze at step 5"


def test_uniform_ranks_as_budgets():
    online = OnlineAllocator(COSTS, uniform_rank(2))
    assert online.budget_at(0) == online.budget_at(10**9) == 20
    online = OnlineAllocator(COSTS, cubic_budget(uniform_rank(4), uniform_rank(1), begin=0, end=8))
    assert isinstance(online.budget, BudgetSchedule)
    assert [online.budget_at(step) for step in (0, 4, 8)] == [40, 13, 10]


def test_a_proposal_reads_well():
    online = OnlineAllocator({"q": 16, "v": 12}, 44, ranks={"q": 1, "v": 1}, period=10)
    online.observe({"q": [0.0, 9.0, 13.0, 14.0], "v": [0.0, 6.25, 6.5]})
    proposal = online.propose()
    assert isinstance(proposal, Proposal)
    assert repr(proposal).splitlines() == [
        "step 0: 1 rank of 1 layer moves",
        "  q  1 -> 2",
        f"  price {proposal.price:.4g}, budget 44, optimal exact",
    ]
    online.accept(proposal)
    assert repr(online.propose()).splitlines()[0] == ("step 0: stay (no move gains anything)")
    online.accept({"q": 1})
    assert online.ranks == {"q": 1, "v": 1}
    with pytest.raises(ValueError, match="layer 'x' is not among"):
        online.accept({"x": 1})
