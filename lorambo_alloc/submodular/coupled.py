"""Coupled layers: the loss that rank-1 directions save together, when they interact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from lorambo_alloc.objectives import FloatArray, IntArray, real_number
from lorambo_alloc.submodular.guarantees import WEAKLY_SUBMODULAR
from lorambo_alloc.submodular.log_det import layer_names
from lorambo_alloc.submodular.matrices import (
    DEPENDENT,
    GrowingFactor,
    bounded_below,
    least_eigenvalue,
    principal,
    symmetric,
)
from lorambo_alloc.submodular.objectives import (
    ROUNDING,
    Ceiling,
    Relaxation,
    SetFunction,
    State,
    finite,
)
from lorambo_alloc.submodular.perspective import Perspective

# Up to so many candidates the least eigenvalue is computed (a second or so), not only bounded.
EIGENVALUES_UP_TO = 1000

# Up to so many a Cholesky factor proves what is assumed of C (seconds, and one copy of C).
PROVED_UP_TO = 6000
_CONJUGATE_GRADIENT_STEPS = 60


class _CoupledState:
    """A set under `CoupledQuadratic`: orthogonal matching pursuit's residual slopes."""

    def __init__(self, factor: GrowingFactor, slopes: FloatArray, value: float = 0.0) -> None:
        self.factor, self.slopes, self._value = factor, slopes, value

    @property
    def items(self) -> tuple[int, ...]:
        return tuple(self.factor.items)

    @property
    def value(self) -> float:
        return self._value

    def gains(self, candidates: IntArray | None = None) -> FloatArray:
        at = slice(None) if candidates is None else candidates
        pivots, diagonal, slopes = self.factor.pivots[at], self.factor.diagonal[at], self.slopes[at]
        # A candidate that depends on those chosen has slope 0 too; what is left of either is
        # rounding, and their quotient would be noise. Its gain counts as 0.
        free = pivots > DEPENDENT * diagonal
        gains = np.zeros(len(pivots))
        # Divided first: squares of slopes may underflow where gains do not.
        np.divide(slopes, pivots, out=gains, where=free)
        gains *= 0.5 * slopes
        return gains

    def add(self, element: int) -> None:
        slope = float(self.slopes[element])
        row, root = self.factor.add(element)
        step = slope / root
        self.slopes -= step * row
        self.slopes[element] = 0.0
        self._value += 0.5 * step * step

    def copy(self) -> _CoupledState:
        return _CoupledState(self.factor.copy(), self.slopes.copy(), self._value)


