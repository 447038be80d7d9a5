"""New directions for an adapter: one side zero, so that the function stays what it is."""

from __future__ import annotations

import math
from typing import TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.growth needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

Gradient: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""A layer's gradient, d x k; or (U, V), d x m and k x m, its best directions first."""

_EXACT_BELOW = 512  # the smaller side of a gradient that is decomposed in full
_INDEPENDENT = 1e-6  # what is left of a direction outside the others' span, relative to its norm


def new_rows(
    count: int,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    embedding: bool = False,
    gradient: Gradient | None = None,
    initialisation: object = True,
) -> torch.Tensor:
    """What the side that is not zero begins with, a row for each new direction.

    That is A, whose columns of B are zero; of an embedding it is B, as in PEFT, and A is zero.

    Without a gradient they are random as PEFT's own: uniform in +-1 / sqrt(k), with "gaussian"
    normal with standard deviation 1 / rank, of an embedding standard normal.

    With a gradient G of the loss with respect to W + s B A they are its directions outside what the
    adapter can already move. The old directions give first-order changes B X + Y A, so what is left
    is (I - P_B) G (I - P_A), with the projections on the span of B's columns and of A's rows. Its
    right singular vectors (of an embedding the left ones), largest first, are the new rows, with
    the mean norm of the old ones (1 / sqrt(3), that of PEFT's, where those are zero; of an
    embedding sqrt(d)). If it has fewer than `count`, the rest are PEFT's.

    Accuracy: exact (float64) up to a smaller side of 512; beyond that from a randomised
    decomposition with four power iterations, whose singular vectors of close values may be mixed.

    Args:
        count: of new directions.
        left: B, d x r, as it will be.
        right: A, r x k.
        embedding: which side.
        gradient: see `Gradient`. Of directions (U, V) only the side in question is used.
        initialisation: PEFT's `init_lora_weights`; others than "gaussian" count as True.

    Returns:
        count x k (of an embedding count x d), float64, on the device of `left`.

    Raises:
        ValueError: the gradient is of another shape, or not finite.
    """
    side = left if embedding else right.T
    width = len(side)
    found = side.new_zeros(0, width, dtype=torch.float64)
    if gradient is not None and count:
        basis = _outside(left, right, embedding, gradient, count)
        norms = side.double().norm(dim=0)
        norms = norms[norms > 0]
        default = math.sqrt(width) if embedding else 1 / math.sqrt(3)
        found = basis.T * (float(norms.mean()) if len(norms) else default)
    rest = torch.empty(count - len(found), width, device=found.device, dtype=torch.float64)
    if embedding:
        rest.normal_()
    elif isinstance(initialisation, str) and initialisation.lower() == "gaussian":
        rest.normal_(std=1 / (left.shape[1] + count))
    else:
        rest.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))
    return torch.cat([found, rest])


def _outside(
    left: torch.Tensor, right: torch.Tensor, embedding: bool, gradient: Gradient, count: int
) -> torch.Tensor:
    """At most `count` orthonormal columns, d or k long, orthogonal to the adapter's own."""
    spans = _span(left), _span(right.T)
    if isinstance(gradient, torch.Tensor):
        expected, got = (len(left), right.shape[1]), tuple(gradient.shape)
        tensors = [gradient]
    else:
        tensors = list(gradient)
        m = tensors[0].shape[-1] if tensors else 0
        expected = (len(left), m), (right.shape[1], m)
        got = tuple(tuple(t.shape) for t in tensors)
    if got != expected:
        raise ValueError(f"expected a gradient of shape {expected}, got {got}")
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise ValueError("expected a finite gradient, got NaN or infinity")
    tensors = [t.detach().to(left.device, torch.float64) for t in tensors]
    if len(tensors) == 1:
        matrix = tensors[0]
        scale = float(matrix.norm())
        matrix = matrix - spans[0] @ (spans[0].T @ matrix)
        matrix = matrix - (matrix @ spans[1]) @ spans[1].T
        if min(matrix.shape) <= _EXACT_BELOW:
            u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
            v = vt.T
        else:
            wanted = min(count + 8, *matrix.shape)
            u, values, v = torch.svd_lowrank(matrix, wanted, niter=4)
        candidates = (u if embedding else v)[:, values > _INDEPENDENT * scale]
    else:
        candidates = tensors[0 if embedding else 1]
    span = spans[0 if embedding else 1]
    # Twice: after one projection a direction almost inside the span is far from orthogonal.
    projected = candidates - span @ (span.T @ candidates)
    projected = projected - span @ (span.T @ projected)
    basis: list[torch.Tensor] = []
    for column, before in zip(projected.T, candidates.norm(dim=0), strict=True):
        rest = column
        for _ in range(2):
            for other in basis:
                rest = rest - other * (other @ rest)
        norm = rest.norm()
        if float(norm) > _INDEPENDENT * float(before) and len(basis) < count:
            basis.append(rest / norm)
    return torch.stack(basis, 1) if basis else span.new_zeros(len(span), 0)


def _span(tall: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns' span, in float64."""
    if not tall.shape[1]:
        return tall.double()
    basis, triangle = torch.linalg.qr(tall.double())
    u, values, _ = torch.linalg.svd(triangle)
    largest = float(values.max()) if len(values) else 0.0
    return basis @ u[:, values > 1e-12 * largest]
