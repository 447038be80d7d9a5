"""The best move against every move, exactly."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import OnlineAllocator

GAINS = st.one_of(st.integers(-2, 6).map(float), st.floats(-3, 10).map(lambda x: round(x, 3)))


@st.composite
def situations(draw):
    """Observed gains of single ranks, costs, present ranks, prices of moving and a budget."""
    count = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    names = [f"layer{i}" for i in range(count)]
    rows = {
        name: draw(st.lists(GAINS, min_size=n, max_size=n))
        for name, n in zip(names, lengths, strict=True)
    }
    if draw(st.booleans()):
        rows = {name: sorted(row, reverse=True) for name, row in rows.items()}
    costs = {name: draw(st.integers(1, 7)) for name in names}
    now = {name: draw(st.integers(0, len(rows[name]))) for name in names}
    switching = {name: draw(st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0, 3)) for name in names}
    budget = draw(st.integers(0, sum(costs[n] * len(rows[n]) for n in names)))
    return rows, costs, now, switching, budget


def every_move(rows, costs, now, switching, budget):
    """(value, ranks, moved) of every rank vector within the budget, in exact arithmetic."""
    for ranks in product(*(range(len(row) + 1) for row in rows.values())):
        if sum(c * r for c, r in zip(costs.values(), ranks, strict=True)) <= budget:
            value, moved = Fraction(0), 0
            for name, rank in zip(rows, ranks, strict=True):
                price = switching[name]
                value += sum(Fraction(gain) for gain in rows[name][:rank])
                value -= Fraction(price) * abs(rank - now[name])
                moved += abs(rank - now[name])
            yield value, dict(zip(rows, ranks, strict=True)), moved


def curves_of(rows):
    return {name: np.concatenate([[0.0], np.cumsum(row)]) for name, row in rows.items()}


def observed_rows(online):
    """The estimates as gains of single ranks: those that the proposal is made from."""
    return {n: c.means.tolist() for n, c in online._estimates.curves.items()}


@given(situations())
def test_a_proposal_is_the_best_of_all_moves(situation):
    rows, costs, now, switching, budget = situation
    online = OnlineAllocator(costs, budget, ranks=now, switching_cost=switching)
    online.observe(curves_of(rows))
    rows = observed_rows(online)
    proposal = online.propose()
    best = {}
    for value, ranks, _ in every_move(rows, costs, now, switching, budget):
        best[tuple(ranks.values())] = value
    # Gain and price of a rank are added in doubles before the exact search.
    assert float(max(best.values()) - best[tuple(proposal.ranks.values())]) <= 1e-12
    allocation = proposal.allocation
    assert allocation.certificate.status.startswith("optimal")
    ranks = np.array(list(proposal.ranks.values()))
    allocation.certificate.verify(allocation.problem, ranks)
    fits = tuple(now.values()) in best
    if fits and best[tuple(now.values())] == max(best.values()) and not any(switching.values()):
        assert not proposal
        assert proposal.reason == "no move is worth its switching cost"
    assert bool(proposal) == (proposal.ranks != now)


@given(situations(), st.integers(1, 3))
def test_few_moves_are_the_best_of_as_few_and_their_loss_is_bounded(situation, limit):
    rows, costs, now, switching, budget = situation
    options = {"ranks": now, "switching_cost": switching}
    online = OnlineAllocator(costs, budget, max_moves=limit, **options)
    online.observe(curves_of(rows))
    rows = observed_rows(online)
    proposal = online.propose()
    moved = sum(map(abs, proposal.moves.values()))
    moves = list(every_move(rows, costs, now, switching, budget))
    mine = next(value for value, ranks, _ in moves if ranks == proposal.ranks)
    if moved > limit:  # the budget forces it: no fewer would do
        assert moved == min(m for _, _, m in moves)
        assert any("more than" in note for note in proposal.notes)
        return
    assert float(max(v for v, _, m in moves if m <= moved) - mine) <= 1e-12
    best = max(v for v, _, m in moves if m <= limit)
    assert float(best - mine) <= proposal.raised * (limit - moved) + 1e-12
    free = OnlineAllocator(costs, budget, **options)
    free.observe(curves_of(observed_rows(online)))
    if sum(map(abs, free.propose().moves.values())) <= limit:
        assert proposal.raised == 0.0


def test_the_limit_on_moves_is_reached_where_the_gains_differ():
    names = [f"layer{i}" for i in range(20)]
    rng = np.random.default_rng(0)
    curves = {name: np.concatenate([[0.0], np.cumsum(rng.random(6))]) for name in names}
    moved = []
    for limit in (2, 4, 8, 16, None):
        online = OnlineAllocator(
            dict.fromkeys(names, 3), 120, ranks=dict.fromkeys(names, 2), max_moves=limit
        )
        online.observe(curves)
        moved.append(sum(map(abs, online.propose().moves.values())))
    assert moved[:4] == [2, 4, 8, 16]  # equal costs: every exchange takes two moves
    assert moved[4] > 16


def test_a_share_of_the_price_does_not_depend_on_the_unit():
    rng = np.random.default_rng(1)
    costs = {f"layer{i}": int(cost) for i, cost in enumerate(rng.integers(3, 9, 12))}
    rows = {name: np.sort(rng.random(8))[::-1] for name in costs}
    ranks, moved = [], []
    for unit in (2.0**-30, 1.0, 2.0**30):
        online = OnlineAllocator(costs, 200, ranks=dict.fromkeys(costs, 3), switching_share=0.25)
        online.observe(curves_of({name: row * unit for name, row in rows.items()}))
        ranks.append(online.propose().ranks)
    assert ranks[0] == ranks[1] == ranks[2]
    for share in (0.0, 0.25, 1.0, 5.0):
        online = OnlineAllocator(costs, 200, ranks=dict.fromkeys(costs, 3), switching_share=share)
        online.observe(curves_of(rows))
        moved.append(sum(map(abs, online.propose().moves.values())))
    assert moved[0] > moved[1] > moved[3]
    assert sorted(moved, reverse=True) == moved


def test_switching_costs_keep_ranks_from_going_to_and_fro():
    """Two layers whose estimates take turns by less than what moving costs."""
    moves = []
    for price in (0.0, 1.0):
        online = OnlineAllocator(
            {"a": 1, "b": 1}, 1, ranks={"a": 1}, switching_cost=price, discount=0.01
        )
        count = 0
        for turn in range(10):
            lead = 0.3 if turn % 2 else -0.3
            online.observe({"a": [0.0, 1.0 - lead], "b": [0.0, 1.0 + lead]})
            proposal = online.propose()
            count += bool(proposal)
            online.accept(proposal)
            online.step()
        moves.append(count)
    assert moves == [9, 0]


def test_limits_ties_and_caps_hold_for_moves():
    online = OnlineAllocator(
        {"q": 2, "k": 2, "v": 3}, 40, ranks={"q": 2, "k": 2, "v": 2}, multiple_of=2,
        tied=[["q", "k"]], caps={"values": (["v"], 6)}, min_rank={"v": 2}, max_rank=6,
    )  # fmt: skip
    online.observe({"q": range(9), "k": range(9), "v": [0, *range(50, 58)]})
    assert online.propose().ranks == {"q": 6, "k": 6, "v": 2}


def test_fixed_costs_belong_to_the_cost():
    online = OnlineAllocator({"a": 2, "b": 2}, 9, ranks={"a": 1}, fixed_costs={"a": 3, "b": 5})
    assert online.cost == 5
    online.observe({"a": [0, 4, 4.5, 5], "b": [0, 5, 5.5, 6]})
    assert online.propose().ranks == {"a": 0, "b": 2}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_large_problem_is_certified(share):
    rng = np.random.default_rng(2)
    names = [f"layer{i}" for i in range(200)]
    costs = {name: int(rng.choice([8192, 18432, 5120])) for name in names}
    budget = 8 * sum(costs.values())
    online = OnlineAllocator(
        costs, budget, ranks=dict.fromkeys(names, 8), switching_share=share, exploration=0.5
    )
    for _ in range(3):
        scale = rng.lognormal(size=(200, 1)) * np.arange(1, 33) ** -1.0
        noisy = scale + 0.1 * rng.normal(size=scale.shape)
        online.observe(curves_of(dict(zip(names, noisy, strict=True))))
    proposal = online.propose()
    certificate = proposal.allocation.certificate
    assert certificate.status.startswith("optimal")
    assert sum(costs[name] * rank for name, rank in proposal.ranks.items()) <= budget
    ranks = np.array(list(proposal.ranks.values()))
    assert certificate.verify(proposal.allocation.problem, ranks).value > 0


@pytest.mark.parametrize("now", [{"a": 2, "b": 0}, {"a": 1, "b": 1}, {"a": 0, "b": 2}])
def test_of_equally_good_ranks_the_present_ones_stay(now):
    online = OnlineAllocator({"a": 1, "b": 1}, 2, ranks=now)
    online.observe({"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]})
    assert not online.propose()