class CoupledQuadratic(SetFunction):
    """The loss that a set of coupled directions saves with the best coefficients.

    Candidate j is a direction (a rank of some layer) along which the loss has slope b_j; C is the
    directions' joint curvature. A quadratic model of the loss then falls by

        f(S) = max over x supported on S of b^T x - 1/2 x^T (C + rho I) x
             = 1/2 b_S^T (C_SS + rho I)^-1 b_S

    which is monotone and weakly submodular; a diagonal C makes it modular, and with it the
    allocation separable. The greedy algorithm is orthogonal matching pursuit in its exact form
    (forward regression), by a Cholesky factor that grows.

    A candidate whose curvature, given those chosen, is below 2^-34 of its own counts as dependent
    on them, and adds nothing. Where C + rho I is so near to singular and b is not in its range to
    the same precision, f as computed is neither f nor monotone: raise rho.

    Args:
        b: n slopes, finite, in units of loss per unit of coefficient.
        C: n x n curvature, symmetric to 1e-10 of its largest diagonal entry and positive
            semidefinite (its diagonal and 2 x 2 minors are checked, and so is each pivot met;
            bounds assume it only beyond 6,000 candidates). An exactly symmetric float64 array is
            used as it is, not copied.
        rho: damping >= 0, in the units of C. Without it no bound is known for more than
            1,000 candidates, nor where C is singular.
        layers: the layer of each candidate; then an answer counts the candidates of each layer.

    Raises:
        ValueError: a shape, an entry or rho is at fault; or a candidate has a slope but neither
            curvature nor damping, so that its gain would be infinite.

    References:
        Das, Kempe, Submodular meets Spectral, ICML 2011.

    Example:
        >>> f = CoupledQuadratic([1.0, 1.0], [[1.0, -0.5], [-0.5, 1.0]])
        >>> f.value([0]), f.value([0, 1])  # the two are worth more than twice one
        (0.5, 2.0)
    """

    kind = WEAKLY_SUBMODULAR

    def __init__(
        self,
        b: object,
        C: object,
        rho: float = 0.0,
        layers: Sequence[str] | None = None,
    ) -> None:
        self.b = finite(b, "b", 1)
        self.C = symmetric(C, "C")
        super().__init__(len(self.b))
        if len(self.C) != self.n:
            raise ValueError(f"C: expected {self.n} x {self.n} as b has, got {self.C.shape}")
        self.rho = real_number(rho)
        if not 0 <= self.rho < np.inf:
            raise ValueError(f"rho: expected a finite number >= 0, got {rho!r}")
        self.layers = layer_names(layers, self.n)
        self._diagonal = self.C.diagonal() + self.rho
        unbounded = (self._diagonal == 0) & (self.b != 0)
        if unbounded.any():
            j = int(unbounded.argmax())
            raise ValueError(f"rho: expected > 0, as C is 0 and b is not at candidate {j}")
        positive = self._diagonal[self._diagonal > 0]
        if len(positive) and not (positive.min() >= 2.0**-900 and positive.max() <= 2.0**900):
            raise ValueError(
                "C: expected every C_jj + rho to be 0 or from 2^-900 to 2^900, got "
                f"{float(positive.min())!r} to {float(positive.max())!r}; choose other units"
            )
        # In this range no sum overflows, and what underflows is far below the rounding.
        with np.errstate(over="ignore"):
            sloped = self.b != 0
            largest = float(
                ((self.b[sloped] / np.sqrt(self._diagonal[sloped])) ** 2).max(initial=0.0)
            )
        if sloped.any() and not 2.0**-900 <= largest <= 2.0**900:
            raise ValueError(
                "b: expected a largest gain b_j^2 / (C_jj + rho) from 2^-900 to 2^900, got "
                f"{largest!r}; choose other units"
            )

    def start(self) -> State:
        """Return the empty set."""
        return _CoupledState(GrowingFactor(self.C, 1.0, self.rho, "C"), self.b.copy())

    def value(self, items: Iterable[int]) -> float:
        """The value of a set, from its best coefficients (of least norm if C_SS is singular)."""
        chosen = self.check_items(items)
        block = principal(self.C, chosen, 1.0, self.rho)
        return max(0.5 * float(self.b[chosen] @ _solve(block, self.b[chosen])), 0.0)

    def rounding(self, size: int, value: float) -> float:
        """How far a value may be from f: a backward error of k (k + 8) u, times the condition."""
        least = max(self.submodularity_ratio(), DEPENDENT)
        return size * (size + 8) * ROUNDING / least * value

    @cached_property
    def floors(self) -> list[FloatArray]:
        """Diagonals p with C + rho I >= diag(p) in the order of matrices; only p > 0 are of use.

        One is the damping, less what rounding may have taken off the eigenvalues of C: 2^-40 of
        its trace, as for a Gram matrix of doubles, or more, as for one of single precision. Up to
        6,000 candidates a Cholesky factor proves that it is no more; beyond, 2^-40 is assumed.
        Up to 1,000 candidates the least eigenvalue of the matrix scaled to a unit diagonal is
        another.
        """
        found: list[FloatArray] = []
        trace = float(self.C.trace())
        share = max(2.0**-40, 16 * (self.n + 4) * ROUNDING)
        while self.n and self.rho > share * trace:
            known = trace == 0 or self.n > PROVED_UP_TO
            if known or bounded_below(self.C, -share * trace):
                found.append(np.full(self.n, (self.rho - share * trace) * (1 - 4 * ROUNDING)))
                break
            share *= 4
        if 0 < self.n <= EIGENVALUES_UP_TO and self._diagonal.min() > 0:
            root = np.sqrt(self._diagonal)
            normal = self.C / root[:, None] / root
            normal[np.diag_indices(self.n)] = 1.0
            least = least_eigenvalue(normal)
            if least > 0:
                found.append(least * self._diagonal * (1 - 4 * ROUNDING))
        return found

    def submodularity_ratio(self) -> float:
        """A proved lower bound on the submodularity ratio, in [0, 1]; 0 if none is known.

        0 also where it is so small that candidates within the conditions of its theorems may
        count as dependent, which they are not: f as computed is another function then.

        The ratio is the least of (sum of the gains at L over S) / (f(L + S) - f(L)). With r the
        slopes left after L, M^ the Schur complement of M = C + rho I and d its diagonal, this is

            sum r_j^2 / d_j  over  r^T (M^_SS)^-1 r  >=  min_j p_j / M_jj

        for every diagonal p with M >= diag(p): then M^ >= diag(p) too (a Schur complement's
        inverse is a block of the inverse), so the joint gain is at most sum r_j^2 / p_j, and
        d_j <= M_jj. With p = lambda diag(M) it is lemma 2.4 of Das and Kempe (2011).
        """
        ratio = max((float((p / self._diagonal).min()) for p in self.floors), default=0.0)
        return ratio * (1 - 4 * ROUNDING) if ratio > 2 * DEPENDENT else 0.0

    def ceilings(self, items: Sequence[int], within: Relaxation) -> list[Ceiling]:
        """Bounds from the dual of the perspective relaxation; `perspective.py` has the proof.

        The search for a good dual point starts from the coefficients that are best for the set,
        from those that are best for all candidates, and from 0.
        """
        chosen = list(items)
        coefficients = np.zeros(self.n)
        coefficients[chosen] = _solve(principal(self.C, chosen, 1.0, self.rho), self.b[chosen])
        found: list[Ceiling] = []
        for p in self.floors:
            starts = [coefficients, self._all_coefficients, np.zeros(self.n)]
            dual = Perspective(self.C, self.b, self.rho, p)
            with np.errstate(over="ignore", invalid="ignore"):
                found.append(dual.ceiling(dual.descend(starts, within)))
        return found

    @cached_property
    def _all_coefficients(self) -> FloatArray:
        """About M^-1 b: solved for where that is quick, else some steps of conjugate gradients."""
        if self.n <= EIGENVALUES_UP_TO:
            return _solve(principal(self.C, range(self.n), 1.0, self.rho), self.b)
        x, r = np.zeros(self.n), self.b.copy()
        direction = r / self._diagonal
        size = float(r @ direction)
        for _ in range(_CONJUGATE_GRADIENT_STEPS):
            image = self.C @ direction + self.rho * direction
            curvature = float(direction @ image)
            if curvature <= 0 or size == 0:
                break
            x += (size / curvature) * direction
            r -= (size / curvature) * image
            scaled = r / self._diagonal
            before, size = size, float(r @ scaled)
            direction = scaled + (size / before) * direction
        return x

    def sketch(self, state: State) -> Ceiling:
        """The bound at a set, to rounding, from the slopes at hand."""
        assert isinstance(state, _CoupledState)
        if not self.floors:
            return np.inf, np.zeros(self.n)
        with np.errstate(over="ignore"):
            return state.value, state.slopes / (2 * self.floors[-1]) * state.slopes


def _solve(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """The solution of a positive semidefinite system; of least norm where it is singular."""
    from scipy.linalg import cho_factor, cho_solve

    if not len(right):
        return np.zeros(0)
    try:
        factor = cho_factor(matrix, lower=True)
        if (factor[0].diagonal() ** 2 > DEPENDENT * matrix.diagonal()).all():
            return np.asarray(cho_solve(factor, right), dtype=np.float64)
    except np.linalg.LinAlgError:
        pass
    # Scaled to a unit diagonal, so that what counts as dependent does not hang on units.
    diagonal = matrix.diagonal()
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    scaled = matrix * scale[:, None] * scale
    found = np.linalg.lstsq(scaled, right * scale, rcond=DEPENDENT)[0] * scale
    return np.asarray(found, dtype=np.float64)
