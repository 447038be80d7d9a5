"""Coupled layers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc.submodular import Cardinality, CoupledQuadratic, bound_check, coupled, select
from lorambo_alloc.submodular.coupled import CoupledQuadratic as Coupled
from lorambo_alloc.submodular.matrices import DEPENDENT
from lorambo_alloc.submodular.perspective import Perspective
from tests.strategies import examples, seeds
from tests.submodular import drawn, exact


def test_values():
    f = CoupledQuadratic([1.0, 2.0], [[3.0, 1.0], [1.0, 1.0]], 1.0)
    assert f.kind == "weakly submodular"
    assert [f.value(s) for s in ([], [0], [1])] == pytest.approx([0, 0.125, 1.0], rel=1e-15)
    # [4 1; 1 2] x = (1, 2) has x = (0, 1).
    assert f.value([0, 1]) == pytest.approx(1.0, rel=1e-15)
    assert f.start().gains().tolist() == [0.125, 1.0]


def test_a_diagonal_curvature_is_modular():
    f = CoupledQuadratic([1.0, 2.0, 3.0], np.diag([1.0, 2.0, 4.0]))
    state = f.start()
    state.add(2)
    assert state.gains().tolist() == [0.5, 1.0, 0]
    assert f.submodularity_ratio() == pytest.approx(1.0, rel=1e-5)


def test_a_dependent_candidate_gains_nothing():
    f = CoupledQuadratic([1.0, 1.0], np.ones((2, 2)))
    state = f.start()
    state.add(0)
    assert state.gains().tolist() == [0, 0]
    state.add(1)
    assert (state.value, state.items) == (0.5, (0, 1))
    assert f.value([0, 1]) == pytest.approx(0.5, rel=1e-14)
    assert select(f, budget=2).items == (0,)


def test_nearly_dependent_candidates_are_solved_for_by_least_squares():
    f = CoupledQuadratic([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0 + 2.0**-52]])
    assert f.value([0, 1]) == pytest.approx(0.5, rel=1e-12)


def test_the_callers_array_is_not_changed():
    b, matrix = np.ones(3), np.eye(3) + 1
    f = CoupledQuadratic(b, matrix, 0.5)
    assert f.C is matrix
    select(f, budget=2)
    assert b.tolist() == [1, 1, 1]
    assert matrix.tolist() == (np.eye(3) + 1).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], np.eye(2)), r"^C: expected 1 x 1 as b has, got \(2, 2\)$"),
        (([[1.0]], np.eye(1)), r"^b: expected 1 dimensions, got shape \(1, 1\)$"),
        (([1.0], np.eye(1), -0.5), r"^rho: expected a finite number >= 0, got -0.5$"),
        (([1.0], np.eye(1), math.nan), r"^rho: expected a finite number >= 0, got nan$"),
        (([1.0], np.eye(1), math.inf), r"^rho: expected a finite number >= 0, got inf$"),
        (([1.0], np.eye(1), True), r"^rho: expected a finite number >= 0, got True$"),
        (
            ([0.0, 1.0], np.zeros((2, 2))),
            r"^rho: expected > 0, as C is 0 and b is not at candidate 1$",
        ),
        (([1e200], [[1.0]]), r"^b: expected a largest gain .* got inf; choose other units$"),
        (
            ([0.0, 1e-200], np.eye(2)),
            r"^b: expected a largest gain .* got 0.0; choose other units$",
        ),
        (
            ([2.0**451], [[1.0]]),
            r"^b: expected a largest gain b_j\^2 / \(C_jj \+ rho\) from ",
        ),
        (
            ([2.0**-451], [[1.0]]),
            r"^b: expected a largest gain b_j\^2 / \(C_jj \+ rho\) from ",
        ),
        (
            ([1.0, 1.0], np.diag([1.0, 2.0**-901])),
            r"^C: expected every C_jj \+ rho to be 0 or from 2\^-900 to 2\^900, got 5.9.* to 1.0;",
        ),
        (([1.0], [[2.0**901]]), r"^C: expected every C_jj \+ rho .*; choose other units$"),
        (([1.0], [[1.0]], 0.0, []), r"^layers: expected one name for each of 1 candidates, got 0$"),
    ],
)
def test_what_is_no_quadratic(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoupledQuadratic(*arguments)


def test_no_slope_no_curvature_no_gain():
    f = CoupledQuadratic([0.0, 2.0], [[0.0, 0.0], [0.0, 1.0]])
    assert f.start().gains().tolist() == [0, 2]
    assert f.value([0, 1]) == 2
    assert f.floors == []
    assert f.submodularity_ratio() == 0
    selection = select(f, budget=1)
    assert (selection.items, selection.upper_bound, selection.ratio) == ((1,), math.inf, 0)


@settings(max_examples=examples(2.0))
@given(drawn.coupled())
def test_the_submodularity_ratio_is_a_lower_bound(f):
    """Definition 2.3 of Das and Kempe, in rational arithmetic."""
    proved = Fraction(f.submodularity_ratio())
    values = {items: exact.value(f, items) for items in exact.subsets(f.n)}
    for left, base in values.items():
        for right in exact.subsets(f.n):
            if not set(left) & set(right):
                joint = values[tuple(sorted(left + right))] - base
                single = sum(values[tuple(sorted((*left, j)))] - base for j in right)
                assert single >= proved * joint


def test_the_ratio_comes_from_the_better_of_two_floors():
    f = CoupledQuadratic([1.0, 1.0], [[1.0, 0.5], [0.5, 1.0]], 1.0)
    damping, eigenvalue = f.floors
    assert damping == pytest.approx([1, 1], rel=1e-11)
    assert damping.max() < 1
    # Scaled to a unit diagonal, M is [1 1/4; 1/4 1].
    assert eigenvalue == pytest.approx([1.5, 1.5], rel=1e-5)
    assert f.submodularity_ratio() == pytest.approx(0.75, rel=1e-5)
    assert f.submodularity_ratio() < 0.75


def test_without_eigenvalues_only_damping_counts(monkeypatch):
    monkeypatch.setattr(coupled, "EIGENVALUES_UP_TO", 1)
    f = CoupledQuadratic([1.0, 1.0], [[1.0, 0.5], [0.5, 1.0]], 1.0)
    assert len(f.floors) == 1
    assert f.submodularity_ratio() == pytest.approx(0.5, rel=1e-11)
    assert CoupledQuadratic([1.0, 1.0], [[1.0, 0.5], [0.5, 1.0]]).floors == []
    assert CoupledQuadratic([1.0], [[1.0]]).submodularity_ratio() > 0.999


@given(drawn.coupled(damped=True), st.data())
def test_conjugate_gradients_serve_as_well(f, data):
    """Their bound holds whatever they reach, and for few candidates they reach the solution."""
    items = data.draw(st.permutations(range(f.n)))[: data.draw(st.integers(0, f.n))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coupled, "EIGENVALUES_UP_TO", 0)
        other = Coupled(f.b, f.C, f.rho)
        within = Cardinality(f.n)
        ((base, weights),) = other.ceilings(items, within)
        for chosen in exact.subsets(f.n):
            bound = Fraction(base) + sum(Fraction(float(weights[j])) for j in chosen)
            assert exact.value(f, chosen) <= bound
        everything = f.value(range(f.n))
        assert base + within.heaviest(weights) <= everything * (1 + 1e-6) + 1e-9


@given(seeds())
def test_any_dual_point_bounds_every_set(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 6))
    x = rng.integers(-3, 4, (n, n)).astype(float)
    f = CoupledQuadratic(rng.integers(-4, 5, n).astype(float), x.T @ x, 0.5)
    point = rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4)
    for p in f.floors:
        base, weights = Perspective(f.C, f.b, f.rho, p).ceiling(point)
        for chosen in exact.subsets(n):
            bound = Fraction(base) + sum(Fraction(float(weights[j])) for j in chosen)
            assert exact.value(f, chosen) <= bound


def test_a_dual_point_by_hand():
    f = CoupledQuadratic([2.0, 1.0], [[1.0, 0.5], [0.5, 1.0]], 1.0)
    dual = Perspective(f.C, f.b, f.rho, np.array([1.0, 1.0]))  # R = C
    w = np.array([1.0, 0.0])
    image = dual.image(w)
    assert image.tolist() == [1.0, 0.5]
    assert dual.weights(image).tolist() == [0.5, 0.125]
    assert dual.bound(w, image, Cardinality(1)) == pytest.approx(1.0, rel=1e-14)
    base, weights = dual.ceiling(w)
    assert 0.5 < base == pytest.approx(0.5, rel=1e-13)
    assert (weights > [0.5, 0.125]).all()
    assert weights == pytest.approx([0.5, 0.125], rel=1e-13)


def test_a_sketch_is_the_bound_by_slopes_and_floors():
    f = CoupledQuadratic([2.0, 3.0], [[1.0, 0.5], [0.5, 1.0]], 1.0)
    state = f.start()
    state.add(0)  # slopes left: 3 - 0.5 * 1
    value, weights = f.sketch(state)
    assert value == pytest.approx(1.0, rel=1e-14)
    assert weights == pytest.approx([0, 2.5**2 / (2 * 1.5)], rel=1e-5)
    unknown = CoupledQuadratic([1.0, 1.0], np.ones((2, 2)))
    value, weights = unknown.sketch(unknown.start())
    assert (value, weights.tolist()) == (math.inf, [0, 0])


def test_descent_starts_from_the_best_point_and_only_improves():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 40))
    f = CoupledQuadratic(rng.standard_normal(40), x.T @ x / 50, 1.0)
    within = Cardinality(5)
    dual = Perspective(f.C, f.b, f.rho, f.floors[-1])
    starts = [rng.standard_normal(40), np.zeros(40), np.full(40, 9.0)]
    bounds = [dual.bound(w, dual.image(w), within) for w in starts]
    found = dual.descend(starts, within)
    reached = dual.bound(found, dual.image(found), within)
    assert reached < 0.95 * min(bounds)
    # From nothing better than the best alone it goes the same way.
    assert (dual.descend([starts[int(np.argmin(bounds))]], within) == found).all()


def test_the_bound_is_far_below_f_of_all():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((250, 200))
    f = CoupledQuadratic(rng.standard_normal(200), x.T @ x / 250, 1.0)
    selection = select(f, budget=20)
    assert selection.ratio > 0.85
    assert selection.upper_bound < 0.7 * f.value(range(200))


@settings(max_examples=examples(1.0))
@given(drawn.coupled(damped=True), st.integers(-200, 200), st.integers(-200, 200), st.data())
def test_units_do_not_matter(f, slope, curvature, data):
    """Powers of 2, and of 4, whose roots are exact: the same items, the same bound."""
    scaled = CoupledQuadratic(f.b * 2.0**slope, f.C * 4.0**curvature, f.rho * 4.0**curvature)
    constraint = data.draw(drawn.constraints(f.n))
    one, other = select(f, constraint=constraint), select(scaled, constraint=constraint)
    assert other.items == one.items
    loss = 2.0 ** (2 * slope - 2 * curvature)
    assert other.value == one.value * loss
    assert other.upper_bound == pytest.approx(
        one.upper_bound * loss, rel=1e-6, abs=1e-250 * (1 + loss)
    )


def test_one_gain_may_be_far_below_the_others():
    """2^-1200 underflows; the bound is not below it all the same."""
    f = CoupledQuadratic([1.0, 2.0**-600], np.eye(2))
    selection = select(f, [5, 1], 1)
    assert (selection.items, selection.value) == ((), 0)
    assert 0 < selection.upper_bound < 2.0**-900
    assert select(f, budget=0).ratio == 1


def test_a_point_beyond_the_range_of_doubles_bounds_nothing():
    dual = Perspective(np.eye(2), np.ones(2), 0.0, np.full(2, 0.5))
    with np.errstate(over="ignore", invalid="ignore"):
        base, weights = dual.ceiling(np.full(2, 1e300))
    assert (base, weights.tolist()) == (math.inf, [0, 0])


def test_the_range_of_curvatures():
    for size in (2.0**-900, 2.0**900):
        f = CoupledQuadratic([size**0.5], [[size]])
        assert f.value([0]) == 0.5
        assert select(f, budget=1).ratio > 0.99


def test_slopes_whose_squares_underflow():
    """2^-1100 is 0 in doubles; divided by 2^-800 it is 2^-300, and no bound is below that."""
    f = CoupledQuadratic([1.0, 2.0**-550], np.diag([1.0, 2.0**-800]))
    assert f.start().gains().tolist() == [0.5, 2.0**-301]
    selection = select(f, [5, 1], 1)
    assert (selection.items, selection.value) == ((1,), 2.0**-301)
    assert selection.value <= selection.upper_bound < 1.001 * selection.value
    value, weights = f.sketch(f.start())
    assert value == 0
    assert weights == pytest.approx([0.5, 2.0**-301], rel=1e-5)


def test_units_of_one_candidate_do_not_make_it_dependent():
    """The first two are copies, so the system is singular; the third is of other units only."""
    matrix = np.array([[1.0, 1.0, 0], [1.0, 1.0, 0], [0, 0, 2.0**-60]])
    f = CoupledQuadratic([1.0, 1.0, 2.0**-30], matrix)
    assert f.value([0, 1, 2]) == pytest.approx(1.0, rel=1e-12)
    assert bound_check(f, Cardinality(2)).violations == ()


def test_a_value_is_never_negative():
    apart = 2.0**-40
    f = CoupledQuadratic([1.0, -1.0], [[1.0, 1 - apart], [1 - apart, 1.0]])
    assert f.value([0, 1]) >= 0


def test_curvature_of_single_precision_is_bounded_too():
    """Its eigenvalues are below 0 by more than the damping's 2^-40 of the trace; that is found."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 60)).astype(np.float32)
    matrix = (x.T @ x).astype(np.float64)
    matrix = (matrix + matrix.T) / 2
    least = float(np.linalg.eigvalsh(matrix)[0])
    trace = float(matrix.trace())
    assert least < -(2.0**-40) * trace
    f = CoupledQuadratic(rng.standard_normal(60), matrix, 10 * abs(least))
    for p in f.floors:
        shifted = matrix + np.diag(f.rho - p)
        assert np.linalg.eigvalsh(shifted)[0] > -1e-14 * trace
    # 2^-40, 2^-38, ... of the trace: the first that is proved is taken, if the damping exceeds it.
    share = 2.0**-40
    while share * trace < abs(least):
        share *= 4
    assert f.floors[0] == pytest.approx(np.full(60, f.rho - share * trace), rel=1e-14)
    assert CoupledQuadratic(f.b, matrix, 0.9 * abs(least)).floors == []


