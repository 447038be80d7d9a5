"""Trained LoRAs made smaller: what PEFT, diffusers and kohya save, in and out."""

import json
import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("safetensors", reason="safetensors is absent: pip install safetensors")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks.resizers import RULES, at_most, ranks_by  # noqa: E402
from lorambo_adapters.ranks import compress as module  # noqa: E402
from lorambo_adapters.ranks.budgets import Bytes, Energy, Share, parsed  # noqa: E402
from lorambo_adapters.ranks.compress import compress  # noqa: E402
from lorambo_adapters.ranks.tensor_writer import Planned, tensor_writer  # noqa: E402
from lorambo_adapters.ranks.truncate import squared_distance, truncated  # noqa: E402
from lorambo_adapters.spectra.lora import lora_spectra  # noqa: E402
from lorambo_alloc import InfeasibleError, uniform_rank  # noqa: E402
from tests.adapters.conftest import TINY, quiet  # noqa: E402


def llama(transformers):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))


def decayed(model, base=0.6):
    """Give every adapter a spectrum that falls off, at a rate and size of its own."""
    generator = torch.Generator().manual_seed(3)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name and "magnitude" not in name:
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fall = (base + 0.04 * (i % 7)) ** torch.arange(min(parameter.shape[:2]))
            side = 0 if parameter.shape[0] == len(fall) else 1
            fall = fall.view([-1 if n == side else 1 for n in range(parameter.ndim)])
            parameter.data = (draw * fall * (1 + i % 3) / 4).to(parameter.dtype)


def saved(peft, transformers, folder, model=None, **options):
    torch.manual_seed(1)
    with quiet():
        config = peft.LoraConfig(**{"target_modules": "all-linear", "r": 6, **options})
        base = llama(transformers) if model is None else model
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        decayed(model)
        model.save_pretrained(folder)
    return model


def loaded(peft, transformers, folder, model=None):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(
            llama(transformers) if model is None else model, folder
        )
    texts = [str(warning.message) for warning in said]
    assert not [text for text in texts if "key" in text or "target" in text], texts
    return model


def deltas(model, adapter="default"):
    found = {}
    for path, part in model.get_base_model().named_modules():
        if hasattr(part, "get_delta_weight") and adapter in part.scaling:
            delta = part.get_delta_weight(adapter).detach().double().flatten(1)
            found[path] = delta.T if getattr(part, "fan_in_fan_out", False) else delta
    return found


