"""Captured gain at equal parameters, on spectra of a tiny model."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.finetune import quality

from .test_extraction import TinyTask, tuned


@pytest.mark.parametrize("source", ["weights", "full fine-tune"])
def test_no_rule_captures_more_than_the_optimum(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Any = TinyTask()
    monkeypatch.setattr(quality, "RULES", ("uniform", "eva", "adalora"))
    monkeypatch.setattr(quality, "best_fine_tune", lambda *_: tuned(task))
    rows = quality.rows_of(task, source)
    assert [row["uniform_rank"] for row in rows] == list(quality.RANKS)
    assert [row["budget"] for row in rows] == [27 * rank for rank in quality.RANKS]
    for row in rows:
        assert row["shares"]["allocate"] == 1.0
        assert max(row["shares"].values()) == 1.0
        assert max(row["costs"].values()) <= row["budget"]
    assert 0 < rows[0]["energy_captured"] < rows[1]["energy_captured"] <= 1
    assert "| eva" in quality.table(rows)


def test_an_unknown_source_is_refused() -> None:
    task: Any = TinyTask()
    with pytest.raises(ValueError, match="source: expected one of weights"):
        quality.real_spectra(task, "dreams")


def test_rows_of_other_sources_stay(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "local_task", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(quality, "table", lambda rows: "")
    turns = iter("abc")

    def rows_of(task: Any, source: str) -> list[dict[str, str]]:
        return [{"model": task.name, "source": source, "made": next(turns)}]

    monkeypatch.setattr(quality, "rows_of", rows_of)
    output = tmp_path / "quality.json"
    for model, source in (("gemma", "gradient"), ("minilm", "weights"), ("gemma", "gradient")):
        quality.main(["--models", model, "--sources", source, "--output", str(output)])
    found = [(row["model"], row["made"]) for row in json.loads(output.read_text())["rows"]]
    assert found == [("minilm", "b"), ("gemma", "c")]
