"""Extraction by examples: which models and labels it takes, and what it says of others."""

from copy import deepcopy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.ranks.calibrated import extract_calibrated  # noqa: E402
from lorambo_adapters.ranks.predictions import (  # noqa: E402
    check_alike,
    log_probabilities,
    own_predictions,
)
from lorambo_adapters.spectra.fisher import labelled_logits  # noqa: E402
from tests.adapters import calibrated_models as models  # noqa: E402
from tests.adapters.conftest import quiet  # noqa: E402

# Few and short examples, so that the tests are quick.
pytestmark = pytest.mark.filterwarnings("ignore:.*singular values are refitted:UserWarning")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_classifiers_of_half_precision(transformers, dtype):
    base = models.bert(transformers)
    tuned, batches = models.updated(base).to(dtype), models.examples("classes")
    base = base.to(dtype).eval()
    # The model rounds its loss to its type, further than 1e-4 from the logits' in float32.
    assert base(**batches[0]).loss.dtype == dtype
    lora = extract_calibrated(base, tuned, batches, "uniform:1")
    assert lora.divergences[-1] < lora.divergences[0]
    assert {tensor.dtype for tensor in lora.tensors.values()} == {dtype}


def test_each_token_has_its_own_label_in_half_precision_too(transformers):
    settings = {**models.BERT, "num_labels": 3, "max_position_embeddings": 16}
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(transformers.BertConfig(**settings)).eval()
    model = model.to(torch.bfloat16)
    ids = torch.randint(1, 40, (8, 7))
    batch = {"input_ids": ids, "labels": ids % 3}
    # Weights are small and losses near log 3, so that the two ways to compare are near too.
    counted = [labelled_logits(model, batch)[2].shape]
    with torch.no_grad():
        counted.append(labelled_logits(model, batch)[2].shape)
    assert counted == [(8, 7), (8, 7)]
    language = models.llama(transformers).eval()
    language.lm_head.weight.data.zero_()
    with torch.no_grad():
        assert labelled_logits(language, {"input_ids": ids, "labels": ids})[2].shape == (8, 6)


def test_drawn_labels_do_not_need_the_models_loss(transformers):
    class Smoothed(transformers.BertForSequenceClassification):
        """Its loss is not the mean cross entropy of the labels."""

        def forward(self, **batch):
            found = super().forward(**batch)
            found.loss = None if found.loss is None else 2 * found.loss
            return found

    torch.manual_seed(0)
    base = Smoothed(models.bert(transformers).config)
    tuned, batches = models.updated(base), models.examples("classes")
    with pytest.raises(ValueError, match="got another loss; pass a loss_fn"):
        extract_calibrated(base, tuned, batches, "uniform:1")
    lora = extract_calibrated(base, tuned, batches, "uniform:1", fisher="true")
    assert lora.predictions == 40


def test_texts_of_one_token(transformers):
    base = models.llama(transformers)
    tuned, batches = models.updated(base), models.examples("lm")
    one = {"input_ids": torch.tensor([[3]]), "labels": torch.tensor([[3]])}
    with pytest.raises(ValueError, match=r"a label after the first token.*texts of one token"):
        extract_calibrated(base, tuned, [*batches, one], "uniform:1")
    del one["labels"]
    unlabelled = models.examples("lm", labelled=False)
    lora = extract_calibrated(base, tuned, [*unlabelled, one], "uniform:1", fisher="true")
    assert lora.predictions == 1 + sum(int(b["attention_mask"].sum()) for b in unlabelled)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_predictions_that_are_no_choice_are_refused(transformers, kind):
    base = models.bert(transformers, problem_type=kind)
    tuned, batches = models.updated(base), models.examples("classes")
    several = [{**b, "labels": torch.eye(3)[b["labels"]]} for b in batches]
    for fisher in ("empirical", "true"):
        with pytest.raises(ValueError, match=f"one of several classes, got problem_type '{kind}'"):
            extract_calibrated(base, tuned, several, "uniform:1", fisher=fisher)
    base.config.problem_type = tuned.config.problem_type = None
    with pytest.raises(ValueError, match=r"got labels of torch.float32; pass refit=0"):
        extract_calibrated(base, tuned, several, "uniform:1")


def test_labels_that_are_yes_or_no_by_the_ways_that_the_message_names(transformers):
    base = models.bert(transformers, problem_type="multi_label_classification")
    tuned = models.updated(base)
    batches = [{**b, "labels": torch.eye(3)[b["labels"]]} for b in models.examples("classes")]

    def logits(model, batch):
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits

    def loss_fn(model, batch):
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits(model, batch), batch["labels"], reduction="none"
        )

    def predict(model, batch):
        found = logits(model, batch)
        return torch.stack([found, 0 * found], -1)

    plain = extract_calibrated(base, tuned, batches, "uniform:1", None, loss_fn, refit=0)
    assert plain.divergences == []
    lora = extract_calibrated(base, tuned, batches, "uniform:1", None, loss_fn, predict=predict)
    assert lora.predictions == 120
    assert lora.divergences[-1] < lora.divergences[0]


