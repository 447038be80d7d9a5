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
from lorambo_adapters.spectra.factors import MomentSums, check_finite, rows
from lorambo_adapters.spectra.fisher import FisherLoss
from lorambo_adapters.spectra.hooks import GradientHooks
from lorambo_adapters.spectra.inputs import DenseInputs, Inputs, TokenInputs


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


@dataclass(frozen=True)
class SummedMoments(LayerMoments):
    """Those that `CentredSums` has summed.

    Attributes:
        covariance: of the inputs, from sums about a point near their mean.
        rounding: of the sums, relative.
    """

    covariance: torch.Tensor
    rounding: float

    @property
    def centred(self) -> torch.Tensor:
        """The covariance of the inputs."""
        return self.covariance


class CentredSums(MomentSums):
    """The sums of K-FAC, and those of the inputs themselves; not of embedding tables.

    Inputs are summed less a shift, the mean of the first batch that reached the layer: with a mean
    many times their spread the covariance would be what rounding leaves.

    Args:
        layers: which.

    Attributes:
        reached: the layers that a gradient has reached.
    """

    def __init__(self, layers: Iterable[TargetLayer]) -> None:
        super().__init__(layers, outputs=True)
        self.reached: set[str] = set()
        self._totals = {name: total.new_zeros(len(total)) for name, total in self.right.items()}
        self._shifts: dict[str, torch.Tensor] = {}
        # What came in last, its shift, and what is left: one for layers that share an input.
        self._moved: tuple[Inputs, torch.Tensor, DenseInputs] | None = None

    def receive(
        self, layer: TargetLayer, inputs: Inputs, gradient: torch.Tensor | None = None
    ) -> None:
        """Add a layer's tokens, as `MomentSums` does."""
        self.reached.add(layer.name)
        if not self.counts_inputs or not rows(inputs):
            super().receive(layer, inputs, gradient)
            return
        moved = self._less_shift(layer.name, inputs)
        super().receive(layer, moved, gradient)
        self._totals[layer.name] += moved.matrix.sum(0)

    def accumulators(self) -> list[torch.Tensor]:
        """None: processes would have shifts of their own."""
        raise NotImplementedError("sums about a shift are not added up across processes")

    def take(self, name: str) -> SummedMoments:
        """The moments of a layer, whose sums are let go of; zero where nothing reached it.

        Raises:
            ValueError: a sum is not finite; the message names the layer.
        """
        self._last = self._moved = None
        right, left, total = (side.pop(name) for side in (self.right, self.left, self._totals))
        shift = self._shifts.pop(name, torch.zeros_like(total))
        for each, what in ((right, "inputs"), (total, "inputs"), (left, "gradients")):
            check_finite(name, each, what)
        rounding = torch.finfo(right.dtype).eps
        tokens = max(float(self.tokens[self._index[name]]), 1.0)
        # Apple's MPS knows no float64.
        right, total, left, shift = (
            (each.cpu() if each.device.type == "mps" else each).double()
            for each in (right, total, left, shift)
        )
        rest, mean = total / tokens, shift + total / tokens
        covariance = right / tokens - torch.outer(rest, rest)
        inputs = covariance + torch.outer(mean, mean)
        gradients = left / max(float(self.terms), 1.0)
        return SummedMoments(inputs, mean, gradients, covariance, rounding)

    def _less_shift(self, name: str, inputs: Inputs) -> DenseInputs:
        assert not isinstance(inputs, TokenInputs)
        shift, last = self._shifts.get(name), self._moved
        same = last is not None and last[0] is inputs
        if shift is None:
            # Layers that share an input share the tensor too, by which that is seen later.
            shift = last[1] if last is not None and same else inputs.matrix.mean(0)
            self._shifts[name] = shift
        if last is None or not same or last[1] is not shift:
            last = self._moved = inputs, shift, DenseInputs(inputs.matrix - shift)
        return last[2]


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
