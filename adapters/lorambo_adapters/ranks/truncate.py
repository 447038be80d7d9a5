"""The best approximation of a lower rank to a product B A, from its factors alone."""

from __future__ import annotations

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.truncate needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.low_rank import Pair, weighted_core

_ROUNDING = 2.0**-52


def truncated(
    left: torch.Tensor, right: torch.Tensor, rank: int, curvature: Pair = (None, None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the product of at most this rank that is nearest to left @ right.

    Nearest in tr((D - D_r)^T B (D - D_r) A)^1/2, the Frobenius norm where no curvature is given.
    With D = left right, M = B^1/2 D A^1/2 and its singular vectors, M's truncation is
    M W_r W_r^T, and the factors are

        left' = left R^T W_r S_r^-1/2,   right' = S_r^-1/2 P_r^T L right

    where L^T L = left^T B left, R^T R = right A right^T and P S W^T = L R^T, all r x r: neither the
    product nor a root or an inverse of A or B is formed. Then each column of left' is given the
    norm of its row of right'.

    Accuracy: in float64, off by about 2e-16 |left| |right| without curvature. Directions whose
    singular value is that small beside the largest are zero in the result. Where A or B is
    singular, directions that it does not see are left out.

    Memory: 2 (d + k) r numbers in float64.

    Args:
        left: d x r, of any floating-point type.
        right: r x k, on the same device.
        rank: columns of left' and rows of right', from 1 to r. Beyond the rank of M they are zero.
        curvature: (A, B), as `product_values` takes it.

    Returns:
        left' and right', d x rank and rank x k, in float64.

    Raises:
        ValueError: as `product_values`.

    References:
        Eckart, Young 1936; Mirsky 1960 (every unitarily invariant norm).

    Example:
        >>> import torch
        >>> left, right = torch.eye(3)[:, :2], torch.tensor([[0.0, 5.0], [3.0, 0.0]])
        >>> b, a = truncated(left, right, 1)
        >>> (b @ a).round(decimals=6) + 0.0
        tensor([[0., 5.],
                [0., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    for name, factor in (("B", left), ("A", right)):
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"expected finite numbers, got NaN or infinity in the factor {name}")
    on_right, on_left = curvature
    left, right = left.to(torch.float64), right.to(torch.float64)
    core_left = weighted_core(left, on_left, "B")
    core_right = weighted_core(right.T, on_right, "A")
    p, values, wt = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    found = min(rank, len(values))
    kept = values[:found]
    largest = core_left.norm() * core_right.norm()
    inverse = torch.where(kept > _ROUNDING * largest, kept, torch.inf).rsqrt()
    new_left = left.new_zeros(len(left), rank)
    new_right = right.new_zeros(rank, right.shape[1])
    new_left[:, :found] = left @ (core_right.T @ wt[:found].T * inverse)
    new_right[:found] = (inverse[:, None] * (p[:, :found].T @ core_left)) @ right
    lengths = new_left.norm(dim=0), new_right.norm(dim=1)
    ratio = torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[1] / lengths[0], 1.0).sqrt()
    return new_left * ratio, new_right / ratio[:, None]


def squared_distance(
    old: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """|D - D'|_F^2 and |D|_F^2 of two products, from their factors alone.

    Accuracy: in float64; the distance is off by about 2e-16 (|D| + |D'|)^2 cond, where cond stands
    for how much larger the factors are than their product.

    Args:
        old: D as (left, right).
        new: D' as (left, right), of any ranks.
    """
    left = torch.cat([old[0].to(torch.float64), -new[0].to(torch.float64)], 1)
    right = torch.cat([old[1].to(torch.float64), new[1].to(torch.float64)])
    squares = (left.T @ left) * (right @ right.T)
    r = old[0].shape[1]
    return max(float(squares.sum()), 0.0), float(squares[:r, :r].sum())
