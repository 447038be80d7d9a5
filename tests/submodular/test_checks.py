"""The bound check, and what it catches."""

import math
from dataclasses import replace

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
    bound_check,
    select,
    submodularity_ratio,
)
from tests.strategies import examples
from tests.submodular import drawn, exact
from tests.submodular.tight import staircase


@settings(max_examples=examples(1.0))
@given(drawn.submodular(), st.data())
def test_the_truth_passes(f, data):
    constraint = data.draw(drawn.constraints(f.n))
    check = bound_check(f, constraint)
    assert check.passed
    assert check.violations == ()
    assert check.exhaustive
    assert check.submodularity_ratio == pytest.approx(1, rel=1e-6)
    if constraint.kind == "cardinality":
        assert check.holds


@settings(max_examples=examples(1.0))
@given(drawn.coupled(), st.data())
def test_weakly_submodular_is_what_it_claims(f, data):
    check = bound_check(f, data.draw(drawn.constraints(f.n)))
    assert check.passed
    assert not check.conclusive
    assert check.submodularity_ratio >= f.submodularity_ratio()


@settings(max_examples=examples(1.0))
@given(st.data())
def test_the_exhaustive_search_misses_nothing(data):
    """Any function at all: a violation is found if and only if the definition is broken."""
    n = data.draw(st.integers(1, 4))
    sets = list(exact.subsets(n))
    drawn_values = data.draw(st.lists(st.integers(0, 6), min_size=len(sets), max_size=len(sets)))
    values = {frozenset(s): float(v) for s, v in zip(sets, drawn_values, strict=True)}
    values[frozenset()] = 0.0
    f = Function(n, values.__getitem__)
    check = bound_check(f, Cardinality(1))

    def gain(s, e):
        return values[s | {e}] - values[s]

    pairs = [(a, b) for a in values for b in values if a <= b]
    falls = any(gain(a, e) < 0 for a in values for e in range(n) if e not in a)
    grows = any(gain(a, e) < gain(b, e) for a, b in pairs for e in range(n) if e not in b)
    assert {v.law for v in check.violations} == (
        ({"monotone"} if falls else set()) | ({"submodular"} if grows else set())
    )
    for v in check.violations:
        assert v.element not in v.larger
        assert v.gain_at_smaller == gain(v.smaller, v.element)
        if v.law == "monotone":
            assert v.smaller == v.larger
            assert v.gain_at_larger == v.gain_at_smaller < 0
        else:
            assert v.smaller < v.larger
            assert v.gain_at_smaller < v.gain_at_larger == gain(v.larger, v.element)
    assert check.passed == (not check.violations and (check.holds or not check.conclusive))
    ratios = [
        sum(gain(low, e) for e in high) / (values[low | high] - values[low])
        for low in values
        for high in values
        if not low & high and values[low | high] > values[low]
    ]
    expected = min(max(min([1.0, *ratios]), 0.0), 1.0)
    assert check.submodularity_ratio == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert submodularity_ratio(f) == check.submodularity_ratio


def test_violations_say_where():
    liar = Function(3, lambda s: len(s) ** 2)
    check = bound_check(liar, Cardinality(2))
    assert not check.passed
    assert all(v.law == "submodular" for v in check.violations)
    assert str(check.violations[0]) == (
        "not submodular: f([] + 0) - f([]) = 1 < f([1] + 0) - f([1]) = 3"
    )
    falling = Function(2, lambda s: len(s) * (2 - len(s)), submodular=False)
    check = bound_check(falling, Cardinality(1))
    assert [str(v) for v in check.violations] == [
        "not monotone: f([1] + 0) - f([1]) = -1 < 0",
        "not monotone: f([0] + 1) - f([0]) = -1 < 0",
    ]
    # Convexity is no lie of a function that claims nothing.
    assert bound_check(Function(3, lambda s: len(s) ** 2, submodular=False), Cardinality(1)).passed


def large_liar(n: int):
    """Modular but for one pair of elements that is worth more together."""
    return Function(n, lambda s: len(s) + 3.0 * ({0, 1} <= s))


