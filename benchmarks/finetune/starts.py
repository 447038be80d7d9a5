"""The ranks that arms start with, kept: runs of one seed share what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.finetune.arms import (
    ARMS,
    CONTROLS,
    Arm,
    Start,
    arm_of,
    best_ranks,
    control,
    starting_ranks,
)
from benchmarks.finetune.signals import OF_THE_MODEL, most_ranks
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
    was other settings, it is measured anew. What a signal that looks at the model alone has
    measured gives the ranks of all the task's budgets. A control permutes the kept ranks of its
    arm, and arms that differ in their scales alone share them.
    """
    from benchmarks.finetune.protocol import protocol

    arm = arm_of(run.arm)
    kind, _, of = run.arm.partition(":")
    if kind in CONTROLS:
        start = kept_start(replace(run, arm=of), task, settings, folder)
        ranks = control(run.arm, start.ranks, _costs(task), run.seed)
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
    files = {
        rank: folder / run.task / f"{same}-b{rank}-s{run.seed}.json"
        for rank in (run.rank, *protocol(run.task).budgets)
    }
    content = _read(files[run.rank])
    if content.get("options") != options:
        found = starting_ranks(run.arm, task, **options)
        content = _write(files[run.rank], options, found, arm)
        if arm.curves in OF_THE_MODEL:
            _write_others(files, options, found, arm, _costs(task))
    curves = content["curves"]
    return Start(
        content["ranks"],
        None if curves is None else {layer: np.array(curve) for layer, curve in curves.items()},
        content["seconds"],
    )


def _costs(task: Task) -> dict[str, int]:
    return {layer.name: sum(layer.shape) for layer in find_layers(task.model(), task.targets)}


def _write_others(
    files: Mapping[int, Path],
    options: Mapping[str, Any],
    start: Start,
    arm: Arm,
    costs: Mapping[str, int],
) -> None:
    """Write the best ranks of the other budgets by what was measured for one, where none are."""
    assert start.curves is not None
    for rank, file in files.items():
        shared = {**options, "rank": rank}
        if most_ranks(rank) == most_ranks(options["rank"]) and _read(file).get("options") != shared:
            ranks = best_ranks(arm, start.curves, costs, rank)
            _write(file, shared, replace(start, ranks=ranks), arm)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write(file: Path, options: Mapping[str, Any], start: Start, arm: Arm) -> dict[str, Any]:
    """Write what was measured; what the file holds."""
    curves = None
    if start.curves is not None and arm.online:
        curves = {
            layer: [float(f"{value:.{_DIGITS}g}") for value in curve[:33]]
            for layer, curve in start.curves.items()
        }
    content = {
        "options": dict(options),
        "ranks": start.ranks,
        "seconds": round(start.seconds, 2),
        "curves": curves,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as out:
        out.write(json.dumps(content).encode() + b"\n")
    return content
