"""What ranks are worth in a quadratic model: those that a product has, and those it could get."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.curves needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

# Of a product's singular values, relative to its factors' norms. Factors in float32 are rounded by
# 6e-8, which is no learning; below this a rank has no share in what the layer computes.
_LEARNT = 1e-6
_INSIDE = 1e-6  # what is left of a direction inside a span, relative to its norm

FloatArray = npt.NDArray[np.float64]
Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def product_pairs(left: torch.Tensor, right: torch.Tensor, scale: float) -> Triplets:
    """The singular value decomposition of scale * left @ right, without values that are about zero.

    Args:
        left: d x r.
        right: r x k.
        scale: any number.

    Returns:
        (U, sigma, V), d x n, n descending and k x n, float64; n <= r: values above a millionth of
        the product of the factors' norms. No d x k product is formed.

    Example:
        >>> b, a = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.eye(2)
        >>> product_pairs(b, a, 2.0)[1]
        tensor([6.], dtype=torch.float64)
    """
    left, right = left.double(), right.double()
    columns, upper = torch.linalg.qr(left)
    rows, lower = torch.linalg.qr(right.T)
    u, values, vt = torch.linalg.svd(scale * upper @ lower.T, full_matrices=False)
    bound = _LEARNT * abs(scale) * float(upper.norm()) * float(lower.norm())
    kept = int((values > bound).sum())
    return columns @ u[:, :kept], values[:kept], rows @ vt[:kept].T


def outside(pairs: Triplets, left: torch.Tensor, right: torch.Tensor) -> Triplets:
    """The decomposition of (I - L L^T) P diag(sigma) Q^T (I - R R^T).

    Args:
        pairs: (P, sigma, Q), d x n, n and k x n.
        left: L, d x m, orthonormal columns.
        right: R, k x m, likewise.

    Returns:
        Triplets as `pairs`, without those that rounding leaves of what lies inside.

    Example:
        >>> pairs = torch.eye(3), torch.tensor([3.0, 2.0, 1.0]), torch.eye(3)
        >>> outside(pairs, torch.eye(3)[:, :1], torch.eye(3)[:, :1])[1].round()
        tensor([2., 1.])
    """
    p, values, q = pairs
    if not left.shape[1] or not p.shape[1]:
        return pairs
    # Twice: after one projection what is almost inside is far from orthogonal.
    for _ in range(2):
        p, q = p - left @ (left.T @ p), q - right @ (right.T @ q)
    columns, upper = torch.linalg.qr(p * values)
    rows, lower = torch.linalg.qr(q)
    u, found, vt = torch.linalg.svd(upper @ lower.T)
    kept = int((found > _INSIDE * values.max()).sum())
    return columns @ u[:, :kept], found[:kept], rows @ vt[:kept].T


def kept_gains(sigma: FloatArray, b: FloatArray, C: FloatArray) -> FloatArray:
    """What the first r of n directions that are there save, against having none: F(0..n).

    With the coefficients sigma taken out from the last to the r + 1st, the loss changes by
    E(r) = -b_T sigma_T + 1/2 sigma_T^T C_TT sigma_T, and F(r) = E(0) - E(r).

    Args:
        sigma: the coefficients of the directions, n.
        b: the loss's slopes along them, where they are.
        C: the curvature, n x n.

    Example:
        >>> kept_gains(np.array([2.0, 1.0]), np.zeros(2), np.eye(2))
        array([0. , 2. , 2.5])
    """
    # Sums over tails of sigma_i C_ij sigma_j: from the lower right corner, both ways.
    quadratic = np.outer(sigma, sigma) * C
    tails = quadratic[::-1, ::-1].cumsum(0).cumsum(1).diagonal()[::-1]
    slopes = (b * sigma)[::-1].cumsum()[::-1]
    lost = np.append(0.5 * tails - slopes, 0.0)
    return lost[0] - lost


def new_gains(b: FloatArray, C: FloatArray, V: FloatArray, rho: float) -> FloatArray:
    """What the first m of n new directions save with their best coefficients, for m = 0..n.

    1/2 (b_m^T (C_mm + rho I)^-1 b_m - tr((C_mm + rho I)^-1 V_mm)): as E[b b^T] is the outer product
    of the true slopes plus V, noise in b adds nothing to it in expectation.

    Args:
        b: the loss's slopes, n.
        C: the curvature, n x n.
        V: the covariance of b's estimate.
        rho: the damping, in C's unit.

    Raises:
        ValueError: C + rho I is not positive definite.

    Example:
        >>> new_gains(np.array([3.0, 2.0]), np.eye(2), np.zeros((2, 2)), 0.0)
        array([0. , 4.5, 6.5])
    """
    if not C.any() and not rho:
        return np.zeros(len(b) + 1)  # a layer that nothing depends on
    try:
        factor = np.linalg.cholesky(C + rho * np.eye(len(b)))
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"damping: expected enough for a curvature that is almost singular, got {rho!r}"
        ) from error
    squares = np.linalg.solve(factor, np.outer(b, b) - V)
    squares = np.linalg.solve(factor, squares.T)
    return np.append(0.0, 0.5 * squares.diagonal().cumsum())
