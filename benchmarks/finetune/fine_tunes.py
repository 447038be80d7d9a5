"""Fine-tunes that there is something to cut in: all weights, or a LoRA of rank 16.

Each is kept under `home()/tuned/`, by model, kind, learning rate and seed, and is made once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune.products import slopes
from benchmarks.finetune.sources import home
from benchmarks.finetune.task import Batch, Task, evaluate
from lorambo_adapters.layers import find_layers
from lorambo_alloc.storage import replacing

KINDS = ("full", "lora")
LORA_RANK = 16
_GROUPED = 8


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned.

    Of every `_GROUPED` batches' examples those of about one length share a batch, so that little is
    padded.

    Attributes:
        steps: of AdamW without weight decay; the rate rises over the first 6 % and falls to 0.
        batch: examples a step.
        rates: learning rates, by kind; the one of the lowest loss on dev is taken.
    """

    steps: int
    batch: int
    rates: dict[str, tuple[float, ...]]


RECIPES = {
    "minilm": Recipe(375, 16, {"full": (5e-5,), "lora": (1e-3,)}),
    "mpnet": Recipe(375, 16, {"full": (5e-5,), "lora": (5e-4,)}),
    "gemma": Recipe(60, 8, {"full": (5e-5,), "lora": (5e-4,)}),
}


@dataclass(frozen=True)
class FineTune:
    """A fine-tuned model.

    Attributes:
        state: all of its tensors by name, those of a LoRA merged into the weights.
        record: its settings, and its loss on dev.
    """

    state: dict[str, torch.Tensor]
    record: dict[str, Any]


def fine_tuned(task: Task, kind: str, seed: int, rate: float) -> FineTune:
    """Read a fine-tune, or make it and keep it.

    Args:
        task: what the model is adapted to.
        kind: one of `KINDS`.
        seed: of the head, the order of the batches, the dropout and a LoRA's factors.
        rate: learning rate.

    Raises:
        ValueError: another kind.
    """
    from safetensors.torch import load_file, save_file

    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    folder = _folder(task.name, kind, rate, seed)
    if not (folder / "record.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        state, record = _train(task, kind, seed, rate, RECIPES[task.name])
        save_file(state, folder / "writing.safetensors")
        (folder / "writing.safetensors").rename(folder / "model.safetensors")
        with replacing(folder / "record.json") as out:
            out.write(json.dumps(record, indent=1).encode())
    record = json.loads((folder / "record.json").read_text())
    return FineTune(load_file(folder / "model.safetensors"), record)


def best_fine_tune(task: Task, kind: str, seed: int) -> FineTune:
    """The one of the recipe's learning rates that has the lowest loss on dev, by seed 0.

    Where there is one rate, seed 0 is not made for another seed's sake.
    """
    rates = RECIPES[task.name].rates[kind]
    if len(rates) == 1:
        return fine_tuned(task, kind, seed, rates[0])
    losses = {rate: _dev_loss(task, kind, 0, rate) for rate in rates}
    best = fine_tuned(task, kind, seed, min(losses, key=lambda rate: losses[rate]))
    return FineTune(best.state, {**best.record, "dev_losses": {f"{r:g}": losses[r] for r in rates}})


def base_state(task: Task, seed: int) -> dict[str, torch.Tensor]:
    """The model as the fine-tune of this seed started from it."""
    torch.manual_seed(seed)
    return {name: tensor.clone() for name, tensor in task.model().state_dict().items()}


def _folder(name: str, kind: str, rate: float, seed: int) -> Path:
    return home() / "tuned" / f"{name}-{kind}-{rate:g}-s{seed}"


def _dev_loss(task: Task, kind: str, seed: int, rate: float) -> float:
    file = _folder(task.name, kind, rate, seed) / "record.json"
    if not file.is_file():
        fine_tuned(task, kind, seed, rate)
    return json.loads(file.read_text())["dev"]["loss"]


def _train(
    task: Task, kind: str, seed: int, rate: float, recipe: Recipe
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    torch.manual_seed(seed)
    model: Any = task.model()
    if kind == "lora":
        model = _with_lora(model, task)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rising = max(1, round(0.06 * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rising, (recipe.steps - step) / (recipe.steps - rising)),
    )
    torch.manual_seed(seed)
    begun, losses = time.perf_counter(), []
    for batch in islice(_batches(task, recipe.batch, seed), recipe.steps):
        losses.append(slopes(model, batch, bfloat16=True))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    if kind == "lora":
        model = model.merge_and_unload()
    dev = _dev_means(task, model)
    last = losses[-max(1, recipe.steps // 10) :]
    record = {
        "model": task.name,
        "kind": kind,
        "rate": rate,
        "seed": seed,
        "recipe": asdict(recipe),
        "seconds": round(seconds, 1),
        "last_train_loss": sum(last) / len(last),
        "dev": dev,
    }
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    state = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name not in tied}, record


def _batches(task: Task, size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, of examples of about one length."""
    order, examples = random.Random(seed), task.splits["train"]
    while True:
        turn = order.sample(range(len(examples)), len(examples))
        for start in range(0, len(turn) - _GROUPED * size + 1, _GROUPED * size):
            group = turn[start : start + _GROUPED * size]
            group.sort(key=lambda index: _length(examples[index]))
            batches = [group[i : i + size] for i in range(0, len(group), size)]
            order.shuffle(batches)
            for batch in batches:
                yield task.batch([examples[index] for index in batch])


def _dev_means(task: Task, model: torch.nn.Module) -> dict[str, float | None]:
    """Loss and accuracy over dev."""
    scores = evaluate(task, model, task.splits["dev"])
    return {
        "loss": float(scores.losses.double().mean()),
        "accuracy": None if scores.right is None else float(scores.right.double().mean()),
    }


def _length(example: Any) -> int:
    return len(example[0]) if isinstance(example, tuple) else len(example)


def _with_lora(model: Any, task: Task) -> Any:
    import peft

    config = peft.LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=[layer.name for layer in find_layers(model, task.targets)],
        task_type=task.peft_type,
        modules_to_save=list(task.head) or None,
    )
    return peft.get_peft_model(model, config)


def main(arguments: Sequence[str]) -> None:
    """Make fine-tunes: `MODEL KIND RATE [SEED]`."""
    from benchmarks.finetune.local_tasks import local_task

    name, kind, rate, seed = (*arguments, "0")[:4]
    torch.set_num_threads(1)
    print(json.dumps(fine_tuned(local_task(name), kind, int(seed), float(rate)).record))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
