"""The front door."""

import inspect
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import lorambo_alloc
from lorambo_alloc import GainCurves, Problem, Spectra, allocate, log, uniform_rank
from lorambo_alloc.testing import SMALL_FAMILIES, brute_force, power_law, small_instance
from tests.checks import check_answer, check_optimum

SPECTRA = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}


def test_the_public_names():
    assert all(hasattr(lorambo_alloc, name) for name in lorambo_alloc.__all__)
    assert lorambo_alloc.__all__ == sorted(lorambo_alloc.__all__)


def test_allocate_and_problem_take_the_same_keywords():
    door = inspect.signature(allocate).parameters
    problem = inspect.signature(Problem).parameters
    assert list(door)[: len(problem)] == list(problem)
    assert list(door)[len(problem) :] == ["method", "time_limit", "constraints"]
    for name, parameter in problem.items():
        assert door[name].default == parameter.default
        assert door[name].kind == parameter.kind


def test_keywords_reach_the_problem():
    keywords: dict[str, Any] = {
        "shapes": {"q": (3, 9), "v": (5, 6)},
        "costs": {"q": 2, "v": 3},
        "fixed_costs": {"q": 1, "v": 0},
        "objective": log(0.5),
        "weights": {"q": 2.0, "v": 1.0},
        "min_rank": {"q": 1},
        "max_rank": {"v": 1},
        "multiple_of": 1,
        "allowed_ranks": {"q": [1, 2, 3]},
        "tied": [["q", "v"]],
    }
    problem = allocate(SPECTRA, 9, **keywords).problem
    assert problem.costs.tolist() == [2, 3]
    assert problem.fixed_costs.tolist() == [1, 0]
    assert problem.objective == log(0.5)
    assert problem.weights is not None
    assert problem.weights.tolist() == [2.0, 1.0]
    assert problem.tied == (("q", "v"),)
    assert [problem.allowed_ranks(i).tolist() for i in range(2)] == [[1], [1]]
    assert allocate(SPECTRA, 9, multiple_of=2).problem.allowed_ranks(0).tolist() == [0, 2]
    assert allocate(SPECTRA, 9, shapes=keywords["shapes"]).problem.costs.tolist() == [12, 11]


@pytest.mark.parametrize(
    "spectra",
    [
        SPECTRA,
        Spectra(SPECTRA),
        GainCurves.from_increments({"q": [9.0, 4.0, 1.0], "v": [6.25, 0.25]}),
        GainCurves({"q": [0.0, 9.0, 13.0, 14.0], "v": [0.0, 6.25, 6.5]}),
        [SPECTRA["q"], SPECTRA["v"]],
        np.array([[3.0, 2.0, 1.0], [2.5, 0.5, 0.0]]),
    ],
)
def test_the_same_answer_from_every_form(spectra):
    allocation = allocate(spectra, 44, costs=[16, 12])
    assert list(allocation.values()) == [2, 1]
    check_optimum(allocation, Fraction(77, 4))


def test_uniform_rank_is_the_baseline():
    instance = power_law("a")
    shapes = instance.keywords["shapes"]
    allocation = allocate(instance.spectra, uniform_rank(8), shapes=shapes)
    assert allocation.budget == instance.budget
    uniform = allocation.problem.value_of(np.full(len(allocation), 8))
    assert allocation.value > uniform
    assert check_answer(allocation) > uniform


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_inputs_are_never_modified(family):
    instance = small_instance(np.random.default_rng(1), family, layers=4, ranks=5)
    before = {name: np.array(row, copy=True) for name, row in instance.spectra.items()}
    instance.allocate()
    assert all(np.array_equal(before[name], row) for name, row in instance.spectra.items())


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_never_modified(order):
    values = np.array(np.sort(np.random.default_rng(0).random((6, 9)))[:, ::-1], order=order)
    before = values.copy()
    values.flags.writeable = False
    check_answer(allocate(values, 20, costs=[1, 2, 3, 4, 5, 6], weights=[2.0] * 6))
    assert np.array_equal(values, before)


