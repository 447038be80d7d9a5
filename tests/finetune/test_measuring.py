"""What less measuring costs and keeps."""

from __future__ import annotations

import json

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
