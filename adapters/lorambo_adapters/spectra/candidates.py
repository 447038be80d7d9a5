"""Candidate directions: the singular pairs that each layer's best updates are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.candidates needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.spectra.batches import (
    MaskOf,
    attention_masks,
    for_passes,
    frozen,
    same_random_numbers,
    shown,
)
from lorambo_adapters.spectra.fisher import FisherLoss, LossFn, Terms
from lorambo_adapters.spectra.sketch import Whitening, times
from lorambo_adapters.spectra.sketcher import GradientSketcher
from lorambo_adapters.spectra.whitening import Curvature
from lorambo_alloc.costs import whole_number

_PASSES = 3  # of the sketch: the last one multiplies by an orthonormal basis on the right


def candidate_directions(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    per_layer: int = 8,
    *,
    curvature: Curvature | None = None,
    targets: str | Sequence[str] = "all-linear",
    terms: Terms = None,
    mask: MaskOf | None = None,
    seed: int = 0,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The directions that the best updates of each layer alone are made of.

    With G~ = B^-1/2 G A^-1/2 = sum_j sigma_j p_j q_j^T, the best update of rank r is the sum over
    j <= r of -sigma_j u_j v_j^T with u_j = B^-1/2 p_j and v_j = A^-1/2 q_j: these are the
    candidates, of unit curvature each in the Kronecker model. Without curvature they are singular
    vectors of G. G is summed exactly in small layers, else sketched in three passes
    (`gradient_spectra`).

    Args:
        model: as in `curvature_factors`.
        batches: as in `curvature_factors`.
        loss_fn: as in `curvature_factors`.
        per_layer: at most so many a layer.
        curvature: the whitening; none: of G itself.
        targets: which layers, as PEFT's `target_modules`.
        terms: as in `curvature_factors`.
        mask: as in `curvature_factors`.
        seed: of the test matrices and of all random numbers in each pass.

    Returns:
        Layer to (U, V), d x m and k x m, in float64; m <= per_layer, and directions of singular
        values that are 0 are left out.

    Raises:
        ValueError: as `gradient_spectra`.
    """
    per_layer = whole_number(per_layer, "per_layer", 1)
    whitenings = None if curvature is None else curvature.whitenings()
    sketcher = GradientSketcher(
        model, rank=per_layer, targets=targets, curvature=whitenings, passes=_PASSES, seed=seed
    )
    losses = FisherLoss(loss_fn, "empirical", terms)
    mask = attention_masks(model, sketcher.layers) if mask is None else mask
    passes = 1 if sketcher.complete else _PASSES
    batches = for_passes(batches, passes)
    with frozen(model), sketcher, shown(batches, passes, "candidates") as one_pass:
        while True:
            with same_random_numbers(model, seed), torch.enable_grad():
                for batch in one_pass(sketcher.number):
                    sketcher.begin(mask(batch))
                    losses.total(model, batch)[0].backward()
            if not sketcher.batches:
                raise ValueError("batches: expected at least one batch, got none")
            if sketcher.complete:
                break
            sketcher.next_pass()
    state = sketcher.state_dict()
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in sketcher.layers:
        pair = (None, None) if whitenings is None else whitenings[layer.name]
        sums, carried = state["sums"][layer.name], state["carried"][layer.name]
        u, v = _singular_pairs(layer, sums, carried, pair, per_layer)
        if u.shape[1]:
            found[layer.name] = u, v
    if not found:
        raise ValueError("expected a gradient that is not zero in some layer, got none")
    return found


def _singular_pairs(
    layer: TargetLayer,
    sums: list[torch.Tensor],
    carried: list[torch.Tensor],
    whitening: Whitening,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(U, V) from what a sketcher has at the end: G itself, or G A^-1/2 P with the basis P."""
    right, left = whitening
    exact = not (sums and carried)
    total = (sums or carried)[0]
    total = (total.cpu() if total.device.type == "mps" else total).double()
    if not bool(torch.isfinite(total).all()):
        raise ValueError(f"layer {layer.name!r}: expected finite gradients, got NaN or infinity")
    basis = None
    if exact:
        product = times(right, times(left, total).T).T
    else:
        basis = carried[0].to(total)
        product = times(left, total[:, : basis.shape[1]])
    p, sigma, q = torch.linalg.svd(product, full_matrices=False)
    rounding = float(sigma.max()) * max(layer.shape) * torch.finfo((sums or carried)[0].dtype).eps
    kept = slice(0, min(count, int((sigma > rounding).sum())))
    q = q[kept].T if basis is None else basis @ q[kept].T
    return times(left, p[:, kept]), times(right, q)
