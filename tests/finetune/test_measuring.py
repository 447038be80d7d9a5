"""What less measuring costs and keeps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks.finetune import measuring
from tests.finetune.tiny_task import TinyTask


def test_ranks_are_judged_by_the_energy_that_they_keep():
    costs = {"a": 1, "b": 1}
    judge = {
        "a": np.array([0.0, 8.0, 12.0] + [12.0] * 14),
        "b": np.array([0.0, 1.0, 2.0] + [2.0] * 14),
    }
    wrong = {"a": judge["b"], "b": judge["a"]}
    assert measuring.kept(judge, judge, costs) == {"1": 1.0, "2": 1.0, "8": 1.0}
    assert measuring.kept(None, judge, costs) == {"1": 9 / 12, "2": 1.0, "8": 1.0}
    assert measuring.kept(wrong, judge, costs)["1"] == 2 / 12


@pytest.mark.usefixtures("one_thread")
def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "local_task", lambda name: TinyTask())
    output = tmp_path / "measuring.json"
    measuring.main(["minilm", "--output", str(output)])
    content = json.loads(output.read_text())
    assert [(row["batches"], row["passes"]) for row in content["rows"]] == [
        (16, 3), (16, 1), (4, 3), (4, 1),
    ]  # fmt: skip
    shares = [row["kept"] for row in content["rows"]] + [content["uniform"]]
    assert all(0 < share <= 1 + 1e-9 for found in shares for share in found.values())
    assert content["uniform"]["1"] < 1
    assert f"{content['rows'][3]['kept']['1']:.1%}" in capsys.readouterr().out


def test_ranks_are_judged_on_batches_that_none_was_measured_on(monkeypatch):
    seen = []

    def recorded(some, *, passes=3):
        seen.append(([batch["input_ids"].tolist() for batch in some.batches], passes))
        return {layer.name: np.arange(65.0) ** 0.5 for layer in some.layers}

    monkeypatch.setattr(measuring, "gradient", recorded)
    task: Any = TinyTask()
    measuring.measured(task, batches=4, size=3, seed=0)
    (judge, three), *others = seen
    assert (len(judge), three) == (4, 3)
    sizes = [(len(batches), passes) for batches, passes in others]
    assert sizes == [(4, 3), (4, 1), (1, 3), (1, 1)]
    assert all(batch not in judge for batches, _ in others for batch in batches)
