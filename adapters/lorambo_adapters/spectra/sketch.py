"""Streaming sketches of one gradient G = sum over tokens of g x^T (d x k), which is never formed.

    exact      G itself, where that takes no more memory than a sketch
    two-sided  one pass over the data: Y = G Omega and Z = Psi^T G
    subspace   several passes: in each, G times the basis that the pass before has found

All are sums over tokens: those of several batches, or of several workers, add up.

References:
    Tropp, Yurtsever, Udell, Cevher: Practical sketching algorithms for low-rank matrix
    approximation. SIAM J. Matrix Anal. Appl. 38 (2017), Algorithms 4 and 5, Theorem 4.3.
    Halko, Martinsson, Tropp: Finding structure with randomness. SIAM Review 53 (2011),
    Algorithm 4.4.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.sketch needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.inputs import Inputs, add_product, product

Whitening: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]
"""(A^-1/2, B^-1/2), symmetric, k x k and d x d, or their diagonals, or None for the identity."""

PROBES = 8
"""Independent Gaussian vectors that estimate what a basis leaves out."""


class Sketch(Protocol):
    """What the three sketches of a layer have in common."""

    accumulators: list[torch.Tensor]
    """What this pass sums."""
    carried: list[torch.Tensor]
    """What it has from the pass before: equal in all workers."""

    def update(self, inputs: Inputs, gradient: torch.Tensor, scale: float) -> None:
        """Add scale * gradient^T inputs (the rows of both are tokens)."""
        ...

    def next_pass(self, divisor: float) -> None:
        """End a pass over data that counts `divisor` times, and begin the next."""
        ...

    def restore(self, number: int, carried: list[torch.Tensor]) -> None:
        """Stand at the beginning of a pass, with what another sketch has carried into it."""
        ...

    def spectrum(self, divisor: float) -> tuple[npt.NDArray[np.float64], float]:
        """Singular values of G / divisor, and an estimate of the energy outside them."""
        ...


class Gaussians:
    """Standard normal test matrices, shared by all layers: the first rows and columns of one.

    Args:
        rows: the longest side of any layer.
        right: columns for the side of the inputs.
        left: columns for the side of the outputs, independent of the former.
        seed: of the generator, which runs on the CPU, so that every device has the same matrices.
    """

    def __init__(self, rows: int, right: int, left: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._drawn = [torch.randn(rows, n, generator=generator) for n in (right, left)]
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}

    def right(
        self, rows: int, columns: slice, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows and columns for the inputs. Equal requests get the same tensor."""
        return self._view(0, rows, columns, device, dtype)

    def left(
        self, rows: int, columns: slice, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows and columns for the outputs."""
        return self._view(1, rows, columns, device, dtype)

    def _view(
        self, side: int, rows: int, columns: slice, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        whole = (side, device, dtype)
        if whole not in self._views:
            self._views[whole] = self._drawn[side].to(device=device, dtype=dtype)
        key = (*whole, rows, columns.start, columns.stop)
        if key not in self._views:
            self._views[key] = self._views[whole][:rows, columns]
        return self._views[key]

    def fingerprint(self) -> list[float]:
        """A few numbers by which two sets of test matrices can be told apart."""
        return [float(m.double().square().sum()) for m in self._drawn]


class ExactSum:
    """G itself: d k numbers, d k multiplications a token."""

    def __init__(
        self,
        shape: tuple[int, int],
        whitening: Whitening,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._whitening = whitening
        self.accumulators = [torch.zeros(shape, device=device, dtype=dtype)]
        self.carried: list[torch.Tensor] = []

    def update(self, inputs: Inputs, gradient: torch.Tensor, scale: float) -> None:
        """Add scale * gradient^T inputs; nothing after the first pass."""
        for total in self.accumulators:
            for x, g in inputs.pieces(gradient):
                add_product(total, g, x, scale)

    def next_pass(self, divisor: float) -> None:
        """Keep the mean: the sum is complete after one pass."""
        if self.accumulators:
            self.restore(2, [self.accumulators[0] / divisor])

    def restore(self, number: int, carried: list[torch.Tensor]) -> None:
        """Stand at the beginning of a pass."""
        if number > 1:
            self.carried, self.accumulators = carried, []

    def spectrum(self, divisor: float) -> tuple[npt.NDArray[np.float64], float]:
        """All singular values, decomposed in float64; nothing is left out."""
        right, left = self._whitening
        mean = _double(self.carried[0]) if self.carried else _double(self.accumulators[0]) / divisor
        gradient = times(left, mean)
        gradient = times(right, gradient.T)
        return torch.linalg.svdvals(gradient).cpu().numpy(), 0.0


class TwoSidedSketch:
    """Y = G Omega (d x a) and Z = Psi^T G (b x k), a < b, for a layer with d >= k.

    (For d < k the roles of the sides are exchanged.) With Q an orthonormal basis of the range of Y,
    X = (Psi^T Q)^+ Z estimates Q^T G: X = Q^T G + N, where the noise N comes from R = G - Q Q^T G.
    Given Omega and T = Psi^T Q, E[N] = 0 and E[N N^T] = |R|_F^2 (T^T T)^-1, and the residual of the
    least squares for X has the mean energy (b - a) |R|_F^2. So

        e = |Z - T X|_F^2 / (b - a)      is an unbiased estimate of |R|_F^2,
        M = X X^T - e (T^T T)^-1         is one of Q^T G G^T Q.

    The roots of M's eigenvalues are the values; trace(M) + e is an unbiased estimate of |G|_F^2.
    Given Omega, the variance of e is 2 |R R^T|_F^2 / (b - a): a relative standard deviation of
    at most (2 / (b - a))^1/2, and less the flatter the spectrum of R is.

    Args:
        shape: (d, k).
        width: s; a = 3 s / 4 and b = 5 s / 4, so that the sums take at most (d + k) s numbers, and
            at most 2 (d + k) s multiplications a token.
        gaussians: with at least 5 s / 4 columns a side.
        whitening: (A^-1/2, B^-1/2); what is sketched is B^-1/2 G A^-1/2. The test matrices are
            multiplied, not the tokens.
        device: of the sums.
        dtype: of the sums.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        width: int,
        gaussians: Gaussians,
        whitening: Whitening,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        d, k = shape
        narrow, wide = two_sided_widths(width)
        right, left = (narrow, wide) if d >= k else (wide, narrow)
        self._tall = d >= k
        self._whitening = whitening
        self._omega = gaussians.right(k, slice(0, right), device, dtype)
        self._psi = gaussians.left(d, slice(0, left), device, dtype)
        self._right_test = times(whitening[0], self._omega)
        self._left_test = times(whitening[1], self._psi)
        self.accumulators = [
            _by_columns(d, right, device, dtype),
            torch.zeros(left, k, device=device, dtype=dtype),
        ]
        self.carried: list[torch.Tensor] = []

    def update(self, inputs: Inputs, gradient: torch.Tensor, scale: float) -> None:
        """Add both products: T (d + k) (a + b) multiplications for T tokens."""
        y, z = self.accumulators
        y = y.T
        products = inputs.products(self._right_test)
        for i, (x, g) in enumerate(inputs.pieces(gradient)):
            add_product(z, g @ self._left_test, x, scale)
            if i == len(products):
                products.append(product(x, self._right_test))
            y.addmm_(products[i].T, g, alpha=scale)

    def next_pass(self, divisor: float) -> None:
        """Refused: this sketch is complete after one pass."""
        raise ValueError("a two-sided sketch takes one pass")

    def restore(self, number: int, carried: list[torch.Tensor]) -> None:
        """Stand at the beginning of the only pass."""

    def spectrum(self, divisor: float) -> tuple[npt.NDArray[np.float64], float]:
        """The a values, and the unbiased estimate of |G|_F^2 less their energy (0 if negative)."""
        y = times(self._whitening[1], _double(self.accumulators[0]) / divisor)
        z = times(self._whitening[0], _double(self.accumulators[1]).T / divisor).T
        psi = _double(self._psi)
        if not self._tall:
            y, z, psi = z.T, y.T, _double(self._omega)
        q, _ = torch.linalg.qr(y)
        basis, triangle = torch.linalg.qr(psi.T @ q)
        inside = basis.T @ z
        x = torch.linalg.solve_triangular(triangle, inside, upper=True)
        residual = float((z - basis @ inside).square().sum()) / (len(basis) - basis.shape[1])
        identity = torch.eye(len(triangle), device=y.device, dtype=y.dtype)
        inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
        eigenvalues = torch.linalg.eigvalsh(x @ x.T - residual * (inverse @ inverse.T)).flip(0)
        energy = float(eigenvalues.sum()) + residual
        values = eigenvalues.clamp(min=0).sqrt().cpu().numpy()
        return values, max(0.0, energy - float(np.square(values).sum()))


class SubspaceSketch:
    """Subspace iteration over several passes: G P with P from the pass before, then Q^T G, ...

    Pass 1 sums Y = G Omega; pass 2 sums Z = Q^T G with Q = orth(Y); pass 3 sums G P with
    P = orth(Z^T), and so on. The values are the singular values of the last product: lower bounds
    of G's up to rounding, and their relative errors fall by about the squared ratio of the value
    number 2 s + 1 to the one in question with each pass after the second. The energy |R|_F^2
    outside the basis is estimated, without bias, by 8 independent Gaussian vectors in the last
    pass; the estimate's variance is |R R^T|_F^2 / 4: a relative standard deviation of at most 1/2,
    and less the flatter the spectrum of R is.

    Args:
        shape: (d, k).
        width: s; each pass has 2 s test vectors: 2 (d + k) s numbers (and 8 more vectors in the
            last pass), and 2 (d + k) s multiplications a token, as a two-sided sketch.
        passes: how many, at least 2.
        gaussians: with 2 s columns on the right, and 8 more on the side of the last pass.
        whitening: (A^-1/2, B^-1/2); what is decomposed is B^-1/2 G A^-1/2.
        device: of the sums.
        dtype: of the sums.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        width: int,
        passes: int,
        gaussians: Gaussians,
        whitening: Whitening,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._shape = shape
        self._width = 2 * width
        self._passes = passes
        self._gaussians = gaussians
        self._whitening = whitening
        self._device, self._dtype = device, dtype
        self.restore(1, [])

    def restore(self, number: int, carried: list[torch.Tensor]) -> None:
        """Begin a pass with this basis: k x 2 s for odd numbers, d x 2 s for even ones."""
        self._number, self.carried = number, carried
        d, k = self._shape
        drawn = slice(0, self._width)
        self._basis = (
            carried[0] if carried else self._gaussians.right(k, drawn, self._device, self._dtype)
        )
        self._on_right = number % 2 == 1
        test = self._basis
        if number == self._passes:
            drawn = slice(self._width, self._width + PROBES)
            if self._on_right:
                self._probes = self._gaussians.right(k, drawn, self._device, self._dtype)
            else:
                drawn = slice(0, PROBES)
                self._probes = self._gaussians.left(d, drawn, self._device, self._dtype)
            test = torch.cat([test, self._probes], dim=1)
        self._test = times(self._whitening[0 if self._on_right else 1], test)
        columns = test.shape[1]
        self.accumulators = [
            _by_columns(d, columns, self._device, self._dtype)
            if self._on_right
            else torch.zeros(columns, k, device=self._device, dtype=self._dtype)
        ]

    def update(self, inputs: Inputs, gradient: torch.Tensor, scale: float) -> None:
        """Add the product of this pass: T (d + k) 2 s multiplications for T tokens."""
        (total,) = self.accumulators
        if not self._on_right:
            for x, g in inputs.pieces(gradient):
                add_product(total, g @ self._test, x, scale)
            return
        total = total.T
        products = inputs.products(self._test)
        for i, (x, g) in enumerate(inputs.pieces(gradient)):
            if i == len(products):
                products.append(product(x, self._test))
            total.addmm_(products[i].T, g, alpha=scale)

    def next_pass(self, divisor: float) -> None:
        """Orthonormalise what this pass has found, in float64."""
        basis, _ = torch.linalg.qr(self._product(divisor))
        self.restore(self._number + 1, [basis.to(device=self._device, dtype=self._dtype)])

    def spectrum(self, divisor: float) -> tuple[npt.NDArray[np.float64], float]:
        """The 2 s values, and the estimate of the energy outside the last basis."""
        if self._number < self._passes:
            raise ValueError(
                f"expected {self._passes} passes over the batches, got {self._number}; call "
                "next_pass() between them"
            )
        whole = self._product(divisor)
        found, probed = whole[:, : self._width], whole[:, self._width :]
        missed = probed - found @ (_double(self._basis).T @ _double(self._probes))
        values = torch.linalg.svdvals(found).cpu().numpy()
        return values, float(missed.square().sum()) / PROBES

    def _product(self, divisor: float) -> torch.Tensor:
        """The whitened product with the test vectors as columns."""
        total = _double(self.accumulators[0]) / divisor
        total = total if self._on_right else total.T
        return times(self._whitening[1 if self._on_right else 0], total)


def two_sided_widths(width: int) -> tuple[int, int]:
    """The columns a and b of a two-sided sketch of width s."""
    narrow = 3 * width // 4
    return narrow, 2 * width - narrow


def times(factor: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """The factor of a whitening (a matrix, a diagonal or None) times a matrix."""
    if factor is None:
        return matrix
    factor = factor.to(device=matrix.device, dtype=matrix.dtype)
    return factor[:, None] * matrix if factor.ndim == 1 else factor @ matrix


def _by_columns(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose transpose is contiguous: adding g^T u to them is faster as u^T g."""
    return torch.zeros(columns, rows, device=device, dtype=dtype).T


def _double(matrix: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where the device has none."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
