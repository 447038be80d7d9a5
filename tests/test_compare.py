"""The comparison: never better than the optimum, never a share above what is proved."""

import dataclasses
import inspect
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import Allocation, GainCurves, InfeasibleError, Problem, allocate
from lorambo_alloc.baselines import RULES, certified, eva, uniform
from lorambo_alloc.compare import Comparison, compare
from lorambo_alloc.testing import (
    HARD_FAMILIES,
    SMALL_FAMILIES,
    Instance,
    power_law,
    small_instance,
)
from tests.checks import all_feasible
from tests.strategies import examples, instances, seeds

SPECTRA = {"0.attn.q": [3.0, 2.0, 1.0], "0.mlp.up": [2.5, 0.5]}


def compared(instance: Instance, **options) -> Comparison:
    return compare(instance.spectra, instance.budget, **instance.keywords, **options)


def test_compare_takes_the_keywords_of_allocate():
    door = inspect.signature(compare).parameters
    library = inspect.signature(allocate).parameters
    shared = [name for name in library if name != "constraints"]
    assert list(door) == [*shared, "rules", "fill"]
    for name in shared:
        parameter = library[name]
        assert door[name].default == parameter.default
        assert door[name].kind == parameter.kind


def test_keywords_reach_the_problem():
    comparison = compare(
        {"a": [3.0, 2.0], "b": [2.5, 0.5], "c": [1.0]},
        41,
        shapes=[(3, 9), (5, 6), (7, 8)],
        costs=[2, 3, 4],
        fixed_costs=[1, 0, 2],
        objective="nuclear",
        weights=[2.0, 1.0, 1.0],
        min_rank={"a": 1},
        max_rank={"b": 1},
        multiple_of=1,
        allowed_ranks={"a": [0, 1, 2]},
        tied=[["a", "b"]],
        caps={"stage": (["a"], 5)},
        method="exact",
        time_limit=60.0,
    )
    problem = comparison.rows[0].allocation.problem
    assert problem.budget == 41
    assert problem.costs.tolist() == [2, 3, 4]
    assert problem.fixed_costs.tolist() == [1, 0, 2]
    assert str(problem.objective) == "nuclear"
    assert problem.weights is not None
    assert problem.weights.tolist() == [2.0, 1.0, 1.0]
    assert [problem.allowed_ranks(i).tolist() for i in range(3)] == [[1], [1], [0, 1]]
    assert problem.tied == (("a", "b"),)
    assert [row.name for row in problem.caps] == ["stage"]
    assert compare({"a": [1.0]}, 7, shapes=[(3, 4)])["allocate"].cost == 7
    assert compare({"a": [1.0, 1.0, 1.0]}, 3, multiple_of=2)["uniform"].cost == 2


@settings(max_examples=examples(1))
@given(
    st.one_of(
        instances(),
        instances(objective="operator"),
        st.builds(
            lambda family, seed: small_instance(np.random.default_rng(seed), family),
            st.sampled_from(SMALL_FAMILIES),
            seeds(),
        ),
    ),
    st.booleans(),
)
def test_no_rule_exceeds_the_optimum_and_no_share_is_overstated(instance, fill):
    comparison = compared(instance, fill=fill)
    problem = instance.problem()
    optimum = max(problem.value_of(ranks) for ranks in all_feasible(problem))
    start = problem.value_of(0 * problem.lower)
    assert comparison.rows[0].rule == "allocate"
    assert {row.rule for row in comparison} | set(comparison.skipped) == {"allocate", *RULES}
    values = []
    for row in comparison:
        problem.check(row.allocation.ranks)
        value = problem.value_of(row.allocation.ranks)
        values.append(value)
        assert Fraction(row.value) <= value <= optimum
        assert row.cost == problem.cost_of(row.allocation.ranks)
        if row.share is not None:
            assert 0 <= row.share <= 1
            if optimum > start:
                assert Fraction(row.share) <= (value - start) / (optimum - start)
    assert values[1:] == sorted(values[1:], reverse=True)
    assert problem.value_of(comparison.best.allocation.ranks) == max(values)
    if comparison.proven:
        assert values[0] == optimum
        assert comparison.best is comparison.rows[0]
        assert comparison.rows[0].share in (1.0, None)


@pytest.mark.parametrize("family", HARD_FAMILIES)
def test_hard_families(family):
    instance = HARD_FAMILIES[family](30, 8, 0)
    comparison = compared(instance, time_limit=0.2)
    most = Fraction(comparison.rows[0].allocation.certificate.upper_bound)
    for row in comparison:
        row.allocation.problem.check(row.allocation.ranks)
        assert row.allocation.problem.value_of(row.allocation.ranks) <= most


