"""Cuts of a fine-tuned difference: norms, ranks, folded biases, refitted singular values."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from benchmarks.finetune import extraction
from benchmarks.finetune.cuts import NORMS, Factored, best_ranks
from benchmarks.finetune.fine_tunes import FineTune, base_state
from benchmarks.finetune.moments import Moments, layer_moments, predicted
from benchmarks.finetune.refit import refitted
from benchmarks.finetune.rules import RULES
from benchmarks.finetune.subject import Subject
from benchmarks.finetune.training import losses_of


class Tiny(torch.nn.Module):
    """Embedding, two layers, mean over tokens, a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 6)
        self.first = torch.nn.Linear(6, 8, bias=bias)
        self.second = torch.nn.Linear(8, 5, bias=bias)
        self.norm = torch.nn.LayerNorm(5)
        self.head = torch.nn.Linear(5, 3)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        hidden = self.second(torch.tanh(self.first(self.embedding(input_ids))))
        mask = attention_mask[..., None].float()
        return SimpleNamespace(logits=self.head((self.norm(hidden) * mask).sum(1) / mask.sum(1)))


class TinyTask:
    """Random token lists with random labels."""

    name, targets, head, peft_type = "minilm", "first|second", ("head",), "SEQ_CLS"

    def __init__(self, bias: bool = True) -> None:
        self.bias = bias
        draw = np.random.default_rng(0)
        examples = [
            (draw.integers(1, 20, draw.integers(2, 7)).tolist(), int(draw.integers(3)))
            for _ in range(80)
        ]
        self.splits = {"train": examples[:48], "dev": examples[48:64], "test": examples[64:]}

    def model(self) -> Any:
        return Tiny(self.bias)

    def batch(self, examples: Any) -> dict[str, Any]:
        longest = max(len(tokens) for tokens, _ in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        for row, (tokens, _) in enumerate(examples):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        labels = torch.tensor([label for _, label in examples])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def tuned(task: TinyTask, size: float = 0.8) -> FineTune:
    """The base with a random change of all tensors."""
    draw = torch.Generator().manual_seed(3)
    state = base_state(task, 0)  # pyright: ignore[reportArgumentType]
    changed = {n: t + size * torch.randn(t.shape, generator=draw) for n, t in state.items()}
    return FineTune(changed, {"seed": 0})


def subject(bias: bool = True, size: float = 0.8, others: str = "tuned") -> Subject:
    task: Any = TinyTask(bias)
    return Subject(task, tuned(task, size), others=others)


def moments_of(shape: tuple[int, int], seed: int = 0) -> Moments:
    d, k = shape
    draw = torch.Generator().manual_seed(seed)

    def moment(n: int) -> torch.Tensor:
        x = torch.randn(3 * n, n, generator=draw, dtype=torch.float64) * torch.arange(1, n + 1)
        return x.T @ x / (3 * n)

    mean = torch.randn(k, generator=draw, dtype=torch.float64)
    return Moments(moment(k), mean, moment(d), moment(k), moment(k), moment(d))


def test_moments_are_those_of_sample_gradients() -> None:
    model = Tiny()
    task = TinyTask()
    layers = subject().layers
    layers = [type(x)(**{**vars(x), "module": model.get_submodule(x.name)}) for x in layers]
    batch = task.batch(task.splits["train"][:12])
    found = layer_moments(model, layers, [batch], seed=5)["first"]
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    labels = torch.multinomial(
        logits.detach().softmax(1), 1, generator=torch.Generator().manual_seed(5)
    )[:, 0]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weight = model.first.weight
    gradients = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in losses]
    right = torch.stack([g.T @ g for g in gradients]).mean(0)
    left = torch.stack([g @ g.T for g in gradients]).sum(0)
    left = left / left.trace()
    assert found.sample_inputs is not None
    assert found.sample_gradients is not None
    assert torch.allclose(found.sample_inputs, right.double(), rtol=1e-4, atol=1e-8)
    assert torch.allclose(found.sample_gradients, left.double(), rtol=1e-4, atol=1e-7)
    rows = model.embedding(batch["input_ids"])[batch["attention_mask"].bool()].double()
    assert torch.allclose(found.inputs, rows.T @ rows / len(rows), atol=1e-6)
    assert torch.allclose(found.mean, rows.mean(0), atol=1e-6)
    assert torch.allclose(found.centred, torch.cov(rows.T, correction=0), atol=1e-6)


def test_the_empirical_fisher_takes_the_given_labels() -> None:
    found = subject()
    batch = found.task.batch(found.task.splits["train"][:12])
    moments = layer_moments(found.model, found.layers, [batch], every=False, fisher="empirical")
    drawn = layer_moments(found.model, found.layers, [batch], every=False)
    module = found.model.second
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda *call: outputs.append(call[2]))
    module.weight.requires_grad_(True)
    logits = found.model(batch["input_ids"], batch["attention_mask"]).logits
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    slopes = torch.autograd.grad(loss, outputs[0])[0].flatten(0, 1).double()
    assert torch.allclose(moments["second"].gradients, slopes.T @ slopes / 12, rtol=1e-4)
    assert torch.allclose(moments["second"].inputs, drawn["second"].inputs)
    assert not torch.allclose(moments["second"].gradients, drawn["second"].gradients, rtol=1e-2)