def test_beyond_what_is_proved_a_share_of_the_trace_is_assumed(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6)).astype(np.float32)
    matrix = (x.T @ x).astype(np.float64)
    matrix = (matrix + matrix.T) / 2
    monkeypatch.setattr(coupled, "PROVED_UP_TO", 5)
    f = CoupledQuadratic(np.ones(6), matrix, 1e-3)
    assert f.floors[0] == pytest.approx(1e-3 - 2.0**-40 * matrix.trace(), rel=1e-14)
    assert f.floors[0].max() < 1e-3 - 2.0**-40 * matrix.trace()
    zero = CoupledQuadratic(np.ones(2), np.zeros((2, 2)), 4.0)
    assert zero.floors[0] == pytest.approx([4, 4], rel=1e-14)


def test_large_damping_does_not_round_the_ratio_up():
    matrix = np.array([[4.0, -4.0], [-4.0, 4.0]])
    for rho in 1e6 * (1 + np.arange(100) / 64):
        f = CoupledQuadratic([1.0, 1.0], matrix, float(rho))
        assert Fraction(f.submodularity_ratio()) <= Fraction(rho) / (Fraction(rho) + 4)
        assert f.submodularity_ratio() == pytest.approx(rho / (4 + rho), rel=1e-5)


def test_how_small_a_ratio_is_cited():
    for apart, known in [(2.0**-34, False), (2.0**-31, True)]:
        f = CoupledQuadratic([1.0, 1.0], [[1.0, 1 - apart], [1 - apart, 1.0]])
        assert (f.submodularity_ratio() > 0) == known
        assert len(f.floors) == 1
        least = max(f.submodularity_ratio(), DEPENDENT)
        assert f.rounding(2, 3.0) == pytest.approx(2 * 10 * 2.0**-53 / least * 3)
