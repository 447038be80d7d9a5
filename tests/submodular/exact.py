"""Set functions and constraints in rational arithmetic, by their definitions alone."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations
from typing import Any, TypeAlias

from lorambo_alloc.submodular import (
    Cardinality,
    Constraint,
    CoupledQuadratic,
    Coverage,
    Knapsack,
    LaminarMatroid,
    LogDet,
    SetFunction,
)

Set: TypeAlias = tuple[int, ...]


def subsets(n: int) -> Iterator[Set]:
    """All subsets of 0..n - 1."""
    for size in range(n + 1):
        yield from combinations(range(n), size)


def eliminated(rows: list[list[Fraction]], right: list[Fraction]) -> tuple[Fraction, Fraction]:
    """The determinant, and right^T matrix^+ right, of a positive semidefinite matrix."""
    rows, right = [row.copy() for row in rows], right.copy()
    determinant, form = Fraction(1), Fraction(0)
    for i in range(len(rows)):
        pivot = rows[i][i]
        assert pivot >= 0
        determinant *= pivot
        if pivot == 0:
            assert right[i] == 0  # else the form is infinite
            continue
        form += right[i] ** 2 / pivot
        for k in range(i + 1, len(rows)):
            factor = rows[k][i] / pivot
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
            right[k] -= factor * right[i]
    return determinant, form


def value(f: SetFunction, items: Set) -> Fraction:
    """f exactly; for `LogDet`, det(I + C_SS / rho), whose order is the same."""
    if isinstance(f, Coverage):
        points = {p for item in items for p in f.row(item).tolist()}
        return sum((Fraction(float(f.weights[p])) for p in points), Fraction(0))
    if isinstance(f, CoupledQuadratic):
        block = [
            [Fraction(float(f.C[i, j])) + Fraction(f.rho) * (i == j) for j in items] for i in items
        ]
        return eliminated(block, [Fraction(float(f.b[i])) for i in items])[1] / 2
    assert isinstance(f, LogDet)
    block = [
        [Fraction(float(f.C[i, j])) / Fraction(f.rho) + (i == j) for j in items] for i in items
    ]
    return eliminated(block, [Fraction(0)] * len(items))[0]


def feasible(constraint: Constraint, items: Set) -> bool:
    """Whether a set is feasible, by the definition."""
    if isinstance(constraint, Cardinality):
        return len(items) <= constraint.limit
    if isinstance(constraint, Knapsack):
        return sum(int(constraint.costs[i]) for i in items) <= constraint.budget
    assert isinstance(constraint, LaminarMatroid)
    return all(
        len(set(members.tolist()) & set(items)) <= capacity
        for members, capacity in zip(constraint.members, constraint.capacities, strict=True)
    )


def optimum(
    f: SetFunction, constraint: Constraint, of: Callable[[SetFunction, Set], Any] = value
) -> Any:
    """The greatest value of a feasible set."""
    return max(of(f, items) for items in subsets(f.n) if feasible(constraint, items))
