"""Curvature where weights are shared over tokens: definitions exact, the Fisher approximate."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is absent: pip install transformers"
)

from lorambo_adapters.layers import find_layers  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.curvature import curvature_factors  # noqa: E402
from lorambo_adapters.spectra.directions import coupled_directions  # noqa: E402
from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

EXPECTATION = TrueFisher(draws="all")


def llama(scale=0.3):
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        initializer_range=scale, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def tokens():
    torch.manual_seed(1)
    ids = torch.randint(1, 7, (4, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def kron(factors):
    right, left = factors.powers(1.0, damped=False)
    right, left = (torch.diag(m) if m.ndim == 1 else m for m in (right, left))
    return torch.kron(left, right)


def exact_fishers(model, batch):
    """The Fisher of every layer's weight, over the 16 tokens that have a next one."""
    outputs = model(**batch).logits[:, :-1].flatten(0, 1)
    p = torch.softmax(outputs.detach(), -1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    weights = {layer.name: layer.module.weight for layer in find_layers(model)}
    rows = [
        torch.autograd.grad(value, list(weights.values()), retain_graph=True)
        for value in outputs.flatten()
    ]
    fishers = {}
    for i, name in enumerate(weights):
        jacobian = torch.stack([row[i].flatten() for row in rows]).view(*outputs.shape, -1)
        fishers[name] = torch.einsum("ncp,nce,neq->pq", jacobian, hessian, jacobian) / 16
    return fishers


@pytest.mark.parametrize(
    ("scale", "kind", "least", "most"),
    [
        # Relative Frobenius errors as measured, over the 14 layers, with some room.
        (0.02, "kfac", 0.1, 0.9),
        (0.02, "ekfac", 0.1, 0.9),
        (0.02, "diagonal", 0.7, 1.0),
        (0.3, "kfac", 0.3, 10.0),
        (0.3, "ekfac", 0.3, 1.0),
        (0.3, "diagonal", 0.7, 1.0),
    ],
)
def test_the_error_against_the_exact_fisher_of_a_small_llama(scale, kind, least, most):
    model, batch = llama(scale), tokens()
    found = curvature_factors(model, [batch], kind=kind, fisher=EXPECTATION, damping=0.0)
    assert found.terms == 16
    exact = exact_fishers(model, batch)
    assert set(found) == set(exact)
    for name, fisher in exact.items():
        ours = kron(found[name])
        assert least < float((ours - fisher).norm() / fisher.norm()) < most, name
        if kind != "kfac" and name.startswith("model.layers.1.mlp"):
            # Behind the last attention a token affects its own logits only: products of different
            # tokens vanish, and a wrong normalisation would show. (Norms are in float32.)
            assert float(ours.trace()) == pytest.approx(float(fisher.trace()), rel=1e-6)


def test_the_empirical_fisher_counts_labelled_tokens_whatever_the_batches():
    model, batch = llama(), tokens()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :3] = -100
    found = curvature_factors(model, [batch], damping=0.0)
    assert found.terms == 14  # the first token of each sequence is never predicted

    def each(model, batch):
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses[labels != -100]

    parts = [{name: part[i : i + 2] for name, part in batch.items()} for i in (0, 2)]
    split = curvature_factors(model, parts, each, damping=0.0)
    assert split.terms == 14
    ours: Any = found.matrices()
    parted: Any = split.matrices()
    for name, pair in ours.items():
        for mine, theirs in zip(pair, parted[name], strict=True):
            # transformers computes the loss in float32.
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_labels_of_a_head_of_zeros_are_recognised_by_the_gradient(fisher):
    # All cross entropies are log V then, shifted or not.
    model, batch = llama(), tokens()
    torch.nn.init.zeros_(model.lm_head.weight)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, -1] = -100
    run: Any = curvature_factors
    assert run(model, [batch], fisher=fisher, targets=["lm_head"]).terms == 15
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    masked = transformers.BertForMaskedLM(config).eval()
    torch.nn.init.zeros_(masked.get_output_embeddings().weight)
    torch.nn.init.zeros_(masked.get_output_embeddings().bias)
    found = run(masked, [batch], fisher=fisher, targets=["cls.predictions.transform.dense"])
    assert found.terms == 19


def test_padding_counts_nowhere():
    model, batch = llama(), tokens()
    exact = curvature_factors(model, [batch], damping=0.0).matrices()
    padding = torch.zeros(4, 2, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([batch["input_ids"], padding], 1),
        "attention_mask": torch.cat([batch["attention_mask"], padding], 1),
        "labels": torch.cat([batch["labels"], padding - 100], 1),
    }
    found = curvature_factors(model, [padded], damping=0.0).matrices()
    for name, pair in found.items():
        for mine, theirs in zip(pair, exact[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_experts_have_factors_but_no_samples():
    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).double().eval()
    set_experts = getattr(model, "set_experts_implementation", None)
    if set_experts is not None:
        set_experts("eager")  # the grouped product knows no float64
    ids = torch.tensor([[3, 7]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1, 0]])}
    names = [layer.name for layer in find_layers(model) if layer.name.split(".")[-2] == "down_proj"]
    if not names:
        pytest.skip("without peft, experts are found by target_parameters alone")
    with pytest.warns(UserWarning, match="no gradient reached 2 layers"):  # of the third expert
        found = curvature_factors(model, [batch], damping=0.0)
    assert found.terms == 1
    model(**batch).loss.backward()
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    reached = 0
    for i, name in enumerate(names):
        # One token and one term: the Fisher is the gradient's outer product.
        gradient = experts.down_proj.grad[i].flatten()
        if gradient.any():
            exact = torch.outer(gradient, gradient)
            assert float((kron(found[name]) - exact).norm() / exact.norm()) < 1e-10
            reached += 1
    assert reached == 2
    with pytest.raises(ValueError, match="got an expert, of whose tokens the samples"):
        coupled_directions(model, [batch])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, batch = llama(), tokens()
    plain = curvature_factors(model, [batch], fisher=TrueFisher(draws=3), damping=0.0).matrices()
    turn_on = getattr(model, "activation_checkpointing_enable", None)
    (turn_on or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    model.train()  # Llama has no dropout
    found = curvature_factors(model, [batch], fisher=TrueFisher(draws=3), damping=0.0).matrices()
    for name, pair in found.items():
        for mine, theirs in zip(pair, plain[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_masked_and_sequence_labels_are_recognised_by_the_value_of_the_loss():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(20, (4, 5))
    labels = torch.where(torch.rand(4, 5) < 0.5, ids, -100)
    masked = transformers.BertForMaskedLM(config).eval()
    batch = {"input_ids": ids, "labels": labels}
    found = curvature_factors(masked, [batch], fisher="true", targets=["query"])
    assert found.terms == int((labels != -100).sum())
    classifier = transformers.BertForSequenceClassification(config).eval()
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}
    found = curvature_factors(classifier, [batch], fisher=EXPECTATION, targets=["query"])
    assert found.terms == 4
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    with pytest.raises(ValueError, match="at least one label that is not -100"):
        curvature_factors(masked, [batch], targets=["query"])
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}
    config.num_labels, config.problem_type = 1, "regression"
    regression = transformers.BertForSequenceClassification(config).eval()
    batch["labels"] = batch["labels"].float()
    with pytest.raises(ValueError, match="to be the mean cross entropy"):
        curvature_factors(regression, [batch], targets=["query"])
    with pytest.raises(ValueError, match="expected a mapping with labels"):
        curvature_factors(classifier, [ids], targets=["query"])
