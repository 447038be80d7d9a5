"""The paper's tasks: what is read, what is masked, what is scored."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
pytest.importorskip("datasets", reason="datasets is absent: pip install 'lorambo-alloc[finetune]'")

from benchmarks.finetune.hub import load_splits  # noqa: E402  (needs torch)
from benchmarks.finetune.paper_settings import SETTINGS, nearest_rank  # noqa: E402
from benchmarks.finetune.question_pairs import QuestionPairs  # noqa: E402
from benchmarks.finetune.task import evaluate  # noqa: E402
from benchmarks.finetune.text_to_text import PREFIX, SentimentWords  # noqa: E402
from benchmarks.finetune.wikitext import ArticleWindows  # noqa: E402
from lorambo_adapters.layers import find_layers  # noqa: E402
from tests.finetune import stand_ins  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pairs(tmp_path: Path) -> QuestionPairs:
    model = stand_ins.model(tmp_path / "model", "roberta")
    data = stand_ins.glue(tmp_path / "data", "qnli")
    return QuestionPairs("qnli", str(model), str(data), "qnli", "cpu")


def words(tmp_path: Path) -> SentimentWords:
    model = stand_ins.model(tmp_path / "model", "t5")
    data = stand_ins.glue(tmp_path / "data", "sst2")
    return SentimentWords("sst2", str(model), str(data), "sst2", "cpu")


def articles(tmp_path: Path) -> ArticleWindows:
    model = stand_ins.model(tmp_path / "model", "gpt2")
    data = stand_ins.wikitext(tmp_path / "data")
    return ArticleWindows("articles", str(model), str(data), "wikitext-103-raw-v1", "cpu")


TASKS = [pairs, words, articles]


@pytest.mark.parametrize("make", TASKS)
def test_scores_are_those_of_examples_and_agree_with_the_loss_that_is_trained(tmp_path, make):
    task = make(tmp_path)
    torch.manual_seed(0)
    model: Any = task.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)  # so that a token that should not count would show
    batch = task.batch(task.splits["dev"])
    with torch.no_grad():
        loss = model(**batch).loss
        scores = task.scores(model, batch)
    torch.testing.assert_close(scores.losses.mean(), loss)
    one_by_one = evaluate(task, model, task.splits["dev"], size=1)
    torch.testing.assert_close(one_by_one.losses, scores.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [pairs, words])
def test_dev_is_held_out_of_train_and_test_is_validation(tmp_path, make):
    task = make(tmp_path)
    sizes = {split: len(examples) for split, examples in task.splits.items()}
    assert sizes == {"train": 54, "dev": 6, "test": 12}
    tokens = task.batch(task.splits["test"])["input_ids"]
    decoded = task._tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert "bad" in decoded
    assert len(tokens) == 12


def test_an_answer_is_right_where_greedy_generation_writes_the_word_and_stops(tmp_path):
    task = words(tmp_path)
    model: Any = task.model()
    # What it writes depends on the text: an embedding that tells words apart, and a wide head.
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6)
    examples = list(task.splits["test"])
    batch = task.batch(examples)
    written = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=len(task.answers[0]),
        do_sample=False,
    )[:, 1:]
    # Some examples ask for what the model does write, and some for that but for the last token.
    for row in range(len(examples)):
        if row % 3:
            batch["labels"][row, : written.shape[1]] = written[row]
        if row % 3 == 2:
            batch["labels"][row, written.shape[1] - 1] += 1
    expected = [
        [t for t in row if t != -100] == list(out[: sum(t != -100 for t in row)])
        for row, out in zip(batch["labels"].tolist(), written.tolist(), strict=True)
    ]
    right = task.scores(model, batch).right
    assert right is not None
    assert right.tolist() == expected
    assert True in expected
    assert False in expected


def test_the_words_and_the_prefix_are_those_of_t5(tmp_path):
    task = words(tmp_path)
    first = task.splits["test"][0]
    decoded = task._tokenizer.decode(first[0], skip_special_tokens=True)
    assert decoded.startswith(PREFIX)
    labels = task.batch([first])["labels"][0]
    assert task._tokenizer.decode(labels[labels >= 0], skip_special_tokens=True) == "negative"
    assert labels[labels >= 0][-1] == task._tokenizer.eos_token_id


def test_windows_hold_the_text_in_its_order(tmp_path):
    import datasets

    task = articles(tmp_path)
    windows = task.splits["test"]
    rows = datasets.load_dataset(str(tmp_path / "data"))["test"]["text"]
    from benchmarks.finetune.hub import tokenizer_of

    whole = tokenizer_of(str(tmp_path / "model")).decode(list(windows.flatten()))
    assert windows.shape[1] == 16
    assert "".join(rows).startswith(whole)


def test_budgets_of_the_real_models():
    import transformers

    t5: dict[str, Any] = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        models: dict[str, Any] = {
            "roberta-base/qnli": transformers.RobertaForSequenceClassification(
                transformers.RobertaConfig()
            ),
            "t5-base/sst2": transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
            "wikitext103-12M": transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        }
    models["wikitext103-24M"] = models["wikitext103-12M"]
    found = {}
    for name, model in models.items():
        setting = SETTINGS[name]
        targets: Any = setting.task
        layers = find_layers(model, targets.targets)
        costs = {layer.name: sum(layer.shape) for layer in layers}
        rank = setting.rank or nearest_rank(costs, setting.parameters or 0)
        found[name] = (len(layers), rank, rank * sum(costs.values()))
    assert found == {
        "roberta-base/qnli": (72, 8, 1_327_104),
        "t5-base/sst2": (192, 8, 3_244_032),
        "wikitext103-12M": (48, 81, 11_943_936),
        "wikitext103-24M": (48, 163, 24_035_328),
    }


@pytest.mark.parametrize(
    ("splits", "columns", "message"),
    [
        (("train", "dev"), ("label",), r"expected a split 'dev', got .*validation"),
        (("train",), ("premise",), r"train: expected a column 'premise', got .*question"),
    ],
)
def test_data_of_another_schema_are_refused(tmp_path, splits, columns, message):
    data = stand_ins.glue(tmp_path / "data", "qnli")
    with pytest.raises(ValueError, match=message):
        load_splits(str(data), "qnli", splits, columns)


def test_hidden_labels_are_refused(tmp_path):
    task = pairs(tmp_path)
    hidden = (tmp_path / "data" / "qnli" / "test.jsonl").read_bytes()
    (tmp_path / "data" / "qnli" / "validation.jsonl").write_bytes(hidden)
    with pytest.raises(ValueError, match="validation: expected labels 0 and 1, got -1"):
        _ = task.splits


def test_text_that_fills_no_window_is_refused(tmp_path):
    model = stand_ins.model(tmp_path / "model", "gpt2")
    data = stand_ins.wikitext(tmp_path / "data", held=0)
    task = ArticleWindows("articles", str(model), str(data), "none", "cpu")
    with pytest.raises(ValueError, match="validation: expected at least one window of 16 tokens"):
        _ = task.splits


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"lorambo-alloc\[finetune\]"):
        load_splits("nyu-mll/glue", "qnli", ("train",), ("label",))
