"""Kronecker factors of a layer's curvature, and the whitening they define."""

from __future__ import annotations

from dataclasses import dataclass

from lorambo_alloc.costs import whole_number

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.whitening needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.sketch import Whitening, times


class SymmetricFactor:
    """One factor by its eigenvalues and eigenvectors, float64, with damping on the eigenvalues.

    Args:
        values: n eigenvalues; negative ones are rounding, and become 0.
        vectors: n x n, an eigenvector a column; None for a diagonal factor.
        damping: added to each eigenvalue, relative to their mean.
        rounding: the machine epsilon that the sums were made with. Without damping, eigenvalues
            below n x rounding x the largest count as 0 and have the inverse 0. With damping none
            does, but inverses take them as rounding x the largest at least, lest what the sums
            cannot resolve be worth much. (A few inputs a thousand times as large as the others,
            as language models have, put all others below n x rounding: they must not count as 0.)

    Attributes:
        values: as given, in float64 and not negative.
        vectors: as given.
        rounding: as given.
        damping: what is added to each eigenvalue, absolute.
    """

    def __init__(
        self,
        values: torch.Tensor,
        vectors: torch.Tensor | None,
        damping: float,
        rounding: float = 2.0**-52,
    ) -> None:
        self.values = values.double().clamp(min=0)
        self.vectors = vectors
        self.rounding = rounding
        self.damping = damping * float(self.values.mean())

    @classmethod
    def of(cls, matrix: torch.Tensor, damping: float, rounding: float) -> SymmetricFactor:
        """From a symmetric matrix (eigh in float64), or from a diagonal, 1-D."""
        # Apple's MPS knows no float64.
        matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
        if matrix.ndim == 1:
            return cls(matrix, None, damping, rounding)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return cls(values, vectors, damping, rounding)

    def power(self, exponent: float, *, damped: bool = True) -> torch.Tensor:
        """The factor to a power, in float64: n x n, or the diagonal.

        Args:
            exponent: any; negative ones are of the pseudo-inverse where eigenvalues count as 0
                (`rounding`).
            damped: whether damping is added to the eigenvalues first.
        """
        values = self.values + self.damping if damped else self.values
        if exponent < 0:
            resolved = self.rounding * float(values.max())
            if damped and self.damping:
                powers = values.clamp(min=resolved) ** exponent
            else:
                kept = values > len(values) * resolved
                powers = torch.where(kept, torch.where(kept, values, 1.0) ** exponent, 0.0)
        else:
            powers = values**exponent
        if self.vectors is None:
            return powers
        return (self.vectors * powers) @ self.vectors.T


@dataclass(frozen=True)
class Factors:
    """A layer's curvature A kron B: an update D costs 1/2 tr(D^T B D A) to second order.

    Attributes:
        name: the layer's.
        shape: (d, k).
        right: A, k x k, of the inputs; None for the identity.
        left: B, d x d, of the output gradients; None for the identity.

    With factored damping (Martens, Grosse 2015, section 6.3, without its balance of the two sides):
    A + a I and B + b I, with a and b relative to the mean eigenvalue of each.

    Memory: 8 (k^2 + d^2) bytes, 8 (k + d) where both are diagonal; layers with one input share A.
    Each method returns new float64 tensors.
    """

    name: str
    shape: tuple[int, int]
    right: SymmetricFactor | None = None
    left: SymmetricFactor | None = None

    @property
    def damping(self) -> tuple[float, float]:
        """What is added to the eigenvalues of A and of B, absolute; 0 for the identity."""
        right, left = (0.0 if s is None else s.damping for s in (self.right, self.left))
        return right, left

    def powers(self, exponent: float, *, damped: bool = True) -> Whitening:
        """A and B to a power: square matrices, 1-D diagonals, or None for the identity."""
        right, left = (
            None if side is None else side.power(exponent, damped=damped)
            for side in (self.right, self.left)
        )
        return right, left

    def whitening(self) -> Whitening:
        """(A^-1/2, B^-1/2), damped: what `gradient_spectra` takes."""
        return self.powers(-0.5)

    def whiten(self, gradient: torch.Tensor) -> torch.Tensor:
        """G~ = B^-1/2 G A^-1/2, in float64."""
        return self._both(self.whitening(), gradient)

    def weigh(self, update: torch.Tensor) -> torch.Tensor:
        """M = B^1/2 D A^1/2, in float64: 1/2 |M|_F^2 = 1/2 tr(D^T B D A)."""
        return self._both(self.powers(0.5), update)

    def best_update(self, gradient: torch.Tensor, rank: int) -> torch.Tensor:
        """The update of at most this rank that lowers <G, D> + 1/2 tr(D^T B D A) most.

        It is -B^-1/2 [B^-1/2 G A^-1/2]_r A^-1/2, with [.]_r the best approximation of rank r
        (Eckart, Young 1936), and lowers it by half the sum of the r largest squared singular
        values.

        Args:
            gradient: G, d x k.
            rank: r, >= 0.
        """
        rank = whole_number(rank, "rank", 0)
        pair = self.whitening()
        u, sigma, v = torch.linalg.svd(self._both(pair, gradient), full_matrices=False)
        return -self._both(pair, (u[:, :rank] * sigma[:rank]) @ v[:rank])

    def _both(self, pair: Whitening, matrix: torch.Tensor) -> torch.Tensor:
        if tuple(matrix.shape) != self.shape:
            raise ValueError(
                f"layer {self.name!r}: expected a matrix of shape {self.shape}, got "
                f"{tuple(matrix.shape)}"
            )
        matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).detach().double()
        return times(pair[0], times(pair[1], matrix).T).T
