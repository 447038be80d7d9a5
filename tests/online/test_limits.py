"""Proposals within every kind of limit, against all rank vectors that obey them."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import OnlineAllocator

NAMES = ("a", "b", "c")


def values(least, most):
    return st.tuples(*[st.integers(least, most)] * 3).map(
        lambda numbers: dict(zip(NAMES, numbers, strict=True))
    )


@given(
    seed=st.integers(0, 2**32 - 1), costs=values(1, 6), fixed=values(0, 3), now=values(0, 5),
    least=values(0, 2), multiple=st.sampled_from([1, 1, 2]), greatest=st.integers(4, 6),
    tied=st.booleans(), spare=st.integers(0, 30), cap_spare=st.none() | st.integers(0, 8),
    unknown=st.sampled_from(["", "a", "c", "bc"]), price=st.sampled_from([0.0, 0.25]),
)  # fmt: skip
def test_a_proposal_is_the_best_of_all_ranks_that_the_limits_allow(
    seed, costs, fixed, now, least, multiple, greatest, tied, spare, cap_spare, unknown, price
):
    rng = np.random.default_rng(seed)
    tie = ("a", "b") if tied else ()

    def legal(ranks):
        return (
            all(least[n] <= r <= greatest and r % multiple == 0 for n, r in ranks.items())
            and len({ranks[name] for name in tie}) <= 1
        )

    def cost(ranks, names=NAMES):
        return sum(costs[n] * ranks[n] + fixed[n] * (ranks[n] > 0) for n in names)

    space = [dict(zip(NAMES, r, strict=True)) for r in product(range(7), repeat=3)]
    space = [ranks for ranks in space if legal(ranks)]
    budget = min(map(cost, space)) + spare
    cap = None if cap_spare is None else min(cost(r, ("b", "c")) for r in space) + cap_spare
    online = OnlineAllocator(
        costs, budget, ranks=now, fixed_costs=fixed, min_rank=least, max_rank=greatest,
        multiple_of=multiple, tied=[tie] if tied else [], switching_cost=price,
        caps=None if cap is None else {"stage": (("b", "c"), cap)},
    )  # fmt: skip
    curves = {
        name: np.concatenate([[0.0], np.cumsum(rng.normal(1.0, 1.0, rng.integers(1, 6)))])
        for name in NAMES
        if name not in unknown
    }
    online.observe(curves)

    rows = {name: np.diff(curve).tolist() for name, curve in curves.items()}
    rho = np.mean([max(row[0], 0.0) / costs[name] for name, row in rows.items()]) or 1.0
    reach = {}
    for name in NAMES:
        lowest = min(ranks[name] for ranks in space)
        if name in unknown:
            reach[name] = max(lowest, now[name])
            rows[name] = [costs[name] * rho / j for j in range(1, reach[name] + 1)]
        else:
            rows[name] += [rows[name][-1]] * (max(lowest, now[name]) - len(rows[name]))
            reach[name] = len(rows[name])
    space = [
        ranks for ranks in space
        if cost(ranks) <= budget and (cap is None or cost(ranks, ("b", "c")) <= cap)
        and all(ranks[name] <= reach[name] for name in NAMES)
    ]  # fmt: skip

    def allowed(name):
        others = tie if name in tie else (name,)
        alone = all(least[n] <= now[n] <= greatest and now[n] % multiple == 0 for n in others)
        return alone and len({now[n] for n in others}) == 1

    if cost(now) <= budget:
        kept = [name for name in unknown if allowed(name)]
        space = [r for r in space if all(r[n] == now[n] for n in kept)] or space

    def value(ranks):
        gained = sum(Fraction(gain) for n in NAMES for gain in rows[n][: ranks[n]])
        return gained - Fraction(price) * sum(abs(ranks[n] - now[n]) for n in NAMES)

    proposal = online.propose()
    assert proposal.ranks in space
    assert float(max(map(value, space)) - value(proposal.ranks)) <= 1e-12
    allocation = proposal.allocation
    assert allocation is not None
    verification = allocation.certificate.verify(allocation.problem, allocation.ranks)
    constant = Fraction(price) * sum(now.values())
    assert float(verification.value - constant) == pytest.approx(
        float(value(proposal.ranks)), abs=1e-12
    )