@pytest.mark.parametrize("keywords", [{}, {"multiple_of": 2}, {"objective": "operator"}])
@pytest.mark.parametrize("method", ["auto", "water_filling", "milp"])
@pytest.mark.parametrize("budget", [0, 1, 5, 10**6, uniform_rank(0), uniform_rank(3)])
class TestEdges:
    def allocate(self, spectra, budget, method, keywords):
        if "objective" in keywords:
            method = "auto"
        allocation = allocate(spectra, budget, method=method, **keywords)
        check_answer(allocation)
        assert allocation.certificate.status == "optimal_exact"
        return allocation

    def test_no_layers(self, budget, method, keywords):
        allocation = self.allocate({}, budget, method, keywords)
        assert (dict(allocation), allocation.value, allocation.cost) == ({}, 0.0, 0)

    def test_one_layer(self, budget, method, keywords):
        allocation = self.allocate({"a": [2.0, 1.0, 0.5]}, budget, method, keywords)
        step = keywords.get("multiple_of", 1)
        rank = min(allocation.budget, 3) // step * step
        if keywords.get("objective") != "operator":
            assert allocation["a"] == rank

    def test_all_zero(self, budget, method, keywords):
        allocation = self.allocate({"a": [0.0, 0.0], "b": [0.0]}, budget, method, keywords)
        assert (allocation.value, allocation.captured) == (0.0, 1.0)

    def test_one_rank(self, budget, method, keywords):
        allocation = self.allocate({"a": [2.0], "b": [1.0]}, budget, method, keywords)
        assert allocation.cost <= min(allocation.budget, 2)


def test_ties_in_rounded_values_at_price_0():
    # Beside 1.0 the second gain vanishes in doubles, not in the sum.
    curves = GainCurves.from_increments({"a": [1.0, 1e-17]})
    for listed in ([1, 2], [0, 1, 2], None):
        allocation = allocate(curves, 9, allowed_ranks=listed)
        assert allocation.ranks.tolist() == [2]
        check_optimum(allocation, 1 + Fraction(1e-17))
    worse = GainCurves.from_increments({"a": [1.0, -1e-17]})
    for listed in ([1, 2], [0, 1, 2], None):
        check_optimum(allocate(worse, 9, allowed_ranks=listed), Fraction(1))


@pytest.mark.parametrize("seed", range(20))
def test_vanishing_gains_in_tied_layers(seed):
    rng = np.random.default_rng(seed)
    rows = {f"{i}": rng.choice([1.0, 1e-17, -1e-17, 0.0], 4) for i in range(3)}
    curves = GainCurves.from_increments(rows)
    for budget in (0, 5, 12, 99):
        allocation = allocate(curves, budget, costs=[1, 2, 3], tied=[["0", "1"]])
        check_optimum(allocation, brute_force(allocation.problem)[0])


@pytest.mark.parametrize("budget", range(8))
def test_the_bound_is_never_a_negative_zero(budget):
    cases: list[tuple[Any, dict[str, Any]]] = [
        ({"a": [0.0, 0.0]}, {}),
        (SPECTRA, {"objective": "operator"}),
        ({"a": [0.0]}, {"objective": "operator"}),
        (GainCurves.from_increments({"a": [-0.0, -1.0]}), {}),
        (GainCurves.from_increments({"a": [1.0, -1.0]}), {"allowed_ranks": [0, 2]}),
    ]
    for spectra, keywords in cases:
        certificate = allocate(spectra, budget, **keywords).certificate
        for figure in (certificate.upper_bound, certificate.value, certificate.gap):
            assert figure != 0 or np.copysign(1.0, figure) == 1.0


def test_caps_and_constraints_reach_the_solver():
    allocation = allocate(SPECTRA, 4, caps={"x": (["q"], 1)}, method="greedy")
    assert allocation.ranks.tolist() == [1, 2]
    assert [row.name for row in allocation.problem.caps] == ["x"]
    pytest.importorskip("cvxpy", reason="the convex relaxation needs the extra `convex`")
    allocation = allocate(SPECTRA, 4, constraints=lambda rank: [rank["q"] + 2 * rank["v"] <= 3])
    assert allocation.certificate.side is not None
    assert allocation["q"] + 2 * allocation["v"] <= 3
    check_answer(allocation)


def test_a_groups_ranks_together():
    # The first example that comes to mind: the attention layers of a block, together at most.
    pytest.importorskip("cvxpy", reason="the convex relaxation needs the extra `convex`")
    instance = power_law("a")
    attention = [name for name in instance.spectra if name.startswith("layers.3.attention")]
    free = instance.allocate()
    assert sum(free[name] for name in attention) > 20
    limited = instance.allocate(constraints=lambda rank: [sum(rank[n] for n in attention) <= 20])
    assert sum(limited[name] for name in attention) == 20
    check_answer(limited)
    assert limited.value < free.value
    assert limited.certificate.relative_gap < 1e-3
    # A cap says the same, and its answer is as good or better.
    caps = {"attention": lorambo_alloc.Cap(attention, 20, [1] * len(attention))}
    capped = allocate(instance.spectra, instance.budget, caps=caps, **instance.keywords)
    assert limited.value <= capped.value <= limited.certificate.upper_bound
