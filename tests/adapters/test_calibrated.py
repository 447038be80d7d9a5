"""LoRAs extracted from two models by examples: what PEFT loads predicts what was measured."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("safetensors", reason="safetensors is absent: pip install safetensors")

from safetensors.torch import load_file  # noqa: E402

from lorambo_adapters.ranks.budgets import Bytes  # noqa: E402
from lorambo_adapters.ranks.calibrated import extract_calibrated  # noqa: E402
from lorambo_adapters.ranks.extract import extract_lora  # noqa: E402
from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402
from lorambo_alloc import uniform_rank  # noqa: E402
from tests.adapters import calibrated_models as models  # noqa: E402
from tests.adapters.conftest import quiet  # noqa: E402

# Few and short examples, so that the tests are quick.
pytestmark = pytest.mark.filterwarnings("ignore:.*singular values are refitted:UserWarning")

KINDS = {models.bert: "classes", models.llama: "lm", models.gpt2: "lm"}


def by_hand(base, tensors, lora):
    """A copy of the base with the adapter's tensors put into its own, without PEFT."""
    model = deepcopy(base)
    state = model.state_dict()
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            left = tensors[key.replace("lora_A", "lora_B")]
            scale = lora.config["lora_alpha"] / lora.config["r"]
            update = scale * left @ tensor
            update = update.T if lora.config["fan_in_fan_out"] else update
            state[f"{layer}.weight"] += update
        elif ".lora_B." not in name:
            state[name.replace(".base_layer.", ".")].copy_(tensor)
    return model.eval()


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_peft_predicts_what_was_measured(transformers, peft, tmp_path, make, scale):
    base = make(transformers)
    tuned, batches = models.updated(base), models.examples(KINDS[make])
    lora = extract_calibrated(base, tuned, batches, "uniform:2", tmp_path / "out", scale=scale)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = models.loaded(peft, base, tmp_path / "out")
    internal = by_hand(base, tensors, lora)
    for batch in batches:
        # In float64, as how far rounding takes the two apart depends on the processor.
        ours, theirs = (models.log_probabilities(m.double(), batch) for m in (internal, found))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    reached = models.divergence(tuned, found, batches)
    assert lora.divergences[-1] == pytest.approx(reached, rel=1e-4)
    assert list(lora.divergences) == sorted(lora.divergences, reverse=True)
    assert 1 < len(lora.divergences) <= 4
    assert reached < models.divergence(tuned, base, batches)
    names = [name for name, _ in found.named_parameters() if "lora_" in name]
    numbers = sum(found.get_parameter(name).numel() for name in names)
    assert numbers == lora.parameters[1] == lora.allocation.cost <= lora.allocation.budget
    assert {name for name, rank in lora.items() if rank} == {
        name.removeprefix("base_model.model.")
        for name, module in found.named_modules()
        if hasattr(module, "lora_A")
    }
    lora.certificate.verify(lora.allocation.problem, lora.allocation.ranks)
    assert lora.certificate.status == "optimal_exact"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == lora.config
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    rest = sum(t.numel() for key, t in tensors.items() if ".lora_" not in key)
    assert lora.beside == rest
    assert f"KL          {lora.divergences[0]:.4g} -> " in repr(lora)
    assert not lora.tensors


def test_ranks_are_those_of_the_plain_extraction_and_predictions_nearer(transformers):
    base = models.bert(transformers)
    tuned, batches = models.updated(base), models.examples("classes")
    options = {"targets": r".*\.layer\..*dense", "min_rank": 1}
    plain = extract_lora(base.state_dict(), tuned.state_dict(), "uniform:2", **options)
    ours = extract_calibrated(base, tuned, batches, "uniform:2", **options)
    assert dict(plain) == dict(ours)
    assert ours.captured == pytest.approx(plain.captured, rel=1e-6)
    assert ours.error > plain.error  # the nearest in another norm
    heads = {k: t for k, t in ours.tensors.items() if ".lora_" not in k}
    biases = {k: t for k, t in tuned.state_dict().items() if k.endswith("dense.bias")}
    with_biases = {f"base_model.model.{k}": t for k, t in biases.items() if "layer" in k}
    for key, tensor in heads.items():
        if "classifier" in key:
            with_biases[key] = tensor
    rivals = by_hand(base, {**plain.tensors, **with_biases}, plain)
    assert ours.divergences[-1] < models.divergence(tuned, rivals, batches)


