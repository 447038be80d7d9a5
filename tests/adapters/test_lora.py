"""Spectra of trained LoRAs: live PEFT models, what PEFT saved, and files of diffusers and kohya."""

import json
import math
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.layers import find_layers  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.lora import lora_spectra  # noqa: E402
from lorambo_adapters.spectra.lora_files import LoraFile  # noqa: E402
from lorambo_alloc import Spectra  # noqa: E402
from tests.adapters.conftest import TINY, quiet  # noqa: E402


def adapted(peft, model, **options):
    torch.manual_seed(1)
    with quiet():
        config = peft.LoraConfig(**{"init_lora_weights": False, **options})
        return peft.get_peft_model(model, config)


def llama(transformers, **changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes}))


def gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Conv2d(3, 6, (2, 3))
        self.point = torch.nn.Conv2d(6, 5, 1)
        self.line = torch.nn.Conv1d(4, 5, 3)
        self.table = torch.nn.Embedding(9, 4)


def deltas(model, adapter="default"):
    """PEFT's own updates, as matrices with outputs in their rows, by module."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.scaling:
            delta = module.get_delta_weight(adapter).detach().double().flatten(1)
            found[path] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return found


def assert_spectra_of(spectra, matrices, tolerance=1e-6):
    """PEFT multiplies in the factors' precision, so its product is off by that much."""
    assert set(spectra) == set(matrices)
    for name, matrix in matrices.items():
        expected = torch.linalg.svdvals(matrix.detach().double()).numpy()
        values = spectra[name]
        np.testing.assert_allclose(
            values, expected[: len(values)], rtol=0, atol=tolerance * float(expected[0])
        )
        assert not np.any(expected[len(values) :] > tolerance * expected[0])


def assert_same(spectra, other):
    assert set(spectra) == set(other)
    assert spectra.shapes == {name: other.shapes[name] for name in spectra}
    for name in spectra:
        np.testing.assert_allclose(spectra[name], other[name], rtol=1e-12, atol=0)


LLAMA_OPTIONS = [
    {"target_modules": "all-linear", "r": 3},
    {"target_modules": "all-linear", "r": 4, "lora_alpha": 7, "use_rslora": True},
    {
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "r": 2,
        "lora_alpha": 5,
        "rank_pattern": {
            "^model.layers.0.self_attn.q_proj": 6,
            r"layers\.\d.*(v|down)_proj": 20,  # more ranks than d
            "q_proj": 3,
        },
        "alpha_pattern": {"layers.1.self_attn.v_proj": 11, "v_proj": 2},
    },
    {
        "target_modules": r".*self_attn\..*",
        "use_rslora": True,
        "rank_pattern": {"k_proj": 1},
        "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 3},
    },
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "lora_bias": False},
]


@pytest.mark.parametrize("options", LLAMA_OPTIONS)
def test_a_live_model_and_what_peft_saves_of_it(transformers, peft, tmp_path, options):
    model = adapted(peft, llama(transformers), **options)
    spectra = lora_spectra(model)
    assert_spectra_of(spectra, deltas(model))
    with quiet():
        model.save_pretrained(tmp_path)
    saved = lora_spectra(tmp_path)
    assert_same(saved, spectra)
    assert_same(lora_spectra(tmp_path / "adapter_model.safetensors"), spectra)
    # One rank of every layer, as the adapter that PEFT makes has it.
    layers = {layer.name: layer.shape for layer in find_layers(model, options["target_modules"])}
    assert spectra.shapes == layers
    assert saved.source.startswith(f"LoRA {tmp_path.name}")
    # The embedding's own weight or that of `modules_to_save`, which PEFT saves too.
    others = "embed_tokens" in options["target_modules"] or "modules_to_save" in options
    assert ("1 other tensors passed over" in saved.source) is others


def test_saving_sorts_the_keys_of_patterns(transformers, peft, tmp_path):
    options = {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3, "layers.1.*": 4}}
    model = adapted(peft, llama(transformers), **options)
    assert {len(values) for values in lora_spectra(model).values()} == {3}
    with quiet():
        model.save_pretrained(tmp_path)
    said = r"layer 'model.layers.1.*expected rank 4 .* got 3 \(by another key of rank_pattern"
    with pytest.raises(ValueError, match=said):
        lora_spectra(tmp_path)
    with quiet(), pytest.raises(RuntimeError, match="size mismatch"):  # nor can PEFT
        peft.PeftModel.from_pretrained(llama(transformers), tmp_path)


