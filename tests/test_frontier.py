"""The frontier against brute force and against its own Lagrangian, in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import GainCurves, Problem, allocate, uniform_rank
from lorambo_alloc.frontier import Frontier, frontier
from lorambo_alloc.testing import (
    SMALL_FAMILIES,
    Instance,
    brute_force,
    multiples_of_8,
    non_concave,
    power_law,
    small_instance,
)
from tests.strategies import examples, instances, seeds

FAMILIES = [family for family in SMALL_FAMILIES if family != "operator"]
CLOSE = Fraction(1, 1 << 40)


def frontier_of(instance: Instance) -> Frontier:
    return frontier(instance.spectra, **instance.keywords)


def magnitude(problem: Problem) -> Fraction:
    """An upper limit for any sum of gains on the way to a value."""
    return sum(
        (
            Fraction(float(np.abs(np.diff(problem.curve(i))).sum()))
            for i in range(len(problem.names))
        ),
        Fraction(0),
    )


def budgets_to_try(curve: Frontier, rng: np.random.Generator) -> list[int]:
    """Breakpoints, their neighbours, and any between the ends and beyond."""
    first, last = int(curve.budgets[0]), int(curve.budgets[-1])
    some = rng.choice(curve.budgets, 3).tolist()
    near = [*some, *(b - 1 for b in some if b > first), *(b + 1 for b in some)]
    between = rng.integers(first, last + 1, 3, endpoint=True).tolist()
    return [first, last, last + 7, *near, *between]


def check_against_brute_force(instance: Instance, rng: np.random.Generator) -> None:
    curve = frontier_of(instance)
    slack = Fraction(curve.rounding)
    assert slack <= CLOSE * magnitude(curve.problem) + Fraction(2) ** -1058
    descending = instance.problem().concave_unit_steps
    for budget in budgets_to_try(curve, rng):
        problem = Problem(instance.spectra, budget, **instance.keywords)
        optimum, _ = brute_force(problem)
        bound = Fraction(curve.at(budget))
        assert bound + slack >= optimum
        if descending and float(optimum) >= 2.0**-1000:
            assert bound * (1 + CLOSE) >= optimum
        if budget in curve.budgets.tolist() or budget > curve.budgets[-1]:
            assert abs(bound - optimum) <= slack


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=seeds())
@settings(max_examples=examples(0.2))
def test_families_against_brute_force(family: str, seed: int):
    rng = np.random.default_rng(seed)
    check_against_brute_force(small_instance(rng, family, layers=3, ranks=4), rng)


@given(instance=instances(layers=3, ranks=4), seed=seeds())
def test_drawn_problems_against_brute_force(instance: Instance, seed: int):
    check_against_brute_force(instance, np.random.default_rng(seed))


@given(instances())
def test_the_hull_is_the_lagrangian_bound_at_its_own_price(instance: Instance):
    """Both sides of duality: the bound holds at any price, and this price attains it."""
    curve = frontier_of(instance)
    problem, slack = curve.problem, Fraction(curve.rounding)
    for k in {0, len(curve) // 2, len(curve) - 1}:
        price, budget = Fraction(float(curve.prices[k])), int(curve.budgets[k])
        bound = price * budget
        for group in problem.variables:
            options: list[Fraction] = []
            for rank in problem.allowed_ranks(group[0]).tolist():
                ranks = np.zeros(len(problem.names), dtype=np.int64)
                ranks[list(group)] = rank
                options.append(problem.value_of(ranks) - price * problem.cost_at(group, rank))
            bound += max(options)
        # The price is a rounded quotient: half its last bit for every unit of cost.
        error = (price * Fraction(2) ** -52 + Fraction(2) ** -1074) * problem.cost_of(problem.upper)
        assert abs(bound - Fraction(float(curve.values[k]))) <= slack + 4 * error


@given(instances())
def test_monotone_and_concave_with_breakpoints_that_ranks_attain(instance: Instance):
    curve = frontier_of(instance)
    problem, slack = curve.problem, Fraction(curve.rounding)
    assert len(curve) == len(curve.budgets) == len(curve.values) == len(curve.prices)
    assert curve.budgets[0] == problem.cost_of(problem.lower)
    assert np.all(np.diff(curve.budgets) > 0)
    assert np.all(np.diff(curve.values) >= 0)
    assert np.all(np.diff(curve.prices) <= 0)
    assert curve.prices[-1] == 0
    before = None
    for k in range(len(curve)):
        ranks = curve.ranks_at_breakpoint(k)
        problem.check(ranks)
        assert problem.cost_of(ranks) == curve.budgets[k]
        assert abs(problem.value_of(ranks) - Fraction(float(curve.values[k]))) <= slack
        if before is not None:
            assert np.all(ranks >= before)
        before = ranks
    assert np.array_equal(curve.ranks_at_breakpoint(-1), curve.ranks_at_breakpoint(len(curve) - 1))


@pytest.mark.parametrize("make", [lambda: power_law("a"), multiples_of_8, non_concave])
def test_real_sizes_agree_with_the_certificates_price_bound(make):
    instance = make()
    curve = frontier_of(instance)
    for share in (0.25, 1, 2):
        budget = int(instance.budget * share)
        allocation = allocate(instance.spectra, budget, **instance.keywords, time_limit=2.0)
        verified = allocation.certificate.verify(allocation.problem, allocation.ranks, effort=0)
        assert curve.at(budget) == pytest.approx(float(verified.price_bound), rel=1e-9)
        assert verified.value <= Fraction(curve.at(budget)) + Fraction(curve.rounding)


@given(instances(concave=True))
@settings(max_examples=examples(0.5))
def test_allocation_is_that_of_allocate(instance: Instance):
    ours = frontier_of(instance).allocation(instance.budget)
    theirs = instance.allocate()
    assert ours.problem.value_of(ours.ranks) == theirs.problem.value_of(theirs.ranks)
    assert ours.certificate.status == theirs.certificate.status == "optimal_exact"


@given(instances())
@settings(max_examples=examples(0.5))
def test_allocation_solves_the_same_problem(instance: Instance):
    again, problem = frontier_of(instance).allocation(instance.budget).problem, instance.problem()
    assert again.budget == problem.budget
    assert again.curves.layers.flat.tolist() == problem.curves.layers.flat.tolist()
    assert again.objective == problem.objective
    assert again.tied == problem.tied
    assert again.costs.tolist() == problem.costs.tolist()
    assert again.fixed_costs.tolist() == problem.fixed_costs.tolist()
    for i in range(len(problem.names)):
        assert again.allowed_ranks(i).tolist() == problem.allowed_ranks(i).tolist()
        if problem.weights is not None:
            assert again.weights is not None
            assert again.weights[i] == problem.weights[i]


def example() -> Frontier:
    """Densities 4.5, 4, 2, 0.5: breakpoints 0, 2, 3, 5, 7."""
    return frontier({"q": [3.0, 2.0, 1.0], "v": [2.0]}, costs={"q": 2, "v": 1})


def test_by_hand():
    curve = example()
    assert curve.budgets.tolist() == [0, 2, 3, 5, 7]
    assert curve.values.tolist() == [0.0, 9.0, 13.0, 17.0, 18.0]
    assert curve.prices.tolist() == [4.5, 4.0, 2.0, 0.5, 0.0]
    assert curve.upper_hull == (curve.budgets, curve.values)
    assert [curve.ranks_at_breakpoint(k).tolist() for k in range(5)] == [
        [0, 0],
        [1, 0],
        [1, 1],
        [2, 1],
        [3, 1],
    ]
    assert len(curve) == 5
    # y - x: 0, 0.5 - 2/7, 13/18 - 3/7, 17/18 - 5/7, 0
    assert curve.knee() == 3
    assert curve.at(uniform_rank(1)) == 13.0
    assert curve.price_at(uniform_rank(2)) == 0.5
    assert curve.allocation(uniform_rank(1)).ranks.tolist() == [1, 1]
    assert curve.rounding < 1e-12
    with pytest.raises(IndexError):
        curve.ranks_at_breakpoint(5)


def test_hulls_skip_what_lies_below_and_keep_what_lies_on_them():
    # q: 1 is below the line to 2; 3 is on the line from 2 to 4; 5 falls. v rises only at the end.
    curves = GainCurves({"q": [0.0, 1.0, 6.0, 8.0, 10.0, 9.0], "v": [0.0, -1.0, -2.0, 1.5]})
    curve = frontier(curves)
    assert curve.budgets.tolist() == [0, 2, 3, 4, 7]
    assert curve.values.tolist() == [0.0, 6.0, 8.0, 10.0, 11.5]
    assert curve.prices.tolist() == [3.0, 2.0, 2.0, 0.5, 0.0]
    assert curve.ranks_at_breakpoint(4).tolist() == [4, 3]


def test_equal_densities_stay_apart_in_the_order_of_the_layers():
    curve = frontier(GainCurves.from_increments([[2.0, 2.0], [4.0]]), costs=[1, 2])
    assert curve.budgets.tolist() == [0, 1, 2, 4]
    assert curve.prices.tolist() == [2.0, 2.0, 2.0, 0.0]
    assert curve.knee() == 0


def test_equal_steps_of_unequal_cost_within_a_layer_keep_their_order():
    # Slope 3, 2 or 1 up to rank 3, then 1: the steps of cost 1 and 5 must not change places.
    rng = np.random.default_rng(0)
    first = rng.integers(1, 4, 300).astype(np.float64)
    rows = [[slope] * 3 + [1.0] * 6 for slope in first]
    curve = frontier(GainCurves.from_increments(rows), allowed_ranks=[0, 3, 4, 9])
    assert len(curve) == 901
    for k in range(len(curve)):
        assert curve.problem.cost_of(curve.ranks_at_breakpoint(k)) == curve.budgets[k]


def test_forced_losses_come_first():
    curve = frontier(
        GainCurves.from_increments([[-3.0, 5.0, -1.0], [1.0, 0.0, -1.0]]), min_rank=1, max_rank=3
    )
    assert curve.budgets.tolist() == [2, 3]
    assert curve.values.tolist() == [-2.0, 3.0]
    assert curve.knee() == 2


def test_ties_fixed_costs_and_weights():
    curve = frontier(
        {"a": [2.0, 1.0], "b": [1.0, 1.0], "c": [3.0]},
        costs=[1, 2, 5],
        fixed_costs=[0, 3, 1],
        weights=[1.0, 2.0, 0.5],
        tied=[("a", "b")],
    )
    # a and b: (6, 6.0), (9, 9.0), one line; c: (6, 4.5).
    assert curve.budgets.tolist() == [0, 6, 9, 15]
    assert curve.values.tolist() == [0.0, 6.0, 9.0, 13.5]
    assert curve.ranks_at_breakpoint(1).tolist() == [1, 1, 0]


def test_operator_is_refused():
    with pytest.raises(ValueError, match=r"objective: a frontier needs gains that add up; 'oper"):
        frontier([[2.0, 1.0]], objective="operator")


def test_costs_up_to_2_to_the_62():
    most = 1 << 53
    curve = frontier({"a": np.ones(511)}, costs=[most])
    assert curve.budgets[-1] == 511 * most
    assert curve.at(300 * most + 1) == 300.0
    steps = frontier({"a": np.arange(511, 0, -1.0)}, costs=[most], objective="nuclear")
    for kind in (np.int64, np.uint64, object):
        around = np.array([300 * most - 1, 300 * most, 300 * most + 1]).astype(kind)
        assert (steps.price_at(around) * most).tolist() == [212.0, 211.0, 211.0]
    message = "costs: expected greatest ranks that cost less than 2\\^62 together, got "
    with pytest.raises(ValueError, match=rf"{message}{512 * most}; divide the costs"):
        frontier({"a": np.ones(512)}, costs=[most])
    with pytest.raises(ValueError, match=rf"{message}least ranks that cost {512 * most}$"):
        frontier({"a": np.ones(512)}, costs=[most], min_rank=512)


def test_tiny_and_huge_gains_keep_their_prices():
    for scale in (2.0**-440, 2.0**440):
        curve = frontier({"q": [3.0 * scale, 2.0 * scale], "v": [2.0 * scale]}, costs=[2, 1])
        assert curve.prices.tolist() == [4.5 * scale**2, 4.0 * scale**2, 2.0 * scale**2, 0.0]
        assert curve.values.tolist() == [0.0, 9.0 * scale**2, 13 * scale**2, 17 * scale**2]


def test_order_of_gains_whose_densities_underflow():
    tiny = 2.0**-960
    curves = GainCurves.from_increments([[tiny], [tiny * 2.0**-60], [3 * tiny * 2.0**-62]])
    curve = frontier(curves, costs=[1, 1 << 53, 1 << 52])
    assert curve.ranks_at_breakpoint(2).tolist() == [1, 0, 1]
    general = frontier(curves, costs=[1, 1 << 53, 1 << 52], fixed_costs=[0, 0, 1])
    assert general.ranks_at_breakpoint(2).tolist() == [1, 0, 1]


def test_arrays_are_read_only():
    curve = example()
    for array in (curve.budgets, curve.values, curve.prices):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