def test_samples_find_a_lie_among_many_elements():
    check = bound_check(large_liar(14), Cardinality(3), samples=200, seed=0)
    assert not check.exhaustive
    assert check.violations
    for v in check.violations:
        assert v.law == "submodular"
        assert v.element in {0, 1}
        assert {0, 1} - {v.element} <= v.larger - v.smaller
        assert (v.gain_at_smaller, v.gain_at_larger) == (1.0, 4.0)
    # (1 + 1) / 5 for the pair alone; no chain can show less.
    assert 0.4 <= check.submodularity_ratio < 1
    assert submodularity_ratio(large_liar(14), samples=200, seed=0) == check.submodularity_ratio


def test_samples_find_what_falls():
    f = Function(12, lambda s: len(s) - 1.5 * (5 in s and len(s) > 1), submodular=False)
    check = bound_check(f, Cardinality(2), samples=50, seed=1)
    assert check.violations
    for v in check.violations:
        assert v.law == "monotone"
        assert 5 in v.smaller | {v.element}
        assert v.gain_at_smaller == v.gain_at_larger == -0.5
    assert not check.passed


def test_rounding_among_samples_is_no_violation():
    """Gains that grow or fall by 1e-12 of the value, within the tolerance of 1e-9."""
    noise = np.random.default_rng(5).standard_normal(1 << 12)
    index = 1 << np.arange(12)
    f = Function(12, lambda s: min(len(s), 3) * (1 + 1e-12 * noise[index[sorted(s)].sum()]))
    check = bound_check(f, Cardinality(2), samples=100)
    assert check.violations == ()
    assert check.submodularity_ratio == pytest.approx(1, abs=1e-9)
    assert bound_check(f, Cardinality(2), samples=100, tolerance=1e-15).violations


def test_samples_depend_on_the_seed_alone():
    def run(seed):
        return bound_check(large_liar(12), Cardinality(2), samples=20, seed=seed)

    assert run(3) == run(3)
    assert any(run(3).violations != run(seed).violations for seed in range(4, 8))


def test_samples_find_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 40))
    for f in [
        LogDet(x.T @ x, 2.0),
        Coverage(rng.integers(0, 50, (40, 6)).tolist()),
        Modular(rng.random(40)),
    ]:
        check = bound_check(f, Cardinality(5), samples=50)
        assert check.passed
        assert check.holds
        assert check.submodularity_ratio == pytest.approx(1, abs=1e-9)


def test_a_constant_too_high_is_caught_on_a_tight_instance():
    """Greedy reaches 1 - (3/4)^4 = 0.684 of the optimum here, and of the bound."""
    f, _ = staircase(4)
    constraint = Cardinality(4)
    selection = select(f, constraint=constraint)
    check = bound_check(f, constraint, selection)
    assert check.holds
    assert check.conclusive
    assert check.value / check.instance_bound == pytest.approx(1 - 0.75**4, rel=1e-12)
    boast = replace(selection, guarantee=replace(selection.guarantee, ratio=0.69))
    caught = bound_check(f, constraint, boast)
    assert not caught.holds
    assert not caught.passed
    assert "fails: these are not the items of the greedy algorithm" in repr(caught)
    modest = replace(selection, guarantee=replace(selection.guarantee, ratio=0.68))
    assert bound_check(f, constraint, modest).holds


def test_every_prefix_counts():
    """Select looks at 64 of them; the theorem about greedy needs all."""
    seen = set()

    class Spy(Modular):
        def sketch(self, state):
            seen.add(len(state.items))
            return super().sketch(state)

    f, constraint = Spy(np.ones(120)), Cardinality(100)
    selection = select(f, constraint=constraint)
    assert len(seen) == 64
    bound_check(f, constraint, selection, samples=1)
    assert seen == set(range(101))


