"""What all runs come to, in one small file and pictures: what README and notebook show.

    python -m benchmarks.finetune summary

Reads `results/finetune/runs` (training, test alone) and `results/finetune/extraction.json` (cuts,
test alone), and writes `results/finetune/summary.json`, and pictures beside it: `training.png`,
`extraction.png` and `ranks_TASK.png`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.finetune.intervals import crossed_interval, paired_interval
from benchmarks.finetune.protocol import protocol
from benchmarks.finetune.report import Results, frame, learning, rows
from benchmarks.finetune.rules import DEFAULT, ENERGY, FIT_ALONE, PLAIN, UNFITTED
from benchmarks.finetune.runs import check_protocol, finished
from benchmarks.finetune.training import losses_of
from benchmarks.report import RESULTS, markdown
from lorambo_alloc.storage import replacing

TASKS = ("minilm", "mpnet", "gemma")
BASELINES = ("uniform", "mlp_only")
MODELS = {"minilm": "MiniLM", "mpnet": "MPNet", "gemma": "Gemma 3 270M"}
ARMS = {
    "gradient_warm": "gradient",
    "gradient": "gradient",
    "gradient_rs_warm": "gradient, scale / √rank",
    "gradient_rs": "gradient, scale / √rank",
    "gradient_alpha_warm": "gradient, scale / rank",
    "gradient_alpha": "gradient, scale / rank",
    "gradient_floor_warm": "gradient above rank 1",
    "gradient_floor": "gradient above rank 1",
    "kfac_warm": "K-FAC",
    "kfac": "K-FAC",
    "coupled_warm": "coupled",
    "mlp_only": "MLPs only",
    "eva": "EVA",
    "gora": "GoRA",
    "both_two": "gradient, online",
    "online_two": "online",
    "full": "full fine-tune",
    "head": "head alone",
}
RULES = {
    PLAIN.label: "plain",
    ENERGY.label: "best ranks",
    UNFITTED.label: "curvature",
    DEFAULT.label: "default",
    FIT_ALONE.label: "refit alone",
}
"""What readers call the arms and rules that are tested."""


def arm_name(arm: str) -> str:
    """What readers call an arm: of a control, what was done to which ranks."""
    kind, _, of = arm.rpartition(":")
    return f"{kind} {ARMS.get(of, of)}".strip()


def training(results: Results) -> dict[str, Any]:
    """By task and baseline, the rows of `report.rows` as what JSON can hold."""
    found: dict[str, Any] = {}
    for task in TASKS:
        check_protocol(results, task, protocol(task).stamp)
        found[task] = {
            baseline: [
                {"name": arm_name(row.arm), **asdict(row)} for row in rows(results, task, baseline)
            ]
            for baseline in BASELINES
        }
    return found


def training_at_one_rate(results: Results) -> dict[str, list[dict[str, Any]]]:
    """By task, the rows of all arms at the rate that was chosen for uniform ranks."""
    return {
        task: [
            {"name": arm_name(row.arm), **asdict(row)}
            for row in rows(results, task, one_rate="uniform")
        ]
        for task in TASKS
    }


def framed(results: Results) -> dict[str, list[dict[str, Any]]]:
    """By task, the rows of `report.frame`: what more or fewer parameters are worth."""
    return {
        task: [
            {
                "name": f"rank {row.rank} everywhere" if row.arm == "uniform" else ARMS[row.arm],
                **asdict(row),
            }
            for row in frame(results, task)
        ]
        for task in TASKS
    }


def first_ranks(results: Results) -> dict[str, dict[str, dict[str, int]]]:
    """By task and arm, the ranks of the first test run at the tightest budget; each map once."""
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for run, result in sorted(results.items(), key=lambda item: (item[0].rank, item[0])):
        ranks = result["ranks"]
        if run.split != "test" or ranks is None or run.arm == "uniform":
            continue
        if ranks not in found[run.task].values():  # arms that differ in their scales share them
            found[run.task].setdefault(arm_name(run.arm), ranks)
    return found


def extraction(content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over fine-tunes of the test cuts, and paired differences to plain truncation.

    An interval is a bootstrap of examples and, where there are several, of fine-tunes; "crossed" is
    Student's (`crossed_interval`), which few fine-tunes need. Differences are of the loss, and of
    the accuracy where an example has one of two answers.
    """
    cuts: dict[tuple[str, str, str, int | None], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in content:
        if row["split"] == "test" and row["others"] == "base":
            key = (row["model"], row["kind"], row["label"], row.get("uniform_rank"))
            cuts[key][row["seed"]] = row
    means: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for (model, kind, label, rank), by_seed in cuts.items():
        found = list(by_seed.values())
        means.append(
            {
                "model": model,
                "kind": kind,
                "label": label,
                "name": RULES.get(label, label),
                "rank": rank,
                "parameters": found[0].get("budget"),
                "fine_tunes": len(found),
                "examples": found[0]["examples"],
                **{key: _mean(found, key) for key in ("loss", "accuracy", "kl", "seconds")},
            }
        )
        if rank is None or label == PLAIN.label:
            continue
        for other in (1, 2, 4, 8):
            plain = cuts.get((model, kind, PLAIN.label, other), {})
            seeds = sorted(set(by_seed) & set(plain))
            if seeds:
                ours, theirs = (
                    np.array([losses_of(cut[s]) for s in seeds]) for cut in (by_seed, plain)
                )
                crossed, accuracy = crossed_interval(ours - theirs), None
                if found[0]["accuracy"] is not None:
                    accuracy = list(paired_interval(_right(ours) - _right(theirs)))
                pairs.append(
                    {
                        "model": model,
                        "kind": kind,
                        "label": label,
                        "name": RULES.get(label, label),
                        "rank": rank,
                        "plain_rank": other,
                        "fine_tunes": len(seeds),
                        "difference": list(paired_interval(ours - theirs)),
                        "by_fine_tune": [float(mean) for mean in (ours - theirs).mean(1)],
                        "crossed": crossed and list(crossed),
                        "accuracy_difference": accuracy,
                    }
                )
    return {"means": means, "pairs": pairs}


def _right(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where the right one of two answers is the likelier one, whose loss is then below log 2."""
    return (losses < np.log(2)).astype(np.float64)


def differences(summary: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Group, arm and interval of each paired difference to uniform ranks, of three seeds or more.

    At uniform's rate only the arms whose own rate is another: the others are there already.
    """
    found: list[tuple[Any, ...]] = []
    for task, by_baseline in summary["training"].items():
        own = by_baseline["uniform"]
        once = [row for row in summary["training_at_one_rate"][task] if row not in own]
        for compared, at in ((own, ""), (once, ", all at uniform's rate")):
            budget = f"{MODELS[task]}, budget of rank"
            found += [
                (f"{budget} {row['rank']}{at}", row["name"], *row["difference"])
                for row in compared
                if row["difference"] is not None and row["paired"] > 2
            ]
    return found


def pictures(summary: Mapping[str, Any], folder: Path) -> None:
    """Intervals of both comparisons, and the rank maps at the tightest budget."""
    from lorambo_alloc.plots import intervals, rank_map

    shown = differences(summary)
    if shown:
        _save(intervals(shown, against="uniform ranks"), folder / "training.png")
    cuts = [
        (
            f"{MODELS[pair['model']]}, {_SOURCES[pair['kind']]}: rank 1 less plain rank 4",
            pair["name"],
            *pair["difference"],
        )
        for pair in summary["extraction"]["pairs"]
        if (pair["rank"], pair["plain_rank"]) == (1, 4)
    ]
    if cuts:
        _save(intervals(cuts, against="plain truncation at rank 4"), folder / "extraction.png")
    for task, arms in summary["ranks"].items():
        _save(rank_map(arms), folder / f"ranks_{task}.png")


def extraction_table(found: Mapping[str, Any]) -> str:
    """Loss, KL and accuracy of the test cuts, and differences to plain truncation at rank 4."""
    lines: list[dict[str, str]] = []
    kinds = dict.fromkeys((row["kind"], row["label"], row["rank"]) for row in found["means"])
    models = [m for m in TASKS if any(row["model"] == m for row in found["means"])]
    answering = {row["model"] for row in found["means"] if row["accuracy"] is not None}
    for kind, label, rank in kinds:
        line = {
            "source": _SOURCES[kind],
            "cut": RULES.get(label, label),
            "rank": "-" if rank is None else str(rank),
        }
        for model in models:
            own = [
                row
                for row in found["means"]
                if (row["model"], row["kind"], row["label"], row["rank"])
                == (model, kind, label, rank)
            ]
            pair = [
                pair
                for pair in found["pairs"]
                if (pair["model"], pair["kind"], pair["label"], pair["rank"], pair["plain_rank"])
                == (model, kind, label, rank, 4)
            ]
            shown = MODELS[model]
            line[shown] = f"{own[0]['loss']:.4f} / {own[0]['kl']:.3f}" if own else ""
            line[f"{shown} less plain rank 4"] = (
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(*pair[0]["difference"]) if pair else ""
            )
            if model in answering:
                line[f"{shown}, right"] = f"{own[0]['accuracy']:.1%}" if own else ""
                line[f"{shown}, right, less plain rank 4"] = (
                    "{:+.1%} [{:+.1%}, {:+.1%}]".format(*pair[0]["accuracy_difference"])
                    if pair
                    else ""
                )
        lines.append(line)
    return markdown(lines)


_SOURCES = {"full": "full fine-tune", "lora": "LoRA of rank 16"}


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as out:
        figure.savefig(out, format="png", dpi=150)


def _mean(found: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row.get(key) for row in found]
    return None if None in values else float(np.mean([float(v) for v in values if v is not None]))


def main(arguments: Sequence[str]) -> None:
    """Write the summary and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune summary")
    parser.add_argument("--output", type=Path, default=RESULTS / "finetune" / "summary.json")
    options = parser.parse_args(arguments)
    results = finished()
    cuts = RESULTS / "finetune" / "extraction.json"
    summary = {
        "training": training(results),
        "training_at_one_rate": training_at_one_rate(results),
        "frame": framed(results),
        "learning": {
            task: {arm_name(arm): found for arm, found in learning(results, task).items()}
            for task in TASKS
        },
        "ranks": first_ranks(results),
        "extraction": extraction(json.loads(cuts.read_text(encoding="utf-8"))["rows"]),
    }
    with replacing(options.output) as out:
        out.write((json.dumps(summary, indent=1) + "\n").encode())
    pictures(summary, options.output.parent)
    print(extraction_table(summary["extraction"]))
    print(f"{options.output}: written, with its pictures beside it")