@pytest.mark.parametrize("shape", ["a", "b"])
def test_on_the_shape_of_a_model(shape):
    comparison = compared(power_law(shape))
    assert len(comparison) == 7
    assert comparison.proven
    assert comparison.best.rule == "allocate"
    shares = {row.rule: row.share for row in comparison}
    assert all(share is not None and share < 1 for rule, share in shares.items() if rule != OURS)
    assert comparison["uniform"].spent == 1.0
    assert all(row.spent > 0.97 for row in comparison)


OURS = "allocate"


def test_under_caps():
    spectra = {f"{n}.mlp": [5.0 - n, 3.0 - n, 2.0 - n] for n in range(3)}
    comparison = compare(spectra, 6, caps={"stage": (["0.mlp", "1.mlp"], 3)})
    assert comparison.proven
    assert comparison["allocate"].value == 25.0 + 16.0 + 9.0 + 9.0 + 1.0
    assert comparison["uniform"].allocation.ranks.tolist() == [1, 1, 1]
    filled = compare(spectra, 6, caps={"stage": (["0.mlp", "1.mlp"], 3)}, fill=True)
    assert filled["uniform"].allocation.ranks.tolist() == [2, 1, 3]
    for row in (*comparison, *filled):
        problem = row.allocation.problem
        assert problem.fits(row.allocation.ranks)
        assert row.allocation.certificate.verify(problem, row.allocation.ranks).complete


def test_a_rule_that_reaches_the_optimum_has_its_status():
    spectra = {"a": [1.0, 0.7], "b": [0.9, 0.8]}
    comparison = compare(spectra, 7, costs=[3, 4], rules=["uniform", "eva"])
    assert comparison["uniform"].status == "optimal_exact"
    assert comparison["uniform"].allocation.certificate.status == "gap_certified"
    quick = compare(spectra, 7, costs=[3, 4], rules=["uniform"], method="water_filling")
    assert [row.status for row in quick] == ["gap_certified"] * 2


def test_rules_by_name():
    names = ["eva", "uniform"]
    assert compare(SPECTRA, 3, rules=names).rows[0].rule == "allocate"
    assert {row.rule for row in compare(SPECTRA, 3, rules=names)} == {"allocate", *names}
    assert [row.rule for row in compare(SPECTRA, 3, rules="uniform")] == ["allocate", "uniform"]
    assert [row.rule for row in compare(SPECTRA, 3, rules=[])] == ["allocate"]
    assert [row.rule for row in compare(SPECTRA, 3, rules=iter(["eva"]))] == ["allocate", "eva"]


