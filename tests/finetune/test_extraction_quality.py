"""Captured gain at equal parameters, on spectra of a tiny model."""

from __future__ import annotations

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
