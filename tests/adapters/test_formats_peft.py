"""Ranks in PEFT: parameters, ranks and scales of the adapters that it makes, saves and loads."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is absent")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.layers import find_layers  # noqa: E402  (needs torch)
from lorambo_adapters.ranks.formats import ranks_of, to_axolotl, to_peft, to_vllm  # noqa: E402
from lorambo_alloc import allocate, uniform_rank  # noqa: E402
from tests.strategies import examples  # noqa: E402

DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
DECODER |= {"intermediate_size": 24, "num_key_value_heads": 2}
ENCODER = {key: DECODER[key] for key in list(DECODER)[:5]}
MOE = {**DECODER, "num_experts": 4, "moe_intermediate_size": 12, "head_dim": 4}
MOE |= {"num_experts_per_tok": 2}
FAMILIES = {
    "bert": ("Bert", "ForMaskedLM", ENCODER),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 16, "n_layer": 12, "n_head": 4, "vocab_size": 40}),
    "t5": ("T5", "ForConditionalGeneration", {"d_model": 16, "d_ff": 24, "d_kv": 4}),
    "llama": ("Llama", "ForCausalLM", {**DECODER, "num_hidden_layers": 12}),
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM", MOE),
}
FAMILIES["gpt2"][2].update(bos_token_id=0, eos_token_id=0)
FAMILIES["t5"][2].update(num_heads=4, num_layers=2, vocab_size=40)
TARGETS = {"bert": r".*(word_embeddings|query|value|dense)"}


def base(name):
    stem, head, options = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, stem + head)(getattr(transformers, f"{stem}Config")(**options))
    return model.eval()


def allocation_of(name, model, *, dora=False, rank=3):
    """An allocation with ranks of 0 in it; experts of one parameter have one rank."""
    layers = find_layers(model, TARGETS.get(name, "all-linear"))
    if dora:
        layers = [layer for layer in layers if layer.kind in ("linear", "conv1d")]
    groups = {}
    for layer in layers:
        if layer.expert is not None:
            groups.setdefault(layer.name.rpartition(".")[0], []).append(layer.name)
    draws = np.random.default_rng(len(layers))
    values = {
        layer.name: np.sort(draws.lognormal(1, 1, min(layer.shape)))[::-1] * draws.lognormal(0, 2)
        for layer in layers
    }
    for group in groups.values():
        values |= dict.fromkeys(group, values[group[0]])
    allocation = allocate(
        values,
        uniform_rank(rank),
        shapes={layer.name: layer.shape for layer in layers},
        fixed_costs={layer.name: layer.shape[0] for layer in layers} if dora else None,
        tied=list(groups.values()),
        max_rank=7,
    )
    assert 0 in allocation.values()
    assert len(set(allocation.values())) > 3
    return allocation


def with_adapters(model, config, name="default"):
    with warnings.catch_warnings():
        # Deprecations of transformers; Conv1D's fan_in_fan_out; keys of parameters, see `to_peft`.
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name=name).eval()


def one_scale(found, scale):
    """Whether all scales are this one, to the last place (s sqrt(r) / sqrt(r) need not be s)."""
    return all(abs(s - scale) <= np.spacing(scale) for s in found.scales.values())


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def output(model):
    with torch.no_grad():
        tokens = {"input_ids": torch.arange(8)[None] + 1}
        if "T5" in type(model.get_base_model()).__name__:
            tokens["decoder_input_ids"] = tokens["input_ids"]
        return model(**tokens).logits


def train_a_little(model):
    """Make every factor and magnitude differ from where it began."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_peft_has_the_allocated_parameters_and_one_scale(name, variant, tmp_path):
    model = base(name)
    dora, rslora = variant == "dora", variant == "rslora"
    allocation = allocation_of(name, model, dora=dora)
    config = to_peft(allocation, scale=1.7, rslora=rslora, modules=model)
    tuned = with_adapters(model, {**config, "use_dora": dora})
    assert trainable(tuned) == allocation.cost
    kept = {layer: rank for layer, rank in allocation.items() if rank}
    made = ranks_of(tuned)
    assert made == kept
    assert one_scale(made, 1.7)
    assert made.parameters == allocation.problem.costs @ allocation.ranks

    before = output(tuned)
    train_a_little(tuned)
    after = output(tuned)
    assert not torch.allclose(before, after)
    tuned.save_pretrained(tmp_path)
    if name == "qwen3_moe" and not dora:
        with pytest.raises(ValueError, match=r"layer 'model.layers.\d.mlp.experts'.*which of the"):
            ranks_of(tmp_path)
        stored = ranks_of(tmp_path / "adapter_config.json", modules=base(name))
    else:
        stored = ranks_of(tmp_path)
        assert stored.shapes == {layer: made.shapes[layer] for layer in stored}
    assert stored == kept
    assert one_scale(stored, 1.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert ranks_of(loaded) == kept
    assert one_scale(ranks_of(loaded), 1.7)
    assert torch.equal(output(loaded), after)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_suffix_keys_give_the_same_adapters(name):
    model = base(name)
    allocation = allocation_of(name, model)
    config = to_peft(allocation, keys="suffix", modules=model)
    assert not any("^" in key or "\\" in key for key in config["rank_pattern"])
    tuned = with_adapters(model, config)
    assert ranks_of(tuned) == {layer: rank for layer, rank in allocation.items() if rank}
    assert set(ranks_of(tuned).scales.values()) == {1.0}


def test_uniform_alpha_and_rank_are_kept_as_a_scale():
    model = base("llama")
    allocation = allocation_of("llama", model)
    for rslora in (False, True):
        uniform = {"r": 4, "lora_alpha": 11, "use_rslora": rslora, "target_modules": "all-linear"}
        expected = set(ranks_of(with_adapters(base("llama"), uniform)).scales.values())
        assert len(expected) == 1
        config = to_peft(allocation, alpha=11, r=4, rslora=rslora)
        assert one_scale(ranks_of(with_adapters(base("llama"), config)), expected.pop())


def test_a_configuration_can_be_read_without_making_adapters():
    for name in ("gpt2", "qwen3_moe"):
        model = base(name)
        allocation = allocation_of(name, model)
        kept = {layer: rank for layer, rank in allocation.items() if rank}
        config = peft.LoraConfig(**to_peft(allocation, scale=0.5, modules=model))
        read = ranks_of(config, modules=model)
        assert read == kept
        assert set(read.scales.values()) == {0.5}
        assert read.alphas == {layer: 0.5 * rank for layer, rank in kept.items()}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_peft_is_silent_and_warns_only_of_the_keys_of_parameters(name):
    model = base(name)
    allocation = allocation_of(name, model)
    config = peft.LoraConfig(**to_peft(allocation, modules=model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.get_peft_model(model, config)
    unmatched = [str(w.message) for w in caught if "did not match" in str(w.message)]
    if name != "qwen3_moe":
        assert unmatched == []
        return
    # Known and harmless: the ranks above are right all the same.
    assert len(unmatched) == 2
    assert all("self_attn" not in message for message in unmatched)


def test_parameters_of_one_rank_bring_no_warning():
    model = base("qwen3_moe")
    layers = find_layers(model, ["q_proj"], target_parameters=["down_proj"])
    ranks = {layer.name: 2 if layer.expert is not None else 5 for layer in layers}
    config = to_peft(ranks, target_parameters=["experts.down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("error", message=".*did not match.*")
        tuned = peft.get_peft_model(model, peft.LoraConfig(**config))
    assert ranks_of(tuned) == ranks
    assert trainable(tuned) == sum(ranks[layer.name] * sum(layer.shape) for layer in layers)


def test_experts_alone_leave_the_modules_alone():
    model = base("qwen3_moe")
    layers = [layer for layer in find_layers(model) if layer.expert is not None]
    ranks = {layer.name: 3 for layer in layers}
    config = to_peft(ranks, modules=model)
    assert config["target_modules"] == []
    assert ranks_of(with_adapters(model, config)) == ranks


def test_experts_that_differ_or_are_missing_are_refused():
    model = base("qwen3_moe")
    stem = "model.layers.0.mlp.experts.down_proj"
    ranks = {f"{stem}.{i}": 2 for i in range(4)}
    with pytest.raises(ValueError, match=r"one rank for all of its experts.*got 2 to 3"):
        to_peft({**ranks, f"{stem}.1": 3}, target_parameters=["down_proj"])
    del ranks[f"{stem}.3"]
    with pytest.raises(ValueError, match="experts 0 to 3, got no expert 3"):
        to_peft(ranks, modules=model)
    del ranks[f"{stem}.1"]
    with pytest.raises(ValueError, match="got no expert 1"):
        to_peft(ranks, target_parameters=["down_proj"])
    with pytest.raises(ValueError, match="expected a module or a parameter"):
        to_peft({"model.layers.9.self_attn.q_proj": 2}, modules=model)
    with pytest.raises(ValueError, match="expected a layer of 'up_proj', got none"):
        to_peft({"q": 1}, target_parameters=["up_proj"])


def test_targets_that_peft_reads_as_others_are_refused():
    def dense_then_experts():
        options = {**MOE, "mlp_only_layers": [0]}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**options))

    dense, q = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
    model = dense_then_experts()
    with pytest.raises(ValueError, match=rf"module '{dense}': expected PEFT to take it"):
        to_peft({dense: 2, q: 3}, modules=model)
    # What PEFT makes of it: the experts' parameters of that name in place of the module.
    made = ranks_of(with_adapters(model, to_peft({dense: 2, q: 3})))
    assert dense not in made
    assert any("experts" in layer for layer in made)
    ranks = {f"{dense}.weight": 2, q: 3}
    model = dense_then_experts()
    config = to_peft(ranks, modules=model)
    assert ranks_of(with_adapters(model, config)) == ranks


def test_an_expression_for_a_mixture_is_refused():
    model = base("qwen3_moe")
    ranks = {"model.layers.0.self_attn.q_proj": 3}
    with pytest.raises(ValueError, match="expected PEFT to take it"):
        to_peft(ranks, targets="regex", modules=model)
    # Unchecked, PEFT adapts the q_proj of every layer.
    made = ranks_of(with_adapters(model, to_peft(ranks, targets="regex")))
    assert set(made) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert ranks_of(with_adapters(base("qwen3_moe"), to_peft(ranks))) == ranks


def test_a_module_whose_name_is_anothers_suffix_is_told_apart():
    def twice():
        class Twice(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.lm_head = torch.nn.Linear(3, 4)
                self.inner = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(3, 4)})

        return Twice()

    model = twice()
    config = to_peft({"lm_head": 2}, modules=model)
    assert config["target_modules"] == "(?:lm_head)"
    assert ranks_of(with_adapters(model, config)) == {"lm_head": 2}
    with pytest.raises(ValueError, match=r"'inner.lm_head': expected no adapter.*'lm_head'"):
        to_peft({"lm_head": 2, "inner.lm_head": 0}, targets="list")
    both = {"lm_head": 2, "inner.lm_head": 3}
    assert to_peft(both)["target_modules"] == ["inner.lm_head", "lm_head"]
    assert ranks_of(with_adapters(twice(), to_peft(both))) == both
    with pytest.raises(ValueError, match="expected the model before PEFT"):
        to_peft({"lm_head": 2}, modules=with_adapters(model, config, "second"))


def test_what_a_tool_has_made_otherwise_is_found():
    allocation = allocation_of("llama", base("llama"))
    config = to_peft(allocation, scale=2.0)
    ranks_of(with_adapters(base("llama"), config)).check(allocation)
    ranks_of(with_adapters(base("llama"), config)).check(allocation, scale=2.0)
    absent = next(name for name, rank in allocation.items() if not rank)
    first = next(name for name, rank in allocation.items() if rank not in (0, config["r"]))
    rank = allocation[first]
    cases = [
        ({}, 1.0, r"expected scale 1, got 2; .* and \d+ more"),
        ({"alpha_pattern": {}}, 2.0, rf"layer '{first}': expected scale 2, got"),
        ({"rank_pattern": {}, "alpha_pattern": {}}, None, rf"'{first}': expected rank {rank}, got"),
        ({"target_modules": [*config["target_modules"], absent]}, 2.0,
         rf"layer '{absent}': expected rank 0, got {config['r']}$"),
        ({"exclude_modules": [first]}, None, rf"layer '{first}': expected rank {rank}, got 0$"),
    ]  # fmt: skip
    for changes, scale, message in cases:
        made = ranks_of(with_adapters(base("llama"), {**config, **changes}))
        with pytest.raises(ValueError, match=message):
            made.check(allocation, scale=scale)


CONFIGURED = [
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    {"target_modules": r".*\.q_proj", "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
]


@pytest.mark.parametrize("entries", CONFIGURED)
def test_configurations_are_read_as_peft_reads_them(entries):
    model = base("llama")
    made = with_adapters(base("llama"), {"r": 4, **entries})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, **entries)
    found = ranks_of(config, modules=model)
    assert dict(found) == dict(ranks_of(made))
    assert dict(ranks_of(config, modules=[name for name, _ in model.named_modules()])) == found


def test_configurations_that_make_other_modules_are_refused():
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="layer_replication: expected"):
        ranks_of({**config, "layer_replication": [[0, 2], [1, 2]]}, modules=base("llama"))
    with pytest.raises(ValueError, match="module 'gate': expected PEFT to take"):
        ranks_of({**config, "target_modules": ["q_proj", "gate"]}, modules=base("qwen3_moe"))


PARTS = ("layers", "1", "11", "q", "q+", "(q|0)", "[01]", "^q", "q$", "a-b", "é", "\\d", "1\\")


@st.composite
def trees(draw):
    """Names of which none is inside another one, and their ranks."""
    name = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join)
    names = draw(st.lists(name, min_size=1, max_size=7, unique=True))
    names = [n for n in names if not any(other.startswith(f"{n}.") for other in names)]
    ranks = {name: draw(st.sampled_from([0, 1, 2, 5])) for name in names}
    return {**ranks, names[0]: ranks[names[0]] or 3}


