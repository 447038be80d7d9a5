"""Caps against brute force, and mid-size problems with caps against HiGHS."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from lorambo_alloc import GainCurves, Problem, solve
from lorambo_alloc.caps import Cap
from lorambo_alloc.testing import SMALL_FAMILIES, Instance, brute_force, small_instance
from tests.checks import all_feasible, check_answer, check_optimum, neighbours
from tests.strategies import GROUPS, capped, caps, examples, instances, seeds

GAINFUL = tuple(family for family in SMALL_FAMILIES if family != "operator")


@pytest.mark.parametrize("kind", GROUPS)
@given(data=st.data())
@settings(max_examples=examples(0.6))
def test_any_problem(kind: str, data):
    instance = data.draw(capped(instances(layers=5, ranks=3), kind))
    problem = instance.problem()
    optimum, _ = brute_force(problem)
    allocation = solve(problem)
    check_optimum(allocation, optimum)
    # Problems this small are searched to the end.
    assert allocation.certificate.gap <= 1e-9 * abs(float(optimum))


@given(capped(instances(layers=4, ranks=4, concave=True), own_units=False))
@settings(max_examples=examples(1))
def test_single_ranks_of_descending_gain(instance: Instance):
    problem = instance.problem()
    check_optimum(solve(problem), brute_force(problem)[0])


@given(capped(instances(layers=3, ranks=3)))
@settings(max_examples=examples(0.3))
def test_mixed_integer_program(instance: Instance):
    problem = instance.problem()
    check_optimum(solve(problem, "milp"), brute_force(problem)[0])


@pytest.mark.parametrize("family", GAINFUL)
@given(seed=seeds(), data=st.data())
@settings(max_examples=examples(0.1))
def test_family(family: str, seed: int, data):
    drawn = small_instance(np.random.default_rng(seed), family)
    keywords = {**drawn.keywords, "caps": data.draw(caps(drawn.problem()))}
    problem = Problem(drawn.spectra, drawn.budget, **keywords)
    check_optimum(solve(problem), brute_force(problem)[0])


@given(capped(instances(layers=4, ranks=3)))
@settings(max_examples=examples(0.5))
def test_no_time_at_all_still_gives_a_certified_answer(instance: Instance):
    problem = instance.problem()
    check_optimum(solve(problem, time_limit=0.0), brute_force(problem)[0])


@given(capped(instances(layers=4, ranks=3)))
@settings(max_examples=examples(0.5))
def test_no_neighbour_is_better(instance: Instance):
    problem = instance.problem()
    allocation = solve(problem)
    for other in neighbours(problem, allocation.ranks):
        assert problem.value_of(other) <= Fraction(allocation.certificate.upper_bound)
        assert problem.value_difference(other, allocation.ranks) <= allocation.certificate.gap


@given(instances(layers=3, ranks=3), st.data())
@settings(max_examples=examples(0.5))
def test_a_cap_never_helps(instance: Instance, data):
    plain = solve(instance.problem())
    keywords = {**instance.keywords, "caps": data.draw(caps(instance.problem()))}
    held = solve(Problem(instance.spectra, instance.budget, **keywords))
    assert held.certificate.value <= plain.certificate.upper_bound


@given(capped(instances(layers=3, ranks=3)), st.integers(2, 5))
@settings(max_examples=examples(0.5))
def test_the_units_of_a_cap_do_not_matter(instance: Instance, factor: int):
    problem = instance.problem()
    scaled: dict[str, Cap] = {}
    for row in problem.caps:
        members = row.layers
        if int(row.costs.max()) * factor > 1 << 53:
            return
        scaled[row.name] = Cap(
            [problem.names[i] for i in members.tolist()],
            row.budget * factor + factor - 1,
            (row.costs[members] * factor).tolist(),
            (row.fixed_costs[members] * factor).tolist(),
        )
    again = Problem(instance.spectra, instance.budget, **{**instance.keywords, "caps": scaled})
    feasible = [ranks.tolist() for ranks in all_feasible(problem)]
    assert feasible == [ranks.tolist() for ranks in all_feasible(again)]
    one, other = solve(problem), solve(again)
    assert one.certificate.value <= other.certificate.upper_bound
    assert other.certificate.value <= one.certificate.upper_bound


FAMILIES = ("descending", "ties", "non-concave", "non-monotone", "proportional")
KINDS = ("disjoint", "nested", "crossing")
LIMITS = ("none", "multiples", "fixed costs", "tied", "ranges")


def mid_size(seed: int, family: str, kind: str, limits: str) -> Problem:
    """A problem with caps too large to enumerate, with gains of about 1 and small costs."""
    rng = np.random.default_rng(seed)
    layers, ranks = 12, 9
    names = [str(i) for i in range(layers)]
    costs = rng.integers(1, 30, layers)
    if family == "descending":
        gains = -np.sort(-rng.random((layers, ranks)), axis=1)
    elif family == "ties":
        gains = -np.sort(-rng.integers(1, 4, (layers, ranks)), axis=1).astype(float)
    elif family == "proportional":
        gains = np.repeat((costs[:, None] + 3) / 32.0, ranks, axis=1)
    else:
        gains = rng.uniform(0.0 if family == "non-concave" else -0.7, 1.0, (layers, ranks))
    keywords: dict[str, Any] = {"costs": costs.tolist()}
    if limits == "multiples":
        keywords["multiple_of"] = 3
    elif limits == "fixed costs":
        keywords["fixed_costs"] = rng.integers(0, 40, layers).tolist()
    elif limits == "tied":
        keywords["tied"] = [names[:3], names[3:5], names[7:9]]
    elif limits == "ranges":
        keywords["min_rank"] = {"0": 2, "5": 1}
        keywords["max_rank"] = 7
    order = rng.permutation(layers)
    if kind == "disjoint":
        groups = np.array_split(order, 3)
    elif kind == "nested":
        groups = [order[:3], order[:6], order[:10]]
    else:
        groups = [rng.permutation(layers)[:6] for _ in range(3)]
    curves = GainCurves.from_increments(gains)
    plain = Problem(curves, 1 << 40, **keywords)
    drawn: dict[str, Cap] = {}
    for n, group in enumerate(groups):
        own = rng.integers(1, 30, len(group)) if n % 2 else costs[group]
        fixed = rng.integers(0, 9, len(group)) if n == 1 else plain.fixed_costs[group]
        least = int(own @ plain.lower[group] + fixed.sum())
        budget = least + int(rng.uniform(0.1, 0.6) * int(own.sum()) * ranks)
        drawn[f"cap{n}"] = Cap([names[i] for i in group], budget, own.tolist(), fixed.tolist())
    budget = plain.cost_of(plain.lower) + int(rng.uniform(0.2, 0.6) * int(costs.sum()) * ranks)
    return Problem(curves, budget, **keywords, caps=drawn)


def highs(problem: Problem) -> float:
    """The optimum by one binary a variable and rank, written down without the library's help."""
    gains: list[float] = []
    owners: list[int] = []
    costs: list[list[float]] = [[] for _ in problem.rows]
    for v, layers in enumerate(problem.variables):
        for rank in problem.allowed_ranks(layers[0]).tolist():
            gains.append(sum(float(problem.curve(i)[rank]) for i in layers))
            owners.append(v)
            for own, row in zip(costs, problem.rows, strict=True):
                own.append(
                    sum(
                        int(row.costs[i]) * rank + int(row.fixed_costs[i]) * (rank > 0)
                        for i in layers
                    )
                )
    one_each = (np.arange(len(problem.variables))[:, None] == np.array(owners)).astype(float)
    result = milp(
        -np.array(gains),
        integrality=np.ones(len(gains), dtype=int),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(
                np.array(costs, dtype=float), -np.inf, [row.budget for row in problem.rows]
            ),
        ],
        options={"mip_rel_gap": 1e-9, "time_limit": 20.0},
    )
    assert result.x is not None
    chosen = np.array(gains) @ np.round(result.x)
    return float(chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "proportional"])
def test_against_highs(family: str, limits: str, kind: str):
    problem = mid_size(1, family, kind, limits)
    expected = highs(problem)
    allocation = solve(problem)
    check_answer(allocation)
    assert allocation.value >= expected * (1 - 1e-6)
    assert allocation.certificate.upper_bound >= expected * (1 - 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds(), family=st.sampled_from(FAMILIES), limits=st.sampled_from(LIMITS))
@settings(max_examples=examples(0.1))
def test_bounds_and_values_of_other_solvers_cross(kind: str, seed: int, family: str, limits: str):
    problem = mid_size(seed, family, kind, limits)
    answers = [solve(problem), solve(problem, time_limit=0.0)]
    for one in answers:
        check_answer(one)
        for other in answers:
            assert one.value <= other.certificate.upper_bound
