"""A core in a fixed point that holds its price."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lorambo_alloc import Problem
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.core import Price
from lorambo_alloc.solvers.setting import CAP, Choice, fit, unit_of


@pytest.mark.parametrize("exponent", [-1100, -3, -1, 0, 1, 5, 900])
def test_units_are_exact(exponent):
    assert unit_of(Price(1, exponent)) == Fraction(2) ** exponent


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("top", [100, 10**9, 2**53])
@pytest.mark.parametrize("width", [0.01, 1.0, 100.0])
def test_the_price_is_held_with_its_own_best_responses(seed, top, width):
    rng = np.random.default_rng(seed)
    values = -np.sort(-rng.random((12, 9)), axis=1)
    costs = rng.integers(top // 2, top + 1, 12).tolist()
    problem = Problem(values, 4 * sum(costs), costs=costs)
    form = ConcaveForm(problem)
    relaxed = form.relax()
    window = width * relaxed.price * top

    def choose(price, ranks):
        return Choice(form.within(price, ranks, window), window)

    setting = fit(form, relaxed.price, relaxed.ranks, choose)
    if setting is None:
        assert top == 2**53  # not a bit of the price is left
        return
    price = setting.price.value
    assert price == pytest.approx(relaxed.price, rel=0.6)
    assert setting.unit == unit_of(setting.price)
    spent = problem.cost_of(setting.core.ranks)
    assert setting.left == (problem.spendable - spent) // form.unit
    # Best responses at the price, whether or not the budget pays for them.
    assert problem.gains is not None
    for i, rank in enumerate(setting.core.ranks.tolist()):
        level = Fraction(price) * int(problem.costs[i] // form.unit)
        slack = setting.core.low * setting.unit
        gains = [Fraction(gain) for gain in problem.gains.row(i).tolist()]
        assert all(gain >= level - slack for gain in gains[:rank])
        assert all(gain <= level + slack for gain in gains[rank:])
    for group in setting.core.classes:
        assert int(group.penalties.max()) <= min(math.ceil(window / setting.unit) + 1, CAP)
    if top == 100:
        assert price == pytest.approx(relaxed.price, rel=1e-9)
        assert setting.whole


@pytest.mark.parametrize("beyond", [math.inf, 2.0**90, 2.0**-30])
def test_losses_beyond_the_cap_are_not_ruled_out(beyond):
    """What the fixed point cannot hold counts as a deviation outside the core."""
    form = ConcaveForm(Problem({"a": [2.0, 1.0], "b": [1.5]}, 2))
    relaxed = form.relax()
    items = form.within(relaxed.price, relaxed.ranks, 1.0)
    # Among the nearest deviations (`beyond` is finite) the window does not make the unit coarser.
    window = 2.0**20 if beyond == math.inf else 2.0**80
    setting = fit(
        form, relaxed.price, relaxed.ranks, lambda price, ranks: Choice(items, window, beyond)
    )
    assert setting is not None
    if beyond == math.inf:
        assert setting.whole
        assert CAP * setting.unit >= 2**20
    else:
        assert setting.beyond == min(Fraction(beyond), CAP * setting.unit)
        assert setting.step == 1


def test_an_endless_reach_is_refused(monkeypatch):
    form = ConcaveForm(Problem({"a": [2.0, 1.0], "b": [1.5]}, 2))
    relaxed = form.relax()
    monkeypatch.setattr(form, "reach", lambda *_: math.inf)
    items = form.within(relaxed.price, relaxed.ranks, 1.0)
    assert fit(form, relaxed.price, relaxed.ranks, lambda p, r: Choice(items, 1.0)) is None
