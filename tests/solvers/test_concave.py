"""Single ranks of descending gain: the price, and what lies near it."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.solvers.concave import ConcaveForm, _sums_up_to
from lorambo_alloc.solvers.core import Price
from lorambo_alloc.testing import Instance, brute_force, power_law
from tests.strategies import examples, instances, seeds

MANY = 1 << 59


def random_problem(
    seed: int, layers: int = 60, ranks: int = 40, distinct: int = 5, low: float = 0, high: float = 1
) -> Problem:
    rng = np.random.default_rng(seed)
    values = -np.sort(-(rng.random((layers, ranks)) ** 3), axis=1)
    costs = rng.integers(1, 100, distinct)[rng.integers(0, distinct, layers)] * 4
    budget = int(rng.uniform(low, high) * int(costs.sum()) * ranks)
    return Problem(values, budget, costs=costs.tolist())


def ties_problem(layers: int = 40, ranks: int = 600, budget: int = 100_001) -> Problem:
    """More increments of one density than are sorted outright."""
    costs = 1 + np.arange(layers) % 9
    gains = np.repeat(costs[:, None].astype(float), ranks, axis=1)
    return Problem(GainCurves.from_increments(gains), budget, costs=costs.tolist())


def check_relaxed(form: ConcaveForm) -> None:
    problem = form.problem
    relaxed = form.relax()
    # A rank that alone breaks the budget is not free.
    upper = (problem.lower + form.free_ranks()[1]).tolist()
    problem.check(relaxed.ranks)
    problem.check(relaxed.feasible)
    assert np.all(relaxed.feasible >= relaxed.ranks)
    if relaxed.price == 0:
        assert problem.gains is not None
        # Every rank that gains anything, and none that loses.
        for i, rank in enumerate(relaxed.ranks.tolist()):
            gains = problem.gains.row(i)
            assert np.all(gains[int(problem.lower[i]) : rank] >= 0)
            assert np.all(gains[rank : upper[i]] <= 0)
        return
    # Best responses to the price: gains above it taken, gains below it not.
    assert problem.gains is not None
    left = problem.spendable - problem.cost_of(relaxed.ranks)
    refused = []
    for i, rank in enumerate(relaxed.ranks.tolist()):
        gains = problem.gains.row(i)[int(problem.lower[i]) : upper[i]]
        taken = rank - int(problem.lower[i])
        cost = float(problem.costs[i] // form.unit)
        level, slack = relaxed.price * cost, 5e-324 * cost  # a price may be subnormal
        below, above = level * (1 - 1e-12) - slack, level * (1 + 1e-12) + slack
        assert np.all(gains[:taken] >= below)
        assert np.all(gains[taken:] <= above)
        if taken < len(gains) and gains[taken] >= below:
            refused.append(int(problem.costs[i]))
    # The budget stops at an increment worth the price: one of these does not fit any more.
    assert refused
    assert max(refused) > left


@given(instances(concave=True, layers=5))
@settings(max_examples=examples(0.5))
def test_relaxation_of_small_problems(instance: Instance):
    check_relaxed(ConcaveForm(instance.problem()))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(60, 40), (400, 60), (2, 9000), (9000, 2)])
def test_relaxation_of_larger_problems(seed, size):
    check_relaxed(ConcaveForm(random_problem(seed, *size)))


@pytest.mark.parametrize("budget", [0, 1, 8, 9, 3333, 60_000, 100_001, 119_999, 120_000, 10**6])
def test_relaxation_where_all_densities_are_equal(budget):
    check_relaxed(ConcaveForm(ties_problem(budget=budget)))


def test_relaxation_where_ties_lie_among_others():
    costs = 1 + np.arange(50) % 9
    gains = np.repeat(costs[:, None].astype(float), 600, axis=1)
    gains[:, :100] *= 3.0
    gains[:, 400:] /= 3.0
    total = int(costs.sum())
    for ranks in (50, 99, 100, 101, 250, 399, 400, 401, 500):
        for extra in (0, 7):
            problem = Problem(
                GainCurves.from_increments(gains), total * ranks + extra, costs=costs.tolist()
            )
            check_relaxed(ConcaveForm(problem))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_relaxation_of_costs_whose_sum_leaves_64_bits(seed, share):
    rng = np.random.default_rng(seed)
    values = -np.sort(-rng.random((40, 40)), axis=1)
    costs = (2**53 - rng.integers(0, 1000, 40)).tolist()
    check_relaxed(ConcaveForm(Problem(values, int(share * 2**62), costs=costs)))
    # A budget that the densest increments fill to the last unit.
    densities = (values**2 / np.array(costs)[:, None]).ravel()
    chosen = np.argsort(-densities)[: int(share * 500)]
    budget = sum(costs[i // 40] for i in chosen.tolist())
    problem = Problem(values, budget, costs=costs)
    assert problem.cost_of(ConcaveForm(problem).relax().ranks) == budget


def test_a_relaxation_is_filled_up():
    # The break leaves 4; the next increments by density cost 5, 3 and 1.
    problem = Problem(
        GainCurves.from_increments({"a": [60.0], "b": [40.0], "c": [21.0], "d": [6.0]}),
        10,
        costs=[6, 5, 3, 1],
    )
    relaxed = ConcaveForm(problem).relax()
    assert relaxed.ranks.tolist() == [1, 0, 0, 0]
    assert relaxed.price == 8.0
    assert relaxed.feasible.tolist() == [1, 0, 1, 1]


def test_costs_are_reduced_by_their_common_divisor():
    spectra = {"a": [3.0, 1.0], "b": [2.0]}
    form = ConcaveForm(Problem(spectra, 25, costs=[12, 8]))
    assert form.unit == 4
    costs, room, budget = form.free_ranks()
    assert (costs.tolist(), room.tolist(), budget) == ([3, 2], [2, 1], 6)
    # What a minimum takes is neither room nor budget.
    limited = ConcaveForm(Problem(spectra, 25, costs=[12, 8], min_rank={"a": 1}))
    costs, room, budget = limited.free_ranks()
    assert (costs.tolist(), room.tolist(), budget) == ([3, 2], [1, 1], 3)
    # A layer that has no room has no say.
    assert ConcaveForm(Problem(spectra, 25, costs=[12, 7], max_rank={"b": 0})).unit == 12
    assert ConcaveForm(Problem(spectra, 25, costs=[12, 7], min_rank={"b": 1})).unit == 12
    assert ConcaveForm(Problem(spectra, 0, costs=[12, 7])).unit == 1


def test_what_is_free():
    form = ConcaveForm(Problem({"a": [3.0, 1.0, 0.5], "b": [2.0]}, 9, min_rank={"a": 1}))
    assert form.size_of_all() == 3
    assert form.largest_gain() == 4.0
    assert form.last_bit_of_all() == -2
    assert ConcaveForm(Problem({}, 9)).largest_gain() == 0.0
    # A rank that alone breaks the budget is not free, whatever it gains.
    dear = ConcaveForm(Problem({"a": [9.0], "b": [2.0, 1.0]}, 3, costs=[4, 1]))
    assert dear.largest_gain() == 4.0
    assert dear.size_of_all() == 2


def test_the_next_rank_and_the_last():
    form = ConcaveForm(Problem({"a": [3.0, 1.0], "b": [2.0]}, 9, weights=[1.0, 0.5]))
    assert form.next_gains(np.array([0, 0])).tolist() == [9.0, 2.0]
    assert form.next_gains(np.array([1, 0])).tolist() == [1.0, 2.0]
    assert form.last_gains(np.array([1, 1])).tolist() == [9.0, 2.0]
    assert form.last_gains(np.array([2, 1])).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_responses_to_a_price(seed):
    problem = random_problem(seed, 30, 20)
    form = ConcaveForm(problem)
    assert problem.gains is not None
    for price in (1e-3, 1e-2, 0.1):
        expected = [
            min(int(np.sum(problem.gains.row(i) > price * float(c // form.unit))), int(room))
            for i, (c, room) in enumerate(zip(problem.costs, form.free_ranks()[1], strict=True))
        ]
        assert form.respond(price).tolist() == expected


@given(seeds(), st.floats(0.0, 2.0))
@settings(max_examples=examples(0.25))
def test_deviations_within_a_window(seed, share):
    problem = random_problem(seed, 20, 15)
    form = ConcaveForm(problem)
    relaxed = form.relax()
    price, ranks = relaxed.price, relaxed.ranks
    window = share * price * 100
    items = form.within(price, ranks, window)
    found = set(zip(items.rows.tolist(), items.ranks.tolist(), strict=True))
    assert len(found) == form.size(items)
    assert problem.gains is not None
    for i in range(len(problem.names)):
        for rank, gain in enumerate(problem.gains.row(i).tolist(), start=1):
            penalty = abs(gain - price * float(problem.costs[i] // form.unit))
            if penalty < window:
                # A rank that alone breaks the budget is no deviation.
                cost = (rank - int(problem.lower[i])) * int(problem.costs[i])
                assert (i, rank) in found or cost > problem.spendable
            if penalty > window * (1 + 1e-9) + 1e-12:
                assert (i, rank) not in found
    assert form.reach(items, price, ranks) <= window * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("layers", "ranks"), [(20, 15), (3, 60), (90, 4)])
@pytest.mark.parametrize("count", [4, 16, 64])
@pytest.mark.parametrize("share", [0.05, 1.0, math.inf])
def test_no_other_deviation_is_nearer(seed, layers, ranks, count, share):
    problem = random_problem(seed, layers, ranks, low=0.05, high=0.8)
    form = ConcaveForm(problem)
    relaxed = form.relax()
    price, at = relaxed.price, relaxed.ranks
    assert price > 0
    window = share * price * 100
    items, beyond = form.nearest(price, at, count, window)
    assert form.size(items) <= count
    found = set(zip(items.rows.tolist(), items.ranks.tolist(), strict=True))
    free = (problem.lower + form.free_ranks()[1]).tolist()
    penalties = {}
    assert problem.gains is not None
    for i in range(len(problem.names)):
        level = Fraction(price) * int(problem.costs[i] // form.unit)
        for rank in range(int(problem.lower[i]) + 1, free[i] + 1):
            gain = Fraction(float(problem.gains.row(i)[rank - 1]))
            penalties[i, rank] = gain - level if rank <= at[i] else level - gain
    others = [float(penalty) for key, penalty in penalties.items() if key not in found]
    assert min(others, default=math.inf) >= beyond
    if found:
        farthest = max(float(penalties[key]) for key in found)
        assert farthest < window
        assert found <= penalties.keys()
    # And it is no further off than it must be: the nearest other one, or the end of what was seen.
    reach = count // layers + 2
    ends = [
        float(penalties[i, rank])
        for i in range(layers)
        for rank in (int(at[i]) - reach + 1, int(at[i]) + reach)
        if (i, rank) in penalties
    ]
    assert beyond >= min([*others, *ends], default=math.inf) * (1 - 1e-9) - 1e-12


def exact_price(form: ConcaveForm, price: float, window: float, ranks: np.ndarray) -> Price:
    items = form.within(price, ranks, window)
    return Price.of(price, max(form.reach(items, price, ranks), window), form.last_bit(items))


@given(instances(concave=True, layers=5))
@settings(max_examples=examples(0.5))
def test_penalties_of_the_core_are_exact(instance: Instance):
    problem = instance.problem()
    form = ConcaveForm(problem)
    relaxed = form.relax()
    if relaxed.price == 0:
        return
    ranks = relaxed.ranks
    window = 3 * float(problem.value_of(problem.upper)) + 1.0
    fixed = exact_price(form, relaxed.price, window, ranks)
    price = Fraction(fixed.value)
    unit = Fraction(2) ** fixed.exponent
    core = form.core(form.within(fixed.value, ranks, window), fixed, ranks, MANY)

    def score(vector: np.ndarray) -> Fraction:
        spent = (problem.cost_of(vector) - problem.cost_of(problem.lower)) // form.unit
        return problem.value_of(vector) - price * spent

    assert np.all(core.ranks >= problem.lower)
    assert np.all(core.ranks <= problem.upper)
    base = score(core.ranks)
    for n, group in enumerate(core.classes):
        for option in range(len(group.moves)):
            choices = [option + 1 if k == n else 0 for k in range(len(core.classes))]
            moved = form.apply(core, choices)
            if np.any(moved < problem.lower) or np.any(moved > problem.upper):
                pytest.fail("a deviation leaves the limits")
            cost = (problem.cost_of(moved) - problem.cost_of(core.ranks)) // form.unit
            assert cost == group.moves[option]
            lost = (base - score(moved)) / unit
            assert lost >= -core.low
            assert abs(lost - int(group.penalties[option])) <= core.low


@given(instances(concave=True, layers=4), st.floats(0.0, 3.0))
@settings(max_examples=examples(0.5))
def test_the_bound_of_two_prices_holds(instance: Instance, share):
    problem = instance.problem()
    form = ConcaveForm(problem)
    optimum, best = brute_force(problem)
    for offset in (share * form.largest_gain(), -share * form.largest_gain()):
        relaxed = form.relax(offset)
        # The optimum itself, priced: the bound less q for each of its ranks.
        count = int(np.sum(best - problem.lower))
        assert optimum <= form.bound(relaxed, offset) + Fraction(offset) * count


def test_many_layers_of_one_cost_form_one_class():
    instance = power_law("a")
    form = ConcaveForm(instance.problem())
    relaxed = form.relax()
    window = 0.01 * relaxed.price * 10
    items = form.within(relaxed.price, relaxed.ranks, window)
    fixed = Price.of(relaxed.price, window, form.last_bit(items))
    core = form.core(items, fixed, relaxed.ranks, int(math.ldexp(window, -fixed.exponent)))
    assert 0 < len(core.classes) <= 2
    for group in core.classes:
        moves = np.abs(group.moves)
        assert np.all(moves % moves.min() == 0)


def test_running_sums_stop_before_they_leave_64_bits():
    penalties = np.full(40, 1 << 58, dtype=np.int64)
    limit = 1 << 60
    assert _sums_up_to(penalties, limit).tolist() == [k << 58 for k in range(1, 5)]
    assert _sums_up_to(penalties[:0], limit).tolist() == []
    assert _sums_up_to(np.array([0, 0, 3, 5]), 8).tolist() == [0, 0, 3, 8]
    assert _sums_up_to(np.array([0, 0, 3, 5]), 7).tolist() == [0, 0, 3]
