"""Greedy with its ratio: never less than the theorem says, and no more than it says."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

from lorambo_alloc import GainCurves, allocate
from lorambo_alloc.solvers.greedy import solve_greedy
from lorambo_alloc.submodular.guarantees import guarantee
from lorambo_alloc.testing import Instance, brute_force, power_law
from tests.checks import check_optimum
from tests.strategies import instances

KNAPSACK = guarantee("knapsack", "density greedy or best single", "modular")


def _greedy(increments, budget, **keywords):
    return allocate(GainCurves.from_increments(increments), budget, method="greedy", **keywords)


@given(instances(layers=4, ranks=4, concave=True))
def test_half_of_the_optimum(instance: Instance):
    problem = instance.problem()
    allocation = solve_greedy(problem)
    optimum = brute_force(problem)[0]
    check_optimum(allocation, optimum)
    certificate = allocation.certificate
    assert certificate.method == "greedy"
    # Spectra gain nothing below 0, so that the theorem holds with any minimum ranks.
    assert problem.value_of(allocation.ranks) >= optimum / 2
    assert certificate.status in ("optimal_exact", "ratio_certified")
    assert certificate.ratio in (0.5, 1.0)
    if certificate.status == "ratio_certified":
        assert (certificate.ratio, certificate.theorem) == (0.5, KNAPSACK.source)
        bound = Fraction(certificate.upper_bound)
        assert problem.value_of(allocation.ranks) * 2 >= bound - Fraction(certificate.gap) / 2**50


@given(instances(layers=4, ranks=4, concave=True))
def test_no_further_rank_fits_that_gains(instance: Instance):
    problem = instance.problem()
    ranks = solve_greedy(problem).ranks
    left = problem.budget - problem.cost_of(ranks)
    gains = problem.gains
    assert gains is not None
    for i, cost in enumerate(problem.costs.tolist()):
        if ranks[i] < problem.upper[i] and cost <= left:
            row = np.array([i])
            single = int(np.sum(ranks - problem.lower)) == 1  # the best single rank stays alone
            assert single or gains.at(row, ranks[row] + 1)[0] <= 0


@pytest.mark.parametrize("size", [10, 1000, 10**6])
def test_density_greedy_alone_is_arbitrarily_bad(size: int):
    # By gain per cost "small" comes first, and then "big" does not fit any more.
    allocation = _greedy({"small": [1.5], "big": [float(size)]}, size, costs=[1, size])
    assert dict(allocation) == {"small": 0, "big": 1}
    assert (allocation.value, allocation.certificate.status) == (size, "ratio_certified")
    check_optimum(allocation, Fraction(size))


def test_the_ratio_is_tight():
    allocation = _greedy(
        {"a": [51.0 + 2.0**-40], "b": [50.0], "c": [50.0]}, 100, costs=[51, 50, 50]
    )
    assert allocation.ranks.tolist() == [1, 0, 0]
    assert brute_force(allocation.problem)[0] == 100
    certificate = allocation.certificate
    assert (certificate.status, certificate.ratio) == ("ratio_certified", 0.5)
    assert certificate.price == 1.0
    assert certificate.verify(allocation.problem, allocation.ranks).proof == "price"


def test_it_goes_on_after_the_break():
    # After a (density 4) the rank of b does not fit; both of c do, and none of d after them.
    increments = {"a": [8.0], "b": [11.0], "c": [2.0, 1.5, 0.1], "d": [0.4]}
    allocation = _greedy(increments, 6, costs=[2, 5, 2, 1])
    assert allocation.ranks.tolist() == [1, 0, 2, 0]
    assert (allocation.value, allocation.certificate.price) == (11.5, 2.2)


def test_losses_are_left_out():
    allocation = _greedy({"a": [2.0, -1.0], "b": [0.0], "c": [-3.0]}, 20, costs=[1, 2, 3])
    assert allocation.ranks.tolist() == [1, 0, 0]
    assert allocation.certificate.status == "optimal_exact"


class TestBestSingle:
    def test_beside_minimum_ranks(self):
        increments = {"a": [5.0, 3.0], "b": [90.0], "c": [95.0]}
        allocation = _greedy(increments, 92, costs=[2, 90, 91], min_rank={"a": 1})
        assert allocation.ranks.tolist() == [1, 1, 0]  # c gains more, but does not fit

    def test_none_that_fits(self):
        allocation = _greedy({"a": [5.0], "b": [1.0]}, 2, costs=[3, 4])
        assert (allocation.ranks.tolist(), allocation.cost) == ([0, 0], 0)
        assert allocation.certificate.status == "optimal_exact"

    def test_at_the_greatest_rank(self):
        allocation = _greedy({"a": [5.0], "b": [4.0]}, 4, costs=[3, 4], min_rank={"a": 1})
        assert allocation.ranks.tolist() == [1, 0]


@pytest.mark.parametrize("forced", [-3.0, -300.0])
def test_minimum_ranks_that_lose_are_no_part_of_the_theorem(forced: float):
    increments = {"a": [forced], "b": [4.0], "c": [3.0]}
    allocation = _greedy(increments, 8, costs=[1, 5, 4], min_rank={"a": 1})
    certificate = allocation.certificate
    assert (certificate.status, certificate.ratio, certificate.theorem) == (
        "gap_certified",
        0.0,
        "",
    )
    check_optimum(allocation, Fraction(forced) + 4)


def test_minimum_ranks_that_lose_little_leave_the_ratio():
    increments = {"a": [-0.25], "b": [4.0], "c": [3.0]}
    certificate = _greedy(increments, 8, costs=[1, 5, 4], min_rank={"a": 1}).certificate
    assert (certificate.status, certificate.ratio) == ("ratio_certified", 0.5)


def test_gains_whose_densities_underflow():
    gains = {**{f"{i}": [2.0**-1060] for i in range(9)}, "z": [1.0]}
    allocation = _greedy(gains, 7 * 2**40, costs=[2**40] * 9 + [2**44])
    assert sum(allocation.values()) == 7
    check_optimum(allocation, 7 * Fraction(2.0**-1060))


def test_equal_costs_are_exact():
    allocation = _greedy({"a": [2.0, 1.0], "b": [3.0, 0.5]}, 9, costs=[3, 3])
    assert allocation.ranks.tolist() == [2, 1]
    row = guarantee("cardinality", "greedy", "modular")
    certificate = allocation.certificate
    assert (certificate.ratio, certificate.theorem) == (row.ratio, row.source)
    assert (certificate.status, certificate.method) == ("optimal_exact", "greedy")


def test_nested_caps_are_exact():
    caps = {"x": (["a"], 1), "y": (["a", "b"], 2)}
    increments = {"a": [9.0, 8.0], "b": [3.0, 2.5], "c": [1.0, 0.5]}
    allocation = _greedy(increments, 4, caps=caps)
    assert allocation.ranks.tolist() == [1, 1, 2]
    row = guarantee("matroid", "greedy", "modular")
    certificate = allocation.certificate
    assert row.ratio == certificate.ratio == 1
    assert (certificate.theorem, certificate.status) == (row.source, "optimal_exact")
    check_optimum(allocation, Fraction("13.5"))


@pytest.mark.parametrize(
    ("costs", "caps"),
    [
        ([2, 3, 1], {"x": (["a"], 3)}),
        ([1, 1, 1], {"x": (["a", "b"], 1), "y": (["b", "c"], 1)}),
    ],
)
def test_caps_that_do_not_nest_are_refused(costs, caps):
    increments = {"a": [2.0, 1.0], "b": [2.0, 1.0], "c": [1.0]}
    expected = "^method 'greedy' takes caps only if they nest and costs are equal within each; use"
    with pytest.raises(ValueError, match=expected):
        _greedy(increments, 4, costs=costs, caps=caps)


@pytest.mark.parametrize(
    "keywords",
    [
        {"multiple_of": 2},
        {"fixed_costs": [1, 0]},
        {"tied": [["a", "b"]]},
        {"allowed_ranks": [0, 2]},
    ],
)
def test_other_forms_are_refused(keywords):
    expected = (
        "^method 'greedy' needs single ranks of descending gain: no multiples, lists, ties or "
        "fixed costs, and concave curves; use 'exact'$"
    )
    with pytest.raises(ValueError, match=expected):
        _greedy({"a": [2.0, 1.0], "b": [2.0, 1.0]}, 3, **keywords)
    with pytest.raises(ValueError, match=expected):
        _greedy({"a": [1.0, 2.0]}, 3)


def test_a_real_model_loses_little():
    allocation = power_law("b").allocate(method="greedy")
    certificate = allocation.certificate
    assert certificate.status in ("ratio_certified", "optimal_exact")
    assert certificate.relative_gap < 1e-4
    assert certificate.verify(allocation.problem, allocation.ranks).complete
