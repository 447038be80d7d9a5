"""Laws that hold for every problem and every solver, whatever the optimum is."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import Allocation, GainCurves, allocate, solve
from lorambo_alloc.arithmetic import exact_sum
from lorambo_alloc.testing import (
    HARD_FAMILIES,
    SMALL_FAMILIES,
    Instance,
    brute_force,
    multiples_of_8,
    non_concave,
    power_law,
    small_instance,
)
from tests.checks import check_answer, neighbours
from tests.strategies import examples, instances, seeds

SOLVERS = ("auto", "water_filling", "milp")


def interval(allocation: Allocation) -> tuple[Fraction, Fraction]:
    """Where the certificate says the optimum lies; one point where it is exact."""
    value = check_answer(allocation)
    return value, value + Fraction(allocation.certificate.gap)


def check_same_optimum(a: Allocation, b: Allocation, factor: Fraction = Fraction(1)) -> None:
    """The optimum of `b` is `factor` times that of `a`, as far as the two certificates say."""
    (low, high), (other_low, other_high) = interval(a), interval(b)
    assert low * factor <= other_high
    assert other_low <= high * factor


def by_layer(keywords: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Keywords with what stands in layer order given by name."""
    ordered = {"costs", "fixed_costs", "weights"}
    return {
        key: dict(zip(names, value, strict=True))
        if key in ordered and isinstance(value, list)
        else value
        for key, value in keywords.items()
    }


def operator_too() -> st.SearchStrategy[Instance]:
    return st.one_of(instances(), instances(objective="operator"))


def solvers_for(instance: Instance) -> tuple[str, ...]:
    return (
        ("auto",) if instance.keywords.get("objective") == "operator" else ("auto", "water_filling")
    )


@given(operator_too())
@settings(max_examples=examples(1))
def test_feasible_and_below_the_bound(instance: Instance):
    for solver in solvers_for(instance):
        check_answer(solve(instance.problem(), solver))


@given(operator_too(), st.integers(0, 40))
@settings(max_examples=examples(1))
def test_a_larger_budget_is_never_worse(instance: Instance, more: int):
    smaller = instance.allocate()
    larger = allocate(instance.spectra, instance.budget + more, **instance.keywords)
    assert interval(smaller)[0] <= interval(larger)[1]
    if instance.keywords.get("objective") == "operator":
        assert smaller.value <= larger.value


@given(operator_too(), st.randoms(use_true_random=False))
@settings(max_examples=examples(1))
def test_the_order_of_layers_does_not_matter(instance: Instance, random):
    names = list(instance.spectra)
    keywords = by_layer(instance.keywords, names)
    shuffled = random.sample(names, len(names))
    rows = {name: np.asarray(instance.spectra[name]) for name in shuffled}
    spectra: Any = rows
    if isinstance(instance.spectra, GainCurves):
        increments = instance.spectra.increments
        if increments is None:
            spectra = GainCurves(rows)
        else:
            spectra = GainCurves.from_increments(
                {name: increments.row(names.index(name)) for name in shuffled}
            )
    original = allocate(instance.spectra, instance.budget, **keywords)
    check_same_optimum(original, allocate(spectra, instance.budget, **keywords))


@given(operator_too(), st.sampled_from([-20, -3, 1, 7, 20]))
@settings(max_examples=examples(1))
def test_gains_may_be_scaled_by_a_power_of_two(instance: Instance, exponent: int):
    kind = instance.keywords.get("objective", "frobenius")
    if kind not in ("frobenius", "nuclear", "operator"):
        return
    scale = 2.0**exponent
    spectra: Any
    if isinstance(instance.spectra, GainCurves):
        increments, names = instance.spectra.increments, list(instance.spectra)
        if increments is None:
            spectra = GainCurves({name: row * scale for name, row in instance.spectra.items()})
        else:
            rows = {name: increments.row(i) * scale for i, name in enumerate(names)}
            spectra = GainCurves.from_increments(rows)
        power = 1
    else:
        rows = {name: np.asarray(row) for name, row in instance.spectra.items()}
        largest = max(float(row[0]) for row in rows.values())
        smallest = min((float(v) for row in rows.values() for v in row[row > 0]), default=1.0)
        # A power of two is exact only while no gain leaves the normal doubles, or their range.
        if largest * max(scale, 1.0) > 2.0**455 or smallest < 2.0**-480:
            return
        spectra = {name: row * scale for name, row in rows.items()}
        power = 2 if kind == "frobenius" else 1
    factor = Fraction(2) ** (exponent * power)
    scaled = allocate(spectra, instance.budget, **instance.keywords)
    check_same_optimum(instance.allocate(), scaled, factor)


