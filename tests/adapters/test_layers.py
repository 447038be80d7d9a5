"""Targets and shapes: names and parameter counts against the adapters that PEFT itself creates."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.layers import find_layers, parameter_count  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.stored_layers import stored_layers  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is absent")


@pytest.fixture
def peft(transformers):
    return pytest.importorskip("peft", reason="peft is absent: pip install peft")


ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"intermediate_size": 24}
DECODER = {**ENCODER, "num_key_value_heads": 2, "vocab_size": 40}
MOE = {**DECODER, "num_experts": 4, "moe_intermediate_size": 12}
FAMILIES = {
    "bert": ("Bert", "ForSequenceClassification", {**ENCODER, "vocab_size": 40}),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}),
    "t5": ("T5", "ForConditionalGeneration", {"d_model": 16, "d_ff": 24, "d_kv": 6}),
    "llama": ("Llama", "ForCausalLM", DECODER),
    "vit": ("ViT", "ForImageClassification", {**ENCODER, "image_size": 16, "patch_size": 4}),
    "mixtral": ("Mixtral", "ForCausalLM", {**DECODER, "num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM", {**MOE, "head_dim": 4, "mlp_only_layers": [0]}),
    "qwen2_moe": ("Qwen2Moe", "ForCausalLM", {**MOE, "shared_expert_intermediate_size": 12}),
    "gpt_oss": ("GptOss", "ForCausalLM", {**DECODER, "num_local_experts": 4, "head_dim": 4}),
}
CONVOLUTIONS = {"depths": [1, 1], "hidden_sizes": [8, 12]}
FAMILIES |= {
    "phi3": ("Phi3", "ForCausalLM", {**DECODER, "pad_token_id": 0}),
    "gemma2": ("Gemma2", "ForCausalLM", {**DECODER, "head_dim": 4}),
    "opt": ("OPT", "ForCausalLM", {**ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 12}),
    "bloom": ("Bloom", "ForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", "ForCausalLM", {"hidden_size": 16, "state_size": 4}),
    "resnet": ("ResNet", "ForImageClassification", {**CONVOLUTIONS, "embedding_size": 8}),
    "convnext": ("ConvNext", "ForImageClassification", {**CONVOLUTIONS, "num_stages": 2}),
    "roberta": ("Roberta", "ForSequenceClassification", {**ENCODER, "vocab_size": 40}),
}
for _name in ("opt", "bloom", "mamba"):
    FAMILIES[_name][2].update(num_hidden_layers=2, vocab_size=40)
FAMILIES["gpt2"][2].update(bos_token_id=0, eos_token_id=0)  # within the small vocabulary
FAMILIES["t5"][2].update(num_heads=3, num_layers=2, vocab_size=40)


def family(transformers, name, **changes):
    """A small model of the family, with random weights."""
    stem, head, options = FAMILIES[name]
    if not hasattr(transformers, stem + head):
        pytest.skip(f"this transformers has no {stem}{head}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**{**options, **changes})
    return getattr(transformers, stem + head)(config)


def with_adapters(peft, model, **options):
    with warnings.catch_warnings():
        # Of PEFT and transformers: deprecations, Conv1D's fan_in_fan_out, tied embeddings.
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def targeted(adapted):
    """The names of the modules and parameters that PEFT adapted."""
    tuner = adapted.base_model
    return {*tuner.targeted_module_names, *getattr(tuner, "targeted_parameter_names", ())}


def adapter_parameters(adapted):
    """Trainable ones; beside them PEFT trains only `modules_to_save`."""
    trainable = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    return sum(count for name, count in trainable.items() if "lora_" in name)


def names(layers):
    """As PEFT has them: one name for all experts of a parameter."""
    return {
        layer.name if layer.expert is None else layer.name.rpartition(".")[0] for layer in layers
    }


def described(layers):
    return [(layer.name, layer.shape, layer.kind, layer.module) for layer in layers]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {"target_modules": "all-linear"}),
        ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["query", "word_embeddings", "output.dense"]}),
        ("bert", {"target_modules": ["bert.encoder.layer.1.attention.self.key"]}),
        ("bert", {"target_modules": r".*\.layer\.0\..*(query|key)"}),
        ("gpt2", {"target_modules": "all-linear"}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj", "wte"]}),
        ("gpt2", {"target_modules": r".*\.h\.1\..*c_fc"}),
        ("t5", {"target_modules": "all-linear"}),
        ("t5", {"target_modules": ["q", "wo", "shared", "relative_attention_bias"]}),
        ("t5", {"target_modules": r"decoder\..*\.(k|v)"}),
        ("llama", {"target_modules": "ALL-LINEAR"}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}),
        ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": r"model\.layers\.\d+\.mlp\.(up|gate)_proj"}),
        ("vit", {"target_modules": "all-linear"}),
        ("vit", {"target_modules": ["query", "projection"]}),
        ("vit", {"target_modules": r".*projection"}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        ("mixtral", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
        ("qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
        ("qwen2_moe", {"target_modules": "all-linear"}),
        ("qwen2_moe", {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
        ("gpt_oss", {"target_modules": "all-linear", "target_parameters": EXPERTS}),
        ("phi3", {"target_modules": "all-linear"}),
        ("gemma2", {"target_modules": "all-linear"}),
        ("opt", {"target_modules": "all-linear"}),
        ("opt", {"target_modules": ["project_in", "embed_positions"]}),
        ("bloom", {"target_modules": "all-linear"}),
        ("mamba", {"target_modules": ["x_proj", "in_proj", "embeddings"]}),
        ("resnet", {"target_modules": r".*convolution"}),
        ("convnext", {"target_modules": "all-linear"}),
        ("roberta", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ],
)
def test_names_and_parameters_are_those_of_peft(transformers, peft, name, options):
    model = family(transformers, name)
    given = {
        "targets": options["target_modules"],
        "target_parameters": options.get("target_parameters"),
        "exclude": options.get("exclude_modules"),
        "task_type": options.get("task_type"),
    }
    layers = find_layers(model, **given)
    for layer in layers:
        assert layer.matrix().shape == layer.shape
    adapted = with_adapters(peft, model, r=4, **options)
    assert names(layers) == targeted(adapted)
    assert parameter_count(layers, 4) == adapter_parameters(adapted)
    # The adapted model has the same layers.
    assert described(find_layers(adapted, **given)) == described(layers)


@pytest.mark.parametrize(
    ("targets", "exclude", "options"),
    [
        ("all-linear", "(.*[.])?classifier([.].*)?", {"modules_to_save": ["classifier"]}),
        (["query", "key"], r".*[.]0[.].*", {"layers_to_transform": [1]}),
    ],
)
def test_what_peft_leaves_out_otherwise_is_left_out_by_exclude(
    transformers, peft, targets, exclude, options
):
    model = family(transformers, "roberta")
    layers = find_layers(model, targets, exclude=exclude)
    adapted = with_adapters(peft, model, r=4, target_modules=targets, **options)
    assert names(layers) == targeted(adapted)
    assert parameter_count(layers, 4) == adapter_parameters(adapted)
    if "modules_to_save" in options:
        assert described(find_layers(adapted, targets)) == described(layers)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mixtral", "all-linear"),
        ("mixtral", r".*\.(w1|w3|q_proj)"),
        ("qwen3_moe", "all-linear"),
        ("qwen3_moe", ["gate_proj", "up_proj", "q_proj"]),
    ],
)
def test_fused_experts_are_found_as_peft_finds_them(transformers, peft, name, targets):
    model = family(transformers, name)
    layers = find_layers(model, targets)
    adapted = with_adapters(peft, model, r=4, target_modules=targets)
    assert names(layers) == targeted(adapted)
    # PEFT doubles the rank where it fused two projections.
    fused = [layer for layer in layers if ".gate_up_proj." in layer.name]
    others = [layer for layer in layers if layer not in fused]
    assert fused
    total = parameter_count(fused, 8) + parameter_count(others, 4)
    assert total == adapter_parameters(adapted)


def test_without_peft_experts_are_found_by_parameter_alone(transformers, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # what the import system reads as absent
    model = family(transformers, "mixtral")
    assert {layer.kind for layer in find_layers(model)} == {"linear"}
    assert len(find_layers(model, target_parameters=EXPERTS)) == 2 * (4 + 2 * 3)


def test_half_of_a_fused_projection_is_refused(transformers, peft):
    with pytest.raises(ValueError, match="without also targeting"):
        find_layers(family(transformers, "mixtral"), ["w1"])


def test_tied_embeddings_count_once_as_with_peft_told_to_tie(transformers, peft):
    model = family(transformers, "llama", tie_word_embeddings=True)
    targets = ["lm_head", "embed_tokens"]
    layers = find_layers(model, targets)
    assert described(layers) == [
        ("model.embed_tokens", (16, 40), "embedding", model.get_input_embeddings())
    ]
    adapted = with_adapters(peft, model, r=4, target_modules=targets, ensure_weight_tying=True)
    trained = {p.data_ptr(): p.numel() for p in adapted.parameters() if p.requires_grad}
    assert parameter_count(layers, 4) == sum(trained.values())


def test_grouped_convolution_has_the_parameters_of_peft(peft):
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, (3, 2), groups=2), torch.nn.Conv2d(8, 5, 1))
    layers = find_layers(model, ["0", "1"])
    assert [layer.shape for layer in layers] == [(4, 36), (5, 8)]
    with pytest.raises(ValueError, match=r"layer '0': .*without groups, got 2 groups"):
        layers[0].matrix()
    adapted = with_adapters(peft, model, r=4, target_modules=["0", "1"])
    assert parameter_count(layers, 4) == adapter_parameters(adapted)


class Fused(torch.nn.Module):
    def __init__(self, is_transposed=False):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 4, 5))
        self.router = torch.nn.Parameter(torch.randn(3, 5))
        self.bias = torch.nn.Parameter(torch.randn(3))
        self.is_transposed = is_transposed


def small_model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {
            "table": torch.nn.Embedding(9, 6),
            "linear": torch.nn.Linear(6, 4),
            "norm": torch.nn.LayerNorm(4),
            "conv": torch.nn.Conv2d(3, 7, (2, 3)),
            "experts": Fused(),
        }
    )


def test_matrices_of_every_kind():
    model = small_model()
    layers = find_layers(
        model, ["table", "linear", "conv"], target_parameters=["experts.up", "router"]
    )
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("table", "embedding"),
        ("linear", "linear"),
        ("conv", "conv2d"),
        ("experts.up.0", "expert"),
        ("experts.up.1", "expert"),
        ("experts.up.2", "expert"),
        ("experts.router", "expert"),
    ]
    table, linear, conv, *experts, router = [layer.matrix() for layer in layers]
    assert torch.equal(table, model["table"].weight.t())
    assert torch.equal(linear, model["linear"].weight)
    # The convolution's matrix takes unfolded patches to outputs.
    image = torch.randn(1, 3, 5, 6)
    patches = torch.nn.functional.unfold(image, (2, 3))
    expected = model["conv"](image).flatten(2) - model["conv"].bias[:, None]
    torch.testing.assert_close(conv @ patches, expected)
    assert torch.equal(torch.stack(experts), model["experts"].up)
    assert torch.equal(router, model["experts"].router)
    assert not any(m.requires_grad for m in (table, linear, conv, router, *experts))


def test_transposed_experts():
    model = torch.nn.ModuleDict({"experts": Fused(is_transposed=True)})
    layers = find_layers(model, None, target_parameters=["up"])
    assert {layer.shape for layer in layers} == {(5, 4)}
    assert torch.equal(layers[1].matrix(), model["experts"].up[1].t())


def test_conv1d_is_transposed(transformers):
    gpt2 = family(transformers, "gpt2")
    layer = find_layers(gpt2, ["c_attn"])[0]
    assert (layer.kind, layer.shape) == ("conv1d", (48, 16))
    inputs = torch.randn(5, 16)
    expected = layer.module(inputs) - layer.module.bias
    torch.testing.assert_close(inputs @ layer.matrix().t(), expected)


def test_of_tied_weights_the_first_counts():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert [layer.name for layer in find_layers(model)] == ["0", "1"]
    model[1].weight.data = model[0].weight.data  # two parameters, one storage
    assert [layer.name for layer in find_layers(model)] == ["0"]
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    model[2].weight = model[0].weight
    assert [layer.name for layer in find_layers(model)] == ["0", "1"]


def test_parametrised_weights_are_not_tied():
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "k": torch.nn.Linear(4, 4)})
    for linear in model.values():
        torch.nn.utils.parametrizations.orthogonal(linear)
    layers = find_layers(model)
    assert [layer.name for layer in layers] == ["q", "k"]
    assert torch.equal(layers[0].matrix(), model["q"].weight)


def test_all_linear_passes_over_what_peft_cannot_adapt():
    inner = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 4))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), inner)
    # "1.0" ends like "0".
    assert [layer.name for layer in find_layers(model)] == ["0", "1.1"]
    with pytest.raises(ValueError, match=r"layer '1.0': expected a Linear, .*, got ReLU"):
        find_layers(model, ["0", "1.1"])


def test_all_linear_catches_what_peft_catches(peft):
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(4, 4))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), inner)
    layers = find_layers(model)
    adapted = with_adapters(peft, model, r=4, target_modules="all-linear")
    assert names(layers) == targeted(adapted) == {"0", "1.0", "1.1"}
    assert parameter_count(layers, 4) == adapter_parameters(adapted)


def test_a_meta_model_has_shapes_and_no_matrix():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4096, 14336))
    layers = find_layers(model)
    assert parameter_count(layers, 16) == 16 * (4096 + 14336)
    with pytest.raises(ValueError, match=r"layer '0': .*meta device"):
        layers[0].matrix()


def test_llama_8b_on_the_meta_device(transformers):
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    layers = find_layers(model)
    assert len(layers) == 32 * 7
    assert parameter_count(layers, 16) == 41_943_040


def test_a_module_of_ones_own_may_be_called_base_layer():
    model = torch.nn.ModuleDict({"base_layer": torch.nn.ModuleDict({"q": torch.nn.Linear(4, 3)})})
    assert [layer.name for layer in find_layers(model)] == ["base_layer.q"]


def test_compiled_model_has_the_names_of_its_original():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with warnings.catch_warnings():
        # What torch imports to compile may warn of its own deprecations.
        warnings.simplefilter("ignore")
        compiled = torch.compile(model)
    assert described(find_layers(compiled)) == described(find_layers(model))


def test_wrappers_are_seen_through_in_any_order(transformers, peft):
    model = family(transformers, "llama")
    expected = described(find_layers(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what compiling imports, and PEFT of mixed adapters
        parallel = torch.nn.DataParallel(torch.compile(model))
        config = peft.LoraConfig(target_modules=["q_proj"])
        mixed = peft.get_peft_model(model, config, mixed=True)
    for wrapped in (parallel, torch.nn.DataParallel(parallel), mixed, torch.compile(mixed)):
        assert described(find_layers(wrapped)) == expected


def test_an_adapted_output_head_is_still_the_head(transformers, peft):
    model = family(transformers, "llama")
    expected = described(find_layers(model))
    adapted = with_adapters(peft, model, r=4, target_modules=["lm_head"])
    assert described(find_layers(adapted)) == expected


def test_modules_to_save_are_left_out(transformers, peft):
    model = family(transformers, "bert")
    adapted = with_adapters(
        peft, model, r=4, target_modules=["query"], modules_to_save=["classifier"]
    )
    assert "classifier" not in names(find_layers(adapted))


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize(("bits", "storage"), [(8, None), (4, torch.uint8), (4, torch.bfloat16)])
@pytest.mark.parametrize("quantised", [False, True])
def test_bitsandbytes_weights_are_dequantised(bits, storage, quantised, has_run):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent")
    plain = torch.nn.Linear(64, 32, bias=False)
    if bits == 8:
        packed = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
        # Half a step of the row's scale, and the rounding to float16 that goes before.
        bound = plain.weight.detach().abs().amax(1, keepdim=True) * (0.501 / 127 + 2**-11)
    else:
        keywords = {"quant_type": "nf4", "quant_storage": storage}
        packed = bnb.nn.Linear4bit(64, 32, bias=False, **keywords)
        bound = plain.weight.detach().abs().max() * 0.16  # half of NF4's widest step
    packed.load_state_dict(plain.state_dict())
    model = torch.nn.Sequential(packed)
    if quantised:
        model.to("cpu")  # where bitsandbytes quantises
        assert model[0].weight.dtype == (torch.int8 if bits == 8 else storage)
    if has_run and quantised:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a cast to float16
            model(torch.randn(2, 64))
    (layer,) = find_layers(model)
    assert (layer.kind, layer.shape) == ("quantized", (32, 64))
    difference = (layer.matrix() - plain.weight.detach()).abs()
    assert layer.matrix().dtype == torch.float32
    assert torch.all(difference <= (bound if quantised else 0))
    if quantised:
        assert difference.max() > 0
        assert model[0].weight.dtype == (torch.int8 if bits == 8 else storage)  # left as it was


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_4_bit_codes_may_be_stored_as_floats(monkeypatch, storage):
    # With a stand-in for bitsandbytes, so that it runs where that is absent. FSDP wants floats.
    class Params4bit(torch.nn.Parameter):
        quant_state: object = None

    whole = torch.randn(6, 4)
    stand_in = SimpleNamespace(dequantize_4bit=lambda codes, state: state)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(functional=stand_in))
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
    model[0].weight = Params4bit(torch.zeros(6, 1, dtype=storage), requires_grad=False)
    model[0].weight.quant_state = whole
    (layer,) = find_layers(model)
    assert (layer.kind, layer.shape) == ("quantized", (6, 4))
    assert torch.equal(layer.matrix(), whole)
    (stored,) = stored_layers(model).layers.values()
    assert stored.info.dtype == "quantized"  # so that no difference is taken


def sharded(rank, world, rendezvous):
    """What one process checks: FSDP2's shards give the whole matrices back."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        model = small_model()
        targets = ["table", "linear"]
        whole = find_layers(model, targets, target_parameters=["up"])
        expected = [layer.matrix().clone() for layer in whole]
        mesh = init_device_mesh("cpu", (world,))
        for module in model.values():
            fully_shard(module, mesh=mesh)
        assert hasattr(model["linear"].weight, "full_tensor")
        layers = find_layers(model, targets, target_parameters=["up"])
        assert described(layers) == described(whole)
        for layer, matrix in zip(layers, expected, strict=True):
            found = layer.matrix()
            assert type(found) is torch.Tensor
            assert torch.equal(found, matrix)
        dist.barrier()  # who leaves first would take the other's connection with it
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_fsdp2_shards_are_gathered(tmp_path, world):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    rendezvous = (tmp_path / "rendezvous").as_uri()
    code = (
        "import runpy, sys; module = runpy.run_path(sys.argv[1]);"
        "module['sharded'](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, __file__, str(rank), str(world), rendezvous],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["nothing"]}, r"matches targets=\['nothing'\], got none in ModuleDict"),
        ({"targets": None}, "matches targets=None"),
        ({"targets": "linear("}, "targets: expected a regular expression"),
        ({"targets": [3]}, "targets: expected names that are not empty, got 3"),
        ({"targets": 3}, "targets: expected a regular expression or a list, got 3"),
        ({"targets": ["norm"]}, "layer 'norm': expected a Linear, .*, got LayerNorm"),
        ({"exclude": [""]}, "exclude: expected names that are not empty"),
        ({"target_parameters": "up"}, "target_parameters: expected a list of names"),
        ({"target_parameters": ["experts.bias"]}, r"parameter 'experts.bias': .* shape \(3,\)"),
    ],
)
def test_bad_targets_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        find_layers(small_model(), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"model: expected a torch\.nn\.Module, got dict"):
        find_layers({"q.weight": torch.eye(3)})  # pyright: ignore[reportArgumentType]


def test_a_parameter_of_the_model_itself_is_refused():
    with pytest.raises(ValueError, match="parameter 'up': expected one of a module inside"):
        find_layers(Fused(), None, target_parameters=["up"])


@pytest.mark.parametrize("rank", [-1, 1.5, "8"])
def test_bad_rank_is_refused(rank):
    with pytest.raises(ValueError, match="rank: expected a whole number >= 0"):
        parameter_count(find_layers(small_model()), rank)


def test_weights_that_are_not_real_numbers_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"layer '0': .*16 bits or more, got torch.float8_e4m3fn"):
        find_layers(model)[0].matrix()
    model[0].weight = torch.nn.Parameter(torch.zeros(3, 4).to_sparse())
    with pytest.raises(ValueError, match=r"layer '0': .*16 bits or more, got torch.sparse_coo"):
        find_layers(model)[0].matrix()
    model[0].weight = torch.nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"layer '0': .*shape \(3, 4\), got \(3, 5\)"):
        find_layers(model)[0].matrix()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_matrices_move_to_the_device():
    for layer in find_layers(small_model(), ["table", "linear"]):
        moved = layer.matrix("cuda")
        assert moved.is_cuda
        assert torch.equal(moved.cpu(), layer.matrix())
