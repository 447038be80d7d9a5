"""The example that trains one model with ranks found in four ways, on a tiny model."""

import json
from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
transformers = pytest.importorskip("transformers", reason="transformers is absent")

from examples import four_arms  # noqa: E402  (needs torch)
from lorambo_alloc import RankHistory  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A BERT of two layers and its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{a}" for a in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    vocabulary = {word: i for i, word in enumerate(words)}
    settings = {"vocab": vocabulary} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    transformers.BertTokenizerFast(
        vocab_file=str(folder / "vocab.txt"), **settings
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_four_arms_of_equal_parameters(tiny, tmp_path, capsys):
    options = "--steps 9 --period 2 --every 5 --batch 8 --length 24 --budget-rank 2".split()
    results = four_arms.main(["--all", "--model", str(tiny), "--out", str(tmp_path), *options])
    shown = capsys.readouterr().out
    assert [result["arm"] for result in results] == ["uniform", "start", "online", "both"]
    budget = results[0]["parameters"]
    assert {result["budget"] for result in results} == {budget}
    by_arm = {result["arm"]: result for result in results}
    assert set(by_arm["uniform"]["ranks"].values()) == {2}
    assert len({json.dumps(result["ranks"]) for result in results}) == 4
    for arm, result in by_arm.items():
        assert result["parameters"] <= budget
        assert [entry["step"] for entry in result["held_out"]] == [0, 5, 9]
        assert result["held_out"][0] == by_arm["uniform"]["held_out"][0]  # B = 0
        assert f"{result['held_out'][-1]['loss']:.4f}" in shown
        history = RankHistory.load(tmp_path / f"{arm}.json")
        assert dict(zip(history.names, history.ranks[-1].tolist(), strict=True)) == result["ranks"]
        moved = sum(event["event"] == "moved" for event in history.events)
        assert (moved > 0) == (arm in ("online", "both"))
        assert not any(event["event"].startswith("failed") for event in history.events)
    assert json.loads((tmp_path / "results.json").read_text())["arms"] == results
    if find_spec("matplotlib"):
        assert all((tmp_path / f"{arm}.png").read_bytes()[:4] == b"\x89PNG" for arm in by_arm)


def test_one_arm_a_run(tiny, tmp_path):
    options = "--steps 3 --period 1 --batch 8 --length 24".split()
    for flags, arm in (([], "uniform"), (["--start"], "start"), (["--online"], "online")):
        (result,) = four_arms.main([*flags, "--model", str(tiny), "--out", str(tmp_path), *options])
        assert result["arm"] == arm
        assert (tmp_path / f"{arm}.json").exists()


def test_several_seeds_in_one_file(tiny, tmp_path, capsys):
    options = "--steps 2 --period 1 --batch 8 --length 24 --seed 3 5 --start".split()
    file = tmp_path / "all.json"
    (tmp_path / "seed-5").mkdir()
    (tmp_path / "seed-5" / "results.json").write_text("of an earlier run")
    folders = ["--model", str(tiny), "--out", str(tmp_path), "--output", str(file)]
    results = four_arms.main([*options, *folders])
    content = json.loads(file.read_text())
    settings, rows = content["settings"], content["rows"]
    assert (settings["seed"], settings["steps"], settings["model"]) == ([3, 5], 2, tiny.name)
    assert settings["held_out_paragraphs"] == len(four_arms.documentation().held_out)
    assert str(tmp_path) not in file.read_text()
    assert [(row["arm"], row["seed"]) for row in rows] == [("start", 3), ("start", 5)]
    for row, result in zip(rows, results, strict=True):
        last = result["held_out"][-1]
        assert (row["held_out_loss"], row["accuracy"]) == (last["loss"], last["accuracy"])
        assert (row["ranks"], row["parameters"]) == (result["ranks"], result["parameters"])
        own = json.loads((tmp_path / f"seed-{row['seed']}" / "results.json").read_text())
        assert own["arms"] == [result]
    losses = [row["held_out_loss"] for row in rows]
    assert losses[0] != losses[1]
    mean = f"{sum(losses) / 2:.4f}"
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "start", *(f"{loss:.4f}" for loss in losses), mean,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--batch", "100000", "batch: expected at most"),  # no batch would ever be full
        ("--every", "0", "every: expected 1 or more, got 0"),
        ("--output", "no/such/folder/all.json", "output: expected a file in a folder"),
    ],
)
def test_what_could_not_work_is_said_before_the_training(tmp_path, capsys, option, value, what):
    with pytest.raises(SystemExit):
        four_arms.main([option, value, "--out", str(tmp_path)])
    assert what in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_more_parameters_than_the_budget_are_noticed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(four_arms, "allocate", lambda curves, *_, **__: dict.fromkeys(curves, 3))
    options = ["--start", "--length", "24", "--model", str(tiny), "--out", str(tmp_path)]
    with pytest.raises(AssertionError, match="expected at most"):
        four_arms.main(options)


def test_no_held_out_paragraph_is_trained_on():
    task = four_arms.documentation()
    train, held_out = ({text for text, _ in part} for part in (task.train, task.held_out))
    assert not train & held_out
    assert len(train) == len(task.train)
    assert {label for _, label in task.held_out} == set(range(len(task.topics)))
