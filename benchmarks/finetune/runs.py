"""The runs: one small file each, written when it is finished, so that any stop loses at most one.

Several processes may work on the same runs: each run is claimed by a lock on a file, which ends
with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, machine
from lorambo_alloc.storage import replacing

FOLDER = RESULTS / "finetune" / "runs"


@dataclass(frozen=True, order=True)
class Run:
    """One training, and what tells it from the others.

    Attributes:
        task: its name.
        arm: by which ranks are chosen.
        rank: the uniform rank whose cost is the budget.
        rate: learning rate.
        seed: of everything random.
        split: what it is scored on.
    """

    task: str
    arm: str
    rank: int
    rate: float
    seed: int
    split: str

    @property
    def path(self) -> str:
        """Relative to the folder of the results."""
        arm = self.arm.replace(":", "-")
        return f"{self.task}/{self.split}/{arm}-b{self.rank}-lr{self.rate:g}-s{self.seed}.json"


def grid(
    task: str,
    arms: Sequence[str],
    ranks: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
    split: str,
) -> list[Run]:
    """All combinations; seeds outermost, so that what is finished first can be compared."""
    return [
        Run(task, arm, rank, rate, seed, split)
        for seed in seeds
        for rank in ranks
        for rate in rates
        for arm in arms
    ]


Rates = Mapping[tuple[str, str, int], float]
"""By task, arm and budget, the rate that dev chose."""


def tuned(chosen: Rates, task: str, arm: str, rank: int) -> tuple[str, str, int] | None:
    """Whose rate an arm takes: its own, or that of the arm that it is a control of."""
    keys = (task, arm, rank), (task, arm.partition(":")[2], rank)
    return next((key for key in keys if key in chosen), None)


def rate_of(chosen: Rates, task: str, arm: str, rank: int) -> float | None:
    """The rate that dev chose for an arm, or for the arm that it is a control of."""
    key = tuned(chosen, task, arm, rank)
    return None if key is None else chosen[key]


def at_chosen_rates(
    task: str,
    arms: Sequence[str],
    ranks: Sequence[int],
    seeds: Sequence[int],
    chosen: Rates,
    one: str | None = None,
) -> list[Run]:
    """The test runs: each arm at the rate that dev chose for it and the budget.

    Args:
        task: its name.
        arms: their names.
        ranks: the budgets.
        seeds: outermost.
        chosen: as `chosen_rates` gives them.
        one: an arm whose rate all train at instead.

    Raises:
        ValueError: an arm has not been run on dev at this budget.
    """
    found: list[Run] = []
    for seed in seeds:
        for rank in ranks:
            for arm in arms:
                rate = rate_of(chosen, task, one or arm, rank)
                if rate is None:
                    raise ValueError(
                        f"arm {one or arm!r}: expected dev runs of {task} at the budget of rank "
                        f"{rank}, which choose its rate; got none"
                    )
                found.append(Run(task, arm, rank, rate, seed, "test"))
    return found


def finished(folder: Path = FOLDER) -> dict[Run, dict[str, Any]]:
    """All runs that have been written."""
    found: dict[Run, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found[Run(**content["run"])] = content
    return found


def check_protocol(results: Mapping[Run, Mapping[str, Any]], task: str, stamp: str) -> None:
    """Refuse results of a task that are of another protocol: they would be compared with new ones.

    Raises:
        ValueError: a result's stamp is not this one.
    """
    for run, result in results.items():
        if run.task == task and result["protocol"] != stamp:
            raise ValueError(
                f"{run.path}: expected a run of the protocol {stamp}, got one of "
                f"{result['protocol']}; move the runs of the older protocol away"
            )


def execute(
    runs: Iterable[Run],
    folder: Path = FOLDER,
    *,
    until: float | None = None,
    train: Callable[[Run, Path], dict[str, Any]] | None = None,
) -> int:
    """Train what is not there yet, in this order.

    Args:
        runs: their order is kept, but those that another process works on are passed over.
        folder: of the results.
        until: as of `time.time()`: no run is begun after it.
        train: trains a run, of which the folder may hold parts; by default one of the protocol's.

    Returns:
        How many were trained here.
    """
    done = 0
    for run in runs:
        if until is not None and time.time() > until:
            break
        path = folder / run.path
        with _claimed(path) as ours:
            if not ours:
                continue
            result = {"run": asdict(run), **(train or _train)(run, folder), "machine": machine(1)}
            with replacing(path) as file:
                file.write(json.dumps(result).encode() + b"\n")
            done += 1
            seconds = result["seconds"]
            print(
                f"{run.path}: loss {result['loss']:.4f}, accuracy {result['accuracy']}, {seconds}",
                flush=True,
            )
    return done


def _train(run: Run, folder: Path) -> dict[str, Any]:
    from benchmarks.finetune.local_tasks import local_task
    from benchmarks.finetune.protocol import protocol
    from benchmarks.finetune.starts import kept_start
    from benchmarks.finetune.training import train

    task, agreed = _task(run.task, local_task), protocol(run.task)
    start = kept_start(run, task, agreed.settings, folder.parent / "starts")
    result = train(
        task,
        run.arm,
        start,
        rank=run.rank,
        rate=run.rate,
        seed=run.seed,
        settings=agreed.settings,
        split=run.split,
    )
    del result["settings"]
    return {"protocol": agreed.stamp, **result}


_TASKS: dict[str, Any] = {}


def _task(name: str, make: Any) -> Any:
    if name not in _TASKS:
        _TASKS[name] = make(name)
    return _TASKS[name]


@contextmanager
def _claimed(path: Path) -> Generator[bool]:
    """Whether nobody has written the path, or works on it; nobody else can within."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        yield False
        return
    claim = path.with_suffix(".claim")
    with claim.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if not os.fstat(file.fileno()).st_nlink:  # its owner has just finished, or failed
            yield False
            return
        try:
            yield not path.exists()
        finally:
            claim.unlink(missing_ok=True)