def test_a_pickled_adapter(transformers, peft, tmp_path):
    model = adapted(peft, llama(transformers), target_modules=["q_proj"])
    with quiet():
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert_same(lora_spectra(tmp_path), lora_spectra(model))


def test_conv1d_of_gpt2(transformers, peft, tmp_path):
    options = {"fan_in_fan_out": True, "rank_pattern": {"mlp.c_proj": 3}, "lora_alpha": 5}
    model = adapted(peft, gpt2(transformers), target_modules=["c_attn", "c_proj", "wte"], **options)
    spectra = lora_spectra(model)
    matrices = deltas(model)
    matrices["transformer.wte"] = (
        model.get_base_model().transformer.wte.get_delta_weight("default").T
    )
    assert_spectra_of(spectra, matrices)
    assert spectra.shapes == {
        layer.name: layer.shape for layer in find_layers(model, ["c_attn", "c_proj", "wte"])
    }
    assert spectra.shapes is not None
    assert spectra.shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert spectra.shapes["transformer.wte"] == (16, 40)
    with quiet():
        model.save_pretrained(tmp_path)
    assert_same(lora_spectra(tmp_path), spectra)


def test_convolutions_and_embeddings(peft, tmp_path):
    names = ["wide", "point", "line", "table"]
    model = adapted(peft, Convolutions(), target_modules=names, r=3, lora_alpha=2)
    spectra = lora_spectra(model)
    matrices = deltas(model)
    matrices["table"] = matrices["table"].T
    assert_spectra_of(spectra, matrices)
    shapes = {"wide": (6, 18), "point": (5, 6), "line": (5, 12), "table": (4, 9)}
    assert spectra.shapes == shapes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 3 * sum(map(sum, shapes.values())) == trained
    with quiet():
        model.save_pretrained(tmp_path)
    assert_same(lora_spectra(tmp_path), spectra)


def test_a_convolution_with_groups_is_refused(peft, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Linear(2, 2))
    model = adapted(peft, model, target_modules=["0"], r=4)
    with pytest.raises(ValueError, match=r"layer '0'.*a convolution without groups"):
        lora_spectra(model)
    with quiet():
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer '0'.*a convolution without groups"):
        lora_spectra(tmp_path)


def test_attention_of_torch(peft, tmp_path):
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    model = adapted(peft, model, target_modules=["0"], r=2)
    spectra = lora_spectra(model)
    assert spectra.shapes == {"0": (24, 8), "0.out_proj": (8, 8)}
    with quiet():
        model.save_pretrained(tmp_path)
    assert_same(lora_spectra(tmp_path), spectra)


def test_bfloat16_factors_are_read_exactly(peft, tmp_path):
    model = adapted(peft, torch.nn.Sequential(torch.nn.Linear(6, 5)), target_modules=["0"], r=2)
    model = model.to(torch.bfloat16)
    layer = model.get_base_model()[0]
    delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    spectra = lora_spectra(model)
    assert_spectra_of(spectra, {"0": 4 * delta.detach()}, 1e-14)
    with quiet():
        model.save_pretrained(tmp_path)
    assert_same(lora_spectra(tmp_path), spectra)


def mixtral(transformers):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TINY, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


# Out x in; in x out; in x out without saying so.
@pytest.mark.parametrize("stem", ["Mixtral", "GptOss", "Llama4"])
def test_experts_of_a_live_model(transformers, peft, stem):
    if not hasattr(transformers, f"{stem}ForCausalLM"):
        pytest.skip(f"this transformers has no {stem}")
    torch.manual_seed(0)
    which = getattr(transformers, f"{stem}TextConfig", getattr(transformers, f"{stem}Config"))
    config = which(**TINY, num_local_experts=3, head_dim=4, pad_token_id=0)
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": parameters}
    options |= {"r": 2, "rank_pattern": {"experts.down_proj": 3}, "lora_alpha": 5}
    model = adapted(peft, model, **options)
    matrices = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            if delta.ndim == 2:
                matrices[path] = delta
                continue
            name = path.replace(".base_layer", "") + f".{module.parameter_name}"
            matrices |= {f"{name}.{expert}": matrix for expert, matrix in enumerate(delta)}
    spectra = lora_spectra(model)
    assert_spectra_of(spectra, matrices)
    layers = find_layers(model, ["q_proj"], target_parameters=parameters)
    assert spectra.shapes == {layer.name: layer.shape for layer in layers}
    # The outputs' side is that of B, whatever way the experts are kept.
    diagonals = {y.name: (torch.rand(y.shape[1]), torch.rand(y.shape[0])) for y in layers}
    weighted = {}
    for layer in layers:
        a, b = (diagonal.double().sqrt() for diagonal in diagonals[layer.name])
        delta = matrices[layer.name].double()
        delta = delta if delta.shape == layer.shape else delta.T
        weighted[layer.name] = b[:, None] * delta * a / math.sqrt(2)
    assert_spectra_of(lora_spectra(model, curvature=diagonals), weighted)


