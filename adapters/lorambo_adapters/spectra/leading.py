"""Factors of a matrix's best approximation of a low rank."""

from __future__ import annotations

import math

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.leading needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.block_krylov import block_krylov, largest_basis
from lorambo_adapters.spectra.decompose import is_exact, squared_norm

_BLOCK = 1024  # rows whose residual is formed at a time


def leading_factors(
    matrix: torch.Tensor,
    rank: int,
    *,
    exact_below: int = 1024,
    tolerance: float = 3e-5,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best approximation of a matrix of this rank, balanced.

    Column j of the left factor and row j of the right one have the length sqrt(sigma_j).

    Accuracy: where `is_exact` says so, the singular value decomposition in float64. Else the left
    vectors are those that block Krylov iteration finds (`decompose`), and the right factor is the
    matrix's projection onto them, in its own precision (float32 at least): no other right factor
    would do better with these, and the energy falls short of the best by `tolerance` of it, by the
    same estimate as there.

    Memory beyond the matrix: exact, 8 d k bytes for a float64 copy and as much again within LAPACK;
    else what `decompose` states, and 4 d k more unless rows or columns lie in one piece in float32.

    Args:
        matrix: d x k, finite, of a floating-point type; it is not written to.
        rank: from 1 to min(d, k).
        exact_below: see `decompose`.
        tolerance: see `decompose`.
        seed: see `decompose`.

    Returns:
        d x rank and rank x k, in float64.

    Raises:
        ValueError: the rank is out of its range, or the matrix is not finite.

    References:
        Halko, Martinsson, Tropp 2011, section 5.1 (from a basis to the decomposition).

    Example:
        >>> import torch
        >>> left, right = leading_factors(torch.tensor([[0.0, 4.0], [1.0, 0.0]]), 1)
        >>> (left @ right).abs().round(decimals=6)
        tensor([[0., 4.],
                [0., 0.]], dtype=torch.float64)
    """
    d, k = matrix.shape
    if not 1 <= rank <= min(d, k):
        raise ValueError(f"rank: expected a whole number from 1 to {min(d, k)}, got {rank}")
    matrix = matrix.detach()
    low, high = torch.aminmax(matrix)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise ValueError("expected a matrix of finite numbers, got NaN or infinity")
    if largest == 0:
        zeros = matrix.new_zeros(d, rank, dtype=torch.float64)
        return zeros, zeros.new_zeros(rank, k)
    # Powers of two are exact, and no square leaves the range of float32.
    scale = 2.0 ** math.frexp(largest)[1]
    exact = is_exact((d, k), rank, exact_below)
    work = torch.float64 if exact else torch.promote_types(matrix.dtype, torch.float32)
    matrix = matrix.to(work) / scale
    if exact:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        root = (values[:rank] * scale).sqrt()
        return u[:, :rank] * root, root[:, None] * vt[:rank]
    # Tall for the iteration, whose products are then columns of the matrix as it is given here.
    flipped = not matrix.is_contiguous() and matrix.T.is_contiguous()
    matrix = matrix.T if flipped else matrix.contiguous()
    found = block_krylov(matrix, rank, *largest_basis(min(d, k), rank), tolerance, seed)
    vectors = torch.linalg.eigh(found.gram).eigenvectors.flip(1)[:, :rank]
    basis = torch.linalg.qr(found.products.T @ vectors).Q
    projected = (basis.to(work).T @ matrix).to(torch.float64)
    p, values, vt = torch.linalg.svd(projected, full_matrices=False)
    root = (values * scale).sqrt()
    left, right = basis @ p * root, root[:, None] * vt
    return (right.T, left.T) if flipped else (left, right)


def residual(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """|matrix - left right|_F^2, a block of rows at a time, in the matrix's own precision.

    Args:
        matrix: d x k, float32 or float64.
        left: d x r.
        right: r x k.
    """
    left, right = left.to(matrix), right.to(matrix)
    blocks = range(0, len(matrix), _BLOCK)
    return math.fsum(
        squared_norm(torch.addmm(matrix[i : i + _BLOCK], left[i : i + _BLOCK], right, alpha=-1))
        for i in blocks
    )
