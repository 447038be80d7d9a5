"""Directions of rank 1 in all layers, their slopes, and their joint curvature."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.directions needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import LayerTargets, TargetLayer, find_layers
from lorambo_adapters.spectra.batches import (
    MaskOf,
    attention_masks,
    for_passes,
    frozen,
    same_random_numbers,
    shown,
)
from lorambo_adapters.spectra.candidates import candidate_directions
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.factors import warn_silent
from lorambo_adapters.spectra.fisher import Fisher, FisherLoss, LossFn, Terms, same_number
from lorambo_adapters.spectra.hooks import GradientHooks
from lorambo_adapters.spectra.kronecker import Curvature
from lorambo_adapters.spectra.sample_derivatives import Directions, SampleDerivatives
from lorambo_alloc import GainCurves
from lorambo_alloc.objectives import real_number

_ROUNDING = 2.0**-23  # of derivatives, in float32 unless the model is in float64


class Coupled(NamedTuple):
    """What `CoupledQuadratic(b, C, rho, layers)` takes.

    Attributes:
        b: the mean loss's slope along each candidate, in units of loss per unit of coefficient.
        C: the candidates' joint Fisher information, symmetric, positive semidefinite up to
            rounding.
        layers: the layer of each candidate: those of one layer stand together.
        directions: layer to the candidates (U, V); the best update is -sum_j x_j u_j v_j^T with
            x = (C + rho I)^-1 b on the chosen candidates.
    """

    b: npt.NDArray[np.float64]
    C: npt.NDArray[np.float64]
    layers: list[str]
    directions: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def curves(self, rho: float = 0.0) -> GainCurves:
        """What each layer's first r candidates save together, for `allocate`: layers alone.

        F(r) = 1/2 b_r^T (C_rr + rho I)^-1 b_r on a layer's first r candidates: no more than the
        best update of rank r saves in the quadratic model, and with the true Fisher exactly what
        the best coefficients of these do. So it is free of what Kronecker factors overstate
        (`curvature_spectra`), whatever curvature the candidates came from. Interaction between
        layers is left out, as in spectra; `CoupledQuadratic` has it.

        C is measured on the samples at hand: if these (times `draws`) are not many times r, it is
        too low in some direction by chance, and F too high. Labels drawn anew (another `seed` than
        the factors') do not share the chance that chose the candidates. In the small Llamas that
        `curvature_spectra` tells of (`draws=8`), F was 1.0 to 1.1 times the exact value in the
        median and below 1.2 times in 90 % of the layers; with the same seed below 1.6 times.

        A candidate without curvature of its own beside the earlier ones adds nothing, as with
        `damping=0`.

        Args:
            rho: added to the curvature of each candidate; of unit order for whitened candidates.

        Returns:
            Curves by layer, not decreasing; not concave in general. They know no shapes, so give
            `allocate` its `shapes=` too: {layer.name: layer.shape for layer in find_layers(model)}.

        Raises:
            ValueError: rho is negative or not finite.

        Example:
            >>> b, C = np.array([3.0, 6.0]), np.array([[18.0, 0.0], [0.0, 72.0]])
            >>> Coupled(b, C, ["0", "0"], {}).curves()["0"]
            array([0.  , 0.25, 0.5 ])
        """
        if not 0 <= real_number(rho) < math.inf:
            raise ValueError(f"rho: expected a finite number >= 0, got {rho!r}")
        names = np.array(self.layers)
        gains: dict[str, npt.NDArray[np.float64]] = {}
        for name in dict.fromkeys(self.layers):
            of = np.flatnonzero(names == name)
            gains[name] = _pivot_gains(self.b[of], self.C[np.ix_(of, of)] + rho * np.eye(len(of)))
        return GainCurves.from_increments(gains)


def coupled_directions(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    directions: Directions | None = None,
    *,
    fisher: Fisher = "empirical",
    curvature: Curvature | None = None,
    per_layer: int = 8,
    targets: LayerTargets = "all-linear",
    terms: Terms = None,
    samples: Callable[[Any], int] | None = None,
    mask: MaskOf | None = None,
    workers: Workers | None = None,
    seed: int = 0,
) -> Coupled:
    """Slopes and joint curvature of candidate directions in all layers: layers as they interact.

    With c_n the derivatives of sample n's loss (the sum of its terms) along all M candidates,

        b = (1/N) sum_n c_n,      C = (1/N) sum_n c_n c_n^T,      N terms,

    that is the gradient and the Fisher information of the mean loss per term, restricted to the
    candidates: C_ij = <d_i, F d_j> for directions d_i, d_j of the same layer or of different
    ones, without any Kronecker or block-diagonal approximation. With the empirical Fisher and
    several terms in a sample (tokens of a sequence) c_n c_n^T has the products of different terms
    too: it is the Fisher of whole sequences. With drawn labels these vanish in expectation. C has
    at most as large a rank as there are samples (times draws): use `rho` > 0 where candidates are
    more.

    With the empirical Fisher (and one term a sample) 1/2 b^T (C + rho I)^-1 b never exceeds 1/2, in
    whatever units the loss is, as C is the second moment of what b is the mean of: such gains rank
    candidates, but do not predict a fall of the loss. Those of the true Fisher do, as far as
    a quadratic model reaches.

    No gradient of a sample is formed: the time added is T (d + k) m multiplications for T tokens
    and m candidates in a layer, and the memory (d + k) m numbers a layer, M numbers a sample of
    the batch and M^2 for C (in float64).

    Args:
        model: any module; no parameter needs `requires_grad`. Samples must not interact (no batch
            normalisation in training mode), and must be the first dimension of every layer's input.
        batches: as in `curvature_factors`.
        loss_fn: as in `curvature_factors`.
        directions: layer to (U, V). By default `candidate_directions` of these batches, of
            `per_layer` columns. A layer without any is left out.
        fisher: as in `curvature_factors`; b always has the data's labels.
        curvature: whitens the gradient for the default candidates.
        per_layer: how many default candidates a layer has, at most.
        targets: which layers, where `directions` does not say.
        terms: as in `curvature_factors`.
        samples: batch to how many samples it has; by default the first dimension of the first
            tensor in it.
        mask: as in `curvature_factors`.
        workers: as in `curvature_factors`; all take worker 0's directions. 8 m^2 bytes travel, of m
            candidates in all.
        seed: as in `curvature_factors`.

    Returns:
        b, C, the layer of each candidate, and the candidates.

    Raises:
        ValueError: directions do not fit their layers, a layer's tokens are not a multiple of the
            samples, or it is an expert or a table with `padding_idx`, which do not tell whose
            tokens they get; loss and `predict` count different terms; or as `curvature_factors`.

    Example:
        >>> import torch
        >>> from lorambo_alloc.submodular import CoupledQuadratic
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> loss = lambda m, x: 3 * m(x).flatten()
        >>> uv = {"0": (torch.ones(1, 2), torch.eye(2))}
        >>> b, C, layers, _ = coupled_directions(model, [x], loss, uv)
        >>> b, C
        (array([3., 6.]), array([[18.,  0.],
               [ 0., 72.]]))
        >>> CoupledQuadratic(b, C, layers=layers).value([0, 1])
        0.5
    """
    workers = Workers.alone() if workers is None else workers
    if directions is None:
        for layer in find_layers(model, targets):
            if layer.kind == "expert":
                raise ValueError(
                    f"layer {layer.name!r}: expected layers that all tokens pass, got an expert, "
                    "of whose tokens the samples are not known; pass targets=[layer for layer in "
                    "find_layers(model) if layer.kind != 'expert']"
                )
        batches = for_passes(batches, 2)
        directions = candidate_directions(
            model, batches, loss_fn, per_layer, curvature=curvature, targets=targets, terms=terms,
            mask=mask, workers=workers, seed=seed,
        )  # fmt: skip
    derivatives = SampleDerivatives(_layers(model, directions), directions)
    derivatives.share(workers)
    losses = FisherLoss(loss_fn, fisher, terms)
    mask = attention_masks(model, derivatives.layers) if mask is None else mask
    samples = first_dimension if samples is None else samples
    number, b, gram = (
        torch.zeros(shape, device=derivatives.device, dtype=torch.float64)
        for shape in ((1,), (derivatives.size,), (derivatives.size, derivatives.size))
    )
    hooks = GradientHooks(derivatives.layers, derivatives.receive, model=model)
    count = 0
    with (
        frozen(model),
        same_random_numbers(model, seed + workers.index),
        hooks,
        shown(batches, 1, "directions") as one_pass,
        torch.enable_grad(),
    ):
        for batch in one_pass(1):
            # Not the hooks' own mask: it would drop rows, and with them which sample they are of.
            derivatives.begin(samples(batch), mask(batch))
            hooks.begin()
            labelled = None
            if not losses.empirical:
                loss, labelled = losses.total(model, batch)
                loss.backward()
                b += derivatives.take().sum(0)
            terms_here, scalars = losses.moments(model, batch)
            if labelled is not None:
                same_number(terms_here, labelled)
            for scalar, last in scalars:
                scalar.backward(retain_graph=not last)
                c = derivatives.take()
                gram += c.T @ c
                if losses.empirical:
                    b += c.sum(0)
            number += terms_here
            count += 1
    if not workers.count_all(count):
        raise ValueError("batches: expected at least one batch, got none")
    workers.sum([number, b, gram])
    names = [layer.name for layer in derivatives.layers]
    reached = workers.united(names, derivatives.reached)
    silent = [name for name in names if name not in reached]
    warn_silent(silent, "gradient", "whose slopes are zero")
    if not float(number):
        raise ValueError("loss_fn: expected at least one term in the batches, got none")
    slopes, joint = b / number, (gram + gram.T) / (2 * number)
    return Coupled(
        slopes.cpu().numpy(), joint.cpu().numpy(), derivatives.names, derivatives.directions
    )


def first_dimension(batch: Any) -> int:
    """The first dimension of the first tensor in a batch.

    Raises:
        ValueError: it has none.
    """
    values = list(batch.values()) if hasattr(batch, "keys") else [batch]
    while values:
        value = values.pop(0)
        if isinstance(value, torch.Tensor) and value.ndim:
            return len(value)
        if isinstance(value, (list, tuple)):
            values = [*value, *values]
    raise ValueError("batch: expected a tensor in it, got none; pass samples=")


def _pivot_gains(b: npt.NDArray[np.float64], C: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The increments of 1/2 b_r^T C_rr^-1 b_r over r, by elimination without row exchanges."""
    b, C = b.copy(), C.copy()
    gains = np.zeros(len(b))
    own = C.diagonal().copy()
    for r in range(len(b)):
        # C was summed from products rounded in float32 or float64; b's own rounding over a smaller
        # pivot than this would pass for a gain.
        if C[r, r] > len(b) * _ROUNDING * own[r]:
            gains[r] = b[r] ** 2 / (2 * C[r, r])
            column = C[r + 1 :, r] / C[r, r]
            b[r + 1 :] -= column * b[r]
            C[r + 1 :, r + 1 :] -= np.outer(column, C[r, r + 1 :])
    return gains


def _layers(model: torch.nn.Module, directions: Directions) -> list[TargetLayer]:
    if not directions:
        raise ValueError("directions: expected at least one layer, got none")
    found = {
        layer.name: layer for layer in find_layers(model, "|".join(map(re.escape, directions)))
    }
    for name in directions:
        if name not in found:
            raise ValueError(f"directions: expected names of the model's layers, got {name!r}")
    return [found[name] for name in directions]
