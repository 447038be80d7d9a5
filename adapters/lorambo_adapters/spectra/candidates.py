"""Candidate directions: the singular pairs that each layer's best updates are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.candidates needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import LayerTargets
from lorambo_adapters.spectra.batches import MaskOf
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.fisher import FisherLoss, LossFn, Terms
from lorambo_adapters.spectra.gradients import sketch_gradients
from lorambo_adapters.spectra.kronecker import Curvature
from lorambo_adapters.spectra.sketch import times
from lorambo_adapters.spectra.sketcher import GradientSketcher
from lorambo_alloc.costs import whole_number

_PASSES = 3  # of the sketch


def candidate_directions(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    per_layer: int = 8,
    *,
    curvature: Curvature | None = None,
    targets: LayerTargets = "all-linear",
    terms: Terms = None,
    mask: MaskOf | None = None,
    workers: Workers | None = None,
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
        targets: which layers, as PEFT's `target_modules`, or from `find_layers`.
        terms: as in `curvature_factors`.
        mask: as in `curvature_factors`.
        workers: as in `gradient_spectra`.
        seed: of the test matrices and of all random numbers in each pass.

    Returns:
        Layer to (U, V), d x m and k x m, in float64; m <= per_layer, and directions of singular
        values that are 0 up to rounding are left out (`GradientSketcher.singular_pairs`).

    Raises:
        ValueError: as `gradient_spectra`.
    """
    per_layer = whole_number(per_layer, "per_layer", 1)
    whitenings = None if curvature is None else curvature.whitenings()
    sketcher = GradientSketcher(
        model, rank=per_layer, targets=targets, curvature=whitenings, passes=_PASSES, seed=seed
    )
    losses = FisherLoss(loss_fn, "empirical", terms)
    sketch_gradients(
        model, batches, lambda model, batch: losses.total(model, batch)[0], sketcher, mask=mask,
        workers=workers, seed=seed,
    )  # fmt: skip
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, (p, _, q) in sketcher.singular_pairs().items():
        right, left = (None, None) if whitenings is None else whitenings[name]
        if p.shape[1]:
            found[name] = times(left, p), times(right, q)
    if not found:
        raise ValueError("expected a gradient that is not zero in some layer, got none")
    return found
