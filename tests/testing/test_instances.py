"""Instances: what they promise, and the same from the same seed."""

import numpy as np
import pytest

from lorambo_alloc import GainCurves, Problem, uniform_rank
from lorambo_alloc.testing import (
    HARD_FAMILIES,
    SMALL_FAMILIES,
    Instance,
    large,
    mixture_of_experts,
    multiples_of_8,
    non_concave,
    parity,
    power_law,
    small_instance,
)
from tests.checks import all_feasible


def rows(instance: Instance) -> list[list[float]]:
    spectra = instance.spectra
    return [np.asarray(row).tolist() for row in (getattr(spectra, "values", lambda: spectra)())]


MAKERS = {
    "power law a": lambda seed: power_law("a", seed),
    "large": lambda seed: large(12, 20, seed),
    "mixture of experts": lambda seed: mixture_of_experts(4, 3, 8, seed),
    "non-concave": lambda seed: non_concave(9, 8, seed),
    "multiples of 8": multiples_of_8,
    **{name: lambda seed, f=f: f(9, 7, seed) for name, f in HARD_FAMILIES.items()},
    **{
        f"small {name}": lambda seed, f=name: small_instance(np.random.default_rng(seed), f)
        for name in SMALL_FAMILIES
    },
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_seed_decides_everything(make):
    one, same, other = make(5), make(5), make(6)
    assert rows(one) == rows(same)
    assert (one.budget, one.keywords) == (same.budget, same.keywords)
    assert (rows(one), one.budget, one.keywords) != (rows(other), other.budget, other.keywords)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_every_instance_is_a_problem_with_a_choice(make):
    instance = make(0)
    problem = instance.problem()
    assert 0 <= problem.cost_of(problem.lower) <= problem.budget
    allocation = instance.allocate(time_limit=1.0)
    assert allocation.cost <= instance.budget


@pytest.mark.parametrize(
    ("shape", "layers", "ranks", "distinct", "uniform"),
    [
        ("a", 96, 64, 2, 8),
        ("b", 224, 128, 3, 16),
        ("c", 560, 256, 3, 16),
        ("d", 2000, 512, None, 16),
    ],
)
def test_power_laws_have_the_shapes_of_real_models(shape, layers, ranks, distinct, uniform):
    instance = power_law(shape)
    problem = instance.problem()
    assert len(problem.names) == layers
    assert set(problem.max_lengths.tolist()) == {ranks}
    if distinct:
        assert len(set(problem.costs.tolist())) == distinct
    assert (
        Problem(instance.spectra, uniform_rank(uniform), **instance.keywords).budget
        == instance.budget
    )


def test_an_unknown_shape():
    with pytest.raises(ValueError, match="shape: expected one of 'a', 'b', 'c', 'd', got 'e'"):
        power_law("e")


def test_multiples_are_asked_for():
    assert multiples_of_8().keywords["multiple_of"] == 8


def test_curves_are_neither_concave_nor_monotone():
    instance = non_concave(20, 30)
    assert not instance.problem().concave_unit_steps
    increments = [np.diff(row) for row in instance.spectra.values()]
    assert any((np.diff(step) > 0).any() for step in increments)
    assert any((step < 0).any() for step in increments)


def test_a_mixture_of_experts_has_few_costs():
    problem = mixture_of_experts(5, 4, 8).problem()
    assert len(set(problem.costs.tolist())) == 7


def test_parity_can_never_meet_its_bound():
    instance = parity(6, 4)
    problem = instance.problem()
    assert not np.any(problem.costs % 2)
    assert instance.budget % 2 == 1
    odd = parity(6, 4, odd_layers=2).problem()
    assert np.count_nonzero(odd.costs % 2) == 2


@pytest.mark.parametrize("family", SMALL_FAMILIES)
@pytest.mark.parametrize("limits", [False, True])
def test_small_instances_are_feasible_and_small(family, limits):
    for seed in range(60):
        instance = small_instance(
            np.random.default_rng(seed), family, layers=3, ranks=4, limits=limits
        )
        problem = instance.problem()
        assert len(problem.names) <= 3
        assert max(problem.max_lengths) <= 4
        assert next(all_feasible(problem), None) is not None
        if not limits:
            assert set(instance.keywords) <= {"costs", "objective"}


def test_small_instances_use_every_limit():
    seen: set[str] = set()
    kinds: set[type] = set()
    for seed in range(300):
        instance = small_instance(np.random.default_rng(seed))
        seen |= instance.keywords.keys()
        kinds.add(type(instance.spectra))
    limits = {
        "min_rank",
        "max_rank",
        "multiple_of",
        "allowed_ranks",
        "tied",
        "fixed_costs",
        "weights",
    }
    assert limits <= seen
    assert kinds == {dict, GainCurves}


def test_an_unknown_family():
    with pytest.raises(ValueError, match=r"family: expected one of power_law, .*, got 'foo'"):
        small_instance(np.random.default_rng(0), "foo")


@pytest.mark.parametrize("family", HARD_FAMILIES)
def test_hard_families_have_the_size_asked_for(family):
    problem = HARD_FAMILIES[family](7, 5).problem()
    assert len(problem.names) == 7
    assert set(problem.max_lengths.tolist()) == {5}
    assert problem.concave_unit_steps
