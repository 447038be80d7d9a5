"""Second moments of inputs and output gradients, with the inputs' mean: K-FAC's, or about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.centred_moments needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.spectra.batches import MaskOf, frozen, same_random_numbers
from lorambo_adapters.spectra.curvature import add_terms
from lorambo_adapters.spectra.factors import MomentSums, check_finite
from lorambo_adapters.spectra.fisher import FisherLoss
from lorambo_adapters.spectra.hooks import GradientHooks
from lorambo_adapters.spectra.inputs import Inputs, TokenInputs


@dataclass(frozen=True)
class LayerMoments:
    """Of one layer, in float64.

    Attributes:
        inputs: (1/T) sum x x^T over T tokens, k x k.
        mean: (1/T) sum x, of length k.
        gradients: (1/N) sum g g^T over the tokens of N terms of the loss, d x d.
    """

    inputs: torch.Tensor
    mean: torch.Tensor
    gradients: torch.Tensor

    @property
    def centred(self) -> torch.Tensor:
        """The covariance of the inputs."""
        return self.inputs - torch.outer(self.mean, self.mean)


class CentredSums(MomentSums):
    """The sums of K-FAC, and those of the inputs themselves; not of embedding tables.

    Args:
        layers: which.

    Attributes:
        reached: the layers that a gradient has reached.
    """

    def __init__(self, layers: Iterable[TargetLayer]) -> None:
        super().__init__(layers, outputs=True)
        self.reached: set[str] = set()
        self._totals = {name: total.new_zeros(len(total)) for name, total in self.right.items()}

    def receive(
        self, layer: TargetLayer, inputs: Inputs, gradient: torch.Tensor | None = None
    ) -> None:
        """Add a layer's tokens, as `MomentSums` does."""
        super().receive(layer, inputs, gradient)
        self.reached.add(layer.name)
        if self.counts_inputs:
            assert not isinstance(inputs, TokenInputs)
            self._totals[layer.name] += inputs.matrix.sum(0)

    def accumulators(self) -> list[torch.Tensor]:
        """As `MomentSums` has them, with the sums of inputs."""
        return [*super().accumulators(), *self._totals.values()]

    def take(self, name: str) -> LayerMoments:
        """The moments of a layer, whose sums are let go of; zero where nothing reached it.

        Raises:
            ValueError: a sum is not finite; the message names the layer.
        """
        self._last = None
        right, left, total = (side.pop(name) for side in (self.right, self.left, self._totals))
        for each, what in ((right, "inputs"), (total, "inputs"), (left, "gradients")):
            check_finite(name, each, what)
        tokens = max(float(self.tokens[self._index[name]]), 1.0)
        # Apple's MPS knows no float64.
        right, total, left = (
            (each.cpu() if each.device.type == "mps" else each).double()
            for each in (right, total, left)
        )
        return LayerMoments(right / tokens, total / tokens, left / max(float(self.terms), 1.0))


def centred_sums(
    model: torch.nn.Module,
    layers: Sequence[TargetLayer],
    batches: Iterable[Any],
    losses: FisherLoss,
    *,
    mask: MaskOf,
    seed: int = 0,
) -> CentredSums:
    """Sum over the batches, in one forward pass and a backward pass for each drawn label.

    Memory: 4 (k^2 + d^2) bytes a layer (twice that in float64), as `curvature_factors` takes.

    Args:
        model: any module; its mode is left as it is.
        layers: whose sums: linear ones.
        batches: what `losses` takes.
        losses: the loss, and whose labels the gradients are of.
        mask: batch to the mask of its tokens.
        seed: of drawn labels.

    Raises:
        ValueError: the loss is not what `curvature_factors` says.
    """
    sums = CentredSums(layers)
    hooks = GradientHooks(layers, sums.receive, model=model)
    with frozen(model), same_random_numbers(model, seed), hooks:
        for batch in batches:
            hooks.begin(mask(batch))
            add_terms(model, batch, losses, sums)
    return sums
