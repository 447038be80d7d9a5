"""What the finished runs come to: chosen rates, paired differences, and a table of each task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from benchmarks.finetune.arms import FRAME
from benchmarks.finetune.intervals import (
    Interval,
    crossed_interval,
    paired_interval,
    seed_interval,
)
from benchmarks.finetune.runs import Run, rate_of, tuned
from benchmarks.finetune.training import losses_of
from benchmarks.report import markdown

Results = Mapping[Run, Mapping[str, Any]]

Seeds = Mapping[int, tuple[Run, Mapping[str, Any]]]
"""The runs of an arm by seed, with their results."""


@dataclass(frozen=True)
class Row:
    """An arm at a budget.

    Attributes:
        task: its name.
        arm: its name.
        rank: the uniform rank whose cost is the budget.
        rate: learning rate of the test runs.
        seeds: of the test runs.
        paired: how many of them the baseline has been run with too: those of the differences.
        parameters: that are trained; of adapters without their head's.
        loss: mean over seeds and examples.
        accuracy: likewise; None for language models.
        difference: of the loss to uniform ranks at the same budget (in `frame`: at the least
            one); None for these themselves.
        crossed: the same with Student's interval (`crossed_interval`), which few seeds need.
        accuracy_difference: mean over the seeds.
        measuring: seconds before the training, and of the measurements within it.
        share: of the training's time that they are.
    """

    task: str
    arm: str
    rank: int
    rate: float
    seeds: tuple[int, ...]
    paired: int
    parameters: int
    loss: float
    accuracy: float | None
    difference: Interval | None
    crossed: Interval | None
    accuracy_difference: float | None
    measuring: float
    share: float


def chosen_rates(results: Results) -> dict[tuple[str, str, int], float]:
    """By task, arm and budget, the rate of the lowest mean dev loss.

    Only rates that all of the arm's dev seeds have been run at are compared. A loss that is no
    number is the worst.
    """
    losses: dict[tuple[str, str, int], dict[float, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for run, result in results.items():
        if run.split == "dev":
            losses[run.task, run.arm, run.rank][run.rate][run.seed] = result["loss"]
    chosen: dict[tuple[str, str, int], float] = {}
    for key, rates in losses.items():
        every = set[int]().union(*rates.values())
        means = {
            rate: float(np.nan_to_num(np.mean(list(seeds.values())), nan=np.inf))
            for rate, seeds in rates.items()
            if set(seeds) == every
        }
        if means:
            chosen[key] = min(sorted(means), key=lambda rate: means[rate])
    return chosen


def unsettled(
    results: Results, task: str, arms: Iterable[str], ranks: Iterable[int], seeds: Iterable[int]
) -> list[str]:
    """What the protocol still wants on dev before an arm is tested: seeds, or rates further out.

    The next rate on either side has to be worse than the chosen one, with the seeds that it has
    been run with: one will do.
    """
    chosen, found = chosen_rates(results), list[str]()
    for arm, rank in product(arms, ranks):
        key = tuned(chosen, task, arm, rank)
        if key is None:
            continue
        by_rate: dict[float, dict[int, float]] = defaultdict(dict)
        for run, result in results.items():
            if run.split == "dev" and (run.task, run.arm, run.rank) == key:
                by_rate[run.rate][run.seed] = result["loss"]
        best = by_rate.pop(chosen[key])
        missing = sorted(set(seeds) - set(best))
        where = f"{key[1]} at the budget of rank {rank}"
        if missing:
            found.append(f"{where}: expected a dev run with seed {missing[0]}, got none")
        worse = [rate for rate, losses in by_rate.items() if _is_worse(losses, best)]
        if not any(rate < chosen[key] for rate in worse) or not any(
            rate > chosen[key] for rate in worse
        ):
            found.append(f"{where}: the chosen rate {chosen[key]:g} is an end of those run on dev")
    return found


def _is_worse(losses: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether a rate does worse than the best one with the seeds that both have."""
    both = sorted(set(losses) & set(best))
    mine = [float(np.nan_to_num(losses[seed], nan=np.inf)) for seed in both]
    return bool(both) and float(np.mean(mine)) > float(np.mean([best[seed] for seed in both]))


