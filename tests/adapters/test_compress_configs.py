"""Compressed adapters whose configuration holds more than ranks: biases, initialisations."""

import copy
import json
import signal
import subprocess
import sys
import warnings
from typing import Any

import pytest

resource = pytest.importorskip("resource", reason="resource is of POSIX systems")
torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("safetensors", reason="safetensors is absent: pip install safetensors")
transformers = pytest.importorskip("transformers", reason="transformers is absent")
peft = pytest.importorskip("peft", reason="peft is absent: pip install peft")

from safetensors.torch import load_file  # noqa: E402

from lorambo_adapters.ranks.adapter_config import peft_entries  # noqa: E402
from lorambo_adapters.ranks.compress import compress  # noqa: E402
from lorambo_adapters.ranks.extract import extract_lora  # noqa: E402
from lorambo_adapters.ranks.truncate import truncated as closest  # noqa: E402

IDS = torch.arange(12).view(2, 6)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40)
    return transformers.GPT2LMHeadModel(config)


def saved(folder, save=None, **options):
    """A model whose adapter, and whatever else is trainable, is away from where it began."""
    given = {"r": 6, "lora_alpha": 9, "target_modules": ["c_attn", "c_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(gpt2(), peft.LoraConfig(fan_in_fan_out=True, **given))
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder, **(save or {}))
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@torch.no_grad()
def truncated(model, ranks):
    """What the model says with its updates truncated by a singular value decomposition."""
    model = copy.deepcopy(model)
    for name, module in model.get_base_model().named_modules():
        if name not in ranks:
            continue
        embedding = "default" in module.lora_embedding_A
        if embedding:
            a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        u, values, vt = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
        values[ranks[name] :] = 0
        count = len(a)
        b.copy_((u * values)[:, :count])
        a.copy_(vt[:count])
    return logits(model)


def reloaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(gpt2(), folder)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("budget", ["30%", "100%"])
def test_biases_of_b_keep_their_effect(tmp_path, budget, fold):
    model = saved(tmp_path / "in", lora_bias=True)
    small = compress(tmp_path / "in", budget, tmp_path / "out", fold_scale=fold)
    assert all(small.values())
    torch.testing.assert_close(
        logits(reloaded(tmp_path / "out")), truncated(model, small), atol=2e-6, rtol=0
    )


def test_a_bias_beside_an_alpha_that_is_rounded(tmp_path):
    # bfloat16 holds 0.3 x 3 and 0.3 x 2 with errors of their own.
    key = "q.lora_B.bias"
    state = {
        "q.lora_A.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0])),
        "q.lora_B.weight": torch.eye(3),
        key: torch.tensor([1.0, 2.0, 3.0]),
        "q.alpha": torch.tensor(0.9, dtype=torch.bfloat16),
    }
    small = compress(state, 12)
    old, new = float(state["q.alpha"]) / 3, float(small.tensors["q.alpha"]) / 2
    assert old != new
    torch.testing.assert_close(small.tensors[key] * new, state[key] * old, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_of_layers_that_are_left_out_stay(tmp_path, bias):
    model = saved(tmp_path / "in", bias=bias)
    small = compress(tmp_path / "in", "12%", tmp_path / "out")
    assert 0 in small.values()
    torch.testing.assert_close(
        logits(reloaded(tmp_path / "out")), truncated(model, small), atol=2e-6, rtol=0
    )


def test_a_trained_embedding_whose_layer_is_left_out_stays(tmp_path):
    targets = ["c_attn", "wte"]
    model = saved(tmp_path / "in", {"save_embedding_layers": True}, target_modules=targets)
    path = tmp_path / "in" / "adapter_model.safetensors"
    key = "base_model.model.transformer.wte.base_layer.weight"
    assert key in load_file(path)
    small = compress(tmp_path / "in", "20%", tmp_path / "out", max_rank={"transformer.wte": 0})
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert key not in new
    torch.testing.assert_close(new[key.replace(".base_layer", "")], load_file(path)[key])
    torch.testing.assert_close(
        logits(reloaded(tmp_path / "out")), truncated(model, small), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_initialisations_that_change_the_base_by_the_rank_are_refused(tmp_path, initialisation):
    saved(tmp_path / "in", init_lora_weights=initialisation)
    with pytest.raises(ValueError, match=f"init_lora_weights='{initialisation}'.*others"):
        compress(tmp_path / "in", "50%", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_orthogonal_start_does_not_forbid_odd_ranks(tmp_path):
    model = saved(tmp_path / "in", init_lora_weights="orthogonal")
    small = compress(tmp_path / "in", "35%", tmp_path / "out")
    assert any(rank % 2 for rank in small.values())
    torch.testing.assert_close(
        logits(reloaded(tmp_path / "out")), truncated(model, small), atol=2e-6, rtol=0
    )


def test_energy_is_reached_or_refused_under_limits(tmp_path):
    saved(tmp_path / "in")
    whole = compress(tmp_path / "in", "100%")
    two = compress(tmp_path / "in", 10**9, max_rank=2)
    for share in (0.5 * two.captured, 0.999999 * two.captured):
        small = compress(tmp_path / "in", f"energy:{100 * share:.6f}%", max_rank=2)
        assert share * (1 - 1e-6) <= small.captured <= two.captured
    limited: list[dict[str, Any]]
    limited = [{"max_rank": 2}, {"multiple_of": 4}, {"max_rank": dict.fromkeys(whole, 2)}]
    for limits in limited:
        with pytest.raises(ValueError, match=r"share of the energy up to 0\.\d+.*got 0\.999"):
            compress(tmp_path / "in", "energy:99.9%", **limits)
    others: list[dict[str, Any]]
    others = [{"objective": "nuclear"}, {"weights": dict.fromkeys(whole, 2.0)}]
    for options in others:
        with pytest.raises(ValueError, match="energy needs the objective 'frobenius'"):
            compress(tmp_path / "in", "energy:90%", **options)
    assert compress(tmp_path / "in", "energy:100%").captured == pytest.approx(1, abs=1e-15)


def test_all_the_energy_of_a_difference():
    generator = torch.Generator().manual_seed(0)
    base = {f"{i}.weight": torch.zeros(5, 7, dtype=torch.float64) for i in range(20)}
    tuned = {key: torch.randn(5, 7, generator=generator, dtype=torch.float64) for key in base}
    lora = extract_lora(base, tuned, "energy:100%")
    assert set(lora.values()) == {5}
    assert lora.captured == 1


def test_a_uniform_rank_beyond_the_greatest_is_refused_and_not_cut_down():
    base = {"up.weight": torch.zeros(9, 8)}
    tuned = {"up.weight": torch.diag(torch.arange(1.0, 10))[:, :8]}
    with pytest.raises(ValueError, match="uniform rank up to max_rank, which is 4, got 5"):
        extract_lora(base, tuned, "uniform:5", max_rank=4)
    assert extract_lora(base, tuned, "uniform:4", max_rank=4)["up"] == 4
    assert extract_lora(base, tuned, "uniform:50", max_rank=8)["up"] == 8
    with pytest.raises(ValueError, match="max_rank: expected a whole number >= 1, got 0"):
        extract_lora(base, tuned, 10, max_rank=0)


def test_no_infinity_is_written():
    half = torch.eye(3, dtype=torch.float16)
    state = {"q.lora_up.weight": 6e4 * half, "q.lora_down.weight": half}
    state["q.alpha"] = torch.tensor(3e6)
    assert compress(state, 6).error == pytest.approx(2 / 3, rel=1e-3)
    with pytest.raises(ValueError, match=r"layer 'q': .* B in the range of torch.float16"):
        compress(state, 6, fold_scale=True)
    base = {"up.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"layer 'up': .* range of torch.float16, got an overflow"):
        extract_lora(base, {"up.weight": torch.eye(3)}, 6, dtype=torch.float16, scale=1e-6)


def test_a_live_model_is_to_be_saved_first():
    with pytest.raises(ValueError, match="state dict, got Linear: save a live model first"):
        compress(torch.nn.Linear(2, 2), 5)  # pyright: ignore[reportArgumentType]


def test_small_directions_are_kept_down_to_rounding():
    sizes = torch.tensor([1.0, 1e-4, 1e-9, 1e-13], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(9, 5, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    values = torch.cat([sizes, torch.zeros(1, dtype=torch.float64)])
    b, a = closest(u * values.sqrt(), (v * values.sqrt()).T, 3)
    assert float((b @ a - (u[:, :3] * sizes[:3]) @ v[:, :3].T).norm()) < 2e-13


def test_layers_of_one_rank_and_different_scales_have_alphas_of_their_own():
    config = peft_entries({}, {"q": 4, "v": 4, "o": 2}, {"q": 0.5, "v": 2.0, "o": 0.5})
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert config["alpha_pattern"] == {"^o": 1, "^v": 8}


def test_an_adapter_that_was_not_trained_is_named_so(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(gpt2(), peft.LoraConfig(fan_in_fan_out=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"update that is not zero.*was not trained"):
        compress(tmp_path, "50%")


@pytest.mark.parametrize("command", ["compress", "extract"])
def test_a_full_disk_is_reported_of_the_output(tmp_path, command):
    pytest.importorskip("typer", reason="typer is absent: pip install 'lorambo-alloc[cli]'")
    saved(tmp_path / "in")
    gpt2().save_pretrained(tmp_path / "base")
    reloaded(tmp_path / "in").merge_and_unload().save_pretrained(tmp_path / "tuned")
    inputs = ["in"] if command == "compress" else ["base", "tuned"]
    arguments = [*(str(tmp_path / name) for name in inputs), "--budget", "uniform:5"]

    def little():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    program = [sys.executable, "-m", "lorambo_adapters", command, *arguments, "-o"]
    ran = subprocess.run(
        [*program, str(tmp_path / "out")], capture_output=True, text=True, preexec_fn=little
    )
    assert ran.returncode == 2
    assert ran.stderr.rstrip().endswith(f"lorambo: {tmp_path / 'out'}: File too large")
    assert not (tmp_path / "out").exists()
    left = {path.name for path in tmp_path.iterdir()} - {"in", "base", "tuned"}
    assert left == ({"out.partial"} if command == "extract" else set())


def test_the_configuration_of_a_compressed_adapter_is_its_own(tmp_path):
    saved(tmp_path / "in", init_lora_weights="gaussian", task_type="CAUSAL_LM")
    compress(tmp_path / "in", "50%", tmp_path / "out")
    old, new = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("in", "out")
    )
    ranks = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    assert {key: old[key] for key in old if key not in ranks} == {
        key: new[key] for key in new if key not in ranks
    }
