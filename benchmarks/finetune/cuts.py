"""A fine-tuned difference D cut to low rank, and its ranks chosen, in a norm |B^1/2 D A^1/2|_F.

With A = B = I the cut is the plain truncated SVD, and the best ranks are those that keep the most
energy. With second moments of inputs and gradients (`moments`) the norm is about what the
difference does: A alone, how far the outputs move; A and B, how far the loss moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.finetune.exact_budget import spend_exactly
from benchmarks.finetune.moments import Moments

_MOST = 128  # ranks that a layer may have


@dataclass(frozen=True)
class Norm:
    """Which norm.

    Attributes:
        right: the moment that is A, an attribute of `Moments`; None for the identity.
        left: the one that is B.
        damping: of either, relative to its mean eigenvalue.
    """

    right: str | None = None
    left: str | None = None
    damping: float = 0.1

    @property
    def centred(self) -> Norm:
        """The norm for a layer whose bias takes up what the mean input loses."""
        return replace(self, right="centred") if self.right == "inputs" else self


NORMS: dict[str, Norm] = {
    "plain": Norm(),
    "input": Norm("inputs"),
    "weighted": Norm("weighted"),
    "gradient": Norm(None, "gradients"),
    "kfac": Norm("inputs", "gradients"),
    "kfac_weighted": Norm("weighted", "gradients"),
    "shampoo": Norm("sample_inputs", "sample_gradients"),
}


class Factored:
    """A layer's difference, with its singular values in a norm.

    Args:
        difference: D, d x k.
        norm: which.
        moments: of the layer; not needed for the plain norm.

    Attributes:
        values: the singular values of B^1/2 D A^1/2, descending, at most 128.
    """

    def __init__(
        self, difference: torch.Tensor, norm: Norm, moments: Moments | None = None
    ) -> None:
        # With B = L L^T and A = R R^T, L^T D R has the singular values of B^1/2 D A^1/2.
        left, right = (
            None if name is None else _root(_moment(moments, name), norm.damping)
            for name in (norm.left, norm.right)
        )
        matrix = difference.double()
        matrix = matrix if left is None else left.T @ matrix
        matrix = matrix if right is None else matrix @ right
        u, values, v = _leading(matrix)
        self.values = values.numpy()
        self._u, self._v = _solved(left, u * values), _solved(right, v)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(d x rank, k x rank): their product B^-1/2 [B^1/2 D A^1/2]_r A^-1/2 is the nearest.

        Nearest in the norm among all matrices of this rank (Eckart, Young 1936, after a change of
        variables).
        """
        return self._u[:, :rank], self._v[:, :rank]

    def cut(self, rank: int) -> torch.Tensor:
        """The product of the factors, d x k."""
        u, v = self.factors(rank)
        return u @ v.T


def best_ranks(
    factored: Mapping[str, Factored], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The ranks that keep the most of the squared norm, at exactly this many parameters.

    Args:
        factored: by layer.
        costs: of a rank.
        budget: in parameters.

    Raises:
        ValueError: no ranks cost exactly the budget.
    """
    curves = {n: np.concatenate([[0.0], np.cumsum(f.values**2)]) for n, f in factored.items()}
    return spend_exactly(curves, costs, budget)


def _moment(moments: Moments | None, name: str) -> torch.Tensor:
    if moments is None:
        raise ValueError(f"moments: expected some for the moment {name!r}, got none")
    moment = getattr(moments, name)
    if moment is None:
        raise ValueError(f"moments: expected all of them for {name!r}, got those of K-FAC")
    return moment


def _leading(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values, by the eigenvalues of the smaller Gram matrix.

    Several times as fast as an SVD; values below 1e-8 of the largest are rounding.
    """
    flat = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(flat @ flat.T)
    values = squares.flip(0)[:_MOST].clamp(min=0).sqrt()
    u = vectors.flip(1)[:, :_MOST]
    v = flat.T @ u / values.clamp(min=1e-300)
    return (u, values, v) if flat is matrix else (v, values, u)


def _root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """The lower Cholesky factor of the damped moment."""
    mean = float(moment.trace()) / len(moment)
    added = max(damping, 1e-9) * mean or 1.0
    return torch.linalg.cholesky(moment + added * torch.eye(len(moment), dtype=torch.float64))


def _solved(root: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """The inverse of a root's transpose, times columns."""
    if root is None:
        return columns
    return torch.linalg.solve_triangular(root.T, columns, upper=True)