def dev_table(results: Results, task: str) -> str:
    """Mean dev losses of all arms, budgets and rates, as markdown."""
    cells: dict[tuple[int, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, result in sorted(results.items()):
        if run.task == task and run.split == "dev":
            cells[run.rank, run.arm][run.rate].append(result["loss"])
    rates = sorted({rate for found in cells.values() for rate in found})
    chosen = chosen_rates(results)
    return markdown(
        [
            {
                "budget of rank": str(rank),
                "arm": arm,
                **{
                    f"{rate:g}": " ".join(f"{loss:.4f}" for loss in found.get(rate, []))
                    for rate in rates
                },
                "chosen": f"{chosen[task, arm, rank]:g}" if (task, arm, rank) in chosen else "",
            }
            for (rank, arm), found in sorted(cells.items())
        ]
    )


def rows(
    results: Results, task: str, baseline: str = "uniform", *, one_rate: str | None = None
) -> list[Row]:
    """The test runs of a task, an arm and budget a row, in pairs with the baseline's.

    Those that train other things than adapters are not among them: `frame` has those.

    Args:
        results: all runs.
        task: its name.
        baseline: the arm that the others are compared with.
        one_rate: an arm, at whose chosen rate all are compared; None: each at its own.

    Raises:
        ValueError: an arm for which dev chose no rate was tested at two at one budget.
    """
    runs = _tested(results, task, one_rate)
    found: list[Row] = []
    for (rank, arm), by_seed in sorted(runs.items()):
        if arm not in FRAME:
            against = {} if arm == baseline else runs.get((rank, baseline), {})
            found.append(_row(by_seed, against))
    return found


def frame(results: Results, task: str, baseline: str = "uniform") -> list[Row]:
    """What more parameters, or fewer, are worth: each less the baseline at its least budget.

    The baseline at every budget, then what trains other things than adapters.
    """
    runs = _tested(results, task, None)
    budgets = sorted(rank for rank, arm in runs if arm == baseline)
    least = runs[budgets[0], baseline] if budgets else {}
    keys = [(rank, baseline) for rank in budgets] + [key for key in sorted(runs) if key[1] in FRAME]
    return [_row(runs[key], {} if runs[key] is least else least) for key in keys]


def _row(by_seed: Seeds, against: Seeds) -> Row:
    values = [by_seed[seed] for seed in sorted(by_seed)]
    run = values[0][0]
    seconds = [result["seconds"] for _, result in values]
    measuring = float(np.mean([part["measure"] + (part["online"] or 0.0) for part in seconds]))
    training = float(np.mean([part["train"] - (part["online"] or 0.0) for part in seconds]))
    accuracies = [result["accuracy"] for _, result in values]
    difference, crossed, gained = _against(by_seed, against)
    return Row(
        run.task,
        run.arm,
        run.rank,
        run.rate,
        tuple(sorted(by_seed)),
        len(set(by_seed) & set(against)),
        values[0][1]["parameters"],
        float(np.mean([result["loss"] for _, result in values])),
        None if accuracies[0] is None else float(np.mean(accuracies)),
        difference,
        crossed,
        gained,
        measuring,
        measuring / (measuring + training),
    )


def _tested(results: Results, task: str, one_rate: str | None) -> Mapping[tuple[int, str], Seeds]:
    """By budget and arm, the test runs of each seed."""
    runs: dict[tuple[int, str], dict[int, tuple[Run, Mapping[str, Any]]]] = defaultdict(dict)
    chosen = chosen_rates(results)
    for run, result in results.items():
        wanted = rate_of(chosen, task, one_rate or run.arm, run.rank)
        if run.task == task and run.split == "test" and wanted in (None, run.rate):
            other = next(iter(runs[run.rank, run.arm].values()), (run, result))[0]
            if other.rate != run.rate:
                raise ValueError(
                    f"{run.path}: expected test runs at one rate, got {other.rate:g} and "
                    f"{run.rate:g}"
                )
            runs[run.rank, run.arm][run.seed] = (run, result)
    return runs


def learning(
    results: Results, task: str, rank: int = 1, baseline: str = "uniform"
) -> dict[str, list[Interval]]:
    """By arm, its training loss less the baseline's in each tenth of the training.

    Of the test runs at the rate that was chosen for the baseline: seeds are paired, and with one
    seed all arms see the same batches in the same order. Intervals are Student's, over seeds; arms
    with fewer than two in pairs are left out.
    """
    runs = _tested(results, task, baseline)
    theirs = runs.get((rank, baseline), {})
    found: dict[str, list[Interval]] = {}
    for (budget, arm), ours in sorted(runs.items()):
        seeds = sorted(set(ours) & set(theirs))
        if budget != rank or arm == baseline or len(seeds) < 2:
            continue
        matrix = [
            np.subtract(ours[s][1]["train_losses"], theirs[s][1]["train_losses"]) for s in seeds
        ]
        by_tenth = [seed_interval(column) for column in np.transpose(matrix)]
        found[arm] = [interval for interval in by_tenth if interval is not None]
    return found


def _against(ours: Seeds, theirs: Seeds) -> tuple[Interval | None, Interval | None, float | None]:
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None, None, None
    pairs = [(ours[seed][1], theirs[seed][1]) for seed in seeds]
    matrix = np.array([losses_of(mine) - losses_of(other) for mine, other in pairs])
    gained = None
    if pairs[0][0]["accuracy"] is not None:
        gained = float(np.mean([mine["accuracy"] - other["accuracy"] for mine, other in pairs]))
    return paired_interval(matrix), crossed_interval(matrix), gained


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
                "less the baseline's": _shown(row.difference),
                "by Student's t": _shown(row.crossed),
                "accuracy": "" if row.accuracy is None else f"{row.accuracy:.2%}",
                "measuring": f"{row.measuring:.0f} s ({row.share:.0%})",
                "seeds (in pairs)": f"{len(row.seeds)} ({row.paired})",
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
    return [
        asdict(row)
        | {
            "difference": row.difference and list(row.difference),
            "crossed": row.crossed and list(row.crossed),
        }
        for row in found
    ]
