"""One training of one arm: the same start, the same batches, the same parameters as every other."""

from __future__ import annotations

import base64
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.finetune.arms import Arm, Start, arm_of
from benchmarks.finetune.products import products, slopes
from benchmarks.finetune.task import Task, evaluate, shuffled
from lorambo_adapters.layers import find_layers
from lorambo_adapters.ranks.formats import to_peft
from lorambo_adapters.ranks.mask import active_ranks
from lorambo_adapters.ranks.resize import resize
from lorambo_adapters.trainer import RankController, allocator_for
from lorambo_adapters.training.probe import Measurement, RankProbe
from lorambo_alloc import GainCurves, uniform_rank


@dataclass(frozen=True)
class Settings:
    """What all arms of a task share.

    Attributes:
        steps: of AdamW, without weight decay; the rate rises over the first 6 % and falls to 0.
        batch: examples a step.
        measured: batches that a signal is measured on.
        scale: the factor before B A in every layer, whatever its rank.
        clip: of the gradient's norm.
        period: steps between two measurements of the online arms.
        bfloat16: whether products are computed in it (`products`).
        dev_examples: how many examples of dev are evaluated, at most.
        grouped: batches that are drawn at once and filled by length (`shuffled`).
    """

    steps: int
    batch: int
    measured: int
    scale: float = 2.0
    clip: float = 1.0
    period: int = 25
    bfloat16: bool = True
    dev_examples: int = 10**9
    grouped: int = 1


def train(
    task: Task,
    name: str,
    start: Start,
    *,
    rank: int,
    rate: float,
    seed: int,
    settings: Settings,
    split: str = "dev",
) -> dict[str, Any]:
    """Train one arm and evaluate it once, at its end.

    Args:
        task: what is trained.
        name: of the arm.
        start: its ranks.
        rank: the uniform rank whose cost is the budget.
        rate: learning rate, of adapters and head alike.
        seed: of head, factors, order of the batches and dropout.
        settings: of the task.
        split: what is evaluated.

    Returns:
        What became of it: `loss`, `accuracy` (or None), `losses` by example (float32, base64),
        `right` by example (bits, base64; or None),
        `ranks`, `parameters`, `budget`, `seconds` by part, `train_losses` (means of tenths).

    Raises:
        AssertionError: the adapters' tensors have not exactly the budget's parameters (those of an
            online arm: more).
    """
    arm = arm_of(name)
    torch.manual_seed(seed)
    base = task.model()
    costs = {layer.name: sum(layer.shape) for layer in find_layers(base, task.targets)}
    budget = rank * sum(costs.values())
    if arm.trains == "adapters":
        model = adapted(
            base, task, start.ranks, seed, settings.scale, moving=arm.online is not None
        )
        if arm.power:
            rescale(model, rank, arm.power)
    else:
        model = _whole(base, task, arm.trains)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rising = max(1, round(0.06 * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / rising, (settings.steps - step) / max(1, settings.steps - rising)
        ),
    )
    controller = None
    if arm.online:
        controller = _controller(model, optimizer, arm, start, rank, seed, settings)
    torch.manual_seed(seed)  # the same dropout in every arm: factors have drawn unequally many
    batches = islice(shuffled(task, settings.batch, seed, settings.grouped), settings.steps)
    begun, losses = time.perf_counter(), []
    for batch in batches:
        losses.append(slopes(model, batch, bfloat16=settings.bfloat16))
        torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], settings.clip
        )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step(batch)
    trained_in = time.perf_counter() - begun
    ranks = dict(start.ranks)
    if arm.trains == "adapters":
        ranks = _spent(model, costs, budget, exactly=arm.online is None)
    result: dict[str, Any] = {
        "ranks": ranks if arm.trains == "adapters" else None,
        "budget": budget,
        "parameters": sum(costs[layer] * ranks[layer] for layer in costs)
        if arm.trains == "adapters"
        else sum(p.numel() for p in trained),
        "train_losses": _tenths(losses),
    }
    if controller is not None:
        controller.close()
        result["history"] = _history(controller)
    begun = time.perf_counter()
    result |= _evaluated(task, model, split, settings)
    result["seconds"] = {
        "measure": round(start.seconds, 2),
        "train": round(trained_in, 2),
        "online": None if controller is None else round(controller.seconds, 2),
        "evaluate": round(time.perf_counter() - begun, 2),
    }
    return result | {"settings": asdict(settings)}


def losses_of(result: Mapping[str, Any]) -> np.ndarray:
    """The losses by example that a result holds."""
    return np.frombuffer(base64.b64decode(result["losses"]), dtype="<f4").astype(np.float64)


def right_of(result: Mapping[str, Any]) -> np.ndarray:
    """Which examples a result has right, in a task of answers."""
    bits = np.frombuffer(base64.b64decode(result["right"]), dtype=np.uint8)
    return np.unpackbits(bits, count=len(losses_of(result))).astype(bool)


