"""EVA and AdaLoRA against their own definitions, and against PEFT's where ranks cost the same."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, Spectra, schatten
from lorambo_alloc.baselines import adalora, eva
from tests.strategies import examples, seeds

FLAT = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 8}


def eva_of_peft(ratios: list[np.ndarray], rank: int, rho: float) -> list[int]:
    """`_get_rank_distribution`, in numpy, for distinct ratios."""
    most = round(rank * rho)
    pairs = [(i, ratio) for i, row in enumerate(ratios) for ratio in row[:most]]
    order = np.argsort([-ratio for _, ratio in pairs])
    counts = Counter(pairs[n][0] for n in order[: rank * len(ratios)])
    return [counts.get(i, 0) for i in range(len(ratios))]


@settings(max_examples=examples(1))
@given(seeds(), st.integers(1, 6), st.integers(1, 4), st.sampled_from([1.0, 1.25, 1.5, 2.0, 2.5]))
def test_eva_is_pefts_where_ranks_cost_the_same(seed, layers, rank, rho):
    rng = np.random.default_rng(seed)
    spectra = [np.sort(rng.exponential(size=12))[::-1] for _ in range(layers)]
    ratios = [row**2 / np.sum(row**2) for row in spectra]
    problem = Problem(spectra, rank * layers)
    expected = eva_of_peft(ratios, rank, rho)
    assert eva(problem, rho=rho).ranks.tolist() == expected
    other = Problem([np.ones(12)] * layers, rank * layers * 7, costs=[7] * layers)
    assert eva(other, ratios=ratios, rho=rho).ranks.tolist() == expected


@pytest.mark.parametrize(
    ("rank", "rho", "expected"),
    [
        (1, 1.0, 1),
        (1, 2.5, 2),
        (1, 1.5, 2),
        (3, 1.5, 4),
        (2, 2.0, 4),
        (3, 2.0, 6),
        (9, 1.0, 8),
        (1, 1e308, 8),
        (10**400, 1.0, 8),
        (10**400, 1e308, 8),
        (1, 7.4, 7),
        (1, 7.6, 8),
    ],
)
def test_eva_cuts_at_rho_r(rank, rho, expected):
    problem = Problem({"a": [1.0] * 8}, 8)
    assert dict(eva(problem, rank=rank, rho=rho)) == {"a": expected}


@pytest.mark.parametrize(
    ("budget", "expected"), [(4, 0), (9, 1), (29, 2), (30, 2), (49, 2), (50, 4), (69, 4), (70, 6)]
)
def test_evas_rank_is_what_the_budget_pays_for(budget, expected):
    # Uniform rank r costs 20 r + 10. With rho = 2, layer a is cut at 2 r.
    problem = Problem(FLAT, budget, costs=[5, 5, 10], fixed_costs=[0, 0, 10])
    ratios = {"a": [0.9] * 8, "b": [0.1] * 8, "c": [0.1] * 8}
    assert eva(problem, ratios=ratios)["a"] == expected


def test_eva_follows_its_order_whatever_ranks_cost():
    ratios = {"a": [0.8, 0.1], "b": [0.5, 0.4], "c": [0.7, 0.2]}
    problem = Problem({"a": [9.0, 9.0], "b": [2.0, 1.0], "c": [1.0, 1.0]}, 12, costs=[6, 5, 2])
    # a, c, then b no longer fits; only with `fill` it is passed over.
    assert dict(eva(problem, ratios=ratios)) == {"a": 1, "b": 0, "c": 1}
    assert dict(eva(problem, ratios=ratios, fill=True)) == {"a": 1, "b": 0, "c": 2}


def test_eva_breaks_ties_in_layer_order():
    problem = Problem(FLAT, 4)
    assert eva(problem, rank=4).ranks.tolist() == [4, 0, 0]
    assert eva(problem, rank=1).ranks.tolist() == [2, 2, 0]


def test_evas_stand_in_counts_what_a_spectrum_leaves_unresolved():
    values = {"a": [3.0, 3.0], "b": [2.0, 1.0]}
    assert dict(eva(Problem(Spectra(values), 1))) == {"a": 0, "b": 1}
    spectra = Spectra(values, unresolved={"b": 4.0})
    assert dict(eva(Problem(spectra, 1))) == {"a": 1, "b": 0}


def test_evas_stand_in_ignores_objective_and_weights():
    values = {"a": [3.0, 3.0], "b": [2.0, 1.0]}
    for objective in ("nuclear", "operator", schatten(3)):
        problem = Problem(values, 1, objective=objective, weights=[9.0, 1.0])
        assert dict(eva(problem)) == {"a": 0, "b": 1}


@pytest.mark.parametrize("rho", [0.99, 0, -1, math.inf, math.nan, "2", None])
def test_eva_refuses_rho(rho):
    with pytest.raises(ValueError, match=r"^rho: expected a finite number >= 1, got "):
        eva(Problem(FLAT, 9), rho=rho)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "2"])
def test_eva_refuses_rank(rank):
    with pytest.raises(ValueError, match=r"^rank: expected a whole number >= 1, got "):
        eva(Problem(FLAT, 9), rank=rank)


@settings(max_examples=examples(1))
@given(seeds(), st.integers(1, 5), st.booleans())
def test_adalora_is_pefts_where_ranks_cost_the_same(seed, layers, ties):
    rng = np.random.default_rng(seed)
    scores = [rng.integers(0, 4, 5) + (0 if ties else rng.random(5)) for _ in range(layers)]
    everything = np.sort(np.concatenate(scores))
    budget = int(rng.integers(0, 5 * layers))
    # torch.kthvalue(scores, k=init - budget); what is <= it is masked.
    threshold = everything[5 * layers - budget - 1]
    expected = [int(np.count_nonzero(row > threshold)) for row in scores]
    problem = Problem([np.ones(5)] * layers, budget)
    assert adalora(problem, scores=scores).ranks.tolist() == expected
    assert adalora(problem, scores=scores, fill=True).cost == budget


def test_adaloras_stand_in_is_the_gain_of_each_rank():
    values = {"a": [3.0, 2.0], "b": [2.5, 0.5]}
    assert dict(adalora(Problem(values, 2))) == {"a": 1, "b": 1}
    assert dict(adalora(Problem(values, 2, weights=[4.0, 1.0]))) == {"a": 2, "b": 0}
    weighted = Problem(values, 2, weights=[2.0, 1.0], objective="operator")
    assert dict(adalora(weighted)) == {"a": 2, "b": 0}
    curves = GainCurves({"a": [0.0, -1.0, 7.0], "b": [0.0, 0.3, 0.6]})
    assert dict(adalora(Problem(curves, 1))) == {"a": 1, "b": 0}


def test_adalora_gives_no_more_ranks_than_scores():
    scores = {"c": [1.0], "a": [5.0, 9.0], "b": [2.0, 3.0, 4.0] * 9}
    assert adalora(Problem(FLAT, 99), scores=scores).ranks.tolist() == [2, 8, 1]