def test_other_classes_are_refused_with_advice_that_works(transformers, peft, tmp_path):
    base, other = (models.bert(transformers, num_labels=n) for n in (2, 3))
    tuned, batches = models.updated(other), models.examples("classes")
    with pytest.raises(ValueError, match=r"same shapes.*exclude='classifier' and refit=0"):
        extract_calibrated(base, tuned, batches, "uniform:1")
    options: dict[str, Any] = {"modules_to_save": []}
    with pytest.raises(ValueError, match=r"layer 'classifier'.*leave it out with exclude"):
        extract_calibrated(base, tuned, batches, "uniform:1", **options)
    options["exclude"] = "classifier"
    with pytest.raises(ValueError, match=r"got 2 of the base and 3 of the tuned model.*refit=0"):
        extract_calibrated(base, tuned, batches, "uniform:1", **options)
    options["refit"] = 0
    two = [{**b, "labels": b["labels"] % 2} for b in batches]
    extract_calibrated(base, tuned, two, "uniform:1", tmp_path / "out", **options)
    models.loaded(peft, base, tmp_path / "out")
    alike = models.bert(transformers, num_labels=3)
    assert extract_calibrated(alike, tuned, batches, "uniform:1").divergences


def test_another_vocabulary_is_refused_with_advice_that_works(transformers):
    base = models.llama(transformers)
    tuned, batches = models.updated(base), models.examples("lm")
    with quiet():
        tuned.resize_token_embeddings(42, mean_resizing=False)
    with pytest.raises(ValueError, match="got 40 of the base and 42 of the tuned model"):
        extract_calibrated(base, tuned, batches, "uniform:1")

    def both(model, batch):
        logits, counted = own_predictions(None)(model, batch)
        return logits[..., :40], counted

    assert extract_calibrated(base, tuned, batches, "uniform:1", predict=both).divergences
    with quiet():
        base.resize_token_embeddings(42, mean_resizing=False)
    whole = ["embed_tokens", "lm_head"]
    lora = extract_calibrated(base, tuned, batches, "uniform:1", modules_to_save=whole)
    assert lora.config["modules_to_save"] == ["lm_head", "model.embed_tokens"]


def test_models_that_predict_for_other_rows_are_refused(transformers):
    model = models.bert(transformers).eval()
    other = deepcopy(model)
    with pytest.raises(ValueError, match="got 8 of the base and 7 of the tuned model in the first"):
        check_alike(
            model, other, models.examples("classes")[0],
            lambda m, b: m(**b).logits[: 7 if m is other else None],
        )  # fmt: skip


def test_an_encoders_mask_is_not_the_decoders(transformers):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = models.examples("lm", labelled=False)[0]
    assert not batch["attention_mask"].all()
    batch["decoder_input_ids"] = batch["input_ids"]
    own = own_predictions(None)
    assert len(log_probabilities(own, model, batch)) == 56
    batch["decoder_attention_mask"] = torch.ones_like(batch["attention_mask"]).tril()
    wanted = int(batch["decoder_attention_mask"].sum())
    assert len(log_probabilities(own, model, batch)) == wanted < 56


def test_prompts_are_refused(transformers, peft):
    base = models.llama(transformers)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with quiet():
        tuned = peft.get_peft_model(models.updated(base), config)
    with pytest.raises(
        ValueError, match=r"tuned: expected a model without prompts.* got PROMPT_TUNING"
    ):
        extract_calibrated(base, tuned, models.examples("lm"), "uniform:1")


class Shared(torch.nn.Module):
    """Two of its layers are one, or have one bias."""

    def __init__(self, module=False):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(6, n) for n in (6, 6, 3))
        if module:
            self.b = self.a
        else:
            self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("module", [True, False])
def test_what_has_several_names_is_refused(module):
    torch.manual_seed(0)
    base = Shared(module)
    tuned, batches = models.updated(base, 1.0), [{"x": torch.randn(32, 6)}]
    options = {"predict": lambda m, b: m(b["x"]), "fisher": "true", "targets": ["a", "b", "c"]}
    what = "module of one name, got a, b" if module else "bias of its own, got one.*a.bias, b.bias"
    with pytest.raises(ValueError, match=f"layer 'a': expected a {what}.*with exclude"):
        extract_calibrated(base, tuned, batches, 12, **options)
    lora = extract_calibrated(base, tuned, batches, 9, **options, exclude=["a", "b"])
    assert dict(lora) == {"c": 1}