@settings(max_examples=examples(0.5))
@given(trees())
@example({"layers.1": 2, "layers.11": 5, "q.1": 0, "q.layers.1": 0})
def test_modules_of_any_names(ranks):
    model = torch.nn.ModuleDict()
    for name in ranks:
        *above, last = name.split(".")
        owner = model
        for part in above:
            if part not in owner:
                owner[part] = torch.nn.ModuleDict()
            owner = owner[part]
        owner[last] = torch.nn.Linear(3, 4)
    tuned = with_adapters(model, to_peft(ranks, scale=0.5))
    ranks_of(tuned).check(ranks, scale=0.5)
    assert trainable(tuned) == 7 * sum(ranks.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_hot_swapping_keeps_the_scale(rslora, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    allocation = allocation_of("llama", base("llama"))
    config = to_peft(allocation, scale=2.0, rslora=rslora)
    tuned = with_adapters(base("llama"), config)
    train_a_little(tuned)
    tuned.save_pretrained(tmp_path / "ours")
    # PEFT 0.21.2 matches the patterns with the keys of parameters there, and so takes the defaults.
    hotswap_adapter(tuned, tmp_path / "ours", adapter_name="default")
    made = ranks_of(tuned)
    assert one_scale(made, 2.0)
    # An adapter of other ranks is no silent error: PEFT compares the patterns.
    ranks = {**allocation, min(made): 1}
    fewer = with_adapters(base("llama"), to_peft(ranks, scale=2.0, rslora=rslora))
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(tuned, tmp_path / "fewer", adapter_name="default")


def test_what_vllm_reads_of_a_saved_adapter(tmp_path):
    allocation = allocation_of("qwen3_moe", base("qwen3_moe"))
    for rslora in (False, True):
        with pytest.warns(UserWarning, match="vLLM sets aside max_lora_rank=8"):
            config, max_lora_rank = to_vllm(
                allocation, scale=3.0, rslora=rslora, modules=base("qwen3_moe")
            )
        tuned = with_adapters(base("qwen3_moe"), config)
        assert one_scale(ranks_of(tuned), 3.0)
        assert trainable(tuned) == allocation.cost
        tuned.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        factor = saved["r"] ** 0.5 if saved["use_rslora"] else saved["r"]
        assert saved["lora_alpha"] / factor == pytest.approx(3.0, rel=1e-15)
        assert saved["r"] == max(allocation.values()) <= max_lora_rank


def test_axolotl_makes_the_same_adapters():
    for name, rslora in (("llama", False), ("qwen3_moe", True)):
        model = base(name)
        allocation = allocation_of(name, model)
        entries = to_axolotl(allocation, scale=0.3, rslora=rslora, modules=model)
        assert type(entries["lora_alpha"]) is int
        # As axolotl's `_build_peft_lora_config` passes them on.
        config = {
            "r": entries["lora_r"],
            "lora_alpha": entries["lora_alpha"],
            "target_modules": entries["lora_target_modules"],
            "target_parameters": entries.get("lora_target_parameters", []),
            "rank_pattern": entries["lora_rank_pattern"],
            "alpha_pattern": entries["lora_alpha_pattern"],
            "use_rslora": entries["peft_use_rslora"],
            "lora_dropout": entries.get("lora_dropout", 0.05),
        }
        made = ranks_of(with_adapters(model, config))
        assert made == {layer: rank for layer, rank in allocation.items() if rank}
        assert one_scale(made, 0.3)
