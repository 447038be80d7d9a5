"""What the finished runs come to: chosen rates, paired differences, and a table of each task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.finetune.intervals import Interval, paired_interval
from benchmarks.finetune.runs import Run
from benchmarks.finetune.training import losses_of
from benchmarks.report import markdown

Results = Mapping[Run, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """An arm at a budget.

    Attributes:
        task: its name.
        arm: its name.
        rank: the uniform rank whose cost is the budget.
        rate: the learning rate chosen on dev; of the test runs.
        seeds: of the test runs.
        parameters: of the adapters.
        loss: mean over seeds and examples.
        accuracy: likewise; None for language models.
        difference: of the loss to uniform ranks at the same budget; None for uniform itself.
        accuracy_difference: mean over the seeds.
        measuring: seconds before the training, and of the measurements within it.
        share: of the training's time that they are.
    """

    task: str
    arm: str
    rank: int
    rate: float
    seeds: tuple[int, ...]
    parameters: int
    loss: float
    accuracy: float | None
    difference: Interval | None
    accuracy_difference: float | None
    measuring: float
    share: float


def chosen_rates(results: Results) -> dict[tuple[str, str, int], float]:
    """By task, arm and budget, the rate of the lowest mean dev loss.

    Only rates that all of the arm's dev seeds have been run at are compared.
    """
    losses: dict[tuple[str, str, int], dict[float, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for run, result in results.items():
        if run.split == "dev":
            losses[run.task, run.arm, run.rank][run.rate][run.seed] = result["loss"]
    chosen: dict[tuple[str, str, int], float] = {}
    for key, rates in losses.items():
        most = max(len(seeds) for seeds in rates.values())
        means = {
            rate: float(np.mean(list(seeds.values())))
            for rate, seeds in rates.items()
            if len(seeds) == most
        }
        chosen[key] = min(means, key=lambda rate: means[rate])
    return chosen


def dev_table(results: Results, task: str) -> str:
    """Mean dev losses of all arms, budgets and rates, as markdown."""
    cells: dict[tuple[int, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, result in sorted(results.items()):
        if run.task == task and run.split == "dev":
            cells[run.rank, run.arm][run.rate].append(result["loss"])
    rates = sorted({rate for found in cells.values() for rate in found})
    return markdown(
        [
            {
                "budget of rank": str(rank),
                "arm": arm,
                **{
                    f"{rate:g}": " ".join(f"{loss:.4f}" for loss in found.get(rate, []))
                    for rate in rates
                },
            }
            for (rank, arm), found in sorted(cells.items())
        ]
    )


def rows(results: Results, task: str, baseline: str = "uniform") -> list[Row]:
    """The test runs of a task, an arm and budget a row, in pairs with the baseline's."""
    runs: dict[tuple[int, str], dict[int, tuple[Run, Mapping[str, Any]]]] = defaultdict(dict)
    for run, result in results.items():
        if run.task == task and run.split == "test":
            runs[run.rank, run.arm][run.seed] = (run, result)
    found: list[Row] = []
    for (rank, arm), by_seed in sorted(runs.items()):
        values = [by_seed[seed] for seed in sorted(by_seed)]
        seconds = [result["seconds"] for _, result in values]
        measuring = float(np.mean([part["measure"] + (part["online"] or 0.0) for part in seconds]))
        training = float(np.mean([part["train"] - (part["online"] or 0.0) for part in seconds]))
        accuracies = [result["accuracy"] for _, result in values]
        difference, gained = _against(by_seed, runs.get((rank, baseline), {}), arm == baseline)
        found.append(
            Row(
                task,
                arm,
                rank,
                values[0][0].rate,
                tuple(sorted(by_seed)),
                values[0][1]["parameters"],
                float(np.mean([result["loss"] for _, result in values])),
                None if accuracies[0] is None else float(np.mean(accuracies)),
                difference,
                gained,
                measuring,
                measuring / (measuring + training),
            )
        )
    return found


def _against(
    ours: Mapping[int, tuple[Run, Mapping[str, Any]]],
    theirs: Mapping[int, tuple[Run, Mapping[str, Any]]],
    same: bool,
) -> tuple[Interval | None, float | None]:
    seeds = sorted(set(ours) & set(theirs))
    if same or not seeds:
        return None, None
    pairs = [(ours[seed][1], theirs[seed][1]) for seed in seeds]
    matrix = np.array([losses_of(mine) - losses_of(other) for mine, other in pairs])
    gained = None
    if pairs[0][0]["accuracy"] is not None:
        gained = float(np.mean([mine["accuracy"] - other["accuracy"] for mine, other in pairs]))
    return paired_interval(matrix), gained


def table(found: Sequence[Row]) -> str:
    """Rows as markdown."""
    return markdown(
        [
            {
                "budget of rank": str(row.rank),
                "arm": row.arm,
                "parameters": f"{row.parameters:,}",
                "rate": f"{row.rate:g}",
                "held-out loss": f"{row.loss:.4f}",
                "less uniform's": _shown(row.difference),
                "accuracy": "" if row.accuracy is None else f"{row.accuracy:.2%}",
                "measuring": f"{row.measuring:.0f} s ({row.share:.0%})",
                "seeds": str(len(row.seeds)),
            }
            for row in found
        ]
    )


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def as_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [asdict(row) | {"difference": row.difference and list(row.difference)} for row in found]
