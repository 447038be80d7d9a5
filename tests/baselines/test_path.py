"""Following a rule to the budget, against its definition; the certificates of what comes out."""

from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, uniform_rank
from lorambo_alloc.baselines import RULES, certified, eva, mlp_only
from lorambo_alloc.baselines.path import follow
from lorambo_alloc.testing import (
    SMALL_FAMILIES,
    Instance,
    brute_force,
    brute_force_bottleneck,
    small_instance,
)
from tests.checks import all_feasible, check_answer
from tests.strategies import examples, instances, random_ranks, seeds


def every_instance() -> st.SearchStrategy[Instance]:
    """Every family, the objective `operator` too, with limits of every kind."""
    family = st.sampled_from(SMALL_FAMILIES)
    drawn = st.builds(lambda f, s: small_instance(np.random.default_rng(s), f), family, seeds())
    return st.one_of(instances(), instances(objective="operator"), drawn)


def with_caps(instance: Instance, seed: int) -> dict[str, Any]:
    """The instance's keywords, with caps that its least ranks satisfy."""
    rng = np.random.default_rng(seed)
    problem = instance.problem()
    caps: dict[str, Any] = {}
    for n in range(rng.integers(3)):
        members = rng.permutation(len(problem.names))[: rng.integers(1, len(problem.names) + 1)]
        least = sum(problem.cost_at([i], int(problem.lower[i])) for i in members)
        most = sum(problem.cost_at([i], int(problem.upper[i])) for i in members)
        names = [problem.names[i] for i in members]
        caps[f"cap{n}"] = (names, int(rng.integers(least, most + 1)))
    return {**instance.keywords, "caps": caps}


def arrivals_of(table: list[list[float]]):
    """Layer i is given rank r at table[i][r - 1]."""
    return lambda i, allowed: np.array([table[i][rank - 1] for rank in allowed[1:].tolist()])


def given_at(problem: Problem, table: list[list[float]], moment: float) -> np.ndarray:
    """The ranks of a rule at a moment, by definition: rounded down to what is allowed."""
    ranks = np.zeros(len(problem.names), dtype=np.int64)
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0]).tolist()
        reached = allowed[0]
        for rank in allowed[1:]:
            if any(table[i][rank - 1] > moment for i in group):
                break
            reached = rank
        ranks[list(group)] = reached
    return ranks


def random_table(problem: Problem, rng: np.random.Generator) -> list[list[float]]:
    """Ascending moments with many ties, some of them never."""
    table: list[list[float]] = []
    for length in problem.max_lengths.tolist():
        row = np.sort(rng.integers(-2, 4, length)).astype(np.float64)
        row[length - int(rng.integers(length + 1)) * int(rng.integers(2)) :] = np.inf
        table.append(row.tolist())
    return table


@settings(max_examples=examples(1))
@given(every_instance(), seeds())
def test_the_last_moment_that_fits(instance, seed):
    problem = Problem(instance.spectra, instance.budget, **with_caps(instance, seed))
    table = random_table(problem, np.random.default_rng(seed))
    moments = [-np.inf, *sorted({t for row in table for t in row if t < np.inf})]
    fitting = [r for t in moments if problem.fits(r := given_at(problem, table, t))]
    ranks = follow(problem, arrivals_of(table))
    problem.check(ranks)
    assert ranks.tolist() == fitting[-1].tolist()


@settings(max_examples=examples(1))
@given(every_instance(), seeds())
def test_filled_up_nothing_more_that_the_rule_gives_fits(instance, seed):
    problem = Problem(instance.spectra, instance.budget, **with_caps(instance, seed))
    table = random_table(problem, np.random.default_rng(seed))
    filled = follow(problem, arrivals_of(table), fill=True)
    problem.check(filled)
    assert np.all(filled >= follow(problem, arrivals_of(table)))
    everything = given_at(problem, table, np.finfo(float).max)
    assert np.all(filled <= everything)
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0]).tolist()
        at = int(filled[group[0]])
        if at < everything[group[0]]:
            more = filled.copy()
            more[list(group)] = allowed[allowed.index(at) + 1]
            assert not problem.fits(more)


