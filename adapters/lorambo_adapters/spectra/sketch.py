"""Streaming sketches of one gradient G = sum over tokens of g x^T (d x k), which is never formed.

    exact      G itself, where that takes no more memory than a sketch
    two-sided  one pass over the data: Y = G Omega and Z = Psi^T G
    subspace   several passes: in each, G times the basis that the pass before has found

All are sums over tokens: those of several batches, or of several workers, add up.

A sketch may be `rounded`: its test matrices are rounded to bfloat16, the rounded ones are what all
that follows is computed with, and tokens and gradients that are bfloat16 are multiplied as they
are, except by a processor without arithmetic for it, where float32 takes a thirtieth of the time.
Then each token's product with the test matrix is rounded to bfloat16, by at most 2^-8 of itself,
and so is each call's sum over its tokens, except on CUDA, where torch gives it in float32 from
version 2.8 on. The errors are not systematic. In what is summed, their energy is about
2^-18 of sum of |g|^2 |x|^2 (which is |G|_F^2 where tokens have little in common), spread over all
directions. On the gradients of a small pretrained encoder (384 wide), three passes came within
0.21 % of values 1 to 16 from below with float32's products, and within 0.22 % with bfloat16's, but
up to 0.12 % from above as well; where few tokens and coordinates make up a value, up to 0.3 % in
tests. With a whitening nothing is rounded: it would amplify the rounding of the test matrices.

References:
    Tropp, Yurtsever, Udell, Cevher: Practical sketching algorithms for low-rank matrix
    approximation. SIAM J. Matrix Anal. Appl. 38 (2017), Algorithms 4 and 5, Theorem 4.3.
    Halko, Martinsson, Tropp: Finding structure with randomness. SIAM Review 53 (2011),
    Algorithm 4.4.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.sketch needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.gaussians import Gaussians
from lorambo_adapters.spectra.inputs import Inputs, add_product, product

Whitening: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]
"""(A^-1/2, B^-1/2), symmetric, k x k and d x d, or their diagonals, or None for the identity."""

Triplets: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Left singular vectors (d x n), descending values (n), right singular vectors (k x n)."""

PROBES = 8
"""Independent Gaussian vectors that estimate what a basis leaves out."""


