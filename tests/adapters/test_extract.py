"""LoRAs extracted from two checkpoints: what PEFT loads, and how near it comes."""

import json
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("safetensors", reason="safetensors is absent: pip install safetensors")

from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks.resizers import RULES, ranks_by  # noqa: E402
from lorambo_adapters.ranks import extract as module  # noqa: E402
from lorambo_adapters.ranks.budgets import Bytes  # noqa: E402
from lorambo_adapters.ranks.extract import extract_lora  # noqa: E402
from lorambo_adapters.spectra.checkpoints import delta_spectra  # noqa: E402
from lorambo_adapters.spectra.leading import leading_factors, residual  # noqa: E402
from lorambo_alloc import uniform_rank  # noqa: E402
from tests.adapters.conftest import TINY, quiet  # noqa: E402

WIDER = {**TINY, "hidden_size": 32, "intermediate_size": 48}
WIDER |= {"num_hidden_layers": 3, "vocab_size": 50}


def llama(transformers):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDER)).eval()


def gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def tune(model, names):
    """Add updates whose spectra fall off at rates and have sizes of their own."""
    generator = torch.Generator().manual_seed(7)
    for i, (name, part) in enumerate(model.named_modules()):
        weight = getattr(part, "weight", None)
        if weight is None or weight.ndim != 2 or not any(word in name for word in names):
            continue
        d, k = weight.shape
        fall = (0.5 + 0.06 * (i % 7)) ** torch.arange(min(d, k)) * (1 + i % 4) / 10
        left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (d, k))
        weight.data += (left[:, : len(fall)] * fall) @ right[: len(fall)]


def checkpoints(transformers, folder, make=llama, names=("proj",)):
    model = make(transformers)
    with quiet():
        model.save_pretrained(folder / "base")
        tune(model, names)
        model.save_pretrained(folder / "tuned")
    return model


