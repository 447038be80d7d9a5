"""The arms of the comparison: how each comes to its ranks, at exactly the same parameters."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.finetune import signals
from benchmarks.finetune.adalora import adalora_ranks
from benchmarks.finetune.exact_budget import nearest_exact, spend_exactly
from benchmarks.finetune.signals import Curves, Measuring
from benchmarks.finetune.task import Task, shuffled
from lorambo_adapters.layers import find_layers


@dataclass(frozen=True)
class Online:
    """How ranks follow the training.

    Attributes:
        first: the share of the training after which ranks are moved first; 0: after a period.
        batches: that a probe takes, half of them to find directions.
        informed: new ranks begin along directions that the probe has found, which no other arm's
            do; else at random, so that the ranks alone differ.
        most: ranks that move at once; None: any number.
    """

    first: float = 0.0
    batches: int = 8
    informed: bool = True
    most: int | None = None


FEW = Online(first=0.25, batches=16, most=2)
"""Layers' gains are measured one by one, so that they hold for small changes only."""


@dataclass(frozen=True)
class Arm:
    """One way to choose ranks.

    Attributes:
        curves: a signal whose best ranks are taken, exactly.
        ranks: a rule's own ranks, moved as little as spending the budget exactly takes.
        warm: steps that the head is trained for, in a copy, before anything is measured.
        online: whether and how the ranks follow the training.
        floor: ranks that every layer has; only those above it are chosen.
        in_loss_units: the signal's values are, so that an online arm goes on from them.
        power: a layer's scale falls with this power of its rank, and is the same as in all other
            arms at the uniform rank; 1/2 is rsLoRA's rule, 1 LoRA's with one alpha.
        trains: what is trained: "adapters" (and the head), "all" weights, or the "head" alone.
    """

    curves: Callable[[Measuring], Curves] | None = None
    ranks: Callable[[Measuring], dict[str, int]] | None = None
    warm: int = 0
    online: Online | None = None
    floor: int = 0
    in_loss_units: bool = False
    power: float = 0.0
    trains: str = "adapters"


ARMS: dict[str, Arm] = {
    "uniform": Arm(),
    "gradient": Arm(curves=signals.gradient),
    "gradient_warm": Arm(curves=signals.gradient, warm=50),
    "gradient_floor": Arm(curves=signals.gradient, floor=1),
    "gradient_floor_warm": Arm(curves=signals.gradient, floor=1, warm=50),
    "gradient_rs": Arm(curves=signals.gradient, power=0.5),
    "gradient_rs_warm": Arm(curves=signals.gradient, power=0.5, warm=50),
    "gradient_alpha": Arm(curves=signals.gradient, power=1.0),
    "gradient_alpha_warm": Arm(curves=signals.gradient, power=1.0, warm=50),
    "nuclear": Arm(curves=signals.gradient_nuclear),
    "nuclear_warm": Arm(curves=signals.gradient_nuclear, warm=50),
    "kfac": Arm(curves=signals.kfac),
    "kfac_warm": Arm(curves=signals.kfac, warm=50),
    "start": Arm(curves=signals.directions),
    "start_warm": Arm(curves=signals.directions, warm=50),
    "coupled_warm": Arm(ranks=signals.coupled_ranks, warm=50),
    "short_run": Arm(curves=signals.short_run),
    "online": Arm(online=Online()),
    "online_random": Arm(online=Online(informed=False)),
    "online_late": Arm(online=Online(first=0.25)),
    "online_two": Arm(online=replace(FEW, first=0.0)),
    "both": Arm(curves=signals.directions, online=Online(), in_loss_units=True),
    "both_late": Arm(curves=signals.gradient, warm=50, online=Online(first=0.25)),
    "both_two": Arm(curves=signals.gradient, warm=50, online=FEW),
    "eva": Arm(ranks=signals.eva_ranks),
    "gora": Arm(ranks=signals.gora_ranks),
    "gora_warm": Arm(ranks=signals.gora_ranks, warm=50),
    "adalora": Arm(ranks=adalora_ranks),
    "mlp_only": Arm(ranks=signals.mlp_ranks),
    "full": Arm(trains="all"),
    "head": Arm(trains="head"),
}
"""By name. "shuffled:NAME" and "inverted:NAME" are controls of any of them (`control`)."""

CONTROLS = ("shuffled", "inverted")

FRAME = tuple(name for name, arm in ARMS.items() if arm.trains != "adapters")
"""What the adapters are seen against: more or fewer parameters, which are no budget's."""


