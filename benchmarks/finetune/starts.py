"""The ranks that arms start with, kept: runs that differ in the learning rate alone share them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.finetune.arms import ARMS, CONTROLS, Start, arm_of, control, starting_ranks
from benchmarks.finetune.task import Task
from lorambo_adapters.layers import find_layers
from lorambo_alloc.storage import replacing

if TYPE_CHECKING:
    from benchmarks.finetune.runs import Run
    from benchmarks.finetune.training import Settings

_DIGITS = 6


def kept_start(run: Run, task: Task, settings: Settings, folder: Path) -> Start:
    """The ranks of a run's arm: read if they have been measured, else measured and written.

    Signals that train (a short run, AdaLoRA) do so at the lowest rate of the task's grid, so that
    their ranks do not depend on the run's rate. A file tells what it was measured with; where that
    was other settings, it is measured anew. A control permutes the kept ranks of its arm, and arms
    that differ in their scales alone share them.
    """
    from benchmarks.finetune.protocol import protocol

    arm = arm_of(run.arm)
    kind, _, of = run.arm.partition(":")
    if kind in CONTROLS:
        start = kept_start(replace(run, arm=of), task, settings, folder)
        costs = {layer.name: sum(layer.shape) for layer in find_layers(task.model(), task.targets)}
        ranks = control(run.arm, start.ranks, costs, run.seed)
        return Start(ranks, None, start.seconds)
    rate = min(protocol(run.task).rates)
    options = {
        "rank": run.rank,
        "seed": run.seed,
        "rate": rate,
        "batches": settings.measured,
        "size": settings.batch,
    }
    if arm.curves is None and arm.ranks is None:
        return starting_ranks(run.arm, task, **options)
    same = next(name for name, other in ARMS.items() if other == replace(arm, power=0.0))
    name = f"{same}-b{run.rank}-s{run.seed}.json"
    path = folder / run.task / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("options") != options:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = starting_ranks(run.arm, task, **options)
        curves = None
        if found.curves is not None and arm.online:
            curves = {
                layer: [float(f"{value:.{_DIGITS}g}") for value in curve[:33]]
                for layer, curve in found.curves.items()
            }
        content = {
            "options": options,
            "ranks": found.ranks,
            "seconds": round(found.seconds, 2),
            "curves": curves,
        }
        with replacing(path) as file:
            file.write(json.dumps(content).encode() + b"\n")
    curves = content["curves"]
    return Start(
        content["ranks"],
        None if curves is None else {layer: np.array(curve) for layer, curve in curves.items()},
        content["seconds"],
    )