def _packed(right: np.ndarray) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def _tenths(losses: Sequence[float]) -> list[float]:
    """Their means over tenths of the training."""
    parts = np.array_split(np.array(losses), min(10, len(losses)))
    return [round(float(part.mean()), 4) for part in parts]


def _evaluated(task: Task, model: Any, split: str, settings: Settings) -> dict[str, Any]:
    examples = task.splits[split]
    if split == "dev":
        examples = examples[: settings.dev_examples]
    with products(_device(model), bfloat16=settings.bfloat16):
        scores = evaluate(task, model, examples)
    values = scores.losses.cpu().numpy().astype("<f4")
    return {
        "split": split,
        "loss": float(values.mean(dtype=np.float64)),
        "accuracy": None if scores.right is None else float(scores.right.double().mean()),
        "losses": base64.b64encode(values.tobytes()).decode(),
        "right": None if scores.right is None else _packed(scores.right.cpu().numpy()),
    }


def _device(model: torch.nn.Module) -> str:
    """The kind of device that the model is on: the task puts it and its batches there."""
    return next(model.parameters()).device.type


def adapted(
    base: Any,
    task: Task,
    ranks: Mapping[str, int],
    seed: int,
    scale: float,
    *,
    moving: bool = False,
) -> Any:
    """A PEFT model whose layers of any rank start from the same rows of A; B is zero.

    Where ranks move, layers of rank 0 are wrapped too: only those can get ranks later.
    """
    import peft

    wrapped = {layer: max(1, found) for layer, found in ranks.items()} if moving else ranks
    config = peft.LoraConfig(
        **to_peft(wrapped, modules=base, scale=scale),
        task_type=task.peft_type,
        modules_to_save=list(task.head) or None,
    )
    model: Any = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        layer, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if found:
            drawn = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(layer.encode()))
            width = parameter.shape[1]
            rows = torch.rand(max(512, len(parameter)), width, generator=drawn)[: len(parameter)]
            with torch.no_grad():
                parameter.copy_((2 * rows - 1) / width**0.5)  # PEFT's distribution
    if wrapped != ranks:
        resize(model, ranks)
    return model


def rescale(model: torch.nn.Module, rank: int, power: float) -> None:
    """Multiply the scale of each layer of a PEFT model by (rank / its own rank) ** power."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter, own in module.r.items():
                module.scaling[adapter] *= (rank / own) ** power


def _whole(base: torch.nn.Module, task: Task, trains: str) -> Any:
    """The model with all of its weights trainable, or its head alone."""
    heads = tuple(f"{part}." for part in task.head)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(trains == "all" or name.startswith(heads))
    return base


class _Uninformed:
    """A probe that keeps the directions it has found to itself: new ones are drawn at random."""

    def __init__(self, probe: RankProbe) -> None:
        self._probe = probe

    def measure(self, batches: Sequence[Any], /) -> Measurement:
        return replace(self._probe.measure(batches), directions={})


def _controller(
    model: Any,
    optimizer: Any,
    arm: Arm,
    start: Start,
    rank: int,
    seed: int,
    settings: Settings,
) -> RankController:
    online = arm.online
    assert online is not None
    allocator = allocator_for(
        model,
        uniform_rank(rank),
        warmup=max(settings.period, round(online.first * settings.steps)),
        period=settings.period,
        freeze=max(1, settings.steps * 3 // 5),
        switching_share=0.1,
        max_moves=online.most,
        max_rank=max(64, 4 * rank),
    )
    if start.curves is not None and arm.in_loss_units:
        allocator.observe(GainCurves(start.curves))
    options: dict[str, Any] = {"ahead": max(8, 2 * rank), "seed": seed}
    if not online.informed:
        options = {"probe": _Uninformed(RankProbe(model, **options))}
    return RankController(
        model,
        optimizer,
        allocator,
        batches_per_probe=online.batches,
        on_error="raise",  # where the ranks stay after an error, the arm is another one
        **options,
    )


def _spent(model: Any, costs: Mapping[str, int], budget: int, *, exactly: bool) -> dict[str, int]:
    """The ranks of the tensors, which cost the budget."""
    ranks = dict.fromkeys(costs, 0) | active_ranks(model)
    tensors = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    spent = sum(costs[name] * ranks[name] for name in costs)
    if tensors != spent or spent > budget or (exactly and spent != budget):
        raise AssertionError(f"expected {budget:,} parameters, got {tensors:,} ({spent:,})")
    return ranks


def _history(controller: RankController) -> dict[str, Any]:
    history = controller.history
    return {
        "steps": [int(step) for step in history.steps],
        "ranks": history.ranks.tolist(),
        "spent": [int(spent) for spent in history.spent],
    }
