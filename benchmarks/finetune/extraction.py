"""A fine-tuned difference cut to low rank, by many rules, at exactly equal parameters.

    python -m benchmarks.finetune extraction search --models minilm --examples 512
    python -m benchmarks.finetune extraction search --models gemma --examples 64
    python -m benchmarks.finetune extraction test

A model is fine-tuned (`fine_tunes`), and the difference of every adapted layer is cut so that all
layers together have exactly the parameters of rank 1, 2, 4, ... everywhere. With `--others base`,
the default, the rest of the model is the base's, but for the head and the adapted layers' biases:
that is what an adapter holds which PEFT loads onto the base (`modules_to_save`,
`bias="lora_only"`). With `--others tuned` all the rest is the tuned model's. Head and biases are
tuned in every cut alike and are not in the budget (`beside` in the JSON); a rule that folds changes
biases, and adds no parameter. The frame: "tuned" is the whole tuned model, "uncut" has the whole
differences, "rank 0" none. Nothing is trained after a cut, so nothing differs between two rules but
ranks and cuts.

A rule (`Rule`) says in which norm ranks are chosen and in which the layers are cut (`cuts.NORMS`),
where on the way from base to tuned model the moments are measured, and whether the singular values
are fitted anew to the tuned model's predictions (`refit`). "search" runs all of `rules.RULES`
on dev, or with `--final` those that go to test; "test" runs these once on test. Measured are the
held-out loss, the accuracy, and how far the predictions are from the tuned model's:
KL(tuned || cut).
"""

from __future__ import annotations

import argparse
import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.finetune.cutter import Cutter, Rule
from benchmarks.finetune.fine_tunes import best_fine_tune
from benchmarks.finetune.local_tasks import local_task
from benchmarks.finetune.rules import DEFAULT, FINAL, RULES
from benchmarks.finetune.subject import OTHERS, Measured, Subject
from benchmarks.report import RESULTS, machine, markdown
from lorambo_alloc.storage import replacing

MODELS = ("minilm", "mpnet", "gemma")
CALIBRATION = {"minilm": 192, "mpnet": 192, "gemma": 64}
"""Examples of train that moments and refits see: snippets, or windows of 64 tokens."""


def frames(subject: Subject) -> list[tuple[str, Measured]]:
    """The whole tuned model, the differences uncut, and none of them."""
    found = [("tuned", subject.measure_tuned())]
    if subject.others == "base":
        subject.between(1.0)
        found.append(("uncut", subject.measure()))
    subject.cut({})
    return [*found, ("rank 0", subject.measure())]


def row_of(
    subject: Subject, kind: str, seed: int, label: str, measured: Measured, **more: Any
) -> dict[str, Any]:
    """What the JSON holds of one cut."""
    return {
        "model": subject.task.name,
        "others": subject.others,
        "kind": kind,
        "seed": seed,
        "label": label,
        **measured.means,
        "losses": base64.b64encode(measured.losses.astype("<f4").tobytes()).decode(),
        **more,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss, accuracy or perplexity, and KL, as markdown."""
    lines: list[dict[str, str]] = []
    for row in rows:
        accuracy = row["accuracy"]
        lines.append(
            {
                "model": f"{row['model']} {row['kind']}",
                "others": row["others"],
                "rule": row["label"],
                "uniform rank": str(row.get("uniform_rank", "-")),
                "parameters": f"{row['budget']:,}" if "budget" in row else "-",
                "loss": f"{row['loss']:.4f}",
                "accuracy or perplexity": f"{np.exp(row['loss']):.2f}"
                if accuracy is None
                else f"{100 * accuracy:.1f} %",
                "KL": f"{row['kl']:.4f}",
            }
        )
    return markdown(lines)


class Results:
    """Rows in a JSON, written as they come; what is there is not done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            self._read()

    def _read(self) -> None:
        self.rows = json.loads(self.path.read_text())["rows"]

    def has(self, **key: Any) -> bool:
        """Whether there is a row of this key."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append, and write; what another run has written since is kept."""
        if self.path.is_file():
            self._read()
        self.rows.append(row)
        content = {"machine": machine(), "default": asdict(DEFAULT), "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as out:
            out.write((json.dumps(content, indent=1) + "\n").encode())
        print(
            f"{row['model']} {row['split']} others {row['others']} {row['label']} "
            f"rank {row.get('uniform_rank')}: loss {row['loss']:.4f}, KL {row['kl']:.4f}",
            flush=True,
        )


def run(
    results: Results,
    model: str,
    kind: str,
    seed: int,
    split: str,
    rules: Sequence[tuple[Rule, Sequence[int]]],
    examples: int | None,
    others: str = "base",
) -> None:
    """Measure what is missing of one model."""
    task = local_task(model)
    count = len(task.splits[split][:examples])
    key = {
        "model": model,
        "kind": kind,
        "seed": seed,
        "split": split,
        "examples": count,
        "others": others,
    }
    wanted = [
        (rule, rank)
        for rule, ranks in rules
        for rank in ranks
        if not results.has(**key, label=rule.label, uniform_rank=rank)
    ]
    if not wanted:
        return
    tuned = best_fine_tune(task, kind, seed)
    subject = Subject(task, tuned, split, examples, others=others)
    if not results.has(**key, label="tuned"):
        for label, measured in frames(subject):
            results.add(
                row_of(
                    subject,
                    kind,
                    seed,
                    label,
                    measured,
                    split=split,
                    examples=len(subject.examples),
                    fine_tune=tuned.record,
                )
            )
    cutter = Cutter(subject, CALIBRATION[model], seed)
    for rule, rank in wanted:
        begun = time.perf_counter()
        ranks = cutter.ranks(rule, rank)
        cutter.apply(rule, ranks)
        seconds = time.perf_counter() - begun
        budget = sum(subject.costs[name] * rank for name, rank in ranks.items())
        results.add(
            row_of(
                subject,
                kind,
                seed,
                rule.label,
                subject.measure(),
                split=split,
                examples=len(subject.examples),
                rule=asdict(rule),
                uniform_rank=rank,
                budget=budget,
                beside=subject.beside,
                ranks=ranks,
                seconds=round(seconds, 1),
                calibration=CALIBRATION[model],
            )
        )


def main(arguments: Sequence[str]) -> None:
    """Search on dev, or measure on test; print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune extraction")
    parser.add_argument("stage", choices=("search", "test"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=["full"], choices=("full", "lora"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--examples", type=int, help="of the split, its first ones; all by default")
    parser.add_argument("--others", default="base", choices=OTHERS, help="tensors that no cut has")
    parser.add_argument("--final", action="store_true", help="search: only the rules of the test")
    parser.add_argument("--output", type=Path, default=RESULTS / "finetune" / "extraction.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results(options.output)
    split = "dev" if options.stage == "search" else "test"
    rules = FINAL if options.final or split == "test" else RULES
    for model in options.models:
        for kind in options.kinds:
            for seed in options.seeds:
                run(results, model, kind, seed, split, rules, options.examples, options.others)
    print(table([row for row in results.rows if row["split"] == split]))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
