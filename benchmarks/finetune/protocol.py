"""The protocol, read from `protocol.toml`: what is compared with what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finetune.training import Settings

FILE = Path(__file__).with_name("protocol.toml")


@dataclass(frozen=True)
class Protocol:
    """Of one task.

    Attributes:
        task: its name.
        settings: of every training.
        budgets: uniform ranks whose cost is spent.
        rates: the grid of learning rates.
        dev_seeds: of the runs that choose a rate.
        seeds: of the runs that are reported.
        stamp: a short hash of the settings.
    """

    task: str
    settings: Settings
    budgets: tuple[int, ...]
    rates: tuple[float, ...]
    dev_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    stamp: str


def protocol(task: str, path: Path = FILE) -> Protocol:
    """The protocol of a task.

    Raises:
        ValueError: the file has none for it, an entry is missing or unknown, or a seed is of both
            kinds.
    """
    whole = tomllib.loads(path.read_text(encoding="utf-8"))
    if task not in whole:
        raise ValueError(f"task: expected one of {', '.join(whole)}, got {task!r}")
    entries = whole[task]
    lists = ("budgets", "rates", "dev_seeds", "seeds")
    known = {field.name for field in dataclasses.fields(Settings)}
    for key in entries:
        if key not in known and key not in lists:
            raise ValueError(f"{path.name}: [{task}]: unknown entry {key!r}")
    for key in lists:
        if key not in entries:
            raise ValueError(f"{path.name}: [{task}]: expected {key!r}, got none")
    both = sorted(set(entries["dev_seeds"]) & set(entries["seeds"]))
    if both:
        raise ValueError(
            f"{path.name}: [{task}]: expected other seeds than the dev_seeds, got {both[0]} in both"
        )
    settings = Settings(**{key: value for key, value in entries.items() if key in known})
    stamped = dataclasses.asdict(settings)
    if settings.grouped == 1:  # older than this entry: earlier runs keep their stamps
        del stamped["grouped"]
    text = json.dumps(stamped, sort_keys=True)
    return Protocol(
        task,
        settings,
        *(tuple(entries[key]) for key in lists),
        stamp=hashlib.sha256(text.encode()).hexdigest()[:12],
    )