class Sketch(Protocol):
    """What the three sketches of a layer have in common."""

    accumulators: list[torch.Tensor]
    """What this pass sums."""
    carried: list[torch.Tensor]
    """What it has from the pass before: equal in all workers."""
    rounded: bool
    """Whether test matrices are rounded to bfloat16, and multiply such tokens as they are."""

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

    def pairs(self, divisor: float) -> Triplets:
        """Left singular vectors, values and right ones of G / divisor, without those of zeros."""
        ...


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
        self.rounded = False
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
        elif self.carried:
            self.carried, self.accumulators = [], [torch.zeros_like(self.carried[0])]

    def spectrum(self, divisor: float) -> tuple[npt.NDArray[np.float64], float]:
        """All singular values, decomposed in float64; nothing is left out."""
        return torch.linalg.svdvals(self._mean(divisor)).cpu().numpy(), 0.0

    def pairs(self, divisor: float) -> Triplets:
        """Those of G itself."""
        return _triplets(self._mean(divisor), (self.accumulators or self.carried)[0].dtype)

    def _mean(self, divisor: float) -> torch.Tensor:
        """The whitened mean."""
        right, left = self._whitening
        mean = _double(self.carried[0]) if self.carried else _double(self.accumulators[0]) / divisor
        return times(right, times(left, mean).T).T


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
        rounded: whether to round test matrices to bfloat16, unless there is a whitening.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        width: int,
        gaussians: Gaussians,
        whitening: Whitening,
        device: torch.device,
        dtype: torch.dtype,
        rounded: bool = False,
    ) -> None:
        d, k = shape
        narrow, wide = two_sided_widths(width)
        right, left = (narrow, wide) if d >= k else (wide, narrow)
        self._tall = d >= k
        self._whitening = whitening
        self.rounded = _rounds(rounded, whitening)
        tests = torch.bfloat16 if self.rounded else dtype
        self._omega = gaussians.right(k, slice(0, right), device, tests)
        self._psi = gaussians.left(d, slice(0, left), device, tests)
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
        for i, (x, g) in enumerate(inputs.pieces(gradient, self.rounded)):
            add_product(z, product(g, self._left_test), x, scale)
            products = inputs.products(self._right_test, g.dtype)
            if i == len(products):
                products.append(product(x, self._right_test))
            add_product(y.T, products[i], g, scale)

    def next_pass(self, divisor: float) -> None:
        """Refused: this sketch is complete after one pass."""
        raise ValueError("a two-sided sketch takes one pass")

    def restore(self, number: int, carried: list[torch.Tensor]) -> None:
        """Stand at the beginning of the only pass."""

    def spectrum(self, divisor: float) -> tuple[npt.NDArray[np.float64], float]:
        """The a values, and the unbiased estimate of |G|_F^2 less their energy (0 if negative)."""
        _, x, triangle, residual = self._solve(divisor)
        identity = torch.eye(len(triangle), device=x.device, dtype=x.dtype)
        inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
        eigenvalues = torch.linalg.eigvalsh(x @ x.T - residual * (inverse @ inverse.T)).flip(0)
        energy = float(eigenvalues.sum()) + residual
        values = eigenvalues.clamp(min=0).sqrt().cpu().numpy()
        return values, max(0.0, energy - float(np.square(values).sum()))

    def pairs(self, divisor: float) -> Triplets:
        """Those of Q X, whose values are not corrected for the noise, and so larger on average."""
        q, x, _, _ = self._solve(divisor)
        left, values, right = _triplets(x, self._omega.dtype)
        return (q @ left, values, right) if self._tall else (right, values, q @ left)

    def _solve(self, divisor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Q, X, the triangular factor of T and e, of G^T / divisor if d < k."""
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
        return q, x, triangle, residual


class SubspaceSketch:
    """Subspace iteration over several passes: G P with P from the pass before, then Q^T G, ...

    Pass 1 sums Y = G Omega; pass 2 sums Z = Q^T G with Q = orth(Y); pass 3 sums G P with
    P = orth(Z^T), and so on. The values are the singular values of the last product: lower bounds
    of G's up to rounding (of the sums; of the tokens' products if the sketch is rounded), and their
    relative errors fall by about the squared ratio of the value number 2 s + 1 to the one in
    question with each pass after the second. The energy |R|_F^2
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
        rounded: whether to round test matrices to bfloat16, unless there is a whitening.
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
        rounded: bool = False,
    ) -> None:
        self._shape = shape
        self._width = 2 * width
        self._passes = passes
        self._gaussians = gaussians
        self._whitening = whitening
        self._device, self._dtype = device, dtype
        self.rounded = _rounds(rounded, whitening)
        self._tests = torch.bfloat16 if self.rounded else dtype
        self.restore(1, [])

    def restore(self, number: int, carried: list[torch.Tensor]) -> None:
        """Begin a pass with this basis: k x 2 s for odd numbers, d x 2 s for even ones."""
        like = {"device": self._device, "dtype": self._tests}
        self._number = number
        self.carried = [basis.to(**like).contiguous() for basis in carried]
        d, k = self._shape
        drawn = slice(0, self._width)
        self._basis = self.carried[0] if carried else self._gaussians.right(k, drawn, **like)
        self._on_right = number % 2 == 1
        test = self._basis
        if number == self._passes:
            if self._on_right:
                drawn = slice(self._width, self._width + PROBES)
                self._probes = self._gaussians.right(k, drawn, **like)
            else:
                self._probes = self._gaussians.left(d, slice(0, PROBES), **like)
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
        for i, (x, g) in enumerate(inputs.pieces(gradient, self.rounded)):
            if not self._on_right:
                add_product(total, product(g, self._test), x, scale)
                continue
            products = inputs.products(self._test, g.dtype)
            if i == len(products):
                products.append(product(x, self._test))
            add_product(total.T, products[i], g, scale)

    def next_pass(self, divisor: float) -> None:
        """Orthonormalise what this pass has found, in float64."""
        basis, _ = torch.linalg.qr(self._product(divisor))
        self.restore(self._number + 1, [basis])

    def spectrum(self, divisor: float) -> tuple[npt.NDArray[np.float64], float]:
        """The 2 s values, and the estimate of the energy outside the last basis."""
        found, probed, basis = self._last(divisor)
        missed = probed - found @ (basis.T @ _double(self._probes))
        values = torch.linalg.svdvals(found).cpu().numpy()
        return values, float(missed.square().sum()) / PROBES

    def pairs(self, divisor: float) -> Triplets:
        """Those of the last product, and the basis times its right ones."""
        found, _, basis = self._last(divisor)
        left, values, right = _triplets(found, self._tests)
        right = basis @ right
        return (left, values, right) if self._on_right else (right, values, left)

    def _last(self, divisor: float) -> Triplets:
        """The last products with an orthonormal basis and with the probes, and the basis."""
        if self._number < self._passes:
            raise ValueError(
                f"expected {self._passes} passes over the batches, got {self._number}; call "
                "next_pass() between them"
            )
        whole = self._product(divisor)
        # What was multiplied is orthonormal up to its rounding: G P = (G Q) R for P = Q R.
        basis, triangle = torch.linalg.qr(_double(self._basis))
        found = torch.linalg.solve_triangular(
            triangle, whole[:, : self._width], upper=True, left=False
        )
        return found, whole[:, self._width :], basis

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


def _rounds(rounded: bool, whitening: Whitening) -> bool:
    return rounded and whitening[0] is None and whitening[1] is None


def _triplets(matrix: torch.Tensor, precision: torch.dtype) -> Triplets:
    """Of a matrix in float64, those of values that are not zero up to the sketch's rounding."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    unit = torch.finfo(precision).eps
    unit *= 0.5 if precision == torch.bfloat16 else max(matrix.shape)
    kept = int((values > unit * values.max()).sum())
    return left[:, :kept], values[:kept], right[:kept].T


def _by_columns(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose transpose is contiguous: adding g^T u to them is faster as u^T g."""
    return torch.zeros(columns, rows, device=device, dtype=dtype).T


def _double(matrix: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where the device has none."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