def test_a_language_models_labels_are_the_next_tokens() -> None:
    logits, labels = torch.randn(2, 4, 9), torch.arange(8).view(2, 4)
    left, right = predicted(logits, labels)
    assert left.shape == (2, 3, 9)
    assert right.tolist() == [[1, 2, 3], [5, 6, 7]]
    left, right = predicted(logits[:, 0], labels[:, 0])
    assert left.shape == (2, 9)
    assert right.tolist() == [0, 4]


def test_another_fisher_is_refused() -> None:
    found = subject()
    with pytest.raises(ValueError, match="fisher: expected one of true, empirical, got 'mine'"):
        layer_moments(found.model, found.layers, [], fisher="mine")


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_a_cut_is_the_nearest_in_its_norm(name: str, shape: tuple[int, int]) -> None:
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    moments, norm = moments_of(shape), NORMS[name]
    factored = Factored(difference, norm, moments)
    roots: list[torch.Tensor] = []
    for moment, size in ((norm.left, shape[0]), (norm.right, shape[1])):
        root = torch.eye(size, dtype=torch.float64)
        if moment is not None:
            matrix = getattr(moments, moment)
            matrix = matrix + norm.damping * matrix.trace() / size * torch.eye(size)
            values, vectors = torch.linalg.eigh(matrix)
            root = (vectors * values.sqrt()) @ vectors.T
        roots.append(root)
    values = torch.linalg.svdvals(roots[0] @ difference @ roots[1])
    assert np.allclose(factored.values, values.numpy())
    for rank in range(5):
        cut = factored.cut(rank)
        assert torch.linalg.matrix_rank(cut) == rank
        lost = (roots[0] @ (difference - cut) @ roots[1]).norm()
        assert float(lost) == pytest.approx(float(values[rank:].norm()), abs=1e-6)


def test_a_norm_needs_its_moments() -> None:
    with pytest.raises(ValueError, match="moments: expected some for the moment 'gradients'"):
        Factored(torch.ones(2, 2), NORMS["kfac"])


def test_the_best_ranks_spend_all_parameters() -> None:
    draw = torch.Generator().manual_seed(2)
    shapes = {"a": (4, 6), "b": (6, 6), "c": (12, 6)}
    factored = {
        n: Factored(torch.randn(s, generator=draw), NORMS["plain"]) for n, s in shapes.items()
    }
    costs = {n: sum(s) for n, s in shapes.items()}
    ranks = best_ranks(factored, costs, 2 * sum(costs.values()))
    assert sum(costs[n] * r for n, r in ranks.items()) == 2 * sum(costs.values())

    def kept(ranks: dict[str, int]) -> float:
        return sum(float((factored[n].values[:r] ** 2).sum()) for n, r in ranks.items())

    assert kept(ranks) >= kept(dict.fromkeys(shapes, 2))


def test_the_tuned_model_is_its_own_reference() -> None:
    found = subject()
    found.between(1.0)
    assert found.measure().means["kl"] == pytest.approx(0, abs=1e-6)
    found.cut({})
    assert found.measure().divergences.min() > 0


def test_other_tensors_are_the_bases_unless_the_tuned_ones_are_asked_for() -> None:
    task: Any = TinyTask()
    after = tuned(task).state
    before = base_state(task, 0)
    of_base = {"embedding.weight", "norm.weight", "norm.bias"}
    for others in ("base", "tuned"):
        found = subject(others=others)
        assert found.beside == 5 * 3 + 3 + 8 + 5
        found.between(1.0)
        for name, tensor in found.model.state_dict().items():
            wanted = before if others == "base" and name in of_base else after
            assert torch.allclose(tensor, wanted[name], atol=1e-6), name


def test_the_reference_is_the_whole_tuned_model_whatever_the_others() -> None:
    base, tuned_others = subject(others="base"), subject(others="tuned")
    assert np.allclose(base.measure_tuned().losses, tuned_others.measure_tuned().losses)
    batches = base.calibration(24, 0)
    for ours, theirs in zip(
        base.tuned_predictions(batches), tuned_others.tuned_predictions(batches), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-6)
    tuned_others.between(1.0)
    base.between(1.0)
    assert tuned_others.measure().divergences.max() < 1e-5
    assert base.measure().divergences.max() > 1e-2


def test_other_others_are_refused() -> None:
    with pytest.raises(ValueError, match="others: expected one of base, tuned, got 'mine'"):
        subject(others="mine")


