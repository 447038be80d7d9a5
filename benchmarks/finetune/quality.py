"""How much of a spectrum's gain each rule captures, at equal parameters and without training.

    python -m benchmarks.finetune quality

For each model four real spectra of its adapted layers: the weights; the gradient of the loss at the
start of the fine-tune (128 examples of train; a classifier's head is random there); the difference
that a full fine-tune has made; the update that a LoRA of rank 16 has learnt. At what rank 1, 2 and
8 everywhere would cost, the gain (sum of squared singular values kept) of each rule as a share of
the optimum's, by `lorambo_alloc.compare`. Rules that want a signal of their own look at the gains
instead, and all spend what is left on their own next ranks. The table says how good the rules are
as solvers of this problem; it says nothing of a model's quality.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune.fine_tunes import base_state, best_fine_tune
from benchmarks.finetune.local_tasks import local_task
from benchmarks.finetune.task import Task, shuffled
from benchmarks.report import RESULTS, markdown, write_json
from lorambo_adapters.layers import find_layers
from lorambo_adapters.spectra.gradients import gradient_spectra
from lorambo_adapters.spectra.weights import weight_spectra
from lorambo_alloc import Spectra, compare, uniform_rank

MODELS = ("minilm", "mpnet", "gemma")
RANKS = (1, 2, 8)
SOURCES = ("weights", "gradient", "full fine-tune", "LoRA of rank 16")
RULES = ("uniform", "eva", "adalora", "gora", "square_root", "mlp_only")
_BATCHES, _SIZE, _KEPT = 16, 8, 128


def real_spectra(task: Task, source: str, seed: int = 0) -> Spectra:
    """One of `SOURCES` of a task's adapted layers.

    Args:
        task: whose model.
        source: one of `SOURCES`.
        seed: of the fine-tunes, the batches and the sketches.

    Raises:
        ValueError: another source.
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}")
    torch.manual_seed(seed)
    model = task.model().eval()
    layers = find_layers(model, task.targets)
    names = [layer.name for layer in layers]
    if source == "gradient":
        batches = list(islice(shuffled(task, _SIZE, seed), _BATCHES))
        return gradient_spectra(model, batches, targets=layers, rank=_KEPT, seed=seed)
    if source == "weights":
        state = model.state_dict()
        matrices = {name: state[f"{name}.weight"] for name in names}
    else:
        kind = "full" if source == "full fine-tune" else "lora"
        base, tuned = base_state(task, seed), best_fine_tune(task, kind, seed).state
        matrices = {n: tuned[f"{n}.weight"] - base[f"{n}.weight"] for n in names}
    return weight_spectra({f"{n}.weight": w for n, w in matrices.items()}, progress=False)


def rows_of(task: Task, source: str) -> list[dict[str, Any]]:
    """The rules' shares at each of `RANKS`."""
    spectra = real_spectra(task, source)
    energy = sum(float(v @ v) + spectra.unresolved.get(n, 0.0) for n, v in spectra.items())
    rows: list[dict[str, Any]] = []
    for rank in RANKS:
        found = compare(spectra, uniform_rank(rank), rules=RULES, fill=True)
        best = found["allocate"]
        rows.append(
            {
                "model": task.name,
                "source": source,
                "uniform_rank": rank,
                "budget": best.allocation.budget,
                "status": best.status,
                "energy_captured": best.value / energy,
                "shares": {row.rule: row.share for row in found},
                "costs": {row.rule: row.cost for row in found},
                "greatest_rank": {row.rule: row.greatest_rank for row in found},
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Shares of the optimum in per cent, as markdown."""
    lines: list[dict[str, str]] = []
    for row in rows:
        line = {
            "model": row["model"],
            "spectra of": row["source"],
            "rank": str(row["uniform_rank"]),
            "energy kept by the optimum": f"{100 * row['energy_captured']:.1f} %",
        }
        shares = {rule: row["shares"].get(rule) for rule in RULES}
        lines.append(line | {r: "-" if s is None else f"{100 * s:.1f}" for r, s in shares.items()})
    return markdown(lines)


def main(arguments: Sequence[str]) -> None:
    """Compute, print the table, write the JSON after every spectrum; others' rows stay."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune quality")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--output", type=Path, default=RESULTS / "finetune" / "quality.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    for model in options.models:
        task = local_task(model)
        for source in options.sources:
            rows = [row for row in rows if (row["model"], row["source"]) != (model, source)]
            rows += rows_of(task, source)
            rows.sort(key=lambda row: (MODELS.index(row["model"]), SOURCES.index(row["source"])))
            write_json(options.output, rows, ranks=list(RANKS), rules=list(RULES), seed=0)
    print(table(rows))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