@pytest.mark.parametrize("fold", [True, False])
def test_each_cut_is_the_nearest_in_the_norm_at_the_base(transformers, fold):
    base = models.bert(transformers).eval()
    tuned, batches = models.updated(base), models.examples("classes")
    options = {"fold": fold, "refit": 0, "damping": 0.2, "min_rank": 1}
    lora = extract_calibrated(base, tuned, batches, "uniform:2", **options)
    # The base with what the adapter holds besides factors.
    model = deepcopy(base)
    names = {f"{name}.bias" for name in lora} | {"classifier.weight", "classifier.bias"}
    model.load_state_dict({k: t for k, t in tuned.state_dict().items() if k in names}, strict=False)
    for name in ("bert.encoder.layer.0.attention.self.value", "bert.encoder.layer.1.output.dense"):
        rows, slopes = [], []

        def keep(module, args, output, rows=rows, slopes=slopes):
            output.retain_grad()
            rows.append(args[0].detach())
            slopes.append(output)

        handle = model.get_submodule(name).register_forward_hook(keep)
        for batch in batches:
            (8 * model(**batch).loss).backward()
        handle.remove()
        masks = [batch["attention_mask"] == 1 for batch in batches]
        x = torch.cat([x[m] for x, m in zip(rows, masks, strict=True)]).double()
        g = torch.cat([y.grad[m] for y, m in zip(slopes, masks, strict=True)]).double()
        right = torch.cov(x.T, correction=0) if fold else x.T @ x / len(x)
        roots = []
        for moment in (g.T @ g / 40, right):
            added = 0.2 * moment.trace() / len(moment) * torch.eye(len(moment))
            values, vectors = torch.linalg.eigh(moment + added)
            roots.append((vectors * values.sqrt()) @ vectors.T)
        after, before = (m.get_submodule(name).weight.detach() for m in (tuned, base))
        u, s, vt = torch.linalg.svd(roots[0] @ (after - before).double() @ roots[1])
        rank = lora[name]
        nearest = torch.linalg.solve(roots[0], (u[:, :rank] * s[:rank]) @ vt[:rank])
        nearest = nearest @ torch.linalg.inv(roots[1])
        a, b = (lora.tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close((b @ a).double(), nearest, rtol=0, atol=2e-4)
        bias = tuned.get_submodule(name).bias.detach()
        if fold:
            bias = bias + (after - before - b @ a) @ x.float().mean(0)
        found = lora.tensors[f"base_model.model.{name}.base_layer.bias"]
        torch.testing.assert_close(found, bias, rtol=0, atol=1e-5)


def test_a_whole_rank_leaves_nothing_to_refit(transformers):
    base = models.llama(transformers)
    tuned = models.updated(base)
    everything = {name: t for name, t in tuned.state_dict().items() if "proj" not in name}
    base.load_state_dict(everything, strict=False)
    lora = extract_calibrated(base, tuned, models.examples("lm"), uniform_rank(16), fisher="true")
    assert lora.others == []
    assert lora.divergences[0] < 1e-5
    assert lora.error < 1e-6
    assert lora.captured == pytest.approx(1)


def test_without_labels(transformers):
    base = models.llama(transformers)
    tuned, batches = models.updated(base), models.examples("lm", labelled=False)
    lora = extract_calibrated(base, tuned, batches, "uniform:1", fisher="true")
    assert lora.divergences[-1] < lora.divergences[0]
    with pytest.raises(ValueError, match="expected a mapping with labels, got none"):
        extract_calibrated(base, tuned, batches, "uniform:1")
    again = extract_calibrated(base, tuned, batches, "uniform:1", fisher="true")
    assert all(torch.equal(t, again.tensors[key]) for key, t in lora.tensors.items())
    other = extract_calibrated(base, tuned, batches, "uniform:1", fisher="true", seed=1)
    assert not all(torch.equal(t, other.tensors[key]) for key, t in lora.tensors.items())


def test_losses_and_predictions_of_ones_own():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    tuned = models.updated(base, 1.0)
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(16, 6, generator=generator), torch.randint(4, (16,), generator=generator))
        for _ in range(3)
    ]

    def loss_fn(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    common = {"targets": ["0", "2"], "predict": lambda model, batch: model(batch[0])}
    lora = extract_calibrated(base, tuned, iter(batches), "50%", None, loss_fn, **common)
    assert lora.divergences[-1] < lora.divergences[0]
    drawn = extract_calibrated(base, tuned, batches, "50%", fisher="true", **common)
    assert drawn.parameters == lora.parameters
    halved = {**common, "refit": 0, "fisher": TrueFisher(common["predict"], "gaussian")}
    assert extract_calibrated(base, tuned, batches, 40, **halved).divergences == []


def test_biases_of_layers_without_a_rank_are_folded_too(transformers, peft, tmp_path):
    base = models.bert(transformers)
    tuned, batches = models.updated(base), models.examples("classes")
    lora = extract_calibrated(base, tuned, batches, "uniform:1", tmp_path / "out", max_rank=4)
    without = [name for name, rank in lora.items() if not rank]
    assert without
    assert lora.config["bias"] == "all"
    assert lora.config["modules_to_save"] == ["classifier"]
    found = models.loaded(peft, base, tmp_path / "out")
    module = found.get_submodule(f"base_model.model.{without[0]}")
    assert not torch.equal(module.bias, base.get_submodule(without[0]).bias)
    assert not torch.equal(module.bias, tuned.get_submodule(without[0]).bias)
    plain = extract_calibrated(base, tuned, batches, "uniform:1", fold=False, min_rank=1)
    assert plain.config["bias"] == "lora_only"
    key = f"base_model.model.{without[0]}.base_layer.bias"
    assert torch.equal(plain.tensors[key], tuned.get_submodule(without[0]).bias)
    kept = {"embeddings", "LayerNorm"}
    assert all(any(word in name for word in kept) for name in lora.others)
    assert "bert.embeddings.word_embeddings.weight" in lora.others


def test_peft_writes_biases_into_the_base(transformers, peft, tmp_path):
    base = models.bert(transformers)
    tuned, batches = models.updated(base), models.examples("classes")
    extract_calibrated(base, tuned, batches, "uniform:1", tmp_path / "out")
    found = models.loaded(peft, base, tmp_path / "out")
    with pytest.warns(UserWarning, match="disabling"), found.disable_adapter():
        away = models.divergence(base, found, batches)
    assert away > 1e-3  # the docstring and the guide say so


def test_biases_that_do_not_change_are_not_stored(transformers):
    base = models.bert(transformers)
    tuned = models.updated(base)
    same = {k: t for k, t in base.state_dict().items() if k.endswith("bias") or "classifier" in k}
    tuned.load_state_dict(same, strict=False)
    lora = extract_calibrated(base, tuned, models.examples("classes"), "uniform:1", fold=False)
    assert lora.config["bias"] == "none"
    assert "modules_to_save" not in lora.config
    assert lora.beside == 0
    assert all(".lora_" in key for key in lora.tensors)
    assert "classifier" not in lora


def test_a_head_stays_the_bases_where_that_is_said(transformers):
    base = models.bert(transformers)
    tuned, batches = models.updated(base), models.examples("classes")
    lora = extract_calibrated(
        base, tuned, batches, "uniform:1", modules_to_save=[], exclude="classifier"
    )
    assert "modules_to_save" not in lora.config
    assert {"classifier.weight", "classifier.bias"} <= set(lora.others)
    assert not any("classifier" in key for key in lora.tensors)


def test_peft_finds_what_a_head_s_name_ends(transformers, peft, tmp_path):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=1, n_heads=4, hidden_dim=24, num_labels=3,
        max_position_embeddings=16, initializer_range=0.4,
    )  # fmt: skip
    base = transformers.DistilBertForSequenceClassification(config)
    tuned, batches = models.updated(base), models.examples("classes")
    lora = extract_calibrated(base, tuned, batches, "uniform:2", tmp_path / "out")
    assert lora.config["modules_to_save"] == ["classifier", "pre_classifier"]
    found = models.loaded(peft, base, tmp_path / "out")
    reached = models.divergence(tuned, found, batches)
    assert lora.divergences[-1] == pytest.approx(reached, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_precision_are_refitted_as_they_are_stored(
    transformers, peft, tmp_path, dtype
):
    base = models.bert(transformers)
    tuned, batches = models.updated(base), models.examples("classes")
    lora = extract_calibrated(base, tuned, batches, Bytes(2000), tmp_path / "out", dtype=dtype)
    assert lora.nbytes[1] == 2 * lora.parameters[1] <= 2000
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for key, t in stored.items() if ".lora_" in key} == {dtype}
    assert stored["base_model.model.classifier.weight"].dtype == torch.float32
    found = models.loaded(peft, base, tmp_path / "out")
    reached = models.divergence(tuned, found, batches)
    assert lora.divergences[-1] == pytest.approx(reached, rel=1e-3)