@given(operator_too(), st.integers(2, 9), st.data())
@settings(max_examples=examples(1))
def test_costs_may_be_scaled_by_a_whole_number(instance: Instance, factor: int, data):
    keywords = dict(instance.keywords)
    keywords["costs"] = [factor * cost for cost in keywords["costs"]]
    if max(keywords["costs"]) > 2**53:
        return
    if "fixed_costs" in keywords:
        keywords["fixed_costs"] = [factor * cost for cost in keywords["fixed_costs"]]
    # What does not make up a whole unit buys nothing.
    budget = factor * instance.budget + data.draw(st.integers(0, factor - 1))
    check_same_optimum(instance.allocate(), allocate(instance.spectra, budget, **keywords))


@given(instances(), st.sampled_from([0.0, None]))
@settings(max_examples=examples(1))
def test_no_step_away_improves_an_answer_beyond_its_gap(instance: Instance, time_limit):
    problem = instance.problem()
    allocation = solve(problem, time_limit=time_limit)
    bound = interval(allocation)[1]
    for other in neighbours(problem, allocation.ranks):
        assert problem.value_of(other) <= bound


@pytest.mark.parametrize(
    "instance",
    [power_law("a"), power_law("b"), multiples_of_8(), non_concave(60, 32)],
    ids=lambda instance: instance.name,
)
def test_no_step_away_improves_an_answer_of_real_size(instance: Instance):
    problem = instance.problem()
    allocation = solve(problem)
    value, bound = interval(allocation)
    certificate = allocation.certificate
    price_bound = certificate.verify(problem, allocation.ranks).price_bound
    steps = 0
    for i in range(len(problem.names)):
        allowed = problem.allowed_ranks(i).tolist()
        at = allowed.index(int(allocation.ranks[i]))
        for to in (at - 1, at + 1):
            if not 0 <= to < len(allowed):
                continue
            other = allocation.ranks.copy()
            other[i] = allowed[to]
            difference = problem.value_difference(other, allocation.ranks)
            if problem.cost_of(other) <= problem.budget:
                assert value + difference <= bound
            else:
                # What does not fit is worth no more than the price.
                further = problem.cost_of(other) - problem.budget
                assert value + difference <= price_bound + Fraction(certificate.price) * further
            steps += 1
    assert steps > len(problem.names)


@given(seeds(), st.integers(1, 9), st.integers(0, 400))
@settings(max_examples=examples(0.5))
def test_equal_costs_take_exactly_the_largest_gains(seed: int, cost: int, budget: int):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 9))
    lengths = rng.integers(1, 12, layers)
    ties = rng.random() < 0.5
    rows = {
        f"layer{i}": -np.sort(-(rng.integers(0, 5, n).astype(float) if ties else rng.random(n)))
        for i, n in enumerate(lengths.tolist())
    }
    allocation = allocate(rows, budget, costs=[cost] * layers)
    check_answer(allocation)
    gains = np.sort(np.concatenate([np.square(row) for row in rows.values()]))[::-1]
    best = exact_sum(gains[: budget // cost])
    assert allocation.problem.value_of(allocation.ranks) == best
    assert allocation.certificate.status == "optimal_exact"


@pytest.mark.parametrize("family", SMALL_FAMILIES)
@given(seeds())
@settings(max_examples=examples(0.05))
def test_solvers_agree_on_the_value(family: str, seed: int):
    instance = small_instance(np.random.default_rng(seed), family)
    problem = instance.problem()
    if family == "operator":
        return
    answers = [solve(problem, solver) for solver in SOLVERS]
    for other in answers[1:]:
        check_same_optimum(answers[0], other)


@pytest.mark.parametrize("family", HARD_FAMILIES)
@given(seeds(), st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=examples(0.05))
def test_hard_families_of_any_small_size(family: str, seed: int, layers: int, ranks: int):
    if (ranks + 1) ** layers > 30_000:
        return
    layers = max(layers, 5) if family == "parity_odd_layers" else layers
    problem = HARD_FAMILIES[family](layers, min(ranks, 3) if layers > 5 else ranks, seed).problem()
    low, high = interval(solve(problem))
    if np.prod(problem.max_lengths + 1.0) <= 30_000:
        assert low <= brute_force(problem)[0] <= high


@given(instances())
@settings(max_examples=examples(0.5))
def test_a_problem_solved_twice_gives_the_same(instance: Instance):
    problem = instance.problem()
    one, other = solve(problem), solve(problem)
    assert one.ranks.tolist() == other.ranks.tolist()
    assert one.certificate == other.certificate


@given(operator_too())
@settings(max_examples=examples(0.5))
def test_a_limit_never_helps(instance: Instance):
    limited = interval(instance.allocate())[0]
    limits = ("min_rank", "max_rank", "multiple_of", "allowed_ranks", "tied", "fixed_costs")
    for limit in instance.keywords.keys() & set(limits):
        keywords = {key: value for key, value in instance.keywords.items() if key != limit}
        freed = allocate(instance.spectra, instance.budget, **keywords)
        assert limited <= interval(freed)[1]