@dataclass(frozen=True)
class Start:
    """The ranks that a training starts with.

    Attributes:
        ranks: by layer.
        curves: the signal they are from, if they are from one.
        seconds: that it took.
    """

    ranks: dict[str, int]
    curves: Curves | None
    seconds: float


def arm_of(name: str) -> Arm:
    """The arm of a name, that of a control being the one it is a control of.

    Raises:
        ValueError: there is none, or it has no ranks that a control could permute.
    """
    kind, _, of = name.partition(":")
    base = of if kind in CONTROLS else name
    if base not in ARMS:
        raise ValueError(f"arm: expected one of {', '.join(ARMS)}, got {name!r}")
    arm = ARMS[base]
    if base != name and (arm.online or (arm.curves is None and arm.ranks is None)):
        raise ValueError(f"arm: expected a control of an arm with measured ranks, got {name!r}")
    return arm


def starting_ranks(
    name: str, task: Task, *, rank: int, seed: int, rate: float, batches: int, size: int
) -> Start:
    """Measure, and choose the ranks that cost exactly what `rank` in every layer does.

    Args:
        name: of the arm.
        task: what is trained.
        rank: the uniform rank.
        seed: of the run: its head, its first batches, the sketches.
        rate: learning rate of signals that train.
        batches: how many are measured on.
        size: of a batch.
    """
    arm = arm_of(name)
    torch.manual_seed(seed)
    model = task.model()
    layers = find_layers(model, task.targets)
    costs = {layer.name: sum(layer.shape) for layer in layers}
    budget = rank * sum(costs.values())
    if arm.curves is None and arm.ranks is None:
        return Start(dict.fromkeys(costs, rank), None, 0.0)
    begun = time.perf_counter()
    first = list(islice(shuffled(task, size, seed), batches))
    measuring = Measuring(task, model, layers, first, rank, rate, seed)
    if arm.warm:
        warm_head(task, model, steps=arm.warm, size=size, seed=seed)
    curves = None
    if arm.curves is not None:
        curves = {layer: _long_enough(c, rank + 1) for layer, c in arm.curves(measuring).items()}
        ranks = best_ranks(arm, curves, costs, rank)
    else:
        assert arm.ranks is not None
        ranks = nearest_exact(arm.ranks(measuring), costs, budget)
    seconds = time.perf_counter() - begun
    return Start(control(name, ranks, costs, seed), curves, seconds)


def best_ranks(arm: Arm, curves: Curves, costs: Mapping[str, int], rank: int) -> dict[str, int]:
    """The best ranks by these curves that cost exactly what `rank` in every layer does."""
    above = {layer: _long_enough(curve, rank + 1)[arm.floor :] for layer, curve in curves.items()}
    chosen = spend_exactly(above, costs, (rank - arm.floor) * sum(costs.values()))
    return {layer: arm.floor + more for layer, more in chosen.items()}


def _long_enough(curve: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """A curve that reaches the uniform rank: further ranks are worth nothing more."""
    return np.append(curve, np.full(max(0, length - len(curve)), curve[-1]))


def control(
    name: str, ranks: Mapping[str, int], costs: Mapping[str, int], seed: int
) -> dict[str, int]:
    """Ranks permuted among layers of one cost: "shuffled" at random, "inverted" least for most.

    An arm that is no control keeps its ranks.
    """
    kind = name.partition(":")[0]
    if kind not in CONTROLS:
        return dict(ranks)
    groups: dict[int, list[str]] = defaultdict(list)
    for layer, cost in costs.items():
        groups[cost].append(layer)
    draw, permuted = random.Random(seed), dict(ranks)
    for group in groups.values():
        values = [ranks[layer] for layer in group]
        if kind == "shuffled":
            draw.shuffle(values)
            permuted |= zip(group, values, strict=True)
        else:
            order = sorted(group, key=lambda layer: ranks[layer])
            permuted |= zip(order, sorted(values, reverse=True), strict=True)
    return permuted


def warm_head(task: Task, model: Any, *, steps: int, size: int, seed: int) -> None:
    """Train nothing but the head, in place: a random one says little of the layers below it.

    Nothing requires a gradient afterwards but the head.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = [p for part in task.head for p in model.get_submodule(part).parameters()]
    if not head:
        return
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head, lr=5e-3, weight_decay=0.0)
    for batch in islice(shuffled(task, size, seed), steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
