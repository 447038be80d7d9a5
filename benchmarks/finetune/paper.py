"""The paper's settings, with real models and data from the hub, on one GPU or (slowly) a CPU.

    python -m benchmarks.finetune paper --setting roberta-base/qnli
    python -m benchmarks.finetune paper --setting t5-base/sst2 --arm both --seeds 0 1

Each arm is trained once at every rate of a grid and scored on dev; at the rate of its lowest dev
loss it is trained with each seed and scored on test. Every run is kept beside the output as it
finishes, so that the same command goes on where it was stopped, and several may run at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.finetune.arms import FRAME, arm_of, starting_ranks
from benchmarks.finetune.paper_settings import (
    ARMS,
    DEV_SEEDS,
    SEEDS,
    SETTINGS,
    PaperSetting,
    nearest_rank,
)
from benchmarks.finetune.report import as_json, chosen_rates, frame, rows, table
from benchmarks.finetune.runs import Run, execute, finished, grid
from benchmarks.finetune.task import Task
from benchmarks.finetune.training import Settings, train
from benchmarks.report import RESULTS
from lorambo_adapters.layers import find_layers
from lorambo_alloc.storage import replacing

_OTHERS = ("datasets", "huggingface_hub", "peft", "torch", "transformers")


def main(arguments: Sequence[str]) -> None:
    """Run a setting: what is not there yet, and then the summary of all that is.

    Raises:
        ValueError: an argument or the data is not as expected, or the runs beside the output are
            of another model, data or settings.
    """
    options = _parser().parse_args(arguments)
    setting = _changed(SETTINGS[options.setting], options)
    arms = ARMS if options.arm == ["all"] else tuple(options.arm)
    for arm in arms:
        arm_of(arm)
    with warnings.catch_warnings():
        for package in _OTHERS:  # they warn of their own futures
            warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        run_setting(
            setting,
            arms,
            device=options.device or _device(),
            dev_seeds=options.dev_seeds,
            seeds=options.seeds,
            output=options.output or RESULTS / "finetune" / f"{_flat(setting.name)}.json",
        )


def run_setting(
    setting: PaperSetting,
    arms: Sequence[str],
    *,
    device: str,
    dev_seeds: Sequence[int],
    seeds: Sequence[int],
    output: Path,
) -> dict[str, Any]:
    """Train, and write the summary.

    Args:
        setting: one of `SETTINGS`, or a change of it.
        arms: names.
        device: as torch names it.
        dev_seeds: of the runs that choose each arm's rate; none are run if there is one rate.
        seeds: of the runs that are reported.
        output: JSON; the runs are in a folder beside it.

    Returns:
        The summary: `paper`, `rank`, `parameters`, and a row an arm with its `metrics` by seed.

    Raises:
        ValueError: as in `main`.
    """
    task = setting.task(_flat(setting.name), setting.model, setting.data, setting.config, device)
    costs = {layer.name: sum(layer.shape) for layer in find_layers(task.model(), task.targets)}
    rank = setting.rank or nearest_rank(costs, setting.parameters or 0)
    parameters = rank * sum(costs.values())
    print(
        f"{setting.name}: {setting.model} on {device}; rank {rank} in each of {len(costs)} layers "
        f"costs {parameters:,} parameters",
        flush=True,
    )
    stamp = _stamp(setting, rank)
    folder = output.with_suffix(".runs")
    _check_stamp(folder, stamp)
    trained = _trainer(task, setting, stamp, device)
    if len(setting.rates) > 1:
        execute(
            grid(task.name, arms, [rank], setting.rates, dev_seeds, "dev"), folder, train=trained
        )
    known = {run: found for run, found in finished(folder).items() if run.rate in setting.rates}
    chosen, only = chosen_rates(known), min(setting.rates)
    rates = {arm: chosen.get((task.name, arm, rank), only) for arm in arms}
    tests = [Run(task.name, arm, rank, rates[arm], s, "test") for s in seeds for arm in arms]
    execute(tests, folder, train=trained)
    summary = _summary(setting, rank, parameters, task.name, finished(folder))
    with replacing(output) as file:
        file.write(json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def _trainer(
    task: Task, setting: PaperSetting, stamp: str, device: str
) -> Callable[[Run, Path], dict[str, Any]]:
    """A function that trains a run.

    Signals that train do so at the lowest rate, so that ranks do not depend on the run's rate.
    """
    settings = setting.settings

    def trained(run: Run, _: Path) -> dict[str, Any]:
        start = starting_ranks(
            run.arm,
            task,
            rank=run.rank,
            seed=run.seed,
            rate=min(setting.rates),
            batches=settings.measured,
            size=settings.batch,
        )
        result = train(
            task,
            run.arm,
            start,
            rank=run.rank,
            rate=run.rate,
            seed=run.seed,
            settings=settings,
            split=run.split,
        )
        return {"protocol": stamp, "device": _device_name(device), **result}

    return trained


def _summary(
    setting: PaperSetting, rank: int, parameters: int, task: str, results: Mapping[Run, Any]
) -> dict[str, Any]:
    framed = (row for row in frame(results, task) if row.arm in FRAME)
    found = [row for row in (*rows(results, task), *framed) if row.rank == rank]
    print(table(found))
    listed = as_json(found)
    for row in listed:
        runs = [
            results[Run(task, row["arm"], rank, row["rate"], seed, "test")] for seed in row["seeds"]
        ]
        values = [_metric(setting.metric, run) for run in runs]
        row["metrics"] = values
        print(f"{row['arm']}: {setting.metric} {sum(values) / len(values):.2f}")
    return {
        "setting": setting.name,
        "model": setting.model,
        "data": setting.data,
        "config": setting.config,
        "metric": setting.metric,
        "paper": dict(setting.paper),
        "rank": rank,
        "parameters": parameters,
        "settings": dataclasses.asdict(setting.settings),
        "rows": listed,
    }


def _metric(metric: str, result: Mapping[str, Any]) -> float:
    """In per cent, or the exponential of the mean loss of a token (windows are equally long)."""
    return 100 * result["accuracy"] if metric == "accuracy" else math.exp(result["loss"])


def _stamp(setting: PaperSetting, rank: int) -> str:
    """A short hash of what runs that are compared have in common."""
    settings = dataclasses.asdict(setting.settings)
    text = json.dumps([setting.name, setting.model, setting.data, rank, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_stamp(folder: Path, stamp: str) -> None:
    for run, result in finished(folder).items():
        if result["protocol"] != stamp:
            raise ValueError(
                f"{folder}: expected runs of this model, data, budget and settings, got others "
                f"({run.path}); choose another --output"
            )


def _changed(setting: PaperSetting, options: argparse.Namespace) -> PaperSetting:
    """The setting with what the command line changes of it."""
    given: dict[str, Any] = {
        key: getattr(options, key)
        for key in ("model", "data", "rank", "parameters")
        if getattr(options, key) is not None
    }
    if options.parameters is not None:
        given["rank"] = None
    if options.rates is not None:
        given["rates"] = tuple(options.rates)
    trainings: dict[str, Any] = {
        key: getattr(options, key)
        for key in ("steps", "batch", "measured", "period")
        if getattr(options, key) is not None
    }
    settings: Settings = dataclasses.replace(setting.settings, **trainings)
    return dataclasses.replace(setting, settings=settings, **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--setting", choices=tuple(SETTINGS), required=True)
    add("--arm", nargs="+", default=["all"], help=f"all ({', '.join(ARMS)}) or names of arms")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the reported runs")
    add("--dev-seeds", type=int, nargs="+", default=list(DEV_SEEDS), help="to choose a rate")
    add("--rates", type=_positive(float), nargs="+", help="a grid; one alone is taken as is")
    add("--model", help="another name on the hub, or a folder")
    add("--data", help="another name on the hub, or a folder")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--rank", type=_positive(int), help="the uniform rank that is the budget")
    budget.add_argument("--parameters", type=_positive(int), help="of the adapters, about")
    for key, what in (
        ("steps", "of a training"),
        ("batch", "examples a step"),
        ("measured", "batches before the training"),
        ("period", "steps between two measurements while training"),
    ):
        add(f"--{key}", type=_positive(int), help=what)
    add("--device", help="as torch names it (default: cuda if there is one)")
    add("--output", type=Path, help="JSON (default: in benchmarks/results/finetune)")
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read


def _flat(name: str) -> str:
    """A setting's name as a file's."""
    return name.replace("/", "-")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
