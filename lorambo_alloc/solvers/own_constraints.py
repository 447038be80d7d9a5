"""Convex constraints of the caller's own, through cvxpy: parsed, priced, checked at whole ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from lorambo_alloc.caps import Constraints
from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import Problem

_TOLERANCE = 1e-9  # of a constraint, at whole ranks
_MARGIN = 2.0**-40  # for the rounding of up to 2^11 terms, as a share of what they sum up
_NUDGE = 1e-6  # into the domain, from the edge of it
_OUTSIDE = 1e30  # how broken a constraint is where it is not defined
_MOST_MOVES = 1000


class OwnConstraints:
    """The caller's constraints: linear ones as rows of a matrix, the others as cvxpy has them.

    A row is scaled by a power of two so that its greatest coefficient is between 1/2 and 1, and
    holds if it is broken by no more than 1e-9 then. An entry of any other constraint holds if it is
    broken by no more than 1e-9 as the caller wrote it, and is defined at all.

    Args:
        cp: the cvxpy module.
        problem: whose ranks they speak of.
        constraints: as `relax` takes them, or None.

    Raises:
        ValueError: one of them is not of its form; the message says which.
    """

    def __init__(self, cp: Any, problem: Problem, constraints: Constraints | None) -> None:
        self._problem = problem
        self.rank = cp.Variable(len(problem.names))
        self._curved: list[Any] = []
        matrices: list[Any] = [_sparse((0, len(problem.names)))]
        offsets, both = [np.zeros(0)], [np.zeros(0, dtype=bool)]
        for where, own in _parsed(cp, problem, constraints, self.rank):
            if not own.expr.is_affine():
                self._curved.append(own)
                continue
            self.rank.value = np.zeros(len(problem.names))
            offset = _entries(own.expr.value, own.expr.shape)
            rows = _gradient(own, self.rank)
            assert rows is not None  # an affine expression has one everywhere
            top = abs(rows).max(axis=0).toarray().ravel()
            factor = np.where(top > 0, np.ldexp(1.0, -np.frexp(top)[1]), 1.0)
            with np.errstate(over="ignore"):
                offset = offset * factor
            if not np.all(np.isfinite(offset)):
                raise ValueError(f"{where}: expected finite numbers")
            matrices.append(rows.T.multiply(factor[:, None]))
            offsets.append(offset)
            both.append(np.full(len(offset), _is_equality(own)))
        from scipy.sparse import vstack

        self._matrix: Any = vstack(matrices, format="csr")
        self._offset = np.concatenate(offsets)
        self._both = np.concatenate(both)
        # Which rows each cvxpy constraint stands for.
        self._linear = [
            (rows, self._matrix[rows] @ self.rank == -self._offset[rows])
            if equal
            else (rows, self._matrix[rows] @ self.rank <= -self._offset[rows])
            for equal in (False, True)
            if len(rows := np.flatnonzero(self._both == equal))
        ]

    def __len__(self) -> int:
        return len(self._offset) + len(self._curved)

    @property
    def conditions(self) -> list[Any]:
        """All of them, in `rank`, for a cvxpy problem."""
        return [*(constraint for _, constraint in self._linear), *self._curved]

    def consequence(self, scale: float) -> tuple[tuple[float, ...], float]:
        """One linear inequality that follows from all of them: weights and limit.

        A convex g lies above its tangents, so from g(r) <= t and a dual y >= 0 follows

            y g'(s) r <= y (g'(s) s - g(s)) + y t

        whatever s is; here it is the solver's solution, and t the tolerance. With an equality, y
        may have any sign. The limit is rounded up by a margin for the rounding of the gradients.

        Args:
            scale: what to multiply the solver's duals by.

        Returns:
            A charge per rank of each layer, and what all ranks that satisfy the constraints are
            charged at most.

        Raises:
            ValueError: cvxpy has no gradient of a constraint at the solution.
        """
        upper = self._problem.upper.astype(np.float64)
        weights, charged = np.zeros(len(upper)), np.zeros(len(upper))
        limit = margin = 0.0
        count = len(upper)
        for rows, constraint in self._linear:
            dual = _dual(constraint) * scale
            weights += self._matrix[rows].T @ dual
            charged += abs(self._matrix[rows]).T @ np.abs(dual)
            limit += _TOLERANCE * float(np.abs(dual).sum()) - float(dual @ self._offset[rows])
            margin += float(np.abs(dual) @ np.abs(self._offset[rows]))
            count += len(rows)
        lower = self._problem.lower.astype(np.float64)
        solution = lower if self.rank.value is None else np.clip(self.rank.value, lower, upper)
        for constraint in self._curved:
            dual = _dual(constraint) * scale
            if not dual.any():
                continue
            point, gradient, value, size = self._tangent(constraint, solution)
            slopes, steep = gradient @ dual, abs(gradient) @ dual
            weights += slopes
            charged += steep
            limit += _TOLERANCE * float(dual.sum()) + float(slopes @ point) - float(dual @ value)
            margin += float(steep @ point) + float(dual @ size)
            count += len(dual)
        margin += float(charged @ upper)
        return tuple(weights.tolist()), limit + _MARGIN * max(1.0, count / 2048) * margin

    def _tangent(
        self, constraint: Any, solution: FloatArray
    ) -> tuple[FloatArray, Any, FloatArray, FloatArray]:
        """A point near the solution; gradient, value and size of the terms there."""
        shape = constraint.expr.shape
        for point in (solution, solution + _NUDGE):
            self.rank.value = point
            gradient = _gradient(constraint, self.rank)
            with np.errstate(all="ignore"):
                value = _entries(constraint.expr.value, shape)
                size = sum(np.abs(_entries(side.value, shape)) for side in constraint.args)
            if (
                gradient is not None
                and np.all(np.isfinite(gradient.data))
                and np.all(np.isfinite(value))
            ):
                return point, gradient, value, np.asarray(size)
        raise ValueError(
            f"constraints: {constraint}: cvxpy has no gradient of it at the solution; write it in "
            "other terms (the largest of some as `max`, not as `norm_inf`)"
        )

    def violation(self, ranks: IntArray) -> float:
        """By how much whole ranks break the constraints, summed up; 0 if they satisfy them."""
        values = self._matrix @ ranks + self._offset
        broken: list[FloatArray] = [np.where(self._both, np.abs(values), values)]
        if self._curved:
            self.rank.value = ranks.astype(np.float64)
        for constraint in self._curved:
            with np.errstate(all="ignore"):
                own = _dense(constraint.violation()).ravel()
            broken.append(np.where(np.isfinite(own), own, _OUTSIDE))
        return sum(float(part[part > _TOLERANCE].sum()) for part in broken)

    def accepts(self, ranks: IntArray) -> bool:
        """Whether whole ranks satisfy all constraints."""
        return self.violation(ranks) == 0

    def repaired(self, ranks: IntArray) -> IntArray:
        """Move single variables by single steps until the constraints hold.

        Raises:
            ValueError: no such step helps any more.
        """
        problem = self._problem
        broken = self.violation(ranks)
        for _ in range(_MOST_MOVES):
            best: tuple[float, IntArray] | None = None
            for group in problem.variables if broken else ():
                allowed = problem.allowed_ranks(group[0]).tolist()
                at = allowed.index(int(ranks[group[0]]))
                for rank in [*allowed[max(at - 1, 0) : at], *allowed[at + 1 : at + 2]]:
                    moved = ranks.copy()
                    moved[list(group)] = rank
                    left = self.violation(moved)
                    if left < (best[0] if best else broken) and problem.fits(moved):
                        best = left, moved
            if best is None:
                break
            broken, ranks = best
        if broken:
            raise ValueError(
                "constraints: rounding found no whole ranks that satisfy them; `relax` has the "
                "continuous ones"
            )
        return ranks


def _parsed(
    cp: Any, problem: Problem, constraints: Constraints | None, rank: Any
) -> list[tuple[str, Any]]:
    """The caller's constraints, checked, and what messages call each."""
    if constraints is None:
        return []
    if not callable(constraints):
        raise ValueError(
            "constraints: expected a function from ranks by name to a list of cvxpy constraints, "
            f"got {constraints!r}"
        )
    own: Any = constraints({name: rank[i] for i, name in enumerate(problem.names)})
    if not isinstance(own, (list, tuple)):
        raise ValueError(f"constraints: expected a list of cvxpy constraints, got {own!r}")
    kinds = (cp.constraints.Inequality, cp.constraints.Zero, cp.constraints.Equality)
    parsed: list[tuple[str, Any]] = []
    for n, constraint in enumerate(cast(Sequence[Any], own)):
        where = f"constraints: number {n + 1} ({constraint})"
        if not isinstance(constraint, kinds):
            raise ValueError(f"{where}: expected an inequality or equality of cvxpy expressions")
        if not constraint.is_dcp():
            raise ValueError(f"{where}: expected a convex one, by cvxpy's rules")
        foreign = [v for v in constraint.variables() if v.id != rank.id]
        if foreign:
            raise ValueError(f"{where}: expected the ranks as its only variables, got {foreign}")
        for leaf in [*constraint.parameters(), *constraint.constants()]:
            if leaf.value is None:
                raise ValueError(f"{where}: expected a value of the parameter {leaf}")
            if not np.all(np.isfinite(_dense(leaf.value))):
                raise ValueError(f"{where}: expected finite numbers")
        parsed.append((where, constraint))
    return parsed