def best(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


OPTIONS = [
    {"lora_alpha": 3},
    {"lora_alpha": 7, "use_rslora": True},
    {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"v_proj": 2},
        "modules_to_save": ["lm_head"],
    },
    {"target_modules": r".*layers\.[01]\.self_attn\..*"},
    {"target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 3},
    {
        "target_modules": ["q_proj", "k_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("budget", ["50%", "25%"])
def test_peft_loads_the_best_truncation(transformers, peft, tmp_path, options, budget):
    model = saved(peft, transformers, tmp_path / "in", **options)
    before = deltas(model)
    small = compress(tmp_path / "in", budget, tmp_path / "out")
    assert small.certificate.status == "optimal_exact"
    small.certificate.verify(small.allocation.problem, small.allocation.ranks)
    again = loaded(peft, transformers, tmp_path / "out")
    after = deltas(again)
    assert set(before) == set(small)
    assert set(after) == {name for name, rank in small.items() if rank}
    lost = energy = 0.0
    for name, delta in before.items():
        reached = after.get(name, torch.zeros_like(delta))
        torch.testing.assert_close(
            reached, best(delta, small[name]), rtol=0, atol=2e-6 * float(delta.norm())
        )
        lost += float((delta - reached).square().sum())
        energy += float(delta.square().sum())
    assert small.error == pytest.approx(lost / energy, rel=1e-4)
    assert small.captured == pytest.approx(1 - lost / energy, rel=1e-5)
    lora = sum(p.numel() for n, p in again.named_parameters() if "lora_" in n)
    assert lora == small.parameters[1] == small.allocation.cost
    assert lora <= small.parameters[0] * Fraction(int(budget[:-1]), 100)
    modules = {n: m for n, m in again.get_base_model().named_modules() if n in after}
    old = {n: m for n, m in model.get_base_model().named_modules() if n in after}
    for name, part in modules.items():
        assert part.r["default"] == small[name]
        assert part.scaling["default"] == pytest.approx(old[name].scaling["default"], rel=1e-12)
    if "modules_to_save" in options:
        head = load_file(tmp_path / "in" / "adapter_model.safetensors")
        new = load_file(tmp_path / "out" / "adapter_model.safetensors")
        key = "base_model.model.lm_head.weight"
        assert torch.equal(head[key], new[key])
    # What is written is read back with the same ranks, and PEFT can save it again.
    assert {n: len(v) for n, v in lora_spectra(tmp_path / "out").items()} == {
        name: rank for name, rank in small.items() if rank
    }
    with quiet():
        again.save_pretrained(tmp_path / "again")
    assert lora_spectra(tmp_path / "again").shapes == lora_spectra(tmp_path / "out").shapes


def test_conv1d_of_gpt2(transformers, peft, tmp_path):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 8}

    def gpt2():
        torch.manual_seed(0)
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config)

    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    before = deltas(saved(peft, transformers, tmp_path / "in", gpt2(), **options))
    small = compress(tmp_path / "in", "40%", tmp_path / "out")
    after = deltas(loaded(peft, transformers, tmp_path / "out", gpt2()))
    for name, delta in before.items():
        reached = after.get(name, torch.zeros_like(delta))
        room = 2e-6 * float(delta.norm())
        torch.testing.assert_close(reached, best(delta, small[name]), rtol=0, atol=room)


def test_more_ranks_than_rows():
    generator = torch.Generator().manual_seed(0)
    state = {
        "q.lora_up.weight": torch.randn(3, 8, generator=generator),
        "q.lora_down.weight": torch.randn(8, 20, generator=generator),
        "v.lora_up.weight": torch.randn(9, 8, generator=generator) / 10,
        "v.lora_down.weight": torch.randn(8, 20, generator=generator),
    }
    small = compress(state, "100%")
    assert dict(small) == {"q": 3, "v": 8}  # three ranks hold all that eight did
    assert small.error < 1e-12
    torch.testing.assert_close(matrices(small.tensors)["q"], matrices(state)["q"])


def test_dropped_layers_are_no_targets_and_prefixes_do_not_mix(transformers, peft, tmp_path):
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))
            self.inner = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(self.layers[:0])})
            self.inner["layers"].append(torch.nn.Linear(4, 4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.inner["layers"][0](x)

    net = Net()
    with quiet():
        model = peft.get_peft_model(net, peft.LoraConfig(target_modules="all-linear", r=2))
    decayed(model)
    weak = {"layers.0", "layers.11"}
    for name, part in model.get_base_model().named_modules():
        if name in weak:
            part.lora_B["default"].weight.data *= 1e-6
    with quiet():
        model.save_pretrained(tmp_path / "in")
    small = compress(tmp_path / "in", 11 * 16, tmp_path / "out")
    assert {name for name, rank in small.items() if rank == 0} == weak
    with quiet():
        again = peft.PeftModel.from_pretrained(Net(), tmp_path / "out")
    assert set(deltas(again)) == set(small) - weak


def test_layers_that_keep_their_rank_keep_their_bits(transformers, peft, tmp_path):
    saved(peft, transformers, tmp_path / "in", lora_alpha=5)
    small = compress(tmp_path / "in", "100%", tmp_path / "out")
    assert small.error == 0
    assert small.captured == 1
    old, new = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("in", "out"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("in", "out")
    ]
    assert configs[0] == configs[1]
    bigger = compress(tmp_path / "in", 10**9)
    assert bigger.parameters[0] == bigger.parameters[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_so_and_the_error_is_of_what_is_stored(
    transformers, peft, tmp_path, dtype
):
    model = saved(peft, transformers, tmp_path / "in", llama(transformers).to(dtype), lora_alpha=3)
    small = compress(tmp_path / "in", "60%", tmp_path / "out")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    old = load_file(tmp_path / "in" / "adapter_model.safetensors")
    lost = energy = 0.0
    for name, rank in small.items():
        a, b = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
        before = old[b].double() @ old[a].double() / 2
        after = new[b].double() @ new[a].double() / 2 if rank else torch.zeros_like(before)
        lost += float((before - after).square().sum())
        energy += float(before.square().sum())
    assert small.error == pytest.approx(lost / energy, rel=1e-9)
    assert 1 - small.captured < small.error  # rounding comes on top
    assert model is not None


def kohya_state(dtype=torch.float16, alpha_dtype=torch.float16):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape, rank):
        fall = 0.7 ** torch.arange(rank)
        left = torch.randn(shape[0], rank, generator=generator) * fall
        return left, torch.randn(rank, *shape[1:], generator=generator)

    state = {}
    shapes = {"lora_unet_mid_attn": (12, 20), "lora_te_text_fc": (30, 8)}
    for i, (name, shape) in enumerate(shapes.items()):
        left, right = draw(*shape, rank=6)
        state[f"{name}.lora_up.weight"] = (left * (1 + i)).to(dtype)
        state[f"{name}.lora_down.weight"] = right.to(dtype)
        state[f"{name}.alpha"] = torch.tensor(2.0).to(alpha_dtype)  # a scale of 1/3
    left, right = draw(9, 4, 3, 3, rank=6)
    state["lora_unet_conv.lora_up.weight"] = left.view(9, 6, 1, 1).to(dtype)
    state["lora_unet_conv.lora_down.weight"] = right.to(dtype)
    state["lora_unet_conv.alpha"] = torch.tensor(6.0).to(alpha_dtype)
    return state


def matrices(state):
    """Each module's update as a matrix, with the scale that kohya gives it."""
    found = {}
    for key in state:
        if key.endswith("lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            up, down = (
                state[f"{name}.lora_{p}.weight"].double().flatten(1) for p in ("up", "down")
            )
            alpha = state.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / up.shape[1]
            found[name] = scale * up @ down
    return found


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kohya_files_with_alphas_convolutions_and_metadata(tmp_path, dtype, fold):
    state = kohya_state(dtype)
    metadata = {
        "ss_network_dim": "6",
        "ss_network_alpha": "2",
        "ss_base_model_version": "sd_1.5",
        "sshs_model_hash": "stale",
        "modelspec.hash_sha256": "stale",
    }
    save_file(state, tmp_path / "in.safetensors", metadata)
    small = compress(
        tmp_path / "in.safetensors", "50%", tmp_path / "out.safetensors", fold_scale=fold
    )
    new = load_file(tmp_path / "out.safetensors")
    assert {k: t.dtype for k, t in new.items()}.items() <= {
        k: t.dtype for k, t in state.items()
    }.items()
    after = matrices(new)
    for name, matrix in matrices(state).items():
        reached = after.get(name, torch.zeros_like(matrix))
        room = (1e-6 if dtype is torch.float32 else 2e-3) * float(matrix.norm())
        torch.testing.assert_close(reached, best(matrix, small[name]), rtol=0, atol=room)
        if fold and small[name]:
            assert float(new[f"{name}.alpha"]) == small[name]
    assert {n: new[f"{n}.lora_up.weight"].shape[1] for n in after} == {
        name: rank for name, rank in small.items() if rank
    }
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        written = file.metadata()
    assert written["ss_network_dim"] == written["ss_network_alpha"] == "Dynamic"
    assert written["ss_base_model_version"] == "sd_1.5"
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & written.keys()
    done = json.loads(written["lorambo_compress"])
    assert done["budget"] == "50%"
    assert done["parameters"] == list(small.parameters)


def test_an_alpha_that_its_type_cannot_hold_is_made_up_for(tmp_path):
    state = kohya_state(torch.float32)  # alphas in float16, scale 1/3: no alpha of rank 5 is exact
    small = compress(state, "100%", max_rank=5)
    assert set(small.values()) == {5}
    alpha = small.tensors["lora_te_text_fc.alpha"]
    assert alpha.dtype == torch.float16
    assert float(alpha) != 5 / 3
    for name, matrix in matrices(state).items():
        reached = matrices(small.tensors)[name]
        torch.testing.assert_close(
            reached, best(matrix, 5), rtol=0, atol=1e-6 * float(matrix.norm())
        )


def test_a_file_without_alphas_gets_none(tmp_path):
    state = {k: t for k, t in kohya_state(torch.float32).items() if not k.endswith("alpha")}
    small = compress(state, "40%")
    assert not [key for key in small.tensors if key.endswith("alpha")]
    for name, matrix in matrices(small.tensors).items():
        expected = best(matrices(state)[name], small[name])
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-5)


def test_in_place_and_an_error_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    save_file(kohya_state(), path)
    before = path.read_bytes()

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lorambo_adapters.ranks.lora_rewrite.truncated", broken)
        with pytest.raises(KeyboardInterrupt):
            compress(path, "50%", path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
    small = compress(path, "50%", path)
    assert {n: len(v) for n, v in lora_spectra(path).items()} == {
        n: r for n, r in small.items() if r
    }


def test_a_folder_appears_whole_or_not_at_all(transformers, peft, tmp_path, monkeypatch):
    saved(peft, transformers, tmp_path / "in")
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(tmp_path / "in", "50%", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        compress(tmp_path / "in", "50%", tmp_path / "out")


@pytest.mark.parametrize("name", ["experts", "modules too", "weak"])
def test_experts_of_one_parameter_share_a_rank(transformers, peft, tmp_path, name):
    torch.manual_seed(0)
    sizes = {**TINY, "num_local_experts": 3, "num_experts_per_tok": 2}
    base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    options = {"target_modules": [] if name == "experts" else ["q_proj"], "r": 4}
    options["target_parameters"] = ["mlp.experts.down_proj"]
    saved(peft, transformers, tmp_path / "in", base, **options)
    path = tmp_path / "in" / "adapter_model.safetensors"
    state = load_file(path)
    weak = "model.layers.1.mlp.experts"
    if name == "weak":
        state[f"base_model.model.{weak}.lora_B.weight"] *= 1e-4
        save_file(state, path)
    before = lora_spectra(tmp_path / "in")
    small = compress(tmp_path / "in", "50%", tmp_path / "out")
    shared = {}
    for layer, rank in small.items():
        shared.setdefault(layer.rpartition(".")[0], set()).add(rank)
    experts = {k: r for k, r in shared.items() if k.endswith("down_proj")}
    assert len(experts) == 2
    assert all(len(ranks) == 1 for ranks in experts.values())
    assert ({0} in experts.values()) is (name == "weak")
    torch.manual_seed(0)
    with quiet():
        again = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
        again = peft.PeftModel.from_pretrained(again, tmp_path / "out")
    after = lora_spectra(again)
    for layer, rank in small.items():
        if rank:
            np.testing.assert_allclose(after[layer], before[layer][:rank], rtol=1e-5)
    assert set(after) == {layer for layer, rank in small.items() if rank}


def test_rules_of_other_tools_by_hand():
    values = np.array([4.0, 2.0, 1.0, 1.0])  # sums 4, 6, 7, 8; of squares 16, 20, 21, 22
    for rule, parameter, rank in (
        ("fixed", 9, 4),
        ("kohya sv_ratio", 3.0, 2),  # above 4/3
        ("kohya sv_ratio", 4.0, 2),  # above 1, and not 1 itself
        ("kohya sv_cumulative", 0.75, 2),
        ("kohya sv_cumulative", 0.76, 3),
        ("kohya sv_fro", 0.95, 2),  # 0.9025 of the squares
        ("PEFT save_as_lora", 0.95, 3),
        ("LyCORIS threshold", 0.9, 4),
        ("LyCORIS threshold", 5.0, 1),
        ("LyCORIS ratio", 0.25, 2),
        ("LyCORIS quantile", 0.8, 2),  # partial sums below 6.4
    ):
        assert RULES[rule](values, parameter) == rank, (rule, parameter)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_no_rule_of_another_tool_keeps_more_at_its_size(transformers, peft, tmp_path, rule, share):
    saved(peft, transformers, tmp_path / "in", lora_alpha=3, r=8)
    spectra = dict(lora_spectra(tmp_path / "in"))
    costs = {n: sum(s) for n, s in (lora_spectra(tmp_path / "in").shapes or {}).items()}
    size = sum(costs[n] * len(v) for n, v in spectra.items())
    _, ranks = at_most(RULES[rule], spectra, costs, share * size)
    cost = sum(costs[n] * rank for n, rank in ranks.items())
    assert cost <= max(share * size, sum(costs.values()))
    energy = sum(float(v @ v) for v in spectra.values())
    theirs = sum(float(spectra[n][:r] @ spectra[n][:r]) for n, r in ranks.items()) / energy
    small = compress(tmp_path / "in", cost)
    assert small.allocation.cost <= cost
    assert small.captured >= theirs * (1 - 1e-14)


def test_peft_s_own_conversion_has_the_ranks_of_its_rule(transformers, peft, tmp_path):
    model = saved(peft, transformers, tmp_path / "in", lora_alpha=3)
    spectra = dict(lora_spectra(model))
    with quiet():
        _, state = peft.convert_to_lora(model, rank=0.9)
    theirs = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in state.items()
        if "lora_A" in key
    }
    assert theirs == ranks_by(RULES["PEFT save_as_lora"], spectra, 0.9)


def test_least_size_for_a_share_of_the_energy(transformers, peft, tmp_path):
    saved(peft, transformers, tmp_path / "in")
    small = compress(tmp_path / "in", "energy:90%", tmp_path / "out")
    assert small.captured >= 0.9
    small.certificate.verify(small.allocation.problem, small.allocation.ranks)
    assert small.certificate.status == "optimal_exact"
    assert compress(tmp_path / "in", small.parameters[1] - 1).captured < 0.9
    assert "nothing below" in repr(small)


def test_bytes_count_every_tensor(transformers, peft, tmp_path):
    saved(peft, transformers, tmp_path / "in", modules_to_save=["lm_head"])
    head = 40 * 16 * 4
    small = compress(tmp_path / "in", Bytes(head + 3000), tmp_path / "out")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in new.values())
    assert head + 2800 < stored == small.nbytes[1] <= head + 3000
    with pytest.raises(
        ValueError, match="more than the 2,560 bytes of tensors that are no layer's"
    ):
        compress(tmp_path / "in", Bytes(head - 1))
    state = kohya_state()
    for count in range(150, 500):
        small = compress(state, Bytes(count), progress=False)
        stored = sum(t.numel() * t.element_size() for t in small.tensors.values())
        assert stored == small.allocation.cost <= count  # with the alphas


def test_limits_and_uniform_budgets(transformers, peft, tmp_path):
    saved(peft, transformers, tmp_path / "in", r=8)
    small = compress(tmp_path / "in", uniform_rank(4), multiple_of=4, min_rank=4)
    assert set(small.values()) == {4}
    least = {name: 2 for name in small if "q_proj" in name}
    small = compress(tmp_path / "in", uniform_rank(3), min_rank=least, max_rank=5)
    assert max(small.values()) <= 5
    assert min(small[name] for name in least) >= 2
    with pytest.raises(InfeasibleError):
        compress(tmp_path / "in", uniform_rank(1), min_rank=2)
    with pytest.raises(ValueError, match="min_rank: layer 'q' is not in the LoRA"):
        compress(tmp_path / "in", uniform_rank(1), min_rank={"q": 2})
    half: Any = 1.5
    with pytest.raises(ValueError, match=r"max_rank: layer .* whole number >= 0, got 1.5"):
        compress(tmp_path / "in", uniform_rank(1), max_rank={next(iter(small)): half})
    assert compress(tmp_path / "in", "100%", min_rank=9).error == 0  # what a layer has is enough
    with pytest.raises(
        ValueError, match="at least one rank to fit, got 3 where the cheapest costs"
    ):
        compress(tmp_path / "in", 3)


def random_curvature(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def spd(n):
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return root @ root.T + 0.1 * torch.eye(n)

    return {name: (spd(k), spd(d)) for name, (d, k) in shapes.items()}


def root(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**power @ vectors.T


def test_curvature_decides_ranks_and_truncations():
    state = kohya_state(torch.float64)
    spectra = lora_spectra(state)
    curvature = random_curvature(spectra.shapes)
    small = compress(state, "50%", curvature=curvature)
    plain = compress(state, "50%")
    weighted = {}
    for name, matrix in matrices(state).items():
        a, b = curvature[name]
        m = root(b, 0.5) @ matrix @ root(a, 0.5)
        weighted[name] = m
        reached = matrices(small.tensors).get(name, torch.zeros_like(matrix))
        expected = root(b, -0.5) @ best(m, small[name]) @ root(a, -0.5)
        torch.testing.assert_close(reached, expected, rtol=0, atol=1e-9 * float(matrix.norm()))
    total = sum(float(m.square().sum()) for m in weighted.values())
    lost = {}
    for label, result in (("weighted", small), ("plain", plain)):
        lost[label] = 0.0
        for name, matrix in matrices(state).items():
            a, b = curvature[name]
            left = matrix - matrices(result.tensors).get(name, torch.zeros_like(matrix))
            lost[label] += float((root(b, 0.5) @ left @ root(a, 0.5)).square().sum())
    assert 1 - small.captured == pytest.approx(lost["weighted"] / total, rel=1e-6)
    assert lost["weighted"] < lost["plain"]
    assert small.error > plain.error


def test_truncation_is_the_best_at_any_rank_and_scale():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    product = left @ right
    values = torch.linalg.svdvals(product)
    for rank in range(1, 6):
        new = truncated(left, right, rank)
        torch.testing.assert_close(new[0] @ new[1], best(product, rank), rtol=0, atol=1e-12)
        torch.testing.assert_close(new[0].norm(dim=0), new[1].norm(dim=1))
        distance, energy = squared_distance((left, right), new)
        assert energy == pytest.approx(float(product.square().sum()))
        assert distance == pytest.approx(float(values[rank:].square().sum()), abs=1e-12)
    # Ranks beyond that of the product: zeros, not noise blown up.
    twice = truncated(torch.cat([left, left], 1), torch.cat([right, right]), 9)
    torch.testing.assert_close(twice[0] @ twice[1], 2 * product, rtol=0, atol=1e-12)
    assert float(twice[0][:, 5:].abs().max()) < 1e-6
    nothing = truncated(0 * left, right, 3)
    assert float(nothing[0].abs().max()) == 0
    wide = truncated(torch.ones(2, 6), torch.ones(6, 2), 6)  # more ranks than rows
    torch.testing.assert_close(wide[0] @ wide[1], torch.full((2, 2), 6.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN or infinity in the factor A"):
        truncated(left, right * math.nan, 2)


def test_a_singular_curvature_drops_what_no_input_reaches():
    left, right = torch.eye(4, 3, dtype=torch.float64), torch.eye(3, 5, dtype=torch.float64)
    unseen = torch.tensor([1.0, 0.0, 4.0, 1.0, 1.0])
    b, a = truncated(left, right, 2, (unseen, None))
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[0, 0] = expected[2, 2] = 1
    torch.testing.assert_close(b @ a, expected)


def test_dora_is_refused_or_keeps_its_magnitudes(transformers, peft, tmp_path):
    saved(peft, transformers, tmp_path / "in", use_dora=True, target_modules=["q_proj", "v_proj"])
    path = tmp_path / "in" / "adapter_model.safetensors"
    state = load_file(path)
    weak = "model.layers.0.self_attn.v_proj"
    state[f"base_model.model.{weak}.lora_B.weight"] *= 1e-4  # as a LoRA it would get no rank
    save_file(state, path)
    with pytest.raises(ValueError, match="got a DoRA"):
        compress(tmp_path / "in", "50%", tmp_path / "out")
    small = compress(tmp_path / "in", "30%", tmp_path / "out", keep_magnitude=True)
    assert small[weak] == 1  # else the magnitude would be lost
    old, new = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("in", "out"))
    magnitudes = [key for key in old if "magnitude" in key]
    assert len(magnitudes) == 4
    assert all(torch.equal(old[key], new[key]) for key in magnitudes)
    loaded(peft, transformers, tmp_path / "out")


def test_what_is_no_plain_lora_is_refused(tmp_path):
    state = kohya_state()
    tucker = {**state, "lora_unet_conv.lora_mid.weight": torch.ones(6, 6, 3, 3)}
    tucker["lora_unet_conv.lora_down.weight"] = torch.ones(6, 4, 1, 1)
    with pytest.raises(ValueError, match=r"lora_unet_conv.*Tucker form"):
        compress(tucker, "50%")
    with pytest.raises(ValueError, match=r"hada_w1_a.* is not a factor"):
        compress({**state, "x.hada_w1_a": torch.ones(2, 2)}, "50%")
    with pytest.raises(FileNotFoundError):
        compress(tmp_path / "none.safetensors", "50%")
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        compress(tmp_path / "in.safetensors", "50%", tmp_path / "out")
    with pytest.raises(IsADirectoryError):
        compress(tmp_path / "in.safetensors", "50%", tmp_path)
    with pytest.raises(FileNotFoundError):
        compress(tmp_path / "in.safetensors", "50%", tmp_path / "no" / "out.safetensors")


def test_diffusers_keeps_its_configurations_in_the_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    entries, state = {}, {}
    for component, names in {"unet": ["a.q", "b.q"], "text_encoder": ["q"]}.items():
        entries |= {
            f"{component}.r": 4,
            f"{component}.lora_alpha": 6,
            f"{component}.target_modules": ["q"],
            f"{component}.rank_pattern": {},
        }
        for i, name in enumerate(names):
            size = {"unet": (1.0, 1e-4), "text_encoder": (1e-6,)}[component][i]
            draw = torch.randn(7, 4, generator=generator) * size
            state[f"{component}.{name}.lora_B.weight"] = draw
            state[f"{component}.{name}.lora_A.weight"] = torch.randn(4, 5, generator=generator)
    save_file(state, tmp_path / "in.safetensors", {"lora_adapter_metadata": json.dumps(entries)})
    small = compress(tmp_path / "in.safetensors", 12 * 5, tmp_path / "out.safetensors")
    assert dict(small) == {"text_encoder.q": 0, "unet.a.q": 4, "unet.b.q": 1}
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        new = json.loads(file.metadata()["lora_adapter_metadata"])
    assert new == {
        "unet.r": 4,
        "unet.lora_alpha": 6,
        "unet.target_modules": ["q"],
        "unet.rank_pattern": {r"^b\.q": 1},
        "unet.alpha_pattern": {r"^b\.q": 1.5},
    }
    before, after = (lora_spectra(tmp_path / f"{n}.safetensors") for n in ("in", "out"))
    for name in after:
        np.testing.assert_allclose(after[name], before[name][: small[name]], rtol=1e-6)


def test_budgets_as_people_write_them():
    assert parsed(0.25) == Share(Fraction(1, 4))
    assert parsed("12.5%") == Share(Fraction(1, 8))
    assert parsed("energy:95%") == Energy(Fraction(19, 20))
    assert parsed("10MB") == parsed("10 mb") == Bytes(10**7)
    assert parsed("1.5kB") == Bytes(1500)
    assert parsed("2KiB") == Bytes(2048)
    assert parsed("1.5M") == 1_500_000
    assert parsed("uniform:8") == uniform_rank(8)
    assert parsed(12) == 12
    for wrong in (1.5, -1, 0.0, "0%", "101%", "half", True, math.nan, Share(Fraction(2))):
        with pytest.raises(ValueError, match="budget"):
            parsed(wrong)


def test_the_writer_wants_what_was_planned(tmp_path):
    plan = {"half": Planned((3,), torch.float16), "whole": Planned((2, 2), torch.float32)}
    path = tmp_path / "f.safetensors"
    whole, half = torch.arange(4.0).view(2, 2), torch.ones(3, dtype=torch.float16)
    with tensor_writer(path, plan, {"key": "ü"}) as writer:
        writer.add("whole", whole.T.contiguous().T)
        writer.add("half", half)
    written = load_file(path)
    assert torch.equal(written["whole"], whole)
    assert torch.equal(written["half"], half)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "ü"}
    before = path.read_bytes()

    def write(tensors):
        with tensor_writer(path, plan, {}) as writer:
            for key, tensor in tensors.items():
                writer.add(key, tensor)

    for tensors in ({"half": half}, {"whole": whole.double()}, {"whole": whole}, {}):
        with pytest.raises(ValueError, match="expected"):
            write(tensors)
    assert path.read_bytes() == before
