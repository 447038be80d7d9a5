"""Bounds of an instance, and curvature."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.submodular import (
    Cardinality,
    CoupledQuadratic,
    Coverage,
    Function,
    Knapsack,
    LogDet,
    Modular,
    PartitionMatroid,
    curvature,
    greedy,
    guarantee,
    instance_bound,
)
from tests.strategies import examples
from tests.submodular import drawn, exact


@settings(max_examples=examples(2.0))
@given(drawn.objectives(), st.data())
def test_no_feasible_set_is_above_the_bound(f, data):
    constraint = data.draw(drawn.constraints(f.n))
    order = data.draw(st.permutations(range(f.n)))
    items = order[: data.draw(st.integers(0, f.n))]
    bound = instance_bound(f, constraint, items)
    best = exact.optimum(f, constraint)
    if isinstance(f, LogDet):
        log = 0.5 * (math.log(best.numerator) - math.log(best.denominator))
        assert log <= bound + 1e-14 * (1 + log)
    elif bound < math.inf:
        assert best <= Fraction(bound)


@settings(max_examples=examples(1.0))
@given(st.data())
def test_the_bound_is_the_least_over_the_prefixes(data):
    f = data.draw(drawn.coverage())
    constraint = data.draw(drawn.constraints(f.n))
    items = data.draw(st.permutations(range(f.n)))[: data.draw(st.integers(0, f.n))]
    expected = []
    for size in range(len(items) + 1):
        prefix = tuple(items[:size])
        gains = [
            float(exact.value(f, tuple({*prefix, j})) - exact.value(f, prefix)) for j in range(f.n)
        ]
        expected.append(float(exact.value(f, prefix)) + constraint.heaviest(np.array(gains)))
    assert instance_bound(f, constraint, items) == pytest.approx(min(expected), rel=1e-12)


def test_which_prefixes_are_looked_at():
    seen = []

    class Spy(Coverage):
        def sketch(self, state):
            seen.append(len(state.items))
            return super().sketch(state)

    f = Spy([[j] for j in range(100)])
    instance_bound(f, Cardinality(50), range(50))
    assert seen == list(range(51))
    seen.clear()
    instance_bound(f, Cardinality(99), range(100))
    assert (len(seen), seen[0], seen[-1]) == (64, 0, 100)
    seen.clear()
    f.incremental = False
    instance_bound(f, Cardinality(99), range(100))
    assert (len(seen), seen[0], seen[-1]) == (16, 0, 100)
    seen.clear()
    instance_bound(f, Cardinality(99), range(100), prefixes=3)
    assert seen == [0, 50, 100]


def test_a_modular_optimum_is_its_own_bound():
    f = Modular([3.0, 2.0, 2.0, 1.0])
    for constraint in [Cardinality(2), PartitionMatroid("abab", 1), Knapsack([1, 1, 5, 5], 2)]:
        items = greedy(f, constraint).items
        bound = instance_bound(f, constraint, items)
        assert 5.0 <= bound == pytest.approx(5.0, rel=1e-14)


def test_without_a_floor_there_is_no_bound():
    f = CoupledQuadratic([1.0, 1.0], np.ones((2, 2)))
    assert instance_bound(f, Cardinality(1), [0]) == math.inf


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^items: expected elements below 1, got 1$"):
        instance_bound(Modular([1.0]), Cardinality(1), [1])
    with pytest.raises(ValueError, match=r"^costs: expected one for each of 1 elements, got 2$"):
        instance_bound(Modular([1.0]), Knapsack([1, 1], 1))


def test_curvatures():
    assert curvature(Modular([1.0, 2.0, 0.0])) == 0
    assert curvature(Modular([])) == 0
    assert curvature(Coverage([[0], [0]])) == 1
    assert curvature(Coverage([[0, 1, 2, 3], [3, 4], [5]])) == 0.5
    # 1/2 log of the pivot that is left, 2 - 1/2, against 1/2 log 2.
    assert curvature(LogDet([[1.0, 1.0], [1.0, 1.0]], 1.0)) == pytest.approx(
        1 - math.log(1.5) / math.log(2), rel=1e-14
    )
    # Not submodular: the last gain is larger than the first.
    assert curvature(Function(2, lambda s: len(s) ** 2)) == 0


@settings(max_examples=examples(1.0))
@given(st.data())
def test_greedy_keeps_what_its_curvature_promises(data):
    f = data.draw(drawn.coverage())
    constraint = data.draw(
        st.one_of(st.builds(Cardinality, st.integers(0, 6)), drawn.matroids(f.n))
    )
    value = exact.value(f, greedy(f, constraint).items)
    row = guarantee(constraint.kind, "greedy", "submodular").with_curvature(curvature(f))
    assert value >= Fraction(row.ratio) * exact.optimum(f, constraint)
