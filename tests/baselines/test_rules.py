"""Each rule against its own definition."""

import math
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, Spectra, schatten, uniform_rank
from lorambo_alloc.baselines import (
    MLP,
    RULES,
    adalora,
    eva,
    gora,
    mlp_only,
    square_root,
    uniform,
)
from lorambo_alloc.testing import power_law
from tests.strategies import examples, instances, seeds

FLAT = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 8}


def test_the_rules_by_name():
    assert list(RULES) == ["uniform", "mlp_only", "eva", "adalora", "gora", "square_root"]
    for name, function in RULES.items():
        assert function.__name__ == name  # type: ignore[attr-defined]


# -- uniform -------------------------------------------------------------------------------------


@settings(max_examples=examples(1))
@given(instances())
def test_uniform_is_the_largest_common_rank_that_fits(instance):
    problem = instance.problem()
    fitting = [problem.lower]
    for rank in range(1, int(problem.upper.max()) + 1):
        ranks = problem.lower.copy()
        for group in problem.variables:
            allowed = problem.allowed_ranks(group[0])
            ranks[list(group)] = max(allowed[allowed <= rank], default=allowed[0])
        if problem.fits(ranks):
            fitting.append(ranks)
    assert uniform(problem).ranks.tolist() == fitting[-1].tolist()


@pytest.mark.parametrize("shape", ["a", "b"])
def test_uniform_spends_the_budget_of_a_uniform_rank(shape):
    allocation = uniform(power_law(shape).problem())
    assert set(allocation.values()) == {8 if shape == "a" else 16}
    assert allocation.cost == allocation.budget
    assert allocation.certificate.status == "gap_certified"


# -- mlp_only ------------------------------------------------------------------------------------

IN_MLP = [
    "encoder.layer.0.intermediate.dense",
    "encoder.layer.11.output.dense",
    "vit.encoder.layer.3.output.dense",
    "layers.7.intermediate",
    "layers.7.output",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.gate_up_proj",
    "layers.0.down_proj",
    "transformer.h.0.mlp.c_fc",
    "transformer.h.0.mlp.c_proj",
    "model.decoder.layers.0.fc1",
    "layers.0.fc2",
    "transformer.layer.0.ffn.lin1",
    "layers.0.feed_forward.w1",
    "layers.0.FeedForward.w2",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "encoder.block.0.layer.1.DenseReluDense.wo",
    "transformer.h.0.mlp.dense_h_to_4h",
    "h.0.dense_4h_to_h",
    "model.layers.0.block_sparse_moe.experts.3.w1",
    "visual.blocks.0.mlp.fc1",
    "mlp",
    "ff.0",
]
NOT_IN_MLP = [
    "encoder.layer.0.attention.output.dense",
    "encoder.layer.0.attention.self.query",
    "layers.7.attention.output",
    "model.layers.0.self_attn.o_proj",
    "transformer.h.0.attn.c_proj",
    "h.0.crossattention.c_attn",
    "h.0.self_attention.dense",
    "h.0.Attention.fc1",
    "encoder.block.0.layer.0.SelfAttention.o",
    "model.layers.0.self_attn.mlp_gate",
    "pooler.dense",
    "lm_head",
    "output",
    "fc",
    "classifier",
    "embed_tokens",
    "cls.predictions.transform.dense",
    "layers.0.offset",
    "layers.0.fc1x",
    "buffn.0",
]


@pytest.mark.parametrize("name", IN_MLP)
def test_names_of_mlp_layers(name):
    assert re.search(MLP, name)


@pytest.mark.parametrize("name", NOT_IN_MLP)
def test_names_of_other_layers(name):
    assert not re.search(MLP, name)


def test_mlp_only_is_uniform_over_the_mlp():
    problem = power_law("b").problem()
    allocation = mlp_only(problem)
    assert {rank for name, rank in allocation.items() if "self_attn" in name} == {0}
    assert {rank for name, rank in allocation.items() if "mlp" in name} == {23}
    one_more = np.where([("mlp" in name) for name in problem.names], 24, 0)
    assert not problem.fits(one_more)


def test_mlp_only_with_a_pattern_and_a_minimum():
    problem = Problem(FLAT, 9, min_rank={"a": 1})
    assert dict(mlp_only(problem, pattern="[bc]")) == {"a": 1, "b": 4, "c": 4}
    assert dict(mlp_only(problem, pattern="^c$")) == {"a": 1, "b": 0, "c": 8}
    assert dict(mlp_only(problem, pattern="a")) == {"a": 8, "b": 0, "c": 0}
    assert dict(mlp_only(Problem(FLAT, 9), pattern="[bc]", fill=True)) == {"a": 0, "b": 5, "c": 4}


