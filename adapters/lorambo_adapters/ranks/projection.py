"""Which directions a smaller adapter keeps, as two small matrices that act on the old factors.

A product B A of r directions becomes B P Q^T A, with P and Q of r rows and Q^T P = I. All that has
to move with the factors follows from P and Q: the gradients of the new factors B' = B P and
A' = Q^T A are G A'^T = (G A^T) Q and B'^T G = P^T (B^T G).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import qr, sqrtm

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.projection needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.low_rank import Pair, weighted_core

_ROUNDING = 2.0**-52
_DAMPING = 1e-10  # of curvature, relative to its mean eigenvalue: for directions it does not see

_WELL_CONDITIONED = 100.0


class Projection(NamedTuple):
    """P and Q, or the rows that are kept as they are.

    Attributes:
        rows: the old directions that the new ones continue, ascending.
        p: P, r x len(rows), float64; None where P = Q = the columns `rows` of the identity.
        q: Q likewise.
    """

    rows: torch.Tensor
    p: torch.Tensor | None = None
    q: torch.Tensor | None = None


def best_projection(
    left: torch.Tensor, right: torch.Tensor, rank: int, curvature: Pair = (None, None)
) -> Projection:
    """P and Q such that left P Q^T right is the best approximation of this rank.

    With L^T L = left^T B left, R^T R = right A right^T (r x r; A and B the curvature, or the
    identity) and the singular value decomposition L R^T = U S V^T,

        P = R^T V_r S_r^-1/2 M        Q = L^T U_r S_r^-1/2 M^-T

    give the truncation of B^1/2 left right A^1/2 to rank r for every invertible M (`truncated` of
    compression is M = I). M is chosen so that r of the old directions, E^T of them, stay as near to
    what they were as they can: left P M is nearest to left E (least squares) with M = Q^T E, and
    M^-1 Q^T right to E^T right with M = (E^T P)^-1. Taken is the one midway, M = Q^T E K^-1/2 with
    K = E^T P Q^T E, so that the result, P M = (P Q^T) E K^-1/2 and Q M^-T likewise, depends on no
    other choice. Then

    - where B^T B and A A^T commute, P = Q has orthonormal columns: a rotation;
    - where little is lost with some directions, the others stay nearly what they are, in their
      sizes too, so that an optimizer's steps keep theirs.

    (Where K has no such root, or an ill-conditioned one, M is the one with the least |P|^2 + |Q|^2,
    turned towards E.)

    Directions with a zero column of `left` or a zero row of `right` (those just added) are left out
    first, and if that is enough nothing is computed.

    Accuracy: in float64, the product is off by about 2e-16 |left| |right| from the truncation of
    the given factors, without curvature.

    Args:
        left: d x r, finite.
        right: r x k, on the same device.
        rank: 0 <= rank < r.
        curvature: (A, B), as `product_values` takes it. 1e-10 of its mean eigenvalue is added, so
            that among directions it does not see the larger ones are kept.

    Returns:
        At most `rank` directions; fewer where the product has fewer.

    Raises:
        ValueError: as `product_values`.

    References:
        Eckart, Young 1936; Mirsky 1960.

    Example:
        >>> import torch
        >>> left, right = torch.diag(torch.tensor([1.0, 5.0, 3.0])), torch.eye(3)
        >>> best_projection(left, right, 2).rows
        tensor([1, 2])
    """
    live = (left.any(0) & right.any(1)).nonzero()[:, 0]
    if len(live) <= rank:
        fresh = (~(left.any(0) & right.any(1))).nonzero()[: rank - len(live), 0]
        return Projection(torch.cat([live, fresh]).sort().values)
    if not rank:
        return Projection(live[:0])
    on_right, on_left = curvature
    core_left = _core(left[:, live].double(), on_left, "B")
    core_right = _core(right[live].double().T, on_right, "A")
    u, values, vt = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    largest = float(core_left.norm() * core_right.norm())
    found = int((values[:rank] > _ROUNDING * largest).sum())
    roots = values[:found].rsqrt()
    p, q = core_right.T @ vt[:found].T * roots, core_left.T @ u[:, :found] * roots
    p, q, rows = _nearest_to_rows(*_balanced(p, q))
    full = left.new_zeros(2, left.shape[1], found, dtype=torch.float64)
    full[:, live] = torch.stack([p, q])
    return Projection(live[rows.to(live.device)], full[0], full[1])


def _core(tall: torch.Tensor, weight: torch.Tensor | None, name: str) -> torch.Tensor:
    """C with C^T C = tall^T (weight + damping) tall."""
    core = weighted_core(tall, weight, name)
    if weight is None:
        return core
    diagonal = weight if weight.ndim == 1 else weight.diagonal()
    damping = _DAMPING * float(diagonal.double().mean()) or 1.0
    both = torch.cat([core, damping**0.5 * weighted_core(tall, None, name)])
    return torch.linalg.qr(both, mode="r").R


def _balanced(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P M and Q M^-T with the least |P M|^2 + |Q M^-T|^2, so of equal Gram matrices.

    Of orthonormal P, Q^T Q = Y >= I, and M = Y^1/4.
    """
    p, triangle = torch.linalg.qr(p)
    q = q @ triangle.T
    values, vectors = torch.linalg.eigh(q.T @ q)
    quarter = values.clamp(min=0.5) ** 0.25
    return p @ ((vectors * quarter) @ vectors.T), q @ ((vectors / quarter) @ vectors.T)


def _nearest_to_rows(
    p: torch.Tensor, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P M and Q M^-T near to columns E of the identity, and which ones: see `best_projection`.

    The rows are those that a pivoted QR decomposition of (P + Q)^T picks first.
    """
    total = p + q
    order = qr(total.T.cpu().numpy(), mode="r", pivoting=True)[1]
    rows = torch.as_tensor(order[: p.shape[1]].copy(), dtype=torch.long).sort().values
    p_rows, q_rows = (part[rows.to(part.device)] for part in (p, q))
    root = _root((p_rows @ q_rows.T).cpu().numpy())
    if root is None:
        # Procrustes' problem: the orthogonal O with the least |P O - E|^2 + |Q O - E|^2.
        u, _, vt = torch.linalg.svd((p_rows + q_rows).T)
        return p @ (u @ vt), q @ (u @ vt), rows
    root = torch.as_tensor(root, dtype=p.dtype, device=p.device)
    new_p = torch.linalg.solve(root, p @ q_rows.T, left=False)
    new_q = torch.linalg.solve(root.T, q @ p_rows.T, left=False)
    return new_p, new_q, rows


def _root(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The principal square root if it is real and well-conditioned."""
    if np.linalg.cond(matrix) > _WELL_CONDITIONED or np.linalg.eigvals(matrix).real.min() <= 0:
        return None
    root = np.asarray(sqrtm(matrix))
    return root.real if np.allclose(root.imag, 0) else None
