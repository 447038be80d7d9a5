"""The layers' differences cut by the curvature at the base, and the biases beside the cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.calibrated_cuts needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.progress import Advance
from lorambo_adapters.ranks.adapted_base import AdaptedBase
from lorambo_adapters.ranks.live_pairs import LayerPair
from lorambo_adapters.ranks.weighted_cut import Fold, WeightedCut
from lorambo_adapters.spectra.batches import MaskOf
from lorambo_adapters.spectra.centred_moments import centred_sums
from lorambo_adapters.spectra.fisher import FisherLoss


class Cuts(NamedTuple):
    """What `cut_layers` made.

    Attributes:
        factors: layer to (U, V), d x r and k x r in float64, of layers with a rank.
        folds: layer to its bias beside any cut, of those that are folded.
        silent: layers with a rank that no gradient reached.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    folds: dict[str, Fold]
    silent: list[str]


def changed_biases(
    pairs: Sequence[LayerPair], folded: Mapping[str, bool]
) -> dict[str, torch.Tensor]:
    """The tuned models' biases that an adapter has to hold: folded ones, and those that differ."""
    found: dict[str, torch.Tensor] = {}
    for pair in pairs:
        before: Any = pair.before.module
        if pair.bias is None:
            continue
        bias = pair.bias.detach()
        if folded[pair.before.name] or not torch.equal(bias.to(before.bias), before.bias):
            found[pair.before.name] = bias
    return found


def cut_layers(
    base: torch.nn.Module,
    pairs: Sequence[LayerPair],
    ranks: Mapping[str, int],
    tensors: Mapping[str, torch.Tensor],
    batches: Sequence[Any],
    losses: FisherLoss,
    *,
    folded: Mapping[str, bool],
    mask: MaskOf,
    damping: float,
    seed: int,
    advance: Advance,
) -> Cuts:
    """Measure the moments at the base, and cut each difference in their norm.

    Args:
        base: in evaluation mode.
        pairs: the layers of both models.
        ranks: layer to its rank, of those that have one.
        tensors: what takes the place of the base's tensors, by the name that `state_dict` has.
        batches: of calibration examples.
        losses: whose gradients B is of.
        folded: whether a layer's bias takes up what the cut leaves out.
        mask: batch to the mask of its tokens.
        damping: of both moments, relative to their mean eigenvalues.
        seed: of drawn labels.
        advance: called after each batch.

    Raises:
        ValueError: a moment is not finite, or with its damping not positive definite; or the loss
            is not what it should be.
    """
    needed = [p for p in pairs if p.before.name in ranks or folded[p.before.name]]
    layers = [pair.before for pair in needed]

    def counted() -> Any:
        for batch in batches:
            yield batch
            advance(1.0, "curvature")

    with AdaptedBase(base, [], tensors, {}, {}, 1.0):
        sums = centred_sums(base, layers, counted(), losses, mask=mask, seed=seed)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    folds: dict[str, Fold] = {}
    for pair in needed:
        name = pair.before.name
        moments = sums.take(name)
        difference = pair.difference(torch.float32).to(moments.mean.device)
        if folded[name]:
            assert pair.bias is not None
            bias = pair.bias.detach().to(moments.mean)
            change = difference.to(moments.mean) @ moments.mean
            folds[name] = Fold(bias, change, moments.mean)
        if name in ranks:
            inputs = moments.centred if folded[name] else moments.inputs
            try:
                cut = WeightedCut(
                    difference, moments.gradients, inputs, damping=damping, most=ranks[name],
                    rounding=moments.rounding,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            factors[name] = cut.factors(ranks[name])
    return Cuts(factors, folds, [name for name in ranks if name not in sums.reached])
