"""A fine-tuned model whose adapted layers can be put back, cut, or taken from in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.finetune.fine_tunes import FineTune, base_state
from benchmarks.finetune.task import Batch, Task
from lorambo_adapters.layers import find_layers

OTHERS = ("base", "tuned")


@dataclass(frozen=True)
class Measured:
    """How a cut model does on some examples, in their order.

    Attributes:
        losses: by example, against the labels.
        divergences: by example, KL(tuned model || cut model), mean over the example's terms.
        right: by example, whether the answer is right; None where nothing is answered.
    """

    losses: np.ndarray
    divergences: np.ndarray
    right: np.ndarray | None

    @property
    def means(self) -> dict[str, float | None]:
        """Loss, accuracy and KL."""
        return {
            "loss": float(self.losses.mean()),
            "accuracy": None if self.right is None else float(self.right.mean()),
            "kl": float(self.divergences.mean()),
        }


class Subject:
    """A fine-tuned model whose adapted layers are cut.

    The head and the adapted layers' biases are always the tuned model's; a cut may change these
    biases. All other tensors (embeddings, norms, other biases) are the tuned model's or the base's.
    With the base's, a cut is what a PEFT adapter can hold: LoRA factors, `modules_to_save`, and
    the biases of `bias="lora_only"`.

    Args:
        task: what the model is adapted to.
        tuned: the fine-tune.
        split: what is measured on.
        examples: of the split, its first ones; all by default.
        others: whose tensors those are that no cut touches, "base" or "tuned".

    Attributes:
        task, others: as given.
        layers: that are cut.
        costs: parameters of a rank, by layer.
        differences: tuned less base weight, by layer.
        examples: that are measured on.
        beside: parameters of the head and of the layers' biases, the same in every cut.

    Raises:
        ValueError: other others.
    """

    def __init__(
        self,
        task: Task,
        tuned: FineTune,
        split: str = "dev",
        examples: int | None = None,
        *,
        others: str = "base",
    ) -> None:
        if others not in OTHERS:
            raise ValueError(f"others: expected one of {', '.join(OTHERS)}, got {others!r}")
        self.task, self.others = task, others
        self.model: Any = task.model().eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        before = base_state(task, tuned.record["seed"])
        self.model.load_state_dict(tuned.state, strict=False)
        self.layers = find_layers(self.model, task.targets)
        self.costs = {layer.name: sum(layer.shape) for layer in self.layers}
        self._base = {n: before[f"{n}.weight"] for n in self.costs}
        self._tuned = {n: tuned.state[f"{n}.weight"] for n in self.costs}
        self._bias = {n: tuned.state.get(f"{n}.bias") for n in self.costs}
        self.differences = {n: self._tuned[n] - self._base[n] for n in self.costs}
        self.examples = list(task.splits[split][:examples])
        lengths = [len(e[0]) if isinstance(e, tuple) else 0 for e in self.examples]
        self._order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        tensors = tuned.state
        beside = [n for n in tensors if _within(n, task.head)]
        beside += [f"{n}.bias" for n, bias in self._bias.items() if bias is not None]
        self.beside = sum(tensors[n].numel() for n in beside)
        cut = {f"{n}.weight" for n in self.costs}
        rest = [n for n in tensors if n not in cut and n not in beside] if others == "base" else []
        self._others_tuned = {n: tensors[n] for n in rest}
        self._others = {n: before[n] for n in rest}
        self._reference = self.tuned_predictions(self._batches())

    def cut(
        self,
        updates: Mapping[str, torch.Tensor],
        means: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Set each layer to its base weight plus an update; without one, to its base weight.

        Args:
            updates: d x k, by layer.
            means: of the layers' inputs. What the rest of a difference makes of the mean input is
                added to the layer's bias, if it has one: (D - update) mean.
        """
        with torch.no_grad():
            for layer in self.layers:
                update = torch.zeros_like(self._base[layer.name])
                if layer.name in updates:
                    update = updates[layer.name].float()
                module: Any = layer.module
                module.weight.copy_(self._base[layer.name] + update)
                bias = self._bias[layer.name]
                if bias is not None:
                    if means is not None:
                        rest = self.differences[layer.name] - update
                        bias = bias + rest @ means[layer.name].float()
                    module.bias.copy_(bias)

    def has_bias(self, name: str) -> bool:
        """Whether a layer has a bias."""
        return self._bias[name] is not None

    def between(self, share: float) -> None:
        """Set the layers to base + share x difference: 1 is as they are in the tuned model."""
        self.cut({name: share * d for name, d in self.differences.items()})

    def tuned_predictions(self, batches: Iterable[Batch]) -> list[torch.Tensor]:
        """Log-probabilities by the whole tuned model; the layers are left as they are in it."""
        self.between(1.0)
        self.model.load_state_dict(self._others_tuned, strict=False)
        found = [self._log_probabilities(batch) for batch in batches]
        self.model.load_state_dict(self._others, strict=False)
        return found

    def measure_tuned(self) -> Measured:
        """The whole tuned model, on all examples."""
        return self._measured(self._reference)

    def measure(self) -> Measured:
        """The model as it is now, on all examples."""
        return self._measured(self._log_probabilities(batch) for batch in self._batches())

    def _measured(self, predictions: Iterable[torch.Tensor]) -> Measured:
        losses, divergences, right = [], [], []
        for batch, now, then in zip(self._batches(), predictions, self._reference, strict=True):
            labels = batch["labels"][:, 1:] if now.ndim == 3 else batch["labels"]
            loss = -now.gather(-1, labels[..., None])[..., 0]
            kl = (then.exp() * (then - now)).sum(-1)
            losses.append(loss.reshape(len(now), -1).mean(1))
            divergences.append(kl.reshape(len(now), -1).mean(1))
            if now.ndim == 2:
                right.append(now.argmax(-1) == labels)
        return Measured(
            self._ordered(losses),
            self._ordered(divergences),
            self._ordered(right) if right else None,
        )

    def calibration(self, count: int, seed: int) -> list[Batch]:
        """Batches of training examples, whose labels are not looked at."""
        examples = self.task.splits["train"]
        chosen = np.random.default_rng(seed).permutation(len(examples))[:count]
        kept = [examples[int(i)] for i in chosen]
        if isinstance(kept[0], tuple):
            kept.sort(key=lambda example: len(example[0]))
        return [self.task.batch(kept[i : i + 8]) for i in range(0, len(kept), 8)]

    def _batches(self) -> Iterable[Batch]:
        for start in range(0, len(self._order), 16):
            yield self.task.batch([self.examples[i] for i in self._order[start : start + 16]])

    @torch.no_grad()
    def _log_probabilities(self, batch: Batch) -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self.model(**inputs).logits.float()
        # A language model's last token predicts nothing that is known.
        return (logits[:, :-1] if logits.ndim == 3 else logits).log_softmax(-1)

    def _ordered(self, parts: Sequence[torch.Tensor]) -> np.ndarray:
        values = torch.cat(list(parts)).numpy().astype(np.float32)
        ordered = np.empty_like(values)
        ordered[self._order] = values
        return ordered


def _within(tensor: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to a module of one of these names, as `modules_to_save` has it."""
    return any(f".{module}." in f".{tensor}" for module in modules)
