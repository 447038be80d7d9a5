"""Symmetric matrices as the curvature of candidates: checks, and a Cholesky factor that grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.submodular.objectives import ROUNDING, finite

# A pivot below this share of its diagonal entry is rounding: the candidate depends on those chosen.
DEPENDENT = 2.0**-34

# What is left on the diagonal of a Schur complement may be below 0 by this share, from rounding.
_FAILED = 1e-5

_SYMMETRY = 1e-10
_BLOCK = 256  # rows looked at together, so that no check needs a second matrix


def symmetric(matrix: object, what: str) -> FloatArray:
    """A symmetric float64 matrix: the caller's own where it is exactly symmetric, else a copy.

    Entries may differ from their mirror images by 1e-10 of the largest diagonal entry; the mean
    of both is taken then. A positive semidefinite matrix has no negative diagonal entry and no
    |C_ij| above sqrt(C_ii C_jj); both are checked here, the rest is not.

    Args:
        matrix: square, finite.
        what: its name in messages.

    Raises:
        ValueError: the matrix is not square, finite and symmetric, or fails a check.
    """
    array = finite(matrix, what, 2)
    n = len(array)
    if array.shape[1] != n:
        raise ValueError(f"{what}: expected a square matrix, got shape {array.shape}")
    diagonal = array.diagonal()
    if n and diagonal.min() < 0:
        j = int(diagonal.argmin())
        raise ValueError(
            f"{what}: expected a positive semidefinite matrix, got {diagonal[j]!r} at [{j}, {j}]"
        )
    largest = float(diagonal.max(initial=0.0))
    root = np.sqrt(diagonal)
    exact = True
    for start in range(0, n, _BLOCK):
        rows = array[start : start + _BLOCK]
        apart = np.abs(rows - array[:, start : start + _BLOCK].T)
        if apart.any():
            exact = False
            i, j = divmod(int(apart.argmax()), n)
            if apart[i, j] > _SYMMETRY * largest:
                raise ValueError(
                    f"{what}: expected a symmetric matrix, got {float(rows[i, j])!r} at "
                    f"[{start + i}, {j}] and {float(array[j, start + i])!r} at [{j}, {start + i}]"
                )
        limit = np.outer(root[start : start + _BLOCK], root)
        over = np.abs(rows) - limit * (1 + 1e-9) > _SYMMETRY * largest
        if over.any():
            i, j = divmod(int(over.argmax()), n)
            raise ValueError(
                f"{what}: expected a positive semidefinite matrix, but {float(rows[i, j])!r} at "
                f"[{start + i}, {j}] is above sqrt(C_ii C_jj) = {float(limit[i, j])!r}"
            )
    return array if exact else (array + array.T) / 2


def least_eigenvalue(matrix: FloatArray) -> float:
    """A proved lower bound on the least eigenvalue of a symmetric matrix; 0 if none above 0 is.

    A Cholesky factorisation that runs to its end proves A + E positive definite for an E with
    |E| <= (n + 1) u / (1 - (n + 1) u) trace(A) (Demmel; Higham, Accuracy and Stability of Numerical
    Algorithms, theorem 10.3; Rump 2006). So the estimate is lowered by twice that, and factored.

    Args:
        matrix: n x n, symmetric, with n up to a few thousand.

    References:
        Rump, Verification of positive definiteness, BIT 46 (2006).

    Example:
        >>> bool(0.999 < least_eigenvalue(np.diag([1.0, 2.0])) < 1)
        True
    """
    from scipy.linalg import eigvalsh

    n = len(matrix)
    if n == 0:
        return 0.0
    margin = 4 * (n + 4) * ROUNDING * float(np.trace(matrix))
    estimate = float(eigvalsh(matrix, subset_by_index=[0, 0])[0])
    bound = estimate * (1 - 2.0**-20) - 2 * margin
    if bound <= 0:
        return 0.0
    shifted = matrix.copy()
    shifted[np.diag_indices(n)] -= bound + margin
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return 0.0
    return bound


def bounded_below(matrix: FloatArray, floor: float) -> bool:
    """Whether a Cholesky factor proves every eigenvalue of a symmetric matrix to be above a floor.

    Args:
        matrix: n x n; copied once.
        floor: any number. A floor within 4 (n + 4) u of the trace of the least eigenvalue may
            be left unproved.
    """
    from scipy.linalg import cho_factor

    n = len(matrix)
    shifted = matrix.copy()
    # The trace of what is factored, were all of it on the diagonal.
    trace = float(matrix.trace()) + n * abs(floor)
    shifted[np.diag_indices(n)] -= floor + 4 * (n + 4) * ROUNDING * trace
    try:
        cho_factor(shifted.T, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return False
    return True


class GrowingFactor:
    """The Cholesky factor of M_SS for a set S that grows, beside all of M's columns.

    M = scale C + shift I. With M_SS = L L^T it keeps V = L^-1 M_{S,:} (k x n) and the pivots
    d_j = M_jj - |V_:j|^2 that candidates would have: the diagonal of the Schur complement. One
    more element costs O(k n), and C is never copied.

    Args:
        matrix: C, n x n, positive semidefinite.
        scale: above 0.
        shift: at least 0.
        what: the matrix's name in messages.
    """

    def __init__(self, matrix: FloatArray, scale: float, shift: float, what: str) -> None:
        self._matrix, self._scale, self._shift, self._what = matrix, scale, shift, what
        self.items: list[int] = []
        self.diagonal: FloatArray = matrix.diagonal() * scale + shift
        self.pivots: FloatArray = self.diagonal.copy()
        self._rows: FloatArray = np.empty((4, len(matrix)))

    @property
    def rows(self) -> FloatArray:
        """V, k x n."""
        return self._rows[: len(self.items)]

    def add(self, element: int) -> tuple[FloatArray, float]:
        """Take an element in.

        Returns:
            The new row of V, and the root of the element's pivot. For an element that depends
            on those in the set the row is 0 and the root infinite: it adds nothing.

        Raises:
            ValueError: C is not positive semidefinite.
        """
        k = len(self.items)
        pivot = float(self.pivots[element])
        self.items.append(element)
        if k == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        row = self._rows[k]
        if pivot <= DEPENDENT * self.diagonal[element]:
            row[:] = 0.0
            self.pivots[element] = 0.0
            return row, np.inf
        np.multiply(self._matrix[element], self._scale, out=row)
        row[element] += self._shift
        row -= self._rows[:k, element] @ self._rows[:k]
        root = float(np.sqrt(pivot))
        row /= root
        self.pivots -= row * row
        self.pivots[self.items] = 0.0
        below = self.pivots - self._shift
        below[self.items] = 0.0
        worst = int(np.argmin(below))
        if below[worst] < -_FAILED * max(self.diagonal[worst], self.diagonal[element]):
            raise ValueError(
                f"{self._what}: expected a positive semidefinite matrix, but eliminating "
                f"{self.items} leaves {float(below[worst] / self._scale)!r} at [{worst}, {worst}]"
            )
        return row, root

    def copy(self) -> GrowingFactor:
        """Return a factor that grows on its own."""
        other = GrowingFactor.__new__(GrowingFactor)
        other.__dict__.update(self.__dict__)
        other.items, other.pivots = self.items.copy(), self.pivots.copy()
        other._rows = self._rows.copy()
        return other


def principal(matrix: FloatArray, items: Sequence[int], scale: float, shift: float) -> FloatArray:
    """M_SS of M = scale C + shift I."""
    index: IntArray = np.array(items, dtype=np.int64)
    block = matrix[np.ix_(index, index)] * scale
    block[np.diag_indices(len(index))] += shift
    return block