def test_experts_in_a_file(transformers, peft, tmp_path):
    options = {"target_modules": ["q_proj"], "r": 2, "rank_pattern": {r".*\.experts\.down_proj": 3}}
    model = adapted(peft, mixtral(transformers), target_parameters=["experts.down_proj"], **options)
    with quiet():
        model.save_pretrained(tmp_path)
    assert_same(lora_spectra(tmp_path), lora_spectra(model))


def test_experts_whose_parameter_the_file_does_not_say(transformers, peft, tmp_path):
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(
        peft, mixtral(transformers), target_modules=["q_proj"], target_parameters=parameters
    )
    with quiet():
        model.save_pretrained(tmp_path)
    said = (
        r"4 problems: layer 'model.layers.0.mlp.experts': .* down_proj, gate_up_proj .* pass that"
    )
    with pytest.raises(ValueError, match=said):
        lora_spectra(tmp_path)


def test_several_adapters(transformers, peft, tmp_path):
    model = adapted(peft, llama(transformers), target_modules=["q_proj", "v_proj"], r=2)
    with quiet():
        options = {"r": 3, "lora_alpha": 9, "init_lora_weights": False}
        model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], **options))
    first, second = deltas(model, "default"), deltas(model, "other")
    assert_spectra_of(lora_spectra(model), first)  # the active one
    assert_spectra_of(lora_spectra(model, adapter="other"), second)
    total = {name: delta + second.get(name, 0) for name, delta in first.items()}
    both = lora_spectra(model, adapter=["default", "other"])
    assert_spectra_of(both, total)
    assert "adapter default + other" in both.source
    model.base_model.set_adapter(["default", "other"])
    assert_same(lora_spectra(model), both)
    with pytest.raises(ValueError, match="adapter: expected one of 'default', 'other', got 'x'"):
        lora_spectra(model, adapter="x")
    with quiet():
        model.save_pretrained(tmp_path)
    assert_same(lora_spectra(tmp_path, adapter="other"), lora_spectra(model, adapter="other"))
    for adapter in ([], ["other", "other"]):
        with pytest.raises(ValueError, match="adapter: expected one or more different names"):
            lora_spectra(model, adapter=adapter)


def test_merging_and_rescaling(transformers, peft):
    model = adapted(peft, llama(transformers), target_modules=["q_proj"], r=2)
    before = lora_spectra(model)
    model.merge_adapter()
    assert_same(lora_spectra(model), before)
    model.unmerge_adapter()
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(-0.5)
    np.testing.assert_allclose(
        lora_spectra(model)["model.layers.0.self_attn.q_proj"] * 2,
        before["model.layers.0.self_attn.q_proj"],
    )


def test_dora_is_refused_unless_told_to_ignore_it(transformers, peft, tmp_path):
    model = adapted(peft, llama(transformers), target_modules=["q_proj"], use_dora=True, r=2)
    with quiet():
        model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match=r"got a DoRA, .* ignore_magnitude"):
            lora_spectra(source)
    spectra = lora_spectra(model, ignore_magnitude=True)
    assert_spectra_of(spectra, deltas(model))
    assert "magnitudes (DoRA) ignored" in spectra.source
    assert_same(lora_spectra(tmp_path, ignore_magnitude=True), spectra)


def test_other_methods_are_refused(transformers, peft, tmp_path):
    with quiet():
        config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=9)
        model = peft.get_peft_model(llama(transformers), config)
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a plain LoRA, got AdaLoRA"):
        lora_spectra(model)
    with pytest.raises(ValueError, match="expected peft_type LORA, got ADALORA"):
        lora_spectra(tmp_path)


