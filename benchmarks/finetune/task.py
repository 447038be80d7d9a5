"""What a training needs to know of its model and its data, and nothing of how ranks are chosen."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """How a model does on some examples.

    Attributes:
        losses: by example: the mean over its terms (tokens, or one label).
        right: by example, whether the answer is right; None where nothing is answered.
    """

    losses: torch.Tensor
    right: torch.Tensor | None


class Task(Protocol):
    """A model and what it is adapted to.

    Attributes:
        name: of the task.
        targets: the layers that are adapted, as PEFT's `target_modules`.
        head: modules that are trained beside the adapters, in full, in every arm.
        peft_type: PEFT's `task_type`.
        splits: examples by "train", "dev" and "test".
    """

    name: str
    targets: str
    head: tuple[str, ...]
    peft_type: str
    splits: Mapping[str, Sequence[Any]]

    def model(self) -> torch.nn.Module:
        """The pretrained model, with its head drawn from torch's random numbers."""
        ...

    def batch(self, examples: Sequence[Any]) -> Batch:
        """What `model(**batch)` takes, labels included, so that it returns the mean loss."""
        ...

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Losses and answers by example; called without gradients, in evaluation mode."""
        ...


def shuffled(task: Task, size: int, seed: int) -> Iterator[Batch]:
    """Batches of the training examples without end, in an order that the seed alone decides."""
    order = random.Random(seed)
    while True:
        turn = order.sample(range(len(task.splits["train"])), len(task.splits["train"]))
        for start in range(0, len(turn) - size + 1, size):
            yield task.batch([task.splits["train"][i] for i in turn[start : start + size]])


@torch.no_grad()
def evaluate(task: Task, model: torch.nn.Module, split: str, size: int = 32) -> Scores:
    """The scores of all examples of a split, in their order."""
    was = model.training
    model.eval()
    examples = task.splits[split]
    found = [
        task.scores(model, task.batch(examples[start : start + size]))
        for start in range(0, len(examples), size)
    ]
    model.train(was)
    right = [scores.right for scores in found]
    return Scores(
        torch.cat([scores.losses for scores in found]).float(),
        None if right[0] is None else torch.cat([part for part in right if part is not None]),
    )
