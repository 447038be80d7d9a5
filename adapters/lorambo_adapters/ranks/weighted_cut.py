"""A matrix cut to low rank in a norm |B^1/2 D A^1/2|_F, and what of it a bias can take up.

With A the second moment of a layer's inputs x and B that of the gradients g of its outputs, the
square of the norm is E[(g^T D x)^2] where x and g are independent: how far the loss moves for a
difference D, to first order, token by token. With A the inputs' moment about their mean it is the
same for D less what D makes of the mean, which a bias can hold (`Fold`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.weighted_cut needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

_RESOLVED = 1e-12
"""Singular values below this share of the largest are rounding, and get no direction."""


class WeightedCut:
    """A matrix, ready to be cut in a norm to any rank.

    With L and R the lower Cholesky factors of the damped moments, B = L L^T and A = R R^T, the
    matrix L^T D R has the singular values of B^1/2 D A^1/2, and what is nearest to it of rank r
    is L^T C R for the C that is nearest to D in the norm.

    Memory: at most about 24 (d k + d^2 + k^2) bytes while it is made.

    Args:
        difference: D, d x k.
        left: B, d x d, symmetric and positive semidefinite; None for the identity.
        right: A, k x k, likewise.
        damping: of either, relative to its mean eigenvalue; 1e-9 at least. A moment of zeros
            counts as the identity.
        most: the greatest rank that is kept.
        rounding: of the sums that the moments are of, relative: so much of the trace is added at
            least, for sums of finite precision need not be positive definite.

    Attributes:
        values: the singular values of B^1/2 D A^1/2, descending, in float64.

    Raises:
        ValueError: a moment is not of the difference's shape, or not positive definite when it is
            damped.

    References:
        Eckart, Young: The approximation of one matrix by another of lower rank. Psychometrika 1,
        1936; Golub, Van Loan: Matrix computations, 4th edition, 2013, theorem 2.4.8 (for the
        spectral norm); here after a change of variables.

    Example:
        >>> import torch
        >>> cut = WeightedCut(torch.diag(torch.tensor([3.0, 2.0])), None, torch.tensor([[1.0, 0.0],
        ...                                                                            [0.0, 9.0]]))
        >>> cut.cut(1).round(decimals=3)  # the second input is three times as large
        tensor([[0., 0.],
                [0., 2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        difference: torch.Tensor,
        left: torch.Tensor | None = None,
        right: torch.Tensor | None = None,
        *,
        damping: float = 0.0,
        most: int | None = None,
        rounding: float = 0.0,
    ) -> None:
        for moment, size, which in zip((left, right), difference.shape, "BA", strict=True):
            if moment is not None and moment.shape != (size, size):
                raise ValueError(
                    f"expected {which} of shape {(size, size)}, got {tuple(moment.shape)}"
                )
        lower, other = (
            None if moment is None else _root(moment, damping, rounding) for moment in (left, right)
        )
        matrix = difference.double()
        matrix = matrix if lower is None else lower.T @ matrix
        matrix = matrix if other is None else matrix @ other
        u, values, v = _leading(matrix, min(matrix.shape) if most is None else most)
        self.values: npt.NDArray[np.float64] = values.cpu().numpy()
        self._u, self._v = _solved(lower, u * values), _solved(other, v)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """U (d x rank) and V (k x rank): U V^T = B^-1/2 [B^1/2 D A^1/2]_rank A^-1/2 is nearest."""
        return self._u[:, :rank], self._v[:, :rank]

    def cut(self, rank: int) -> torch.Tensor:
        """The product of the factors, d x k."""
        u, v = self.factors(rank)
        return u @ v.T


@dataclass(frozen=True)
class Fold:
    """A layer's bias, such that what a cut leaves out changes no mean output.

    With m the mean input, (D - U V^T) m is added: the layer's mean output over the tokens that m
    is the mean of is then that with the whole difference, whatever the cut.

    Attributes:
        bias: of the layer with the whole difference, of length d.
        change: D m.
        mean: m, of length k.
    """

    bias: torch.Tensor
    change: torch.Tensor
    mean: torch.Tensor

    def beside(self, factors: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """The bias beside a cut U V^T; None for a layer that is cut to nothing. In float64."""
        bias = self.bias.double() + self.change.double()
        if factors is None:
            return bias
        u, v = (each.double() for each in factors)
        return bias - u @ (v.T @ self.mean.double())


def _leading(matrix: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values, by the eigenvalues of the smaller Gram matrix.

    Several times as fast as an SVD; values below 1e-8 of the largest are rounding.
    """
    flat = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(flat @ flat.T)
    values = squares.flip(0)[:most].clamp(min=0).sqrt()
    u = vectors.flip(1)[:, :most]
    resolved = values > _RESOLVED * values[:1]
    inverse = torch.where(resolved, 1 / torch.where(resolved, values, 1.0), 0.0)
    v = flat.T @ u * inverse
    return (u, values, v) if flat is matrix else (v, values, u)


def _root(moment: torch.Tensor, damping: float, rounding: float) -> torch.Tensor:
    """The lower Cholesky factor of the damped moment."""
    moment = moment.double()
    mean = float(moment.trace()) / len(moment)
    added = max(damping, rounding * len(moment), 1e-9) * mean or 1.0
    root, failed = torch.linalg.cholesky_ex(moment + added * torch.eye(len(moment)).to(moment))
    if int(failed):
        raise ValueError(
            f"expected a moment that is positive definite with damping {damping!r}, got another; "
            "give a larger damping"
        )
    return root


def _solved(root: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """The inverse of a root's transpose, times columns."""
    if root is None:
        return columns
    return torch.linalg.solve_triangular(root.T, columns, upper=True)
