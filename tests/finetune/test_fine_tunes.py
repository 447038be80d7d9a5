"""Which fine-tunes are made for the cuts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.finetune import fine_tunes
from benchmarks.finetune.fine_tunes import FineTune, Recipe, best_fine_tune

TINY: Any = SimpleNamespace(name="tiny")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[tuple[int, float]]:
    """Seed and rate of all that were asked for; the lower the rate, the lower the loss."""
    asked: list[tuple[int, float]] = []

    def fine_tuned(task: Any, kind: str, seed: int, rate: float) -> FineTune:
        asked.append((seed, rate))
        folder = tmp_path / "tuned" / f"{task.name}-{kind}-{rate:g}-s{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").write_text(f'{{"dev": {{"loss": {rate}}}}}')
        return FineTune({}, {"rate": rate, "seed": seed})

    recipe = Recipe(1, 1, {"full": (0.1,), "lora": (0.1, 0.2)})
    monkeypatch.setitem(fine_tunes.RECIPES, "tiny", recipe)
    monkeypatch.setattr(fine_tunes, "fine_tuned", fine_tuned)
    monkeypatch.setenv("LORAMBO_FINETUNE", str(tmp_path))
    return asked


def test_the_only_rate_needs_no_other_seed(made: list[tuple[int, float]]) -> None:
    best = best_fine_tune(TINY, "full", 3)
    assert best.record == {"rate": 0.1, "seed": 3}
    assert made == [(3, 0.1)]


def test_seed_0_chooses_among_rates(made: list[tuple[int, float]]) -> None:
    best = best_fine_tune(TINY, "lora", 3)
    assert best.record == {"rate": 0.1, "seed": 3, "dev_losses": {"0.1": 0.1, "0.2": 0.2}}
    assert made == [(0, 0.1), (0, 0.2), (3, 0.1)]
