"""Spectra whose gains are in units of the loss: whitened gradients, and weighted updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.loss_units needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import LayerTargets
from lorambo_adapters.spectra.batches import MaskOf, for_passes
from lorambo_adapters.spectra.curvature import curvature_factors
from lorambo_adapters.spectra.decompose import decompose
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.factors import Kind
from lorambo_adapters.spectra.fisher import Fisher, FisherLoss, LossFn, Terms
from lorambo_adapters.spectra.gradients import gradient_spectra
from lorambo_adapters.spectra.kronecker import Curvature
from lorambo_alloc import Spectra
from lorambo_alloc.costs import whole_number


def curvature_spectra(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    rank: int = 64,
    *,
    curvature: Curvature | Kind = "kfac",
    fisher: Fisher = "empirical",
    damping: float = 1e-3,
    targets: LayerTargets = "all-linear",
    terms: Terms = None,
    passes: int = 3,
    width: int | None = None,
    mask: MaskOf | None = None,
    workers: Workers | None = None,
    seed: int = 0,
    source: str | None = None,
) -> Spectra:
    """Spectra whose squares are what each rank lowers the loss by, in the quadratic model.

    The gradient G of the mean loss per term is whitened before it is sketched. By second order the
    best update of rank r of one layer lowers the mean loss by 1/2 sum of the r largest sigma_j^2
    of G~ = B^-1/2 G A^-1/2. The spectra hold sigma_j / sqrt(2): with `allocate`'s objective
    "frobenius" the gains are in units of the loss (for "none" and "input" they are not: the
    curvature on the side of the outputs is not known; `source` says so).

    All terms have the same weight, whatever the sizes of the batches.

    **How far to trust them.** From N terms the mean gradient has a covariance of about F / N, which
    whitening turns into I / N where A kron B is right: noise alone has values of up to about
    (sqrt(d) + sqrt(k)) / sqrt(2 N) here (`noise_edge`; Yin, Bai, Krishnaiah 1988), and
    ranks below that are not told apart. On 96 terms of a small pretrained encoder, a layer of
    384 x 1,536 had the values 4.6, 4.5, ..., 3.8 (the 21st), where noise has 4.2.
    Many more terms than (sqrt(d) + sqrt(k))^2 are needed, or a "diagonal" curvature, which whitens
    less.

    Gains are too high even without noise, as the best update seeks out what the factors miss, above
    all products of a sample's tokens. In six small random Llamas (14 layers each, 64 sequences of
    20 tokens, `TrueFisher(draws=8)`, damping 0.001), the gain of the first rank was so many times
    what the best step along that update saves in the exact quadratic model (median, 90 % below):

    | loss | "kfac" | "ekfac" | "diagonal" | "kfac", damping 0.1 |
    |---|---|---|---|---|
    | one a token | 3.3, 5.9 | 3.6, 6.2 | 7.3, 14 | 1.7, 3.8 |
    | one a sequence, at its last token | 4.9, 14 | 5.5, 11 | 8.0, 21 | 2.5, 7.8 |
    | one a sequence, of the tokens' mean | 8.8, 20 | 10, 21 | 36, 130 | 6.3, 16 |

    `coupled_directions(...).curves()` measures the curvature along these updates instead, sample by
    sample, for one more pass (1.0 to 1.1 in the median there; `benchmarks/run_curvature.py`). And
    sums over layers leave out that layers save the same loss.

    A quadratic model knows no range: what it predicts may exceed the loss itself. And with
    the empirical Fisher "kfac" of the same T tokens no value exceeds sqrt(T / (2 N)), whatever the
    loss: G is made of the same g and x as A and B.

    Memory: that of `curvature_factors`, as much again for the inverse roots (8 (k^2 + d^2) bytes a
    layer), and the sketch (`GradientSketcher`).

    Whitened spectra are flatter than plain ones, and flat ones are harder to sketch: on that
    encoder the values 1 to 16 were off by 3 % (root mean square; at most 6 %) with "kfac" and three
    passes, and by 0.1 % (0.6 %) with "diagonal". More `passes` or a larger `width` help.

    Args:
        model: any module; no parameter needs `requires_grad`.
        batches: as in `curvature_factors`; kept as a list if it is an iterator.
        loss_fn: as in `curvature_factors`.
        rank: at most this many values a layer.
        curvature: factors that are ready, or the kind to compute on these batches.
        fisher: as in `curvature_factors`.
        damping: as in `curvature_factors`.
        targets: which layers, as PEFT's `target_modules`, or from `find_layers`.
        terms: as in `curvature_factors`.
        passes: over the batches, for the gradient (`gradient_spectra`).
        width: of the sketches (`gradient_spectra`).
        mask: as in `curvature_factors`.
        workers: as in `curvature_factors` and `gradient_spectra`.
        seed: of drawn labels, test matrices and all random numbers in each pass.
        source: what to record as the spectra's origin, put before how they were computed.

    Returns:
        Spectra with shapes; the energy that they leave unresolved is in the same units.

    Raises:
        ValueError: as `curvature_factors` and `gradient_spectra`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> loss = lambda m, x: 3 * m(x).flatten()
        >>> spectra = curvature_spectra(model, [x], loss, damping=0.0, targets=["0"])
        >>> spectra["0"] ** 2  # G = [3, 6], A = diag(2, 8), B = 9
        array([0.5])
    """
    batches = for_passes(batches, 2)
    if not isinstance(curvature, Curvature):
        curvature = curvature_factors(
            model, batches, loss_fn, kind=curvature, fisher=fisher, damping=damping,
            targets=targets, terms=terms, mask=mask, workers=workers, seed=seed,
        )  # fmt: skip
    losses = FisherLoss(loss_fn, "empirical", terms)
    counts = [0, 0]

    def total(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss, number = losses.total(model, batch)
        counts[0] += 1
        counts[1] += number
        return loss

    spectra = gradient_spectra(
        model, batches, total, rank, curvature.whitenings(), targets,
        passes=passes, width=width, mask=mask, workers=workers, seed=seed,
    )  # fmt: skip
    if workers is not None:
        counts = [workers.count_all(count) for count in counts]
    if not counts[1]:
        raise ValueError("loss_fn: expected at least one term in the batches, got none")
    # Those were of the mean over batches of the sum over terms.
    per_term = counts[0] / counts[1]
    return _in_loss_units(spectra, per_term, curvature, "whitened gradient", source)


def noise_edge(shape: tuple[int, int], terms: int) -> float:
    """The largest value that noise alone would have in `curvature_spectra`, about.

    (sqrt(d) + sqrt(k)) / sqrt(2 N), for large d and k the edge of the singular values of a matrix
    of independent entries with variance 1 / (2 N). It supposes that A kron B is the covariance of
    a term's gradient.

    Args:
        shape: (d, k).
        terms: N, of the gradient.

    Raises:
        ValueError: terms is not a whole number >= 1.

    References:
        Yin, Bai, Krishnaiah: On the limit of the largest eigenvalue of the large dimensional sample
        covariance matrix. Probability Theory and Related Fields 78 (1988).

    Example:
        >>> round(noise_edge((384, 1536), 96), 3)
        4.243
    """
    d, k = shape
    terms = whole_number(terms, "terms", 1)
    return (math.sqrt(d) + math.sqrt(k)) / math.sqrt(2 * terms)


def weighted_spectra(
    updates: Mapping[str, torch.Tensor],
    curvature: Curvature,
    *,
    rank: int | None = None,
    source: str | None = None,
) -> Spectra:
    """Spectra of updates as the curvature weighs them: M = B^1/2 D A^1/2.

    Near a minimum that D* leads to, the loss above it is 1/2 |M - M_r|_F^2 if only rank r of M is
    kept, so each rank is worth 1/2 sigma_j(M)^2. The spectra hold sigma_j / sqrt(2), as those of
    `curvature_spectra`. Here damping raises the gains instead.

    Args:
        updates: layer to D, d x k, such as a tuned weight less its base; float64 copies are made
            one at a time.
        curvature: of the tuned model, or the base; has factors for all these layers.
        rank: at most this many values a layer (`decompose`); all by default.
        source: what to record as the spectra's origin, put before how they were computed.

    Raises:
        ValueError: a layer has no factors, or an update has another shape or is not finite.

    Example:
        >>> from lorambo_adapters.spectra.curvature import curvature_factors
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> loss = lambda m, x: 3 * m(x).flatten()
        >>> factors = curvature_factors(model, [x], loss, damping=0.0, targets=["0"])
        >>> (weighted_spectra({"0": torch.tensor([[1.0, 0.5]])}, factors)["0"] ** 2).round(6)
        array([18.])
    """
    values: dict[str, npt.NDArray[np.float64]] = {}
    unresolved: dict[str, float] = {}
    for name, update in updates.items():
        if name not in curvature:
            raise ValueError(f"curvature: layer {name!r} is missing")
        weighed = curvature[name].weigh(update)
        if not bool(torch.isfinite(weighed).all()):
            raise ValueError(f"layer {name!r}: expected a finite update, got NaN or infinity")
        found = decompose(weighed, None if rank is None else min(rank, *weighed.shape))
        values[name], unresolved[name] = found.values, found.unresolved
    shapes = {name: curvature[name].shape for name in updates}
    spectra = Spectra(values, shapes=shapes, unresolved=unresolved)
    return _in_loss_units(spectra, 1.0, curvature, f"{len(values)} weighted updates", source)


def _in_loss_units(
    spectra: Spectra, factor: float, curvature: Curvature, what: str, source: str | None
) -> Spectra:
    units = (
        "squares in units of the mean loss per term"
        if curvature.in_loss_units
        else "squares not in units of the loss, as the outputs' curvature is unknown"
    )
    how = f"{what} / sqrt(2): {units}; {curvature.source}"
    how = f"{how}; {spectra.source}" if spectra.source else how
    scale = factor / math.sqrt(2)
    return Spectra(
        {name: values * scale for name, values in spectra.items()},
        shapes=spectra.shapes,
        source=f"{source}; {how}" if source else how,
        unresolved={name: energy * scale**2 for name, energy in spectra.unresolved.items()},
    )
