"""The summary of what was tested: pairs of cuts, names, and the files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks.finetune import summary
from benchmarks.finetune.protocol import protocol
from benchmarks.finetune.rules import DEFAULT, PLAIN
from benchmarks.finetune.runs import Run


def packed(losses: Any) -> str:
    return base64.b64encode(np.asarray(losses, dtype="<f4").tobytes()).decode()


def cut(label: str, rank: int | None, seed: int, losses: Any, **more: Any) -> dict[str, Any]:
    row = {
        "model": "gemma",
        "kind": "full",
        "seed": seed,
        "split": "test",
        "others": "base",
        "examples": len(losses),
        "label": label,
        "loss": float(np.mean(losses)),
        "accuracy": None,
        "kl": 0.5,
        "losses": packed(losses),
    }
    if rank is not None:
        row |= {"uniform_rank": rank, "budget": 10 * rank, "seconds": 1.0}
    return row | more


def cuts() -> list[dict[str, Any]]:
    plain = np.arange(8.0)
    return [
        cut("tuned", None, 0, plain),
        *(cut(PLAIN.label, 4, seed, plain + seed) for seed in (0, 1)),
        *(cut(DEFAULT.label, 1, seed, plain + seed - 0.25 - seed / 2) for seed in (0, 1)),
        cut(DEFAULT.label, 1, 0, plain + 99, split="dev"),
        cut(DEFAULT.label, 1, 0, plain + 99, others="tuned"),
    ]


def test_cuts_are_paired_by_fine_tune_and_example() -> None:
    found = summary.extraction(cuts())
    (pair,) = found["pairs"]
    assert (pair["label"], pair["rank"], pair["plain_rank"]) == (DEFAULT.label, 1, 4)
    assert pair["fine_tunes"] == 2
    mean, low, high = pair["difference"]
    assert mean == pytest.approx(-0.5)
    assert (low, high) == pytest.approx((-0.75, -0.25))  # both fine-tunes drawn alike
    assert pair["by_fine_tune"] == pytest.approx([-0.25, -0.75])
    mean, low, high = pair["crossed"]
    assert mean == pytest.approx(-0.5)
    half = 12.706 * 0.25  # of two values that differ by 0.5: Student's with one degree of freedom
    assert (low, high) == pytest.approx((-0.5 - half, -0.5 + half), rel=1e-4)
    means = {(row["label"], row["rank"]): row for row in found["means"]}
    assert means[DEFAULT.label, 1]["loss"] == pytest.approx(3.5 + 0.5 - 0.5)
    assert means[DEFAULT.label, 1]["parameters"] == 10
    assert means["tuned", None]["parameters"] is None
    table = summary.extraction_table(found)
    assert "| 3.5000 / 0.500 | -0.5000 [-0.7500, -0.2500] " in table
    assert "| default " in table


def test_accuracies_of_two_answers_are_paired_too() -> None:
    right, wrong = 0.6, 0.8  # either side of log 2
    plain, ours = [right, right, wrong, wrong], [right, wrong, right, right]
    found = summary.extraction(
        [
            cut(PLAIN.label, 4, 0, plain, model="minilm", accuracy=0.5),
            cut(DEFAULT.label, 1, 0, ours, model="minilm", accuracy=0.75),
            *cuts(),
        ]
    )
    pair, of_a_language_model = found["pairs"]
    mean, low, high = pair["accuracy_difference"]
    assert mean == 0.25
    assert -1 <= low < 0.25 < high <= 1
    table = summary.extraction_table(found)
    assert "| 75.0%" in table
    assert f"+25.0% [{low:+.1%}, {high:+.1%}]" in table
    assert of_a_language_model["accuracy_difference"] is None
    assert (pair["fine_tunes"], pair["crossed"]) == (1, None)


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("gradient_warm", "gradient"),
        ("inverted:gradient_warm", "inverted gradient"),
        ("gora", "GoRA"),
        ("of tomorrow", "of tomorrow"),
    ],
)
def test_readers_are_given_names(arm: str, name: str) -> None:
    assert summary.arm_name(arm) == name


def test_arms_of_the_same_ranks_have_one_map() -> None:
    results: dict[Run, dict[str, Any]] = {
        Run("gemma", arm, 1, 1e-3, 0, "test"): {"ranks": {"q": rank}}
        for arm, rank in (("gradient", 2), ("gradient_rs", 2), ("eva", 1), ("uniform", 1))
    }
    assert summary.first_ranks(results) == {"gemma": {"EVA": {"q": 1}, "gradient": {"q": 2}}}


def test_each_difference_of_three_seeds_or_more_is_shown_once() -> None:
    row = {"name": "gradient", "rank": 1, "rate": 2e-3, "paired": 3, "difference": [0.1, 0.0, 0.2]}
    other = {**row, "name": "EVA", "rate": 4e-3}
    few, uniform = {**row, "name": "GoRA", "paired": 2}, {**row, "difference": None}
    content = {
        "training": {"gemma": {"uniform": [row, other, few, uniform]}},
        "training_at_one_rate": {"gemma": [row, {**other, "rate": 2e-3}, uniform]},
    }
    group = "Gemma 3 270M, budget of rank 1"
    assert summary.differences(content) == [
        (group, "gradient", 0.1, 0.0, 0.2),
        (group, "EVA", 0.1, 0.0, 0.2),
        (f"{group}, all at uniform's rate", "EVA", 0.1, 0.0, 0.2),
    ]


def test_the_summary_holds_what_was_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    stamp = protocol("minilm").stamp
    ranks = {"encoder.0.query": 1, "encoder.1.query": 2}
    runs = {
        Run("minilm", arm, rank, 1e-3, seed, split): {
            "protocol": stamp,
            "losses": packed(np.arange(4.0) - shift),
            "loss": 1.5 - shift,
            "accuracy": 0.5,
            "parameters": 3,
            "train_losses": [2.0 - shift, 1.0 - shift],
            "ranks": {name: rank * value for name, value in ranks.items()},
            "seconds": {"measure": 1.0, "train": 4.0, "online": None, "evaluate": 1.0},
        }
        for arm, shift in (("uniform", 0.0), ("kfac_warm", 0.5))
        for rank in (1, 2)
        for seed in (0, 1, 2)
        for split in ("dev", "test")
    }
    monkeypatch.setattr(summary, "finished", lambda: runs)
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "extraction.json").write_text(json.dumps({"rows": cuts()}))
    output = tmp_path / "summary.json"
    summary.main(["--output", str(output)])
    found = json.loads(output.read_text())
    (ours, *_) = (row for row in found["training"]["minilm"]["uniform"] if row["difference"])
    assert (ours["arm"], ours["rank"], ours["seeds"]) == ("kfac_warm", 1, [0, 1, 2])
    assert ours["name"] == "K-FAC"
    assert ours["difference"] == pytest.approx([-0.5, -0.5, -0.5])
    assert found["training"]["gemma"] == {"uniform": [], "mlp_only": []}
    assert found["training_at_one_rate"]["minilm"] == found["training"]["minilm"]["uniform"]
    assert [row["name"] for row in found["frame"]["minilm"]] == [
        "rank 1 everywhere",
        "rank 2 everywhere",
    ]
    assert found["learning"] == {"minilm": {"K-FAC": [[-0.5] * 3] * 2}, "mpnet": {}, "gemma": {}}
    assert found["ranks"] == {"minilm": {"K-FAC": ranks}}
    for name in ("training", "extraction", "ranks_minilm"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
