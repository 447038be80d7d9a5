"""Does a signal foretell what a layer's rank is worth? Each layer trained alone, and compared.

    python -m benchmarks.finetune predicted minilm

For each layer a LoRA of one rank is trained in that layer alone, from the same start and on the
same batches, and the held-out loss that it saves is set beside what each signal predicts for the
layer's first ranks. Where there is a head it is trained first, alone, and then stays as it is, so
that all that is saved is the layer's doing. Layers are done one by one and written as they finish.
At the end all of them are trained together: where that saves much less than the sum of what they
save alone, layers stand in for each other, and no sum of layers' gains can foretell a training.

Rank correlations (Spearman) are over layers; "per parameter" divides both by the cost of the ranks,
which is what decides where a rank goes. It is above 0 even where the signal tells nothing, as both
are divided by the same costs; the columns of one cost each are free of that.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.finetune import signals
from benchmarks.finetune.arms import warm_head
from benchmarks.finetune.local_tasks import local_task
from benchmarks.finetune.protocol import protocol
from benchmarks.finetune.signals import Measuring
from benchmarks.finetune.task import Task, evaluate, shuffled
from benchmarks.finetune.training import Settings, adapted
from benchmarks.report import RESULTS, machine, markdown
from lorambo_adapters.layers import find_layers
from lorambo_alloc.storage import replacing

SIGNALS = {
    "gradient": signals.gradient,
    "nuclear": signals.gradient_nuclear,
    "first_step": signals.first_step,
    "kfac": signals.kfac,
    "directions": signals.directions,
}

_SHARES = (1.0, 0.5, 0.25)
"""Of the rate: those that all layers together are trained at, which move further together."""


def main(arguments: Sequence[str]) -> None:
    """Measure the layers that are not in the output yet, and print the correlations."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune predicted")
    parser.add_argument("task", choices=("minilm", "mpnet", "gemma"))
    parser.add_argument("--rank", type=int, default=1, help="of the layer's LoRA")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--held-out", type=int, default=512, help="examples of dev")
    parser.add_argument("--every", type=int, default=1, help="take every n-th layer")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/finetune")
    options = parser.parse_args(arguments)
    output = options.output or RESULTS / "finetune" / f"predicted_{options.task}.json"
    content = measure(local_task(options.task), options, output)
    print(correlations(content))


def measure(task: Task, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """What `output` holds at the end: the signals, and what each layer has saved."""
    agreed = protocol(task.name).settings
    keys = ("rank", "steps", "rate", "held_out", "every", "seed")
    settings = {key: getattr(options, key) for key in keys}
    settings |= {"batch": agreed.batch, "measured": agreed.measured, "scale": agreed.scale}
    content: dict[str, Any] = {"settings": settings, "machine": machine(1)}
    if output.exists():
        content = json.loads(output.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise ValueError(f"{output}: has other settings; move it away or give another --output")
    base = _started(task, options.seed, agreed.batch)
    layers = find_layers(base, task.targets)[:: options.every]
    if "predicted" not in content:
        content["predicted"] = {
            name: _predicted(signal, task, copy.deepcopy(base), options, agreed)
            for name, signal in SIGNALS.items()
        }
        content["costs"] = {layer.name: options.rank * sum(layer.shape) for layer in layers}
        content["saved"] = {}
        _write(output, content)
    held_out = task.splits["dev"][: options.held_out]
    before = _loss(task, base, held_out)
    content["before"] = float(before)
    for layer in layers:
        if layer.name not in content["saved"]:
            begun = time.perf_counter()
            ranks = {layer.name: options.rank}
            saved = before - _trained(task, copy.deepcopy(base), ranks, held_out, options, agreed)
            content["saved"][layer.name] = float(saved)
            _write(output, content)
            seconds = time.perf_counter() - begun
            print(f"{layer.name}: saves {saved:.4f} of {before:.4f} ({seconds:.0f} s)", flush=True)
    together = content.setdefault("together", {})
    for share in _SHARES:
        rate = share * options.rate
        if f"{rate:g}" not in together:
            ranks = dict.fromkeys(content["saved"], options.rank)
            left = _trained(task, copy.deepcopy(base), ranks, held_out, options, agreed, share)
            together[f"{rate:g}"] = float(before - left)
            _write(output, content)
    alone = content["saved"].values()
    print(
        f"alone, layers save {min(alone):.4f} to {max(alone):.4f}, {sum(alone):.4f} in sum; "
        f"together {max(together.values()):.4f} of {content['before']:.4f}"
    )
    return content


def correlations(content: Mapping[str, Any]) -> str:
    """Spearman's correlation of each signal with what was saved, as markdown."""
    names = list(content["saved"])
    saved = np.array([content["saved"][name] for name in names])
    costs = np.array([content["costs"][name] for name in names], dtype=np.float64)
    groups = {
        f"cost {cost:g} ({np.sum(costs == cost)})": costs == cost for cost in np.unique(costs)
    }
    table: list[dict[str, str]] = []
    for signal, values in content["predicted"].items():
        predicted = np.array([values[name] for name in names])
        ratio = np.median(predicted / np.maximum(saved, 1e-12))
        table.append(
            {
                "signal": signal,
                "layers": str(len(names)),
                "correlation": _correlation(predicted, saved),
                "per parameter": _correlation(predicted / costs, saved / costs),
                **{g: _correlation(predicted[of], saved[of]) for g, of in groups.items()},
                "median predicted / saved": f"{ratio:.3g}",
            }
        )
    return markdown(table)


def _correlation(predicted: np.ndarray, saved: np.ndarray) -> str:
    """Spearman's, `-` for fewer than three layers."""
    from scipy.stats import spearmanr

    if len(saved) < 3:
        return "-"
    return f"{spearmanr(predicted, saved).statistic:.2f}"


def _started(task: Task, seed: int, size: int) -> torch.nn.Module:
    """The base with its head trained."""
    torch.manual_seed(seed)
    model = task.model()
    warm_head(task, model, steps=100, size=size, seed=seed)
    return model


def _predicted(
    signal: Any,
    task: Task,
    model: torch.nn.Module,
    options: argparse.Namespace,
    agreed: Settings,
) -> dict[str, float]:
    layers = find_layers(model, task.targets)
    first = list(islice(shuffled(task, agreed.batch, options.seed), agreed.measured))
    found = signal(Measuring(task, model, layers, first, options.rank, options.rate, options.seed))
    return {name: float(curve[min(options.rank, len(curve) - 1)]) for name, curve in found.items()}


def _trained(
    task: Task,
    base: torch.nn.Module,
    ranks: Mapping[str, int],
    held_out: Sequence[Any],
    options: argparse.Namespace,
    agreed: Settings,
    share: float = 1.0,
) -> float:
    """The held-out loss after training these ranks, and nothing else, at a share of the rate."""
    model = adapted(base, task, ranks, options.seed, agreed.scale)
    torch.manual_seed(options.seed)  # the same dropout whatever has been done before
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(islice(shuffled(task, agreed.batch, options.seed), options.steps)):
        for group in optimizer.param_groups:
            group["lr"] = share * options.rate * (1 - step / options.steps)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return _loss(task, model, held_out)


def _loss(task: Task, model: torch.nn.Module, examples: Sequence[Any]) -> float:
    return float(evaluate(task, model, examples).losses.double().mean())


def _write(output: Path, content: Mapping[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file:
        file.write(json.dumps(content).encode() + b"\n")
