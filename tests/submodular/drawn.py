"""Hypothesis strategies for set functions and constraints. Constructive: they filter nothing."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from lorambo_alloc.submodular import (
    Cardinality,
    Constraint,
    CoupledQuadratic,
    Coverage,
    Knapsack,
    LaminarMatroid,
    LogDet,
    Modular,
    PartitionMatroid,
    SetFunction,
)

SIZES = st.integers(1, 6)


@st.composite
def modular(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES) -> Modular:
    """Weights with ties, dyadic, or of very unlike sizes."""
    n = draw(sizes)
    entry = draw(
        st.sampled_from(
            [
                st.integers(0, 4).map(float),
                st.floats(0, 100),
                st.integers(-300, 300).map(lambda e: 2.0**e),
                st.integers(-3, 3).map(lambda k: 1 + k * 2.0**-52),
            ]
        )
    )
    return Modular(draw(st.lists(entry, min_size=n, max_size=n)))


@st.composite
def coverage(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES) -> Coverage:
    """Few points, so that sets overlap, with weights whose sums are exact."""
    n, points = draw(sizes), draw(st.integers(1, 8))
    sets = st.sets(st.integers(0, points - 1), max_size=5)
    weight = st.sampled_from([0.0, 0.25, 1.0, 1.0, 2.0, 3.0])
    weights = draw(st.lists(weight, min_size=points, max_size=points))
    return Coverage(draw(st.lists(sets, min_size=n, max_size=n)), weights)


def gram(draw: st.DrawFn, n: int) -> Any:
    """A positive semidefinite integer matrix, often singular, often with equal rows."""
    samples = draw(st.integers(1, n + 2))
    row = st.lists(st.integers(-3, 3), min_size=n, max_size=n)
    x = np.array(draw(st.lists(row, min_size=samples, max_size=samples)), dtype=float)
    return x.T @ x


@st.composite
def log_det(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES) -> LogDet:
    """Integer covariances."""
    return LogDet(gram(draw, draw(sizes)), draw(st.sampled_from([0.25, 1.0, 8.0])))


@st.composite
def coupled(
    draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES, *, damped: bool = False
) -> CoupledQuadratic:
    """Integer curvatures; slopes in their range where there is no damping."""
    n = draw(sizes)
    matrix = gram(draw, n)
    numbers = draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n))
    rho = draw(st.sampled_from([0.125, 1.0, 16.0] if damped else [0.0, 0.125, 1.0]))
    slopes = np.array(numbers, dtype=float)
    return CoupledQuadratic(slopes if rho else matrix @ slopes, matrix, rho)


def submodular(sizes: st.SearchStrategy[int] = SIZES) -> st.SearchStrategy[SetFunction]:
    """Monotone submodular objectives."""
    return st.one_of(coverage(sizes), log_det(sizes), modular(sizes))


def objectives() -> st.SearchStrategy[SetFunction]:
    """All objectives that bring a proof."""
    return st.one_of(submodular(), coupled())


def knapsacks(n: int) -> st.SearchStrategy[Knapsack]:
    """Costs small, equal or near 2^53."""
    cost = st.sampled_from(
        [st.integers(1, 9), st.just(3), st.integers(2**53 - 9, 2**53), st.sampled_from([1, 50])]
    )

    def of(costs: list[int]) -> st.SearchStrategy[Knapsack]:
        return st.builds(Knapsack, st.just(costs), st.integers(0, sum(costs) + 1))

    return cost.flatmap(lambda c: st.lists(c, min_size=n, max_size=n)).flatmap(of)


@st.composite
def laminar(draw: st.DrawFn, n: int) -> LaminarMatroid:
    """Sets made by cutting sets in two, in any order; some left out."""
    sets: list[list[int]] = []
    waiting = [draw(st.permutations(range(n)))]
    while waiting:
        members = waiting.pop()
        if draw(st.booleans()):
            sets.append(list(members))
        if len(members) > 1:
            cut = draw(st.integers(1, len(members) - 1))
            waiting += [members[:cut], members[cut:]]
    sets = draw(st.permutations(sets))
    return LaminarMatroid(n, sets, [draw(st.integers(0, len(s))) for s in sets])


@st.composite
def partitions(draw: st.DrawFn, n: int) -> PartitionMatroid:
    """Up to three groups."""
    groups = draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    return PartitionMatroid(groups, {g: draw(st.integers(0, 3)) for g in "abc"})


def matroids(n: int) -> st.SearchStrategy[Constraint]:
    """Partition and laminar matroids."""
    return st.one_of(laminar(n), partitions(n))


def constraints(n: int) -> st.SearchStrategy[Constraint]:
    """All constraints."""
    return st.one_of(st.builds(Cardinality, st.integers(0, n + 1)), knapsacks(n), matroids(n))