def test_mlp_only_needs_an_mlp():
    expected = (
        r"^pattern: expected a match among the names of the 4 layers, got none "
        r"\('a', 'b', 'c', ...\)$"
    )
    with pytest.raises(ValueError, match=expected):
        mlp_only(Problem({**FLAT, "d": [1.0]}, 9))


@pytest.mark.parametrize("pattern", ["(", 3, None])
def test_mlp_only_refuses(pattern):
    with pytest.raises(ValueError, match=r"^pattern: expected a regular expression, got "):
        mlp_only(Problem(FLAT, 9), pattern=pattern)


# -- eva -----------------------------------------------------------------------------------------


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


# -- adalora -------------------------------------------------------------------------------------


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


# -- gora and the square root --------------------------------------------------------------------


def divisor_method(problem: Problem, breaks) -> list[int]:
    """Ranks at the largest scale that fits, in rationals; breaks(i, n): the n-th allowed rank's."""
    points = {breaks(i, n) for i in range(len(problem.names)) for n in range(1, 9)}
    best = [0] * len(problem.names)
    for scale in sorted(points - {None}):
        ranks = [
            sum(1 for n in range(1, 9) if (at := breaks(i, n)) is not None and at <= scale)
            for i in range(len(problem.names))
        ]
        if problem.cost_of(np.array(ranks)) > problem.budget:
            break
        best = ranks
    return best


# Powers of two, whose ties are ties in doubles too, or numbers that have none.
roots = st.one_of(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0]), min_size=3, max_size=3),
    seeds().map(lambda seed: np.random.default_rng(seed).uniform(0.1, 9.0, 3).tolist()),
)
unit_costs = st.lists(st.sampled_from([1, 4, 16]), min_size=3, max_size=3)


@settings(max_examples=examples(1))
@given(roots, unit_costs, st.integers(0, 170))
def test_gora_rounds_shares_down(importance, costs, budget):
    problem = Problem(FLAT, budget, costs=costs)

    def breaks(i: int, n: int):
        return n * costs[i] / Fraction(importance[i]) if importance[i] else None

    assert gora(problem, importance=importance).ranks.tolist() == divisor_method(problem, breaks)


@settings(max_examples=examples(1))
@given(roots, unit_costs, st.integers(0, 170))
def test_square_root_rounds_to_the_nearest(root, costs, budget):
    problem = Problem(FLAT, budget, costs=costs)

    def breaks(i: int, n: int):
        return (2 * n - 1) * math.isqrt(costs[i]) / Fraction(root[i]) if root[i] else None

    ranks = square_root(problem, sensitivity=[value**2 for value in root]).ranks.tolist()
    assert ranks == divisor_method(problem, breaks)


def test_gora_in_numbers():
    # Shares 1 : 2 : 4 of the budget, over costs 4, 8 and 2: scales 1/4, 1/4 and 2 a rank.
    problem = Problem(FLAT, 56, costs=[4, 8, 2])
    importance = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert dict(gora(problem, importance=importance)) == {"a": 3, "b": 3, "c": 8}
    # Over the roots 2, 2 sqrt 2 and sqrt 2.
    ranks = gora(problem, importance=importance, features="sqrt").ranks.tolist()
    assert ranks == [2, 4, 8]
    assert gora(problem, importance=[0.0, 0.0, 1.0]).ranks.tolist() == [0, 0, 8]
    assert gora(problem, importance=[0.0, 0.0, 0.0]).ranks.tolist() == [0, 0, 0]
    assert gora(problem, importance=[1.0, 2.0, 0.0]).ranks.tolist() == [4, 4, 0]
    assert gora(problem, importance=[1.0, 2.0, 0.0], fill=True).ranks.tolist() == [6, 4, 0]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, [0, 0, 0]),
        (1, [1, 0, 0]),
        (4, [1, 0, 0]),
        (5, [1, 1, 0]),
        (6, [2, 1, 0]),
        (21, [2, 1, 0]),
        (22, [2, 1, 1]),
        (23, [3, 1, 1]),
        (26, [3, 1, 1]),
        (27, [3, 2, 1]),
        (167, [8, 8, 7]),
        (168, [8, 8, 8]),
    ],
)
def test_square_root_in_numbers(budget, expected):
    # sqrt(s / c) is 1, 1/2 and 1/4; n ranks are reached at n - 1/2 over that.
    problem = Problem(FLAT, budget, costs=[1, 4, 16])
    assert square_root(problem, sensitivity=[1.0, 1.0, 1.0]).ranks.tolist() == expected


