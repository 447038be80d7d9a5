"""The rules that look at no signal."""

import re

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import Problem, uniform_rank
from lorambo_alloc.baselines import MLP, mlp_only, uniform
from lorambo_alloc.testing import power_law
from tests.strategies import examples, instances

FLAT = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 8}


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


def test_uniform_rank_as_the_budget():
    assert set(uniform(Problem(FLAT, uniform_rank(5))).values()) == {5}


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
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
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
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.1.attentions.0.proj_in",
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
    with pytest.raises(ValueError, match=r"of the 3 layers, got none \('a', 'b', 'c'\)$"):
        mlp_only(Problem(FLAT, 9))
    with pytest.raises(ValueError, match=r"of the 0 layers, got none$"):
        mlp_only(Problem({}, 9))


@pytest.mark.parametrize("pattern", ["(", 3, None])
def test_mlp_only_refuses(pattern):
    with pytest.raises(ValueError, match=r"^pattern: expected a regular expression, got "):
        mlp_only(Problem(FLAT, 9), pattern=pattern)
