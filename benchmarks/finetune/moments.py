"""Second moments of inputs and of output gradients, from which the norms of a cut are made.

With x a layer's inputs, g the gradients of the sum of the terms' losses with respect to its
outputs (labels drawn from the model's own predictions: the true Fisher; or the given ones: the
empirical Fisher), G_n = sum_t g_t x_t^T the
gradient of sample n, T tokens and N terms:

| name | moment |
|---|---|
| `inputs` | (1/T) sum_t x x^T |
| `centred` | the same, less the outer product of the mean input |
| `weighted` | sum_t |g|^2 x x^T / sum_t |g|^2: tokens count as much as the loss feels them |
| `gradients` | (1/N) sum_t g g^T |
| `sample_inputs` | (1/N) sum_n G_n^T G_n |
| `sample_gradients` | sum_n G_n G_n^T / sum_n |G_n|_F^2 |

(`inputs`, `gradients`) are the factors of K-FAC (Martens, Grosse, ICML 2015), as the library's
`centred_sums` has them; here labels are drawn from a generator of their own. The last two are
those of Shampoo (Gupta, Koren, Singer, ICML 2018), whose product is one power iteration towards the
nearest Kronecker product to the layer's Fisher (Morwani et al., 2024): the tokens of a sample are
summed before they are squared, as they are in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.finetune.task import Batch
from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.spectra.centred_moments import LayerMoments

FISHERS = ("true", "empirical")


@dataclass(frozen=True)
class Moments(LayerMoments):
    """Of one layer, in float64; see the module. The last three are None where not asked for."""

    weighted: torch.Tensor | None = None
    sample_inputs: torch.Tensor | None = None
    sample_gradients: torch.Tensor | None = None


def layer_moments(
    model: Any,
    layers: Sequence[TargetLayer],
    batches: Sequence[Batch],
    *,
    every: bool = True,
    fisher: str = "true",
    seed: int = 0,
) -> dict[str, Moments]:
    """One forward and one backward pass over the batches.

    Args:
        model: in evaluation mode; its predictions are over the last dimension of `logits`.
        layers: whose moments.
        batches: padding is what `attention_mask` leaves out.
        every: all moments; else those of K-FAC, which take a third of the time.
        fisher: "true" draws labels from the predictions, and those in the batches are not looked
            at; "empirical" takes those.
        seed: of the drawn labels.

    Raises:
        ValueError: another Fisher.
    """
    if fisher not in FISHERS:
        raise ValueError(f"fisher: expected one of {', '.join(FISHERS)}, got {fisher!r}")
    drawn = torch.Generator().manual_seed(seed)
    sums: dict[str, _Sums] = {}
    tokens = terms = 0
    with captured(model, layers) as seen:
        for batch in batches:
            with torch.enable_grad():
                logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
                if fisher == "true":
                    logits = logits.float().flatten(0, -2)
                    chances = logits.detach().softmax(1)
                    labels = torch.multinomial(chances, 1, generator=drawn)[:, 0]
                else:
                    logits, labels = predicted(logits.float(), batch["labels"])
                    logits, labels = logits.flatten(0, -2), labels.flatten()
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
            tokens += int(mask.sum())
            terms += len(labels)
            for layer in layers:
                x, g = (side * mask for side in seen[layer.name])
                if layer.name not in sums:
                    sums[layer.name] = _Sums(*layer.shape, every)
                sums[layer.name].add(x, g)
    return {name: each.moments(tokens, terms) for name, each in sums.items()}


class _Sums:
    def __init__(self, d: int, k: int, every: bool) -> None:
        self.every = every
        self.inputs, self.weighted, self.sample_inputs = (torch.zeros(k, k) for _ in range(3))
        self.gradients, self.sample_gradients = (torch.zeros(d, d) for _ in range(2))
        self.mean = torch.zeros(k)
        self.weight = 0.0

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add samples x tokens x features."""
        rows, slopes = x.flatten(0, 1), g.flatten(0, 1)
        self.inputs += rows.T @ rows
        self.mean += rows.sum(0)
        self.gradients += slopes.T @ slopes
        if not self.every:
            return
        weight = (slopes**2).sum(1)
        self.weighted += rows.T @ (rows * weight[:, None])
        self.weight += float(weight.sum())
        self.sample_inputs += rows.T @ (g @ g.mT @ x).flatten(0, 1)
        self.sample_gradients += slopes.T @ (x @ x.mT @ g).flatten(0, 1)

    def moments(self, tokens: int, terms: int) -> Moments:
        kfac = (
            self.inputs.double() / tokens,
            self.mean.double() / tokens,
            self.gradients.double() / terms,
        )
        if not self.every:
            return Moments(*kfac)
        energy = float(self.sample_gradients.trace())
        return Moments(
            *kfac,
            self.weighted.double() / self.weight,
            self.sample_inputs.double() / terms,
            self.sample_gradients.double() / energy,
        )


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the labels that they are for: of a language model, the next tokens."""
    return (logits[:, :-1], labels[:, 1:]) if logits.ndim == 3 else (logits, labels)


@contextmanager
def captured(
    model: Any, layers: Sequence[TargetLayer]
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs and output gradients of the layers at the last pass, by name."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def forward(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda g: seen.__setitem__(name, (x, g.detach())))

        return forward

    embedding = model.get_input_embeddings()
    handles = [layer.module.register_forward_hook(watch(layer.name)) for layer in layers]
    # No weight needs a gradient, so one has to begin at the embedding.
    handles.append(embedding.register_forward_hook(lambda *call: call[2].requires_grad_(True)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