def test_variants_with_the_plain_update_are_read_and_others_refused(transformers, peft, tmp_path):
    with quiet():
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="mica", r=2)
        model = peft.get_peft_model(llama(transformers), config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter)
    assert_spectra_of(lora_spectra(model), deltas(model))
    kasa = getattr(peft, "KasaConfig", None)
    if kasa is None:
        pytest.skip("this peft has no KaSA")
    model = adapted(peft, llama(transformers), target_modules=["q_proj"], kasa_config=kasa(), r=2)
    with pytest.raises(ValueError, match="expected a plain LoRA, got KasaLinearVariant"):
        lora_spectra(model)
    with quiet():
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got one with kasa_config"):
        lora_spectra(tmp_path)


def test_initialisations_that_change_the_base_warn(transformers, peft, tmp_path):
    options = {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "r": 2}
    model = adapted(peft, llama(transformers), **options)
    with quiet():
        model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.warns(UserWarning, match="weights were changed by pissa"):
            spectra = lora_spectra(source)
        assert spectra.source.count("relative to weights changed by pissa") == 1


def test_models_without_an_active_or_sound_adapter_are_refused(transformers, peft):
    model = adapted(peft, llama(transformers), target_modules=["q_proj"])
    with quiet():
        options = {"target_modules": ["v_proj"], "r": 2}
        model.add_adapter("other", peft.LoraConfig(**options))
    model.set_adapter("other")
    for module in model.modules():
        if hasattr(module, "lora_B") and "other" in module.lora_B:
            module.lora_B["other"].weight = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"2 problems: .*v_proj', adapter 'other': expected fac"):
        lora_spectra(model)
    assert len(lora_spectra(model, adapter="default")) == 2
    model.delete_adapter("default")
    model.base_model.set_adapter([])
    with pytest.raises(
        ValueError, match="expected an active LoRA adapter, got none; name one of o"
    ):
        lora_spectra(model)


