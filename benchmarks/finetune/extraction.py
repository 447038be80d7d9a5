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
are fitted anew to the tuned model's predictions (`refit`). "search" runs all of `RULES` on dev;
"test" runs `FINAL` once on test. Measured are the held-out loss, the accuracy, and how far the
predictions are from the tuned model's: KL(tuned || cut).

What holds when, on dev, with one fine-tune a model and others of the base (loss and KL; 64 windows
of Gemma, 512 snippets of MiniLM; rank 1 unless said; intervals are 95 %, over examples alone):

- Gemma (tuned 4.018, uncut 4.019, rank 0 4.536). Plain at ranks 1, 2, 4, 8: 4.118 / .309,
  4.081 / .264, 4.015 / .183, 4.002 / .152. Frobenius ranks, plain cut: 4.105 / .309. The K-FAC cut
  at the base, with ranks uniform, by K-FAC, by Frobenius: 4.066 / .266, 4.073 / .290, 4.055 / .266
  with drawn labels (true Fisher), and 4.030 / .243, 4.025 / .243, 4.024 / .244 with the given ones
  (empirical Fisher). The last is .009 above plain rank 4, interval -.000 to +.018, and its KL is
  well above. The inputs' moment alone gives nothing (4.120), so it is the gradients' that helps.
  Measured half way to the tuned model it helps less: 4.079 by K-FAC ranks, 4.046 by Frobenius.
  Refitting the latter's singular values failed: 4.845 / .922 after three full steps on 32 windows,
  fewer samples than the 126 values. No step is checked against the KL it should lower.
- MiniLM (tuned .433, uncut .537, rank 0 .692): most of what a rank can win is lost before any cut,
  with the embeddings and norms. Plain at ranks 1, 2, 4, 8: .627 / .258, .566 / .191, .549 / .173,
  .544 / .167. Frobenius ranks: .606 / .240, and .586 / .217 folded. The K-FAC cut at the base,
  folded: .609, .601, .597 by the same ranks as above, and both Fishers agree, since the slopes of
  a loss of two classes at even odds have one size whatever the label. Unfolded it is worse than
  plain (.648 at uniform ranks). Half way, folded, with K-FAC or Frobenius ranks and given labels:
  .578 / .208 and .580 / .210. The first with its singular values refitted (three steps, no labels):
  .520 / .114, below plain rank 4 by .029 (.009 to .051) and rank 8 by .024 (.003 to .045), and
  below the uncut differences: the values make up for embeddings and norms that are not there.

So a fold is what counts for one label of two; for a language model the gradients' moment at the
base, with the labels, is worth nearly four times the parameters in loss, and about twice in KL.
No one rule is worth four times on both models, and no claim is made for a third. `DEFAULT`,
Frobenius ranks and the folded K-FAC cut half way with given labels, is worth (loss interpolated
between plain ranks) 2.9 times the parameters on Gemma and 1.7 on MiniLM, and is ahead of all rules
without curvature on both; at the base the same rule is worth 3.6 and 1.4.
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
from benchmarks.finetune.subject import OTHERS, Measured, Subject
from benchmarks.report import RESULTS, machine, markdown
from lorambo_alloc.storage import replacing

MODELS = ("minilm", "mpnet", "gemma")
CALIBRATION = {"minilm": 192, "mpnet": 192, "gemma": 48}
"""Examples of train that moments and refits see: snippets, or windows of 64 tokens."""


PLAIN = Rule("uniform", "plain")
ENERGY = Rule("plain", "plain")
DEFAULT = Rule("plain", "kfac", where=0.5, fold=True, fisher="empirical")
"""Of the rules tried on both, with others of the base, the one whose lesser gain is the largest."""

_AT_BASE = tuple(
    (Rule(ranks, "kfac", where=0.0, fold=True, fisher=fisher), (1, 2))
    for fisher in ("empirical", "true")
    for ranks in ("plain", "kfac", "uniform")
)

RULES: tuple[tuple[Rule, tuple[int, ...]], ...] = (
    (PLAIN, (1, 2, 4, 8)),
    (DEFAULT, (1, 2)),
    *_AT_BASE,
    (Rule("kfac", "kfac", fold=True), (1, 2)),
    (Rule("kfac", "kfac", fold=True, refit=3), (1, 2)),
    (Rule("uniform", "plain", fold=True, refit=3), (1, 2)),
    (ENERGY, (1, 2)),
    (Rule("kfac", "kfac"), (1,)),
    (Rule("shampoo", "shampoo", fold=True), (1,)),
    (Rule("shampoo", "shampoo", fold=True, refit=3), (1,)),
    (Rule("uniform", "plain", fold=True), (1,)),
    (Rule("plain", "plain", fold=True), (1,)),
    (Rule("plain", "plain", fold=True, refit=3), (1,)),
    (Rule("kfac", "plain", fold=True, refit=3), (1,)),
    (Rule("uniform", "kfac", fold=True, refit=3), (1,)),
    (Rule("uniform", "kfac", fold=True), (1,)),
    (Rule("kfac", "kfac", fold=True, fisher="empirical"), (1,)),
    (Rule("kfac", "kfac", where=1.0, fold=True), (1,)),
    (Rule("kfac", "kfac", damping=0.01, fold=True), (1,)),
    (Rule("kfac", "kfac", damping=1.0, fold=True), (1,)),
    (Rule("input", "input", fold=True), (1,)),
    (Rule("kfac_weighted", "kfac_weighted", fold=True), (1,)),
    (Rule("kfac", "plain"), (1,)),
    (Rule("uniform", "kfac"), (1,)),
    (Rule("shampoo", "shampoo"), (1,)),
    (Rule("input", "input"), (1,)),
    (Rule("input", "plain"), (1,)),
    (Rule("weighted", "weighted"), (1,)),
    (Rule("gradient", "gradient"), (1,)),
)
"""What is searched on dev, with the uniform ranks; the most telling first."""

FINAL: tuple[tuple[Rule, tuple[int, ...]], ...] = (
    (PLAIN, (1, 2, 4, 8, 16)),
    (DEFAULT, (1, 2, 4)),
    (ENERGY, (1, 2, 4)),
    (Rule("uniform", "plain", fold=True, refit=3), (1, 2, 4)),
    (Rule("kfac", "kfac", fold=True), (1, 2, 4)),
)
"""What is measured on test, once."""


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


def interval(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean paired difference of losses by example, with its 95 % bootstrap interval."""
    a, b = (
        np.frombuffer(base64.b64decode(row["losses"]), "<f4").astype(float)
        for row in (ours, theirs)
    )
    difference = a - b
    random = np.random.default_rng(seed)
    means = np.array([difference[random.integers(0, len(a), len(a))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


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
    parser.add_argument("--output", type=Path, default=RESULTS / "finetune" / "extraction.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results(options.output)
    split, rules = ("dev", RULES) if options.stage == "search" else ("test", FINAL)
    for model in options.models:
        for kind in options.kinds:
            for seed in options.seeds:
                run(results, model, kind, seed, split, rules, options.examples, options.others)
    print(table([row for row in results.rows if row["split"] == split]))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