def test_losses_are_in_the_order_of_the_examples() -> None:
    found = subject()
    found.cut({})
    measured = found.measure()
    for index in (0, 7, 15):
        batch = found.task.batch([found.examples[index]])
        logits = found.model(batch["input_ids"], batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        assert measured.losses[index] == pytest.approx(float(loss), rel=1e-4)


def test_folding_keeps_the_mean_output_of_a_layer() -> None:
    found = subject()
    batches = found.calibration(48, 0)
    found.between(1.0)
    first = found.layers[0]
    means = {n: m.mean for n, m in layer_moments(found.model, found.layers, batches).items()}

    def mean_output() -> torch.Tensor:
        rows = [found.model.embedding(b["input_ids"])[b["attention_mask"].bool()] for b in batches]
        return first.module(torch.cat(rows)).mean(0)

    wanted = mean_output()
    found.cut({}, means)
    assert torch.allclose(mean_output(), wanted, atol=1e-5)
    found.cut({})
    assert not torch.allclose(mean_output(), wanted, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_refitting_finds_the_scale_again(bias: bool, fold: bool) -> None:
    found = subject(bias, size=0.3)
    batches = found.calibration(48, 0)
    means = {n: m.mean for n, m in layer_moments(found.model, found.layers, batches).items()}
    given = means if fold else None
    factors = {}
    for name, difference in found.differences.items():
        u, v = Factored(difference, NORMS["plain"]).factors(min(difference.shape))
        factors[name] = (0.5 * u, v)
    found.cut({name: u @ v.T for name, (u, v) in factors.items()}, given)
    before = found.measure().means["kl"]
    refitted(found, factors, batches, means=given, steps=6, draws=8, damping=0.1)
    after = found.measure().means["kl"]
    assert before is not None
    assert after is not None
    assert after < 0.2 * before


def test_refitting_leaves_the_tuned_model_alone() -> None:
    found = subject()
    factors = {
        n: Factored(d, NORMS["plain"]).factors(min(d.shape)) for n, d in found.differences.items()
    }
    again = refitted(found, factors, found.calibration(24, 0))
    for name, (u, v) in factors.items():
        assert torch.allclose(again[name][0] @ again[name][1].T, u @ v.T, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_refitting_on_few_samples_never_moves_further_from_the_tuned_model(seed: int) -> None:
    found = subject(size=1.0)
    batches = found.calibration(3, seed)
    targets = found.tuned_predictions(batches)
    factors = {n: Factored(d, NORMS["plain"]).factors(1) for n, d in found.differences.items()}

    def distance() -> float:
        inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        now = [found.model(**each).logits.log_softmax(-1) for each in inputs]
        parts = [(t.exp() * (t - n)).sum() for t, n in zip(targets, now, strict=True)]
        return float(torch.stack(parts).sum())

    with torch.no_grad():
        found.cut({name: u @ v.T for name, (u, v) in factors.items()})
        before = distance()
        # Next to no damping and one draw: whole steps would be wild.
        refitted(found, factors, batches, draws=1, damping=1e-6, seed=seed)
        assert distance() <= before * (1 + 1e-5)


def test_rows_of_another_run_are_kept(tmp_path: Any) -> None:
    path = tmp_path / "extraction.json"
    row = {"model": "minilm", "split": "dev", "others": "base", "loss": 1.0, "kl": 0.0}
    ours, theirs = extraction.Results(path), extraction.Results(path)
    ours.add({**row, "label": "a"})
    theirs.add({**row, "label": "b"})
    ours.add({**row, "label": "c"})
    assert [each["label"] for each in json.loads(path.read_text())["rows"]] == ["a", "b", "c"]


def test_runs_are_resumed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TinyTask()
    made = []

    def best(*_: Any) -> FineTune:
        made.append(1)
        return tuned(task)

    monkeypatch.setattr(extraction, "local_task", lambda _: task)
    monkeypatch.setattr(extraction, "best_fine_tune", best)
    path = tmp_path / "extraction.json"
    rules = [(rule, (1,)) for rule, _ in RULES]
    extraction.run(extraction.Results(path), "minilm", "full", 0, "dev", rules[:3], None)
    extraction.run(extraction.Results(path), "minilm", "full", 0, "dev", rules, None)
    extraction.run(extraction.Results(path), "minilm", "full", 0, "dev", rules, None)
    assert len(made) == 2
    extraction.run(extraction.Results(path), "minilm", "full", 0, "dev", rules[:1], None, "tuned")
    extraction.run(extraction.Results(path), "minilm", "full", 0, "dev", rules[:1], None, "tuned")
    assert len(made) == 3
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(rules) + 3 + 1 + 2
    assert len({(row["label"], row["others"]) for row in rows}) == len(rows)
    assert [row["label"] for row in rows[:3]] == ["tuned", "uncut", "rank 0"]
    cuts = [row for row in rows if "budget" in row]
    assert {row["budget"] for row in cuts} == {6 + 8 + 8 + 5}
    difference = losses_of(cuts[0]) - losses_of(cuts[1])
    assert difference.mean() == pytest.approx(cuts[0]["loss"] - cuts[1]["loss"], abs=1e-5)
    assert "| minilm full " in extraction.table(rows)