def test_gora_and_square_root_stand_ins():
    # Mean gains 5 and 3, whole gains 10 and 12.
    curves = GainCurves.from_increments({"a": [9.0, 1.0], "b": [3.0, 3.0, 3.0, 3.0]})
    assert dict(gora(Problem(curves, 1))) == {"a": 1, "b": 0}
    assert dict(square_root(Problem(curves, 1))) == {"a": 0, "b": 1}


def test_steps_are_rounded_down_by_gora_and_to_the_nearest_by_the_square_root():
    spectra = {"a": [1.0] * 16, "b": [1.0] * 16}
    problem = Problem(spectra, 16, multiple_of=8)
    # gora: b reaches 8 when a has 8 / 0.9 = 8.9, rounded down to 8.
    assert gora(problem, importance=[1.0, 0.9]).ranks.tolist() == [8, 8]
    assert gora(problem, importance=[1.0, 0.4]).ranks.tolist() == [16, 0]
    # square root: a is nearer to 16 than to 8 from 12 on, b nearer to 8 than to 0 from 4 on.
    assert square_root(problem, sensitivity=[1.0, 0.12]).ranks.tolist() == [8, 8]
    assert square_root(problem, sensitivity=[1.0, 0.11]).ranks.tolist() == [16, 0]


@pytest.mark.parametrize("features", ["log1p", None, 1])
def test_gora_refuses_features(features):
    with pytest.raises(ValueError, match=r"^features: expected 'linear' or 'sqrt', got "):
        gora(Problem(FLAT, 9), features=features)


def test_importance_too_small_to_count():
    # 2 / 5e-324 overflows: such a layer is never given a rank.
    assert gora(Problem(FLAT, 30), importance=[1.0, 5e-324, 1.0]).ranks.tolist() == [8, 0, 8]
    problem = Problem(FLAT, 30, costs=[1, 2**53, 1])
    assert square_root(problem, sensitivity=[1.0, 5e-324, 1.0]).ranks.tolist() == [8, 0, 8]


@pytest.mark.parametrize(
    ("allocation_of", "expected"),
    [
        (lambda p: gora(p, importance=[1.0, -1.0, 1.0]), "^importance: layer 'b': expected a fin"),
        (lambda p: gora(p, importance=[1.0]), "^importance: expected 3 values, got 1"),
        (lambda p: square_root(p, sensitivity=[1.0]), "^sensitivity: expected 3 values, got 1"),
        (lambda p: eva(p, ratios=[[1.0]]), "^ratios: expected 3 sequences, got 1"),
        (lambda p: adalora(p, scores=[[1.0]]), "^scores: expected 3 sequences, got 1"),
    ],
)
def test_signals_are_named_where_they_are_wrong(allocation_of, expected):
    with pytest.raises(ValueError, match=expected):
        allocation_of(Problem(FLAT, 9))


@pytest.mark.parametrize("rule", RULES)
def test_what_is_left_over_is_spent_only_if_asked_for(rule):
    # Every rule gives all layers their ranks at the same moments, at 10 for a rank of each.
    spectra = {f"{n}.mlp": [1.0] * 4 for n in range(2)}
    problem = Problem(spectra, 29, costs=[5, 5])
    plain, filled = RULES[rule](problem), RULES[rule](problem, fill=True)
    assert filled.cost == 25
    expected = {"adalora": 0, "eva": 25}
    assert plain.cost == expected.get(rule, 20)


def test_ties_go_to_the_first_of_many_layers():
    # Two values in turn, so many that a sort which is not stable would mix them up.
    rows = [[0.9], [0.5]] * 40
    problem = Problem([[1.0]] * 80, 53)
    expected = [1, 1] * 13 + [1, 0] * 27
    assert eva(problem, ratios=rows).ranks.tolist() == expected
    assert adalora(problem, scores=rows).ranks.tolist() == [1, 0] * 40
    assert adalora(problem, scores=rows, fill=True).ranks.tolist() == expected


@pytest.mark.parametrize("rule", RULES)
def test_limits_come_first(rule):
    names = {f"{n}.mlp": [4.0, 3.0, 2.0, 1.0] for n in range(3)}
    problem = Problem(names, 7, min_rank={"1.mlp": 2}, max_rank={"0.mlp": 1})
    ranks = RULES[rule](problem, fill=True).ranks.tolist()
    assert ranks[0] <= 1
    assert ranks[1] >= 2
    assert sum(ranks) == 7


def test_uniform_rank_as_the_budget():
    assert set(uniform(Problem(FLAT, uniform_rank(5))).values()) == {5}
