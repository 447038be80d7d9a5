"""What measuring the gradient costs, and how good the ranks are that less of it gives.

    python -m benchmarks.finetune measuring minilm

Ranks by the gradient's energy, from fewer batches or passes than the arms of the training take, at
what rank 1, 2 and 8 everywhere would cost. They are judged by the gradient of as many *other*
batches, measured in three passes: the energy that they keep there, as a share of what the best
ranks for those batches keep. So the noise of the batches counts as well as that of the sketch. A
classifier's head is trained first, alone, as for the arms.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune.arms import warm_head
from benchmarks.finetune.exact_budget import spend_exactly
from benchmarks.finetune.local_tasks import local_task
from benchmarks.finetune.protocol import protocol
from benchmarks.finetune.signals import Curves, Measuring, gradient
from benchmarks.finetune.task import Task, shuffled
from benchmarks.report import RESULTS, machine, markdown
from lorambo_adapters.layers import find_layers
from lorambo_alloc.storage import replacing

RANKS = (1, 2, 8)
PARTS = ((1, 3), (1, 1), (4, 3), (4, 1))
"""Each a part of the batches (one in so many), and passes over them."""


def measured(task: Task, *, batches: int, size: int, seed: int) -> dict[str, Any]:
    """Seconds of each of `PARTS`, and what its ranks keep of other batches' energy.

    Args:
        task: whose model.
        batches: of the full measurement; as many others judge.
        size: of a batch.
        seed: of the head, the batches and the sketches.
    """
    torch.manual_seed(seed)
    model = task.model()
    layers = find_layers(model, task.targets)
    drawn = list(islice(shuffled(task, size, seed), 2 * batches))
    if task.head:
        warm_head(task, model, steps=50, size=size, seed=seed)
    costs = {layer.name: sum(layer.shape) for layer in layers}
    judge = gradient(Measuring(task, model, layers, drawn[batches:], 1, 0.0, seed))
    rows: list[dict[str, Any]] = []
    for part, passes in PARTS:
        some = Measuring(task, model, layers, drawn[: batches // part], 1, 0.0, seed)
        begun = time.perf_counter()
        curves = gradient(some, passes=passes)
        seconds = time.perf_counter() - begun
        rows.append(
            {
                "batches": batches // part,
                "passes": passes,
                "seconds": round(seconds, 2),
                "kept": kept(curves, judge, costs),
            }
        )
    return {"rows": rows, "uniform": kept(None, judge, costs)}


def kept(curves: Curves | None, judge: Curves, costs: Mapping[str, int]) -> dict[str, float]:
    """By uniform rank, the share of the best ranks' energy that other ranks of that cost keep.

    Args:
        curves: that choose the ranks; None: the same rank everywhere.
        judge: the energy of each layer's ranks.
        costs: of a rank.
    """
    found: dict[str, float] = {}
    for rank in RANKS:
        budget = rank * sum(costs.values())
        best = spend_exactly(judge, costs, budget)
        ranks = dict.fromkeys(costs, rank)
        if curves is not None:
            ranks = spend_exactly(curves, costs, budget)
        found[str(rank)] = _energy(judge, ranks) / _energy(judge, best)
    return found


def _energy(judge: Curves, ranks: Mapping[str, int]) -> float:
    return sum(float(curve[min(ranks[name], len(curve) - 1)]) for name, curve in judge.items())


def table(content: Mapping[str, Any]) -> str:
    """Seconds and shares, as markdown."""
    lines = [
        {
            "batches": str(row["batches"]),
            "passes": str(row["passes"]),
            "seconds": f"{row['seconds']:.0f}",
            **{f"rank {rank}": f"{share:.1%}" for rank, share in row["kept"].items()},
        }
        for row in content["rows"]
    ]
    even = {f"rank {rank}": f"{share:.1%}" for rank, share in content["uniform"].items()}
    return markdown([*lines, {"batches": "uniform ranks", "passes": "", "seconds": "", **even}])


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune measuring")
    parser.add_argument("task", choices=("minilm", "mpnet", "gemma"))
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/finetune")
    options = parser.parse_args(arguments)
    output = options.output or RESULTS / "finetune" / f"measuring_{options.task}.json"
    agreed = protocol(options.task).settings
    content = {
        "task": options.task,
        "seed": options.seed,
        "machine": machine(1),
        **measured(
            local_task(options.task),
            batches=agreed.measured,
            size=agreed.batch,
            seed=options.seed,
        ),
    }
    with replacing(output) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    print(table(content))