def test_models_without_lora_are_refused(transformers, peft):
    with pytest.raises(ValueError, match="expected a model with LoRA layers of PEFT, got Linear"):
        lora_spectra(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        model = adapted(peft, llama(transformers), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"2 problems: layer 'model.layers.0.*meta device"):
        lora_spectra(model)


# Files of other programs.


def factors(name, d, k, rank, style="lora_down", seed=0):
    draw = torch.Generator().manual_seed(seed)
    down, up = {
        "lora_down": (".lora_down.weight", ".lora_up.weight"),
        "lora_A": (".lora_A.weight", ".lora_B.weight"),
        "lora_A.default": (".lora_A.default.weight", ".lora_B.default.weight"),
        "loralib": (".lora_A", ".lora_B"),
        "lora.down": (".lora.down.weight", ".lora.up.weight"),
        "_lora.down": ("_lora.down.weight", "_lora.up.weight"),
        "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    }[style]
    return {
        name + down: torch.randn(rank, *k, generator=draw),
        name + up: torch.randn(d, rank, *[1] * (len(k) - 1), generator=draw),
    }


def save(path, state, metadata=None):
    pytest.importorskip("safetensors", reason="safetensors is absent")
    from safetensors.torch import save_file

    save_file({key: value.clone() for key, value in state.items()}, path, metadata)
    return path


def product(state):
    down, up = (v.double().flatten(1) for k, v in state.items() if not k.endswith("alpha"))
    return up @ down


STYLES = ["lora_down", "lora_A", "lora_A.default", "loralib", "lora.down", "_lora.down"]


@pytest.mark.parametrize("style", [*STYLES, "linear_layer"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_names_of_factors(tmp_path, style, alpha):
    name = "unet.down_blocks.0.attn1.to_q"
    state = factors(name, 7, [5], 2, style)
    matrix = product(state)
    if alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
        matrix = matrix * alpha / 2
    spectra = lora_spectra(save(tmp_path / "x.safetensors", state))
    assert_spectra_of(spectra, {name: matrix}, 1e-13)
    assert spectra.shapes == {name: (7, 5)}
    assert_same(lora_spectra(state), spectra)
    if alpha is None:
        np.testing.assert_allclose(lora_spectra(state, alpha=4)[name], 2 * spectra[name])


def test_a_kohya_file(tmp_path):
    names = [f"lora_unet_down_blocks_0_attentions_{i}_proj_in" for i in (0, 2, 10)]
    conv, line, tucker = names
    state = factors(conv, 6, [4, 3, 3], 2) | {f"{conv}.alpha": torch.tensor(1.0)}
    state |= factors(line, 6, [4], 8, seed=1) | {f"{line}.alpha": torch.tensor(4.0)}
    small = factors(tucker, 6, [4, 1, 1], 2, seed=2)
    middle = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    state |= small | {f"{tucker}.lora_mid.weight": middle, f"{tucker}.alpha": torch.tensor(2.0)}
    state["lora_te_text_model_final_layer_norm.w_norm"] = torch.ones(4)
    state["emb_params"] = torch.ones(4, 4)
    down, up = (value.double() for value in small.values())
    whole = torch.einsum("ijkl,pi,jr->prkl", middle.double(), up[..., 0, 0], down[..., 0, 0])
    spectra = lora_spectra(save(tmp_path / "style.safetensors", state))
    assert list(spectra) == names  # in the natural order
    assert_spectra_of(
        spectra,
        {
            conv: product(factors(conv, 6, [4, 3, 3], 2)) / 2,
            line: product(factors(line, 6, [4], 8, seed=1)) / 2,
            tucker: whole.flatten(1),
        },
        1e-13,
    )
    assert spectra.shapes == {conv: (6, 36), line: (6, 4), tucker: (6, 36)}
    assert len(spectra[line]) == 4  # of rank 8, but the matrix is 6 x 4
    assert spectra.source.startswith("LoRA style.safetensors, 2 other tensors passed over; QR")


def test_old_diffusers_names_of_processors():
    key = "double_blocks.0.processor.proj_lora1"
    state = {f"{key}.down.weight": torch.eye(2, 3), f"{key}.up.weight": torch.eye(4, 2)}
    assert lora_spectra(state).shapes == {key: (4, 3)}


def test_the_configuration_in_a_diffusers_file(tmp_path):
    state = factors("unet.a.to_q", 6, [5], 4, "lora_A") | factors("unet.b", 6, [5], 2, "lora_A", 1)
    state |= factors("text_encoder.q", 4, [3], 2, "lora_A", 2)
    entries = {"r": 2, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"a.to_q": 4}}
    entries |= {"alpha_pattern": {"^a.to_q": 7}}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in entries.items()})}
    spectra = lora_spectra(save(tmp_path / "x.safetensors", state, metadata))
    matrices = {
        "unet.a.to_q": product(factors("x", 6, [5], 4)) * 7 / math.sqrt(4),
        "unet.b": product(factors("x", 6, [5], 2, seed=1)) * 3 / math.sqrt(2),
        "text_encoder.q": product(factors("x", 4, [3], 2, seed=2)),
    }
    assert_spectra_of(spectra, matrices, 1e-13)
    for text, said in (("[1", "expected JSON"), ('{"unet.r": 0}', "expected whole ranks >= 1")):
        path = save(tmp_path / "y.safetensors", state, {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=said):
            lora_spectra(path)


def test_dora_of_lycoris_is_refused_unless_told_to_ignore_it():
    state = factors("q", 6, [5], 2) | {"q.dora_scale": torch.ones(1, 5)}
    with pytest.raises(ValueError, match="got a DoRA"):
        lora_spectra(state)
    assert_spectra_of(
        lora_spectra(state, ignore_magnitude=True), {"q": product(factors("q", 6, [5], 2))}
    )


def without(state, *endings):
    return {key: value for key, value in state.items() if not key.endswith(endings)}


GOOD = factors("q", 6, [5], 2)
NAN = {**GOOD, "q.lora_up.weight": torch.full((6, 2), math.nan)}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"norm.weight": torch.ones(3)}, "expected tensors of a LoRA .* got none among 1"),
        ({"q.alpha": torch.tensor(1.0)}, "expected tensors of a LoRA"),
        (without(GOOD, "up.weight"), "layer 'q': 'q.lora_down.weight' has no partner B"),
        (without(GOOD, "down.weight"), "layer 'q': 'q.lora_up.weight' has no partner A"),
        ({"q.lora_mid.weight": torch.ones(2, 2)}, "'q.lora_mid.weight' has no partner"),
        (GOOD | {"q.lora_down.weight": torch.ones(3, 5)}, "A and B of one rank, got A"),
        (GOOD | {"q.lora_down.weight": torch.ones(2)}, "expected factors r x k and d x r"),
        (GOOD | {"q.lora_down.weight": torch.ones(2, 5, 1, 1)}, "factors r x k and d x r"),
        (
            factors("q", 6, [5, 3, 3], 2) | {"q.lora_up.weight": torch.ones(6, 2, 3, 3)},
            "expected B to have a kernel of size 1",
        ),
        (GOOD | {"q.lora_mid.weight": torch.ones(3, 2)}, "expected factors that multiply"),
        (GOOD | {"q.lora_down.weight": torch.ones(2, 5).to(torch.int8)}, "16 bits or more.*int8"),
        (GOOD | {"q.alpha": torch.tensor(0.0)}, "'q.alpha': expected one number .* not 0"),
        (GOOD | {"q.alpha": torch.ones(2)}, "'q.alpha': expected one number"),
        (GOOD | {"q.alpha": torch.ones((), device="meta")}, "'q.alpha': expected one number"),
        (GOOD | {"q.lora_up.weight": torch.ones(6, 2, device="meta")}, "16 bits or more, got meta"),
        (GOOD | {"q.lora_A.weight": torch.ones(2, 5)}, "expected one A a layer, got 'q.lora_down"),
        (NAN, "layer 'q'.*NaN or infinity in the factor B"),
        ({key: 1e200 * value.double() for key, value in GOOD.items()}, "layer 'q': .*an overflow"),
        (GOOD | {"k.hada_w1_a": torch.ones(2, 2)}, "'k.hada_w1_a' is not a factor of a LoRA"),
        (GOOD | {"q.lora_E": torch.ones(2, 1)}, "'q.lora_E' is not a factor of a LoRA"),
        (factors("base_model.model.q", 6, [5], 2, "lora_A"), "their scale is in adapter_config"),
        (
            factors("q", 6, [5], 2, "lora_A") | factors("q.base_layer", 6, [5], 2, "lora_A"),
            "layer 'q' is there 2 times",
        ),
    ],
)
def test_bad_tensors_are_refused(state, said):
    with pytest.raises(ValueError, match=said):
        lora_spectra(state)