@pytest.mark.parametrize(
    ("budget", "threshold", "filled"),
    [
        (9, [0, 1, 1, 1], [0, 1, 1, 1]),
        (12, [0, 1, 2, 1], [0, 1, 2, 1]),
        (14, [0, 1, 2, 1], [0, 1, 2, 1]),
        (15, [0, 1, 2, 1], [0, 1, 3, 1]),
        (16, [0, 2, 2, 1], [0, 2, 2, 1]),
        (20, [0, 2, 2, 1], [0, 3, 2, 1]),
        (21, [0, 2, 2, 1], [1, 2, 2, 1]),
        (24, [0, 2, 2, 1], [1, 2, 3, 1]),
        (25, [0, 2, 2, 1], [1, 3, 2, 1]),
        (35, [3, 3, 2, 1], [3, 3, 2, 1]),
        (99, [3, 3, 3, 1], [3, 3, 3, 1]),
    ],
)
def test_what_comes_first_is_filled_first(budget, threshold, filled):
    problem = Problem([[1.0] * 3] * 4, budget, costs=[5, 4, 3, 2])
    # Between the moments 1.5 and 3 layers 0 and 1 are given their last ranks at once.
    never = np.inf
    table = [[2.0, 2.0, 2.0], [1.0, 1.5, 2.0], [1.0, 1.2, 3.0], [1.0, never, never]]
    assert follow(problem, arrivals_of(table)).tolist() == threshold
    assert follow(problem, arrivals_of(table), fill=True).tolist() == filled


def test_of_one_moment_the_first_layers_are_filled():
    problem = Problem([[1.0] * 2] * 3, 5, costs=[2, 2, 2])
    table = [[1.0, 2.0]] * 3
    assert follow(problem, arrivals_of(table)).tolist() == [0, 0, 0]
    assert follow(problem, arrivals_of(table), fill=True).tolist() == [1, 1, 0]