@pytest.mark.parametrize("budget", [10, 14, 15])
def test_equal_costs_are_counted_here_too(budget):
    """2.8 of three like elements fit a fractional knapsack; greedy is no worse for that."""
    f, knapsack = Modular([1.0, 1.0, 1.0]), Knapsack([5, 5, 5], budget)
    check = bound_check(f, knapsack)
    assert check.guarantee.constraint == "cardinality"
    assert check.instance_bound == pytest.approx(budget // 5, rel=1e-14)
    assert check.conclusive
    assert check.passed
    named = select(f, constraint=knapsack, algorithm="density greedy")
    assert not bound_check(f, knapsack, named).conclusive


def test_an_answer_to_a_cardinality_proves_nothing_about_a_matroid():
    f = Modular([2.0, 2.0, 1.0])
    selection = select(f, budget=1)
    assert bound_check(f, Cardinality(1), selection).conclusive
    assert not bound_check(f, PartitionMatroid("aab", 1), selection).conclusive


def test_small_noise_is_no_violation():
    """The determinants of nearly singular matrices differ by more than 1e-9 for no reason."""
    for seed in range(20):
        x = np.random.default_rng(seed).integers(-2, 3, (2, 5)).astype(float)
        matrix = x.T @ x + np.eye(5)
        f = LogDet(matrix, float(matrix.max()) * 2.0**-32)
        assert bound_check(f, Cardinality(3)).violations == ()


def test_how_many_elements_are_looked_at_exhaustively():
    assert bound_check(Modular(np.ones(10)), Cardinality(1)).exhaustive
    assert not bound_check(Modular(np.ones(11)), Cardinality(1)).exhaustive


def test_lazy_greedy_on_a_lie_fails_conclusively():
    """The gain of 5 grows from 0.1 to 5; lazy greedy never looks at it again."""

    def f(s):
        others = len(s - {5})
        return (1 + 0.2 * (others - 1) if others else 0.0) + (5 in s) * (5 if others else 0.1)

    liar = Function(6, f)
    check = bound_check(liar, Cardinality(4))
    assert check.value == pytest.approx(1.6)
    assert check.conclusive
    assert not check.holds
    assert check.violations


def test_beyond_cardinality_a_failure_proves_nothing():
    f = Coverage([[0], [1], [0]], weights=[1.0, 1 - 2.0**-10])
    matroid = PartitionMatroid("aab", 1)
    selection = select(f, constraint=matroid, algorithm="greedy")
    boast = replace(selection, guarantee=replace(selection.guarantee, ratio=0.6))
    check = bound_check(f, matroid, boast)
    assert not check.holds
    assert not check.conclusive
    assert check.passed
    assert repr(check) == (
        "value 1 >= 0.6000 x 1.99902: not shown: the bound may be above the optimum, so this "
        "proves no violation\n"
        "submodularity ratio 1 (all sets)\n"
        "violations 0 (all sets)"
    )


def test_as_text():
    check = bound_check(large_liar(12), Cardinality(2), samples=30)
    lines = repr(check).splitlines()
    assert lines[0].endswith(": holds")
    assert lines[1].startswith("submodularity ratio 0.")
    assert lines[1].endswith("(samples)")
    assert lines[2] == f"violations {len(check.violations)} (samples)"
    assert lines[3] == f"  {check.violations[0]}"
    assert len(lines) == 3 + min(3, len(check.violations))


def test_no_claim_no_failure():
    f = CoupledQuadratic([1.0, 1.0], np.ones((2, 2)))
    check = bound_check(f, Knapsack([1, 2], 2))
    assert check.instance_bound == math.inf
    assert check.holds


def test_tolerance_and_other_arguments():
    wobbly = Function(2, lambda s: {0: 0.0, 1: 1.0, 2: 2.0 + 1e-6}[len(s)])
    assert bound_check(wobbly, Cardinality(1)).violations
    loose = bound_check(wobbly, Cardinality(1), tolerance=1e-5)
    assert loose.violations == ()
    assert loose.tolerance == 1e-5
    f, one = Modular([1.0, 2.0]), Cardinality(1)
    for bad in [0, -0.1, 1.0, math.nan, "x"]:
        with pytest.raises(ValueError, match=r"^tolerance: expected a number in \(0, 1\), got "):
            bound_check(f, one, tolerance=bad)  # pyright: ignore[reportArgumentType]
    for bad in [0, 1.5]:
        with pytest.raises(ValueError, match=r"^samples: expected a whole number >= 1, got "):
            bound_check(f, one, samples=bad)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"^samples: expected a whole number >= 1, got "):
            submodularity_ratio(f, samples=bad)  # pyright: ignore[reportArgumentType]
    both = select(f, budget=2)
    with pytest.raises(ValueError, match=r"^selection: \[1, 0\] is not feasible$"):
        bound_check(f, one, both)
    with pytest.raises(ValueError, match=r"^constraint: expected 2 elements"):
        bound_check(f, PartitionMatroid("a", 1), both)


def test_nothing_to_check():
    check = bound_check(Modular([]), Cardinality(1))
    assert check.passed
    assert check.submodularity_ratio == 1
