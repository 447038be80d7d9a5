"""Log-determinants: how much information a set of candidates carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lorambo_alloc.objectives import FloatArray, IntArray, positive_number
from lorambo_alloc.submodular.matrices import GrowingFactor, principal, symmetric
from lorambo_alloc.submodular.objectives import ROUNDING, Ceiling, Relaxation, SetFunction, State

_INDEFINITE = "C: expected a positive semidefinite matrix, but I + C / rho is not positive definite"


class _LogDetState:
    """A set under `LogDet`."""

    def __init__(self, function: LogDet, factor: GrowingFactor, value: float = 0.0) -> None:
        self._function, self._factor, self._value = function, factor, value

    @property
    def items(self) -> tuple[int, ...]:
        return tuple(self._factor.items)

    @property
    def value(self) -> float:
        return self._value

    def gains(self, candidates: IntArray | None = None) -> FloatArray:
        at = slice(None) if candidates is None else candidates
        # M = I + C / rho has no eigenvalue below 1, hence no pivot: less is rounding. `LogDet`
        # keeps rho so large that rounding does not reach 1, and no candidate counts as dependent.
        pivots = np.maximum(self._factor.pivots[at], 1.0)
        gains: FloatArray = 0.5 * np.log(pivots)
        return gains

    def add(self, element: int) -> None:
        gain = float(self.gains(np.array([element]))[0])
        self._factor.add(element)
        self._value += gain

    def copy(self) -> _LogDetState:
        return _LogDetState(self._function, self._factor.copy(), self._value)


class LogDet(SetFunction):
    """The information in a set of Gaussian measurements; monotone and submodular.

    f(S) = 1/2 log det(I + C_SS / rho), in nats.

    Args:
        C: n x n, symmetric to 1e-10 of its largest diagonal entry and positive semidefinite
            (assumed; its diagonal and 2 x 2 minors are checked, and so is each pivot met).
        rho: noise, finite and > 0, in the units of C; from 2^-32 to 2^40 times its largest entry.
        layers: the layer of each candidate; then an answer counts the candidates of each layer.

    Raises:
        ValueError: C fails a check, rho is out of range, or there is not one layer a candidate.

    References:
        Krause, Singh, Guestrin, JMLR 9 (2008): submodularity, section 4.

    Example:
        >>> f = LogDet([[3.0, 0.0], [0.0, 0.0]], rho=1.0)
        >>> round(f.value([0]), 4), f.value([1])
        (0.6931, 0.0)
    """

    def __init__(self, C: object, rho: float, layers: Sequence[str] | None = None) -> None:
        self.C = symmetric(C, "C")
        super().__init__(len(self.C))
        self.rho = positive_number(rho, "rho")
        self.layers = layer_names(layers, self.n)
        with np.errstate(over="ignore"):
            ratio = float(self.C.diagonal().max(initial=0.0)) / self.rho
        # Beyond, C_jj / rho is rounding beside 1 on one side, and 1 beside C_jj / rho on the other:
        # of two like candidates the second would add half a bit in truth, and anything here.
        if ratio and not 2.0**-40 <= ratio <= 2.0**32:
            raise ValueError(
                f"rho: expected max C_jj / rho from 2^-40 to 2^32, got {ratio!r} with rho {rho!r}"
            )

    def start(self) -> State:
        """Return the empty set."""
        return _LogDetState(self, GrowingFactor(self.C, 1 / self.rho, 1.0, "C"))

    def value(self, items: Iterable[int]) -> float:
        """The value of a set, from a determinant of its own."""
        sign, log = np.linalg.slogdet(principal(self.C, self.check_items(items), 1 / self.rho, 1.0))
        if sign <= 0:
            raise ValueError(_INDEFINITE)
        return max(0.5 * float(log), 0.0)

    def ceilings(self, items: Sequence[int], within: Relaxation) -> list[Ceiling]:
        """The gains at the set, from a Cholesky factor of its own.

        The computed factor is that of a matrix M + E with |E| <= (k + 1) u trace(M) or so (Higham,
        Accuracy and Stability of Numerical Algorithms, theorem 10.3). No eigenvalue of M is below
        1, so each of the k of M^-1/2 E M^-1/2 is at most |E|, and 1/2 log det is off by at most
        k |E| while |E| <= 1/2. Of a set too large for that a prefix is taken.
        """
        from scipy.linalg import solve_triangular

        chosen = list(items)
        while chosen and self._backward_error(len(chosen) + 1) > 0.5:
            del chosen[len(chosen) // 2 :]
        diagonal = self.C.diagonal() / self.rho + 1.0
        try:
            lower = np.linalg.cholesky(principal(self.C, chosen, 1 / self.rho, 1.0))
        except np.linalg.LinAlgError as error:
            raise ValueError(_INDEFINITE) from error
        # The identity is missing in the columns of the set, whose weights are 0.
        rows = solve_triangular(lower, self.C[chosen] / self.rho, lower=True)
        pivots = diagonal - np.einsum("ij,ij->j", rows, rows)
        k = len(chosen)
        error = (k + 1) * (k + 8) * ROUNDING * (float(diagonal[chosen].sum()) + diagonal)
        weights = (0.5 * np.log(np.maximum(pivots, 1.0))) * (1 + 4 * ROUNDING) + error
        weights[chosen] = 0.0
        weights[self.C.diagonal() == 0] = 0.0  # a zero row: no information at all
        base = float(np.log(lower.diagonal()).sum()) * (1 + (k + 8) * ROUNDING)
        return [(base + float(np.max(error[chosen], initial=0.0)), weights)]

    def _backward_error(self, size: int) -> float:
        """|E| for a set of so many elements, at most."""
        largest = float(self.C.diagonal().max(initial=0.0)) / self.rho + 1.0
        return 2 * (size + 8) * ROUNDING * size * largest

    def rounding(self, size: int, value: float) -> float:
        """How far the value of a set of so many elements may be from f, as in `ceilings`."""
        return size * self._backward_error(size)


def layer_names(layers: Sequence[str] | None, n: int) -> tuple[str, ...] | None:
    """One layer name a candidate.

    Raises:
        ValueError: there is not one string a candidate.
    """
    if layers is None:
        return None
    if isinstance(layers, (str, Mapping)):
        raise ValueError(f"layers: expected one name a candidate, in their order, got {layers!r}")
    names = tuple(layers)
    if len(names) != n:
        raise ValueError(f"layers: expected one name for each of {n} candidates, got {len(names)}")
    for name in names:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"layers: expected strings, got {name!r}")
    return names