def _is_equality(constraint: Any) -> bool:
    return type(constraint).__name__ in ("Equality", "Zero")


def _dual(constraint: Any) -> FloatArray:
    """Its dual, entry by entry in columns; 0 where the solver has found none."""
    value: Any = constraint.dual_value
    size = constraint.expr.size
    dual = np.zeros(size) if value is None else _entries(value, constraint.expr.shape)
    dual = np.where(np.isfinite(dual), dual, 0.0)
    return dual if _is_equality(constraint) else np.maximum(dual, 0.0)


def _entries(value: Any, shape: tuple[int, ...]) -> FloatArray:
    """The value of an expression of a shape, column by column as gradients count entries."""
    dense = _dense(value)
    # Some atoms give a 1 x 1 matrix for a scalar; a scalar side stands for all entries.
    return (dense if dense.size > 1 or not shape else np.broadcast_to(dense, shape)).ravel("F")


def _dense(value: Any) -> FloatArray:
    dense = value.toarray() if hasattr(value, "toarray") else value
    return np.asarray(dense, dtype=np.float64)


def _gradient(constraint: Any, rank: Any) -> Any:
    """The gradient at the rank's value: a row a layer, a column an entry; None if there is none."""
    try:
        with np.errstate(all="ignore"):
            gradient = constraint.expr.grad.get(rank, 0.0)
    except (NotImplementedError, TypeError, ValueError):
        return None  # atoms without one; at the edge of a domain cvxpy adds to None
    if gradient is None:
        return None
    shape = (rank.size, constraint.expr.size)
    # cvxpy makes a number of every gradient with one entry.
    return _sparse(shape, np.full(shape, gradient) if np.isscalar(gradient) else gradient)


def _sparse(shape: tuple[int, int], values: Any = None) -> Any:
    from scipy.sparse import csr_array

    return csr_array(shape if values is None else values)
