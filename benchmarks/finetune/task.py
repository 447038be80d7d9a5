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
    """

    name: str
    targets: str
    head: tuple[str, ...]
    peft_type: str

    @property
    def splits(self) -> Mapping[str, Sequence[Any]]:
        """Examples by "train", "dev" and "test"."""
        ...

    def model(self) -> torch.nn.Module:
        """The pretrained model, with its head drawn from torch's random numbers."""
        ...

    def batch(self, examples: Sequence[Any]) -> Batch:
        """What `model(**batch)` takes, labels included, so that it returns the mean loss."""
        ...

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Losses and answers by example; called without gradients, in evaluation mode."""
        ...


def shuffled(task: Task, size: int, seed: int, grouped: int = 1) -> Iterator[Batch]:
    """Batches of the training examples without end, in an order that the seed alone decides.

    Args:
        task: whose examples.
        size: of a batch.
        seed: of the order.
        grouped: so many batches are drawn at once and filled by length, that less is padded
            (1: in the order drawn). They come in an order drawn anew.
    """
    order, train = random.Random(seed), task.splits["train"]
    while True:
        turn = order.sample(range(len(train)), len(train))
        if grouped > 1:
            turn = _by_length(task, turn, size, grouped, order)
        for start in range(0, len(turn) - size + 1, size):
            yield task.batch([train[i] for i in turn[start : start + size]])


def _by_length(
    task: Task, turn: Sequence[int], size: int, grouped: int, order: random.Random
) -> list[int]:
    """Whole batches of examples of about one length, and what is left over at the end."""
    found: list[int] = []
    for start in range(0, len(turn), size * grouped):
        drawn = sorted(
            turn[start : start + size * grouped],
            key=lambda i: tokens_in(task, task.splits["train"][i]),
        )
        batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        short = [batches.pop()] if len(batches[-1]) < size else []
        order.shuffle(batches)
        found += [i for batch in [*batches, *short] for i in batch]
    return found


def tokens_in(task: Task, example: Any) -> int:
    """How long an example is."""
    return int(task.batch([example])["input_ids"].shape[1])


@torch.no_grad()
def evaluate(task: Task, model: torch.nn.Module, examples: Sequence[Any], size: int = 32) -> Scores:
    """The scores of examples, in their order.

    Those of about one length are computed together: less is padded, and scores change by rounding
    alone.
    """
    was = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: tokens_in(task, examples[i]))
    found = [
        task.scores(model, task.batch([examples[i] for i in order[start : start + size]]))
        for start in range(0, len(order), size)
    ]
    model.train(was)
    back = torch.tensor(order).argsort()
    losses = torch.cat([scores.losses for scores in found]).float()
    right = [scores.right for scores in found if scores.right is not None]
    back = back.to(losses.device)
    return Scores(losses[back], torch.cat(right)[back] if right else None)