def best(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def loaded(peft, transformers, folder, make=llama):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(make(transformers), folder).eval()
    texts = [str(warning.message) for warning in said]
    assert not [text for text in texts if "key" in text or "target" in text], texts
    return model


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_peft_adds_the_best_approximation(transformers, peft, tmp_path, make, scale):
    names = ("proj",) if make is llama else ("c_attn", "c_fc", "c_proj")
    checkpoints(transformers, tmp_path, make, names)
    base, tuned = weights(tmp_path / "base"), weights(tmp_path / "tuned")
    lora = extract_lora(
        tmp_path / "base", tmp_path / "tuned", "uniform:4", tmp_path / "out", scale=scale
    )
    assert lora.certificate.status == "optimal_exact"
    lora.certificate.verify(lora.allocation.problem, lora.allocation.ranks)
    model = loaded(peft, transformers, tmp_path / "out", make)
    found = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert set(found) == {name for name, rank in lora.items() if rank}
    lost = energy = 0.0
    for name, rank in lora.items():
        difference = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        reached = torch.zeros_like(difference)
        if rank:
            reached = found[name].get_delta_weight("default").detach().double()
            assert found[name].scaling["default"] == scale
            assert found[name].r["default"] == rank
        expected = best(difference, rank)
        room = 2e-6 * float(difference.norm())
        torch.testing.assert_close(reached, expected, rtol=0, atol=room)
        lost += float((difference - reached).square().sum())
        energy += float(difference.square().sum())
    assert lora.error == pytest.approx(lost / energy, rel=1e-5)
    assert lora.captured == pytest.approx(1 - lost / energy, rel=1e-6)
    numbers = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert numbers == lora.parameters[1] == lora.allocation.cost
    assert numbers <= lora.allocation.budget
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == lora.config


def test_nearer_to_the_tuned_model_than_a_fixed_rank(transformers, peft, tmp_path):
    tuned = checkpoints(transformers, tmp_path)
    tokens = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    spectra = delta_spectra(tmp_path / "base", tmp_path / "tuned", rank=None)
    energy = sum(float(v @ v) for v in spectra.values())
    errors = {}
    for rank in (2, 4, 8):
        # mergekit's rule: every layer the same rank. Ours at what that costs.
        fixed = ranks_by(RULES["fixed"], dict(spectra), rank)
        theirs = sum(float(spectra[n][:r] @ spectra[n][:r]) for n, r in fixed.items()) / energy
        ours = extract_lora(
            tmp_path / "base", tmp_path / "tuned", uniform_rank(rank), tmp_path / f"ours{rank}"
        )
        uniform = extract_lora(
            tmp_path / "base", tmp_path / "tuned", uniform_rank(rank), tmp_path / f"fixed{rank}",
            min_rank=rank, max_rank=rank,
        )  # fmt: skip
        assert dict(uniform) == fixed
        assert uniform.captured == pytest.approx(theirs, rel=1e-6)
        assert ours.parameters[1] <= uniform.parameters[1]
        assert ours.captured > theirs
        with torch.no_grad():
            wanted = tuned(tokens).logits
            for label in ("ours", "fixed"):
                model = loaded(peft, transformers, tmp_path / f"{label}{rank}")
                errors[label, rank] = float((model(tokens).logits - wanted).square().mean())
    with torch.no_grad():
        untuned = float((llama(transformers)(tokens).logits - wanted).square().mean())
    for rank in (2, 4, 8):
        assert errors["ours", rank] < errors["fixed", rank] < untuned


def test_half_precision_and_what_no_layer_holds(transformers, peft, tmp_path):
    model = llama(transformers).to(torch.bfloat16)
    with quiet():
        model.save_pretrained(tmp_path / "base")
        tune(model, ["proj", "norm"])
        model.model.norm.weight.data *= 2
        model.model.embed_tokens.weight.data[3] += 1
        model.save_pretrained(tmp_path / "tuned")
    lora = extract_lora(tmp_path / "base", tmp_path / "tuned", "energy:95%", tmp_path / "out")
    assert set(lora.others) >= {"model.norm.weight", "model.embed_tokens.weight"}
    assert not [key for key in lora.others if "proj" in key]
    assert "model.norm.weight" in lora.summary() or "..." in lora.summary()
    assert lora.captured >= 0.95
    assert lora.error > 1 - lora.captured  # rounding the factors comes on top
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    cheaper = lora.parameters[1] - 1
    assert extract_lora(tmp_path / "base", tmp_path / "tuned", cheaper).captured < 0.95
    wide = extract_lora(
        tmp_path / "base", tmp_path / "tuned", lora.parameters[1], dtype=torch.float32
    )
    assert wide.error == pytest.approx(1 - wide.captured, rel=1e-5)
    sized = extract_lora(tmp_path / "base", tmp_path / "tuned", Bytes(5000), tmp_path / "small")
    assert 4500 < sized.nbytes[1] <= 5000


def test_layers_that_were_not_trained_get_no_rank(transformers, peft, tmp_path):
    checkpoints(transformers, tmp_path, names=["layers.1.mlp"])
    lora = extract_lora(tmp_path / "base", tmp_path / "tuned", "uniform:30", tmp_path / "out")
    trained = {name for name in lora if "layers.1.mlp" in name}
    assert {name for name, rank in lora.items() if rank} == trained
    model = loaded(peft, transformers, tmp_path / "out")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 3
    with pytest.raises(ValueError, match="at least one rank to fit and to gain"):
        extract_lora(tmp_path / "base", tmp_path / "base", "uniform:3")
    # A share is one of the weights.
    lora = extract_lora(tmp_path / "base", tmp_path / "tuned", "1%")
    assert lora.parameters[1] <= 0.01 * lora.parameters[0]
    with pytest.raises(ValueError, match=r"share of the energy up to .* raise max_rank"):
        extract_lora(tmp_path / "base", tmp_path / "tuned", "energy:99.9%", max_rank=1)


def written(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("stop", ["leading_factors", "delta_spectra", "tensor_writer"])
def test_an_interrupted_run_goes_on_where_it_was(transformers, tmp_path, monkeypatch, stop):
    checkpoints(transformers, tmp_path)
    arguments = tmp_path / "base", tmp_path / "tuned", "uniform:3"
    extract_lora(*arguments, tmp_path / "whole")
    calls = []
    original = getattr(module, stop)

    def interrupted(*given, **options):
        calls.append(given)
        if len(calls) == (5 if stop == "leading_factors" else 1):
            raise KeyboardInterrupt
        return original(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, stop, interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract_lora(*arguments, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    assert (partial / "extraction.json").is_file()
    made, spectra = [], []
    factors, deltas = module.leading_factors, module.delta_spectra
    with monkeypatch.context() as patched:
        patched.setattr(
            module, "leading_factors", lambda *a, **k: made.append(a) or factors(*a, **k)
        )
        patched.setattr(
            module, "delta_spectra", lambda *a, **k: spectra.append(a) or deltas(*a, **k)
        )
        lora = extract_lora(*arguments, tmp_path / "out")
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not partial.exists()
    layers = sum(rank > 0 for rank in lora.values())
    finished = {"leading_factors": 4, "delta_spectra": 0, "tensor_writer": layers}[stop]
    assert len(made) == layers - finished
    assert len(spectra) == (stop == "delta_spectra")


def test_only_what_fits_is_taken_over(transformers, tmp_path, monkeypatch):
    checkpoints(transformers, tmp_path)
    arguments = tmp_path / "base", tmp_path / "tuned"
    whole = extract_lora(*arguments, "uniform:2", tmp_path / "whole")
    first = extract_lora(*arguments, "uniform:3")

    def interrupt(where="out", **options):
        with monkeypatch.context() as patched:
            patched.setattr(module, "new_folder", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                extract_lora(*arguments, "uniform:3", tmp_path / where, **options)

    made = []
    factors = module.leading_factors

    def counting(*given, **options):
        made.append(given)
        return factors(*given, **options)

    # Another budget: the spectra, and the layers of equal rank.
    interrupt()
    monkeypatch.setattr(module, "leading_factors", counting)
    extract_lora(*arguments, "uniform:2", tmp_path / "out")
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    same = sum(0 < whole[name] == first[name] for name in whole)
    assert len(made) == sum(rank > 0 for rank in whole.values()) - same
    assert same > 0
    # Another type, or a changed checkpoint: nothing.
    made.clear()
    interrupt("again", dtype=torch.float16)
    made.clear()
    extract_lora(*arguments, "uniform:3", tmp_path / "again")
    assert len(made) == sum(rank > 0 for rank in first.values())
    # A folder that is not ours is left alone.
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious").touch()
    with pytest.raises(FileExistsError, match="not a partial extraction"):
        extract_lora(*arguments, "uniform:2", tmp_path / "other")
    assert (tmp_path / "other.partial" / "precious").exists()


def test_what_cannot_be_extracted(transformers, tmp_path):
    model = checkpoints(transformers, tmp_path)
    arguments = tmp_path / "base", tmp_path / "tuned"
    with pytest.raises(ValueError, match="got embedding tables"):
        extract_lora(*arguments, 1000, targets=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="pass the state_dict"):
        extract_lora(model, model, 1000)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        extract_lora(*arguments, 1000, scale=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError):
        extract_lora(*arguments, 1000, tmp_path / "out")
    state = {"mlp.experts.up": torch.ones(2, 3, 4), "q.weight": torch.ones(3, 3)}
    with pytest.raises(ValueError, match="got stacked experts"):
        extract_lora(state, state, 100)
    broken = {"q.weight": torch.full((3, 3), torch.nan)}
    with pytest.raises(ValueError, match="layer 'q'"):
        extract_lora({"q.weight": torch.ones(3, 3)}, broken, 100, tmp_path / "new")
    assert not (tmp_path / "new.partial").exists()  # a state dict cannot be known again


def test_state_dicts_of_one_name_in_two_types(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"q.weight": torch.randn(6, 5, generator=generator, dtype=torch.float64)}
    tuned = {"q.weight": (base["q.weight"] + torch.eye(6, 5)).to(torch.float32)}
    lora = extract_lora(base, tuned, 22, tmp_path / "out")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    assert lora.config["base_model_name_or_path"] is None
    save_file(base, tmp_path / "base.safetensors")
    again = extract_lora(tmp_path / "base.safetensors", tuned, 22)
    assert dict(again) == dict(lora) == {"q": 2}
    for key, tensor in again.tensors.items():
        assert torch.equal(tensor, new[key])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("exact_below", [1024, 16])
def test_leading_factors(flip, exact_below):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 90, generator=generator)).Q for n in (120, 90))
    values = 0.8 ** torch.arange(90)
    matrix = (left * values) @ right.T
    matrix = matrix.T if flip else matrix
    assert matrix.is_contiguous() is not flip
    b, a = leading_factors(matrix, 6, exact_below=exact_below)
    assert b.dtype == torch.float64
    tail = float((values[6:].double() ** 2).sum())
    distance = float((matrix.double() - b @ a).square().sum())
    assert distance == pytest.approx(tail, rel=1e-4)
    assert distance >= tail * (1 - 1e-6)
    assert residual(matrix, b, a) == pytest.approx(distance, rel=1e-5)
    np.testing.assert_allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-6)
    np.testing.assert_allclose(b.norm(dim=0).square(), values[:6], rtol=1e-2)
    for power in (-110, 110):  # squares that float32 does not hold
        b, a = leading_factors(matrix.double() * 2.0**power, 6, exact_below=exact_below)
        scaled = (b @ a) * 2.0**-power
        assert float((matrix.double() - scaled).square().sum()) == pytest.approx(tail, rel=1e-4)
    with pytest.raises(ValueError, match="rank: expected a whole number from 1 to 90, got 91"):
        leading_factors(matrix, 91)
    zero = leading_factors(0 * matrix, 3)
    assert float(zero[0].abs().max()) == 0


class TestCommands:
    @pytest.fixture(autouse=True)
    def needs_typer(self):
        pytest.importorskip("typer", reason="typer is absent: pip install 'lorambo-alloc[cli]'")
        pytest.importorskip("rich", reason="rich is absent: pip install 'lorambo-alloc[cli]'")

    def test_extract_then_compress(self, transformers, peft, tmp_path, capsys):
        from lorambo_adapters.cli import main

        checkpoints(transformers, tmp_path)
        paths = {
            name: str(tmp_path / name) for name in ("base", "tuned", "lora", "small", "j.json")
        }
        capsys.readouterr()
        options = ["--budget", "uniform:4", "-o", paths["lora"], "--json", paths["j.json"]]
        assert main(["extract", paths["base"], paths["tuned"], *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert "optimal exact" in out
        assert f"written     {paths['lora']}" in out
        document = json.loads((tmp_path / "j.json").read_text())
        lora = extract_lora(paths["base"], paths["tuned"], uniform_rank(4))
        assert document["ranks"] == dict(lora)
        assert document["error"] == pytest.approx(lora.error)
        options = ["--budget", "50%", "-o", paths["small"], "--multiple-of", "2"]
        assert main(["compress", paths["lora"], *options]) == 0
        assert "parameters" in capsys.readouterr().out
        model = loaded(peft, transformers, tmp_path / "small")
        sizes = [len(p) for n, p in model.named_parameters() if "lora_A" in n]
        assert all(size % 2 == 0 for size in sizes)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["compress", "{}/none", "--budget", "50%", "-o", "{}/o"], "No such file"),
            (["compress", "{}/a.safetensors", "--budget", "half", "-o", "{}/o"], "energy:95%"),
            (["compress", "{}/a.safetensors", "--budget", "5%", "-o", "{}/o"], "a .safetensors"),
            (["extract", "{}", "{}", "--budget", "1%", "-o", "{}"], "not an empty folder"),
            (["extract", "{}", "{}", "--budget", "1%", "-o", "{}/o", "--dtype", "int8"], "dtype"),
        ],
    )
    def test_refusals_are_one_line(self, tmp_path, capsys, arguments, said):
        from lorambo_adapters.cli import main

        state = {"q.lora_up.weight": torch.ones(2, 1), "q.lora_down.weight": torch.ones(1, 2)}
        save_file(state, tmp_path / "a.safetensors")
        assert main([argument.format(tmp_path) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert said in err
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