def test_filled_up():
    spectra = {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert dict(compare(spectra, 3)["uniform"].allocation) == {"a": 1, "b": 1}
    assert dict(compare(spectra, 3, fill=True)["uniform"].allocation) == {"a": 2, "b": 1}


def test_rules_of_ones_own():
    def by_hand(problem: Problem) -> Allocation:
        return certified(problem, np.array([0, 2]), "by hand")

    ratios = {"0.attn.q": [0.1, 0.0], "0.mlp.up": [0.9, 0.5]}
    rules = {"mine": by_hand, "measured": partial(eva, ratios=ratios)}
    comparison = compare(SPECTRA, 2, rules=rules)
    assert [row.rule for row in comparison] == ["allocate", "mine", "measured"]
    assert comparison["mine"].allocation.certificate.method == "by hand"
    assert comparison["measured"].allocation.ranks.tolist() == [0, 2]


def test_a_rule_that_does_not_apply():
    comparison = compare({"a": [1.0], "b": [1.0]}, 1)
    assert list(comparison.skipped) == ["mlp_only"]
    assert comparison.skipped["mlp_only"].startswith("pattern: expected a match")
    assert repr(comparison).splitlines()[-1].startswith("left out: mlp_only: pattern: expected a")
    with pytest.raises(ValueError, match=r"^pattern: expected a match among the names of the 2 la"):
        compare({"a": [1.0], "b": [1.0]}, 1, rules=["mlp_only"])
    assert compare({}, 0).rows[0].share == 1.0


def test_what_rules_are_not():
    with pytest.raises(ValueError, match=r"^rules: expected some of 'uniform', 'mlp_only', .*'x'"):
        compare(SPECTRA, 3, rules=["uniform", "x"])
    for unhashable in ([[]], [uniform]):
        with pytest.raises(ValueError, match=r"^rules: expected some of 'uniform', .*, got "):
            compare(SPECTRA, 3, rules=unhashable)  # type: ignore[list-item]
    for value in (5, uniform):
        with pytest.raises(
            ValueError, match=r"^rules: expected some of .*, or names to functions, "
        ):
            compare(SPECTRA, 3, rules=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rules: expected names other than 'allocate' to functi"):
        compare(SPECTRA, 3, rules={"allocate": uniform})
    with pytest.raises(ValueError, match=r"^rules: expected names .* got 'mine': \[1, 2\]$"):
        compare(SPECTRA, 3, rules={"mine": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"^rules: expected names .* got 1: "):
        compare(SPECTRA, 3, rules={1: uniform})  # type: ignore[dict-item]


def test_what_a_rule_may_not_return():
    expected = "^rules: 'mine': expected an Allocation of the problem that the rule was given$"
    with pytest.raises(ValueError, match=expected):
        compare(SPECTRA, 3, rules={"mine": lambda p: p.lower})
    with pytest.raises(ValueError, match=expected):
        compare(SPECTRA, 3, rules={"mine": lambda p: allocate(SPECTRA, 3)})
    certificate = allocate(SPECTRA, 3).certificate
    with pytest.raises(ValueError, match=r"^rules: 'mine': the ranks cost 5, more than the bu"):
        compare(SPECTRA, 3, rules={"mine": lambda p: Allocation(p, np.array([3, 2]), certificate)})


def test_an_error_of_the_problem_is_its_own():
    with pytest.raises(InfeasibleError):
        compare(SPECTRA, 1, min_rank=1)
    with pytest.raises(ValueError, match=r"^method: expected one of"):
        compare(SPECTRA, 1, method="none")


def test_a_claim_on_the_certificate_of_a_rule_is_not_believed():
    def boastful(problem: Problem) -> Allocation:
        own = uniform(problem)
        return Allocation(problem, own.ranks, dataclasses.replace(own.certificate, value=1e9))

    comparison = compare(SPECTRA, 44, costs=[16, 12], rules={"boast": boastful})
    assert comparison.best.rule == "allocate"
    assert comparison["boast"].share == pytest.approx(61 / 77)


def test_shares_where_nothing_is_proven():
    # The quick answer takes "a"; the optimum is b and c.
    spectra = GainCurves.from_increments({"a": [10.0], "b": [9.0], "c": [9.0]})

    def both(problem: Problem) -> Allocation:
        return certified(problem, np.array([0, 1, 1]), "both")

    def first(problem: Problem) -> Allocation:
        return certified(problem, np.array([1, 0, 0]), "first")

    rules = {"both": both, "first": first}
    comparison = compare(
        spectra, 11, costs=[6, 5, 5], method="water_filling", rules=rules, min_rank=0
    )
    quick = comparison.rows[0].allocation
    assert quick.certificate.status == "gap_certified"
    assert not comparison.proven
    upper = Fraction(quick.certificate.upper_bound)
    assert comparison["first"].share is not None
    assert Fraction(comparison["first"].share) <= 10 / upper
    assert comparison["first"].share == pytest.approx(float(10 / upper))
    text = repr(comparison).splitlines()
    assert text[-1] == "shares are of the upper bound: of the optimum they are no less"
    assert text[0] == "rule      value  of bound  cost  of budget  ranks  status"


def test_the_time_limit_is_passed_on():
    instance = HARD_FAMILIES["strongly_correlated_linear"](60, 16, 0)
    assert not compared(instance, time_limit=0.0, rules=[]).proven
    assert compared(instance, rules=[]).proven


def test_shares_of_losses():
    curves = GainCurves({"a": [0.0, -2.0, -1.0], "b": [0.0, -1.0, -4.0]})
    forced = compare(curves, 4, min_rank={"a": 1})
    assert [row.share for row in forced] == [None] * len(forced)
    # Doing nothing is best: what loses has no share, what does not has it all.
    shares = {row.rule: (row.value, row.share) for row in compare(curves, 4)}
    assert shares["allocate"] == (0.0, 1.0)
    assert shares["uniform"] == (-5.0, None)
    gainful = GainCurves({"a": [0.0, 3.0, 1.0], "b": [0.0, -1.0, -4.0]})
    shares = {row.rule: (row.value, row.share) for row in compare(gainful, 4)}
    assert shares["allocate"] == (3.0, 1.0)
    assert shares["uniform"] == (-3.0, None)


def test_shares_of_operator_count_from_rank_0():
    spectra = {"0.mlp": [5.0, 4.0, 1.0], "1.attn": [3.0, 2.0]}
    comparison = compare(spectra, 3, objective="operator")
    assert comparison["allocate"].value == -2.0 or comparison["allocate"].value == -3.0
    start, best = 5.0, -comparison["allocate"].value
    for row in comparison:
        assert row.share == pytest.approx((start + row.value) / (start - best))
    nothing = compare({"a": [0.0], "b": [0.0]}, 1, objective="operator")
    assert [row.share for row in nothing] == [1.0] * len(nothing)
