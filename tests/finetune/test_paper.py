"""The paper's settings end to end: every arm on stand-ins, by the code that runs the real ones."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
pytest.importorskip("datasets", reason="datasets is absent: pip install 'lorambo-alloc[finetune]'")

from benchmarks.finetune import arms  # noqa: E402  (needs torch)
from benchmarks.finetune.adalora import adalora_ranks  # noqa: E402
from benchmarks.finetune.paper import main  # noqa: E402
from benchmarks.finetune.paper_settings import ARMS, SETTINGS  # noqa: E402
from tests.finetune import stand_ins  # noqa: E402

KINDS = {
    "roberta-base/qnli": "roberta",
    "t5-base/sst2": "t5",
    "wikitext103-12M": "gpt2",
    "wikitext103-24M": "gpt2",
}
QUICK = "--steps 10 --batch 4 --measured 4 --period 3 --device cpu".split()


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    short = replace(arms.ARMS["adalora"], ranks=partial(adalora_ranks, steps=12))
    monkeypatch.setitem(arms.ARMS, "adalora", short)


def stand_in(tmp_path: Path, setting: str, **shape: int) -> list[str]:
    """The arguments that put a tiny model and a folder of data in the place of the real ones."""
    kind = KINDS[setting]
    model = stand_ins.model(tmp_path / "model", kind, **shape)
    data = tmp_path / "data"
    if kind == "gpt2":
        stand_ins.wikitext(data)
    else:
        stand_ins.glue(data, SETTINGS[setting].config)
    output = ["--output", str(tmp_path / "out.json")]
    return ["--setting", setting, "--model", str(model), "--data", str(data), *output, *QUICK]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_arm_runs_at_exactly_the_budget(tmp_path, setting):
    # A classifier looks at one token a text, which alone leads to few directions in one layer.
    layers = 2 if setting == "roberta-base/qnli" else 1
    budget = ["--rank", "2"] if SETTINGS[setting].rank else ["--parameters", "600"]
    main([*stand_in(tmp_path, setting, layers=layers), *budget, "--rates", "1e-2", "--seeds", "0"])
    summary = json.loads((tmp_path / "out.json").read_text())
    assert [row["arm"] for row in summary["rows"]] == sorted(ARMS)
    assert summary["rank"] == 2
    for row in summary["rows"]:
        online = row["arm"] in ("online", "both")
        spent = row["parameters"]
        assert spent <= summary["parameters"] if online else spent == summary["parameters"]
        assert (row["difference"] is None) == (row["arm"] == "uniform")
        if SETTINGS[setting].metric == "accuracy":
            assert row["metrics"] == [100 * row["accuracy"]]
        else:
            assert row["metrics"][0] == pytest.approx(2.718281828459045 ** row["loss"])


def test_the_rate_is_chosen_on_dev_and_runs_are_not_repeated(tmp_path, capsys):
    arguments = stand_in(tmp_path, "roberta-base/qnli")
    arguments += "--arm uniform --rank 1 --rates 1e-4 1e-1 --seeds 0 1 --dev-seeds 7".split()
    main(arguments)
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out.runs").glob("*/*/*.json")]
    dev = {r["run"]["rate"]: r["loss"] for r in runs if r["run"]["split"] == "dev"}
    test = {(r["run"]["seed"], r["run"]["rate"]) for r in runs if r["run"]["split"] == "test"}
    best = min(dev, key=lambda rate: dev[rate])
    assert set(dev) == {1e-4, 1e-1}
    assert test == {(0, best), (1, best)}
    first = (tmp_path / "out.json").read_text()
    assert capsys.readouterr().out.count(": loss ") == 4
    main(arguments)
    assert capsys.readouterr().out.count(": loss ") == 0
    assert (tmp_path / "out.json").read_text() == first


def test_all_weights_are_reported_beside_the_arms(tmp_path):
    options = ["--rank", "1", "--rates", "1e-3", "--seeds", "0", "--arm", "full", "uniform"]
    main([*stand_in(tmp_path, "t5-base/sst2"), *options])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["uniform", "full"]
    assert rows[1]["parameters"] > rows[0]["parameters"]


def test_runs_of_other_settings_are_not_mixed_in(tmp_path):
    arguments = stand_in(tmp_path, "roberta-base/qnli")
    arguments += "--arm uniform --rates 1e-3 --seeds 0".split()
    main([*arguments, "--rank", "1"])
    with pytest.raises(ValueError, match=r"out\.runs: expected runs of this model.*--output"):
        main([*arguments, "--rank", "2"])


def test_ranks_above_64_find_their_place(tmp_path):
    arguments = stand_in(tmp_path, "wikitext103-12M", width=192, layers=1)
    arguments += "--arm uniform gradient gora eva mlp_only online --rank 81 --rates 1e-3".split()
    main([*arguments, "--seeds", "0"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["parameters"] for row in rows if row["arm"] != "online"} == {81 * 3072}
    (online,) = (row["parameters"] for row in rows if row["arm"] == "online")
    assert 70 * 3072 < online <= 81 * 3072


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("setting", ["roberta-base/qnli", "t5-base/sst2", "wikitext103-12M"])
def test_on_a_gpu(tmp_path, setting):
    arguments = [*stand_in(tmp_path, setting), "--device", "cuda", "--rank", "2", "--seeds", "0"]
    main([*arguments, "--rates", "1e-2"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == sorted(ARMS)


def test_an_unknown_arm_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"arm: expected one of uniform, .*got 'best'"):
        main(["--setting", "t5-base/sst2", "--arm", "best"])


def test_a_budget_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--setting", "t5-base/sst2", "--rank", "0"])
    assert "invalid positive int value: '0'" in capsys.readouterr().err