def test_one_error_lists_all_faults(tmp_path):
    state = {}
    for i in range(7):
        state |= without(factors(f"layers.{i}", 6, [5], 2), "up.weight")
    state |= factors("good", 6, [5], 2) | {"odd.lokr_w1": torch.ones(2, 2)}
    path = save(tmp_path / "x.safetensors", state)
    with pytest.raises(
        ValueError, match=r"x\.safetensors: 8 problems: 'odd.lokr_w1'.*; and 3 more"
    ):
        lora_spectra(path)
    broken = {f"{n}.{k[2:]}": v for n in "abc" for k, v in NAN.items()}
    with pytest.raises(ValueError, match=r"3 problems: layer 'a' \(y\.safetensors\): .*NaN"):
        lora_spectra(save(tmp_path / "y.safetensors", broken))


def saved_config(tmp_path, state=None, **entries):
    """A folder as PEFT saves it."""
    tmp_path.mkdir(exist_ok=True)
    save(tmp_path / "adapter_model.safetensors", state or factors("q", 6, [5], 2, "lora_A"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, **entries}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"r": 3}, "layer 'q': expected rank 3 by the configuration, got 2"),
        ({"r": 1}, "layer 'q': expected rank 1 by the configuration, got 2"),
        ({"rank_pattern": {"q": 4}}, "expected rank 4"),
        ({"r": None}, "expected whole ranks >= 1"),
        ({"r": 0}, "expected whole ranks >= 1"),
        ({"rank_pattern": {"k": "2"}}, "expected whole ranks >= 1"),
        ({"lora_alpha": "4"}, "expected numbers for lora_alpha"),
        ({"lora_alpha": math.inf}, "expected numbers for lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a mapping"),
        ({"rank_pattern": {"q(": 2}}, r"rank_pattern: expected regular expressions, got 'q\('"),
        ({"target_modules": 3}, "target_modules: expected a regular expression or a list, got 3"),
        ({"target_modules": [{}]}, "target_modules: expected names that are not empty, got {}"),
        ({"target_parameters": [None]}, "target_parameters: expected names that are not empty"),
        ({"target_parameters": "experts"}, "target_parameters: expected a list, got a string"),
        ({"peft_type": "LOHA", "r": None}, "expected peft_type LORA, got LOHA"),
        ({"use_qalora": True}, "got one with use_qalora"),
        ({"use_dora": True}, "got a DoRA"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, entries, said):
    with pytest.raises(ValueError, match=said):
        lora_spectra(saved_config(tmp_path, **entries))