def test_models_of_half_precision(transformers):
    base = models.llama(transformers).to(torch.bfloat16)
    tuned = models.updated(base.float()).to(torch.bfloat16)
    base = base.to(torch.bfloat16)
    lora = extract_calibrated(base, tuned, models.examples("lm"), "energy:60%")
    assert lora.captured >= 0.6
    assert {t.dtype for t in lora.tensors.values()} == {torch.bfloat16}
    assert lora.divergences[-1] <= lora.divergences[0]


def test_the_guides_example(transformers, peft, tmp_path):
    guide = Path(__file__).parents[2] / "docs" / "guide" / "tools.md"
    text = guide.read_text(encoding="utf-8")
    found = re.search(r"<!-- calibrated extraction -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    code = found[1].replace('"adapter"', repr(str(tmp_path / "adapter")))
    base = models.llama(transformers)
    generator = torch.Generator().manual_seed(0)

    def tokenizer(text, return_tensors):
        ids = torch.randint(40, (1, len(text)), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    names = {
        "PeftModel": peft.PeftModel,
        "base": base,
        "tuned": models.updated(base),
        "texts": ["a text", "another text", "and one more"] * 4,
        "tokenizer": tokenizer,
    }
    with quiet():
        exec(compile(code, "tools.md", "exec"), names)
    lora = names["lora"]
    assert lora.parameters[1] == lora.allocation.cost <= lora.allocation.budget
    assert lora.divergences[-1] < lora.divergences[0]
    assert lora.path == tmp_path / "adapter"