def test_ties_are_given_together_or_not_at_all():
    problem = Problem([[1.0], [1.0]], 1)
    assert follow(problem, arrivals_of([[1.0], [1.0]])).tolist() == [0, 0]
    assert follow(problem, arrivals_of([[1.0], [1.5]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("first", "expected"), [(1.0, [1, 1, 1]), (4.5, [0, 2, 0]), (np.inf, [0, 2, 0])]
)
def test_a_tied_group_waits_for_its_last_layer(first, expected):
    spectra = {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    problem = Problem(spectra, 3, tied=[["a", "c"]])
    table = [[first, 5.0], [3.0, 4.0], [1.0, 5.0]]
    assert follow(problem, arrivals_of(table)).tolist() == expected


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=examples(0.5))
@given(instance=every_instance(), seed=seeds())
def test_every_rule_is_feasible_and_no_better_than_the_optimum(rule, fill, instance, seed):
    keywords = with_caps(instance, seed)
    if keywords.get("objective") == "operator":
        del keywords["caps"]  # no solver takes them together
    problem = Problem(instance.spectra, instance.budget, **keywords)
    some = partial(mlp_only, pattern="layer[02]|^[02]$")
    allocation = (some if rule == "mlp_only" else RULES[rule])(problem, fill=fill)
    problem.check(allocation.ranks)
    assert allocation.certificate.method == rule
    value = problem.value_of(allocation.ranks)
    optimum = max(problem.value_of(r) for r in all_feasible(problem) if problem.fits(r))
    assert value <= optimum <= Fraction(allocation.certificate.upper_bound)
    assert optimum <= value + Fraction(allocation.certificate.gap)
    if allocation.certificate.status == "optimal_exact":
        assert value == optimum
    assert allocation.certificate.verify(problem, allocation.ranks).value == value


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mlp_only"])
@settings(max_examples=examples(0.5))
@given(instance=instances(), more=st.integers(0, 60))
def test_more_budget_never_takes_a_rank_away(rule, instance, more):
    # EVA's cap on a layer follows the budget unless it is given, and takes from some layers.
    function = partial(eva, rank=2) if rule == "eva" else RULES[rule]
    tight = function(instance.problem())
    loose = function(Problem(instance.spectra, instance.budget + more, **instance.keywords))
    assert np.all(tight.ranks <= loose.ranks)


@settings(max_examples=examples(1))
@given(instances(), seeds())
def test_a_certificate_of_any_ranks_verifies(instance, seed):
    problem = instance.problem()
    rng = np.random.default_rng(seed)
    ranks = random_ranks(problem, rng)
    if problem.cost_of(ranks) > problem.budget:
        ranks = problem.lower
    check_answer(allocation := certified(problem, ranks, "drawn"))
    assert allocation.ranks.tolist() == ranks.tolist()
    assert allocation.certificate.method == "drawn"
    optimum = brute_force(problem)[0]
    assert optimum <= Fraction(allocation.certificate.upper_bound)


@settings(max_examples=examples(1))
@given(instances(objective="operator"), seeds())
def test_a_certificate_of_any_ranks_for_operator(instance, seed):
    problem = instance.problem()
    ranks = random_ranks(problem, np.random.default_rng(seed))
    if problem.cost_of(ranks) > problem.budget:
        ranks = problem.lower
    certificate = certified(problem, ranks, "drawn").certificate
    optimum = -Fraction(brute_force_bottleneck(problem)[0][0])
    assert Fraction(certificate.upper_bound) == optimum
    assert Fraction(certificate.value) == problem.value_of(ranks)
    assert (certificate.gap == 0) == (problem.value_of(ranks) == optimum)


def test_the_best_ranks_are_certified_optimal():
    problem = Problem({"a": [3.0, 2.0], "b": [2.5, 1.0]}, 2)
    best = certified(problem, np.array([1, 1]), "best").certificate
    assert (best.status, best.value, best.upper_bound, best.gap) == (
        *("optimal_exact", 15.25, 15.25),
        0.0,
    )
    worse = certified(problem, np.array([0, 1]), "worse").certificate
    assert (worse.status, worse.value, worse.upper_bound, worse.gap) == (
        *("gap_certified", 6.25, 15.25),
        9.0,
    )
    assert 4.0 <= worse.price <= 6.25


def test_a_value_that_is_no_double_can_be_optimal():
    problem = Problem(GainCurves.from_increments({"a": [1.0], "b": [2.0**-60]}), 2)
    certificate = certified(problem, np.array([1, 1]), "all").certificate
    assert (certificate.status, certificate.gap) == ("optimal_exact", 0.0)
    assert certificate.value < certificate.upper_bound


def test_the_bound_is_that_of_the_prices():
    spectra = {"a": [3.0, 2.0, 1.5], "b": [2.5, 2.0, 1.0], "c": [2.2, 1.9, 1.8]}
    caps = {"stage": (["a", "b"], 11), "other": (["b", "c"], 9)}
    problem = Problem(spectra, 17, costs=[5, 3, 2], caps=caps)
    allocation = certified(problem, np.array([1, 0, 1]), "mine")
    certificate = allocation.certificate
    assert len(certificate.cap_prices) == 2
    assert max(certificate.cap_prices) > 0
    assert certificate.status == "gap_certified"
    verified = certificate.verify(problem, allocation.ranks)
    assert verified.proof == "price"
    optimum = max(problem.value_of(r) for r in all_feasible(problem) if problem.fits(r))
    assert optimum < Fraction(certificate.upper_bound)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([2, 2], "the ranks cost 4, more than the budget 2"),
        ([3, 0], "layer 'a': rank 3 is not allowed"),
        ([1], "ranks: expected 2 whole numbers"),
        ([0.5, 1.0], "ranks: expected 2 whole numbers"),
    ],
)
def test_ranks_that_are_not_allowed(ranks, expected):
    problem = Problem({"a": [3.0, 2.0], "b": [2.5, 1.0]}, 2)
    with pytest.raises(ValueError, match=expected):
        certified(problem, np.array(ranks), "mine")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mlp_only"])
def test_no_layers(rule):
    allocation = RULES[rule](Problem({}, uniform_rank(1)), fill=True)
    assert dict(allocation) == {}
    assert allocation.certificate.status == "optimal_exact"


@pytest.mark.parametrize("rule", RULES)
def test_a_cap_holds_a_rule_back(rule):
    spectra = {f"{n}.mlp": [4.0 - n, 3.0 - n, 2.0 - n] for n in range(3)}
    caps = {"stage": (["0.mlp", "1.mlp"], 2)}
    problem = Problem(spectra, 9, caps=caps)
    free = RULES[rule](Problem(spectra, 9), fill=True)
    capped = RULES[rule](problem, fill=True)
    assert problem.fits(capped.ranks)
    assert not problem.fits(free.ranks)
    assert capped["0.mlp"] + capped["1.mlp"] == 2


def test_moments_ascend_within_a_layer_even_if_a_rule_does_not():
    problem = Problem([[1.0, 1.0, 1.0]], 3)
    table = [[5.0, 1.0, 6.0]]
    assert follow(problem, arrivals_of(table)).tolist() == [3]
    ends = [follow(Problem([[1.0] * 3], b), arrivals_of(table)).tolist()[0] for b in range(4)]
    assert ends == [0, 0, 2, 3]
    assert all(a <= b for a, b in pairwise(ends))