def test_configurations_that_are_none(tmp_path):
    folder = saved_config(tmp_path / "a")
    for text, said in (("[1]", "expected a mapping, got list"), ("{", "expected JSON")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            lora_spectra(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        lora_spectra(folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_by_pattern_as_peft_has_them(peft, rslora):
    # Each key of a pattern tried by PEFT's own function.
    from peft.utils.other import get_pattern_key

    from lorambo_adapters.spectra.peft_config import PeftConfig

    names = ["q", "a.q", "aq", "a.q.0", "layers.1.q", "layers.11.q", "b.k", "layers.1.k.q"]
    ranks = {"^a.q": 3, r"layers\.1\..*": 5, "1.q": 6, "q": 4, "k|q.0": 7}
    alphas = {".*k.*": 9, "a": 8, "q": 2.5, "layers.1.q": 1}
    entries = {"r": 2, "lora_alpha": 16, "rank_pattern": ranks, "alpha_pattern": alphas}
    config = PeftConfig.checked({**entries, "use_rslora": rslora}, "here")
    for name in names:
        rank = ranks.get(get_pattern_key(list(ranks), name), 2)
        alpha = alphas.get(get_pattern_key(list(alphas), name), 16)
        assert config.rank(name) == rank
        assert config.scale(name) == alpha / (math.sqrt(rank) if rslora else rank)


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        lora_spectra(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"expected adapter_model.safetensors, .* got 0$"):
        lora_spectra(tmp_path)
    saved_config(tmp_path / "one")
    saved_config(tmp_path / "two", factors("q", 6, [5], 2, "lora_A", 3), use_rslora=True)
    with pytest.raises(ValueError, match=r"got 0; adapters in it: one, two"):
        lora_spectra(tmp_path)
    first, second = (product(factors("q", 6, [5], 2, seed=s)) for s in (0, 3))
    assert_spectra_of(lora_spectra(tmp_path, adapter="one"), {"q": 2 * first}, 1e-13)
    both = lora_spectra(tmp_path, adapter=("one", "two"))
    assert_spectra_of(both, {"q": 2 * first + 4 / math.sqrt(2) * second}, 1e-13)
    assert both.source.startswith("LoRA one + LoRA two, adapter one + two; QR")
    for lora in (tmp_path / "one" / "adapter_model.safetensors", GOOD):
        with pytest.raises(ValueError, match="adapter: expected"):
            lora_spectra(lora, adapter="one")
    # A file of diffusers alone in its folder.
    (tmp_path / "three").mkdir()
    save(tmp_path / "three" / "pytorch_lora_weights.safetensors", GOOD)
    assert_spectra_of(lora_spectra(tmp_path / "three"), {"q": first}, 1e-13)


def test_arguments_that_are_none():
    with pytest.raises(ValueError, match="expected a path, a module or a state dict, got int"):
        lora_spectra(3)  # pyright: ignore[reportArgumentType]
    for alpha in (math.nan, "8"):
        with pytest.raises(ValueError, match="alpha: expected a finite number"):
            lora_spectra(GOOD, alpha=alpha)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("alpha", [6.0, 6, torch.tensor(6), torch.tensor([6.0], dtype=torch.half)])
def test_an_alpha_of_any_type(tmp_path, alpha):
    state = GOOD | {"q.alpha": alpha}
    assert_spectra_of(lora_spectra(state), {"q": 3 * product(GOOD)})
    torch.save(state, tmp_path / "lora.pt")
    assert_spectra_of(lora_spectra(tmp_path / "lora.pt"), {"q": 3 * product(GOOD)})
    given = np.float32(float(alpha))
    spectra = lora_spectra(GOOD, alpha=given)  # pyright: ignore[reportArgumentType]
    assert_spectra_of(spectra, {"q": 3 * product(GOOD)})


def test_sharded_factors_are_gathered(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in GOOD.items()}
        assert_spectra_of(lora_spectra(state), {"q": product(GOOD)})
    finally:
        dist.destroy_process_group()


def test_curvature_weights_the_spectra():
    a, b = torch.rand(5) + 1, torch.rand(6) + 1
    spectra = lora_spectra(GOOD, curvature={"q": (a, b.diag())}, source="mine")
    weighted = b.sqrt().double()[:, None] * product(GOOD) * a.sqrt().double()
    assert_spectra_of(spectra, {"q": weighted / math.sqrt(2)})
    assert spectra.source.startswith("mine; QR of the factors in float64; weighted by curvature")
    with pytest.raises(ValueError, match="curvature: layer 'q' is missing"):
        lora_spectra(GOOD, curvature={})


def test_one_layer_is_in_memory_at_a_time(tmp_path):
    state = {}
    for i in range(5):
        state |= factors(f"layers.{i}", 60, [50], 4, seed=i)
    updates = LoraFile(save(tmp_path / "x.safetensors", state)).updates()
    reads = [update.read for update in updates]
    # Nothing is read before its turn: the file could be gone by now.
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        reads[0]()


@pytest.fixture
def lorambo(capsys):
    """`lorambo spectra lora`: its exit code, and what it says on stdout and on stderr."""
    pytest.importorskip("typer", reason="typer is absent: pip install 'lorambo-alloc[cli]'")
    pytest.importorskip("rich", reason="rich is absent: pip install 'lorambo-alloc[cli]'")
    from lorambo_adapters.cli import main

    def run(*arguments):
        code = main(["spectra", "lora", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command(lorambo, tmp_path):
    out = tmp_path / "out.npz"
    path = save(tmp_path / "b.safetensors", GOOD | {"q.alpha": torch.tensor(6.0)})
    code, said, errors = lorambo(path, "-o", out)
    assert (code, errors) == (0, "")
    assert said.startswith(f"{out}: Spectra(1 layers, 2 singular values, source='LoRA b.safe")
    assert_spectra_of(Spectra.load(out), {"q": 3 * product(GOOD)}, 1e-13)
    save(path, GOOD | {"q.dora_scale": torch.ones(1, 5)})
    code, said, _ = lorambo(path, "-o", out, "--ignore-magnitude", "--alpha", "4")
    assert code == 0
    assert_spectra_of(Spectra.load(out), {"q": 2 * product(GOOD)}, 1e-13)


def test_the_command_without_torch(lorambo, monkeypatch, tmp_path):
    absent = "lorambo_adapters.spectra.lora"
    monkeypatch.delitem(sys.modules, absent)
    monkeypatch.setitem(sys.modules, "torch", None)  # what the import system reads as absent
    code, _, errors = lorambo(tmp_path, "-o", tmp_path / "out.npz")
    assert code == 2
    assert errors.startswith(f"lorambo: {absent} needs torch: pip install 'lorambo-alloc[torch]'")


def test_the_command_warns_in_a_line(lorambo, tmp_path):
    saved_config(tmp_path / "a", init_lora_weights="olora")
    code, _, errors = lorambo(tmp_path, "-o", tmp_path / "out.npz", "--adapter", "a")
    assert code == 0
    assert errors.count("\n") == 1
    assert errors.startswith("lorambo: warning: the base model's weights were changed by olora")
    assert Spectra.load(tmp_path / "out.npz").source.endswith("QR of the factors in float64")


def test_the_command_refuses_in_a_line(lorambo, tmp_path):
    dora = save(tmp_path / "b.safetensors", GOOD | {"q.dora_scale": torch.ones(1, 5)})
    for arguments, said in (
        ((dora, "-o", tmp_path / "out.npz"), f"{dora}: expected a LoRA, got a DoRA"),
        ((tmp_path / "none", "-o", tmp_path / "out.npz"), f"{tmp_path / 'none'}: No such file"),
        ((dora, "-o", tmp_path / "none" / "f"), f"{tmp_path / 'none' / 'f'}: No such file"),
        ((dora, "-o", tmp_path), f"{tmp_path}: Is a directory"),
        ((dora, "-o", dora), f"{dora}: expected a file to write spectra to"),
    ):
        code, out, errors = lorambo(*arguments)
        assert (code, out) == (2, "")
        assert errors.startswith(f"lorambo: {said}")
        assert errors.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_device(transformers, peft):
    model = adapted(peft, llama(transformers), target_modules="all-linear", r=3)
    here = lora_spectra(model)
    moved = lora_spectra(model.cuda())
    for name in here:
        np.testing.assert_allclose(moved[name], here[name], rtol=1e-10)
