"""Log-determinants."""

import math

import numpy as np
import pytest

from lorambo_alloc.submodular import Cardinality, LogDet, bound_check, select

TILTED = [[3.0, 1.0], [1.0, 2.0]]


def test_values():
    f = LogDet(TILTED, 0.5)
    assert f.kind == "submodular"
    assert f.value([]) == 0
    assert f.value([0]) == pytest.approx(0.5 * math.log(7), rel=1e-15)
    assert f.value([1, 0]) == pytest.approx(0.5 * math.log(7 * 5 - 4), rel=1e-15)
    assert f.start().gains() == pytest.approx([0.5 * math.log(7), 0.5 * math.log(5)], rel=1e-15)
    assert f.layers is None


def test_a_copy_of_a_candidate_says_little_more():
    f = LogDet(np.ones((2, 2)), 1.0)
    state = f.start()
    state.add(0)
    assert state.gains()[1] == pytest.approx(0.5 * math.log(1.5), rel=1e-14)


def test_a_copy_of_a_candidate_counts_however_small_the_noise():
    f = LogDet(np.full((3, 3), 2.0**32), 1.0)
    state = f.start()
    state.add(0)
    assert state.gains()[1:] == pytest.approx([0.5 * math.log(2)] * 2, abs=1e-5)
    selection = select(f, constraint=Cardinality(3))
    assert len(selection) == 3
    assert selection.value == pytest.approx(0.5 * math.log(1 + 3 * 2.0**32), abs=1e-5)
    assert 0 <= selection.upper_bound - selection.value < 1e-3


def test_candidates_nearly_alike_keep_the_guarantee():
    """Each adds 0.9 to the first's 11; left out, 20 of them would be more than half of it all."""
    n, share = 20, 2.0**-30
    f = LogDet(2.0**32 * ((1 - share) * np.ones((n, n)) + share * np.eye(n)), 1.0)
    selection = select(f, budget=n)
    assert selection.value == pytest.approx(f.value(range(n)), abs=1e-4)
    assert bound_check(f, Cardinality(n), selection).holds


def test_a_pivot_below_1_is_rounding():
    f = LogDet([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]], 1e-9)
    state = f.start()
    state.add(0)
    assert 0 <= state.gains()[1] < 0.5 * math.log(2)


def test_of_a_set_too_large_for_its_rounding_a_prefix_is_bounded():
    """|E| is at most 2 k (k + 8) u (1 + C / rho); the proof needs it to be 1/2 or less."""
    n, ratio = 1600, 2.0**32
    f = LogDet(ratio * np.eye(n), 1.0)
    largest = max(k for k in range(1, n) if 2 * k * (k + 8) * 2.0**-53 * (ratio + 1) <= 0.5)
    assert 700 < largest < 800
    for size, kept in [(largest - 1, largest - 1), (largest, largest // 2), (n, n // 4)]:
        ((base, weights),) = f.ceilings(range(size), Cardinality(n))
        assert (weights == 0).sum() == kept
        assert base >= kept * 0.5 * math.log1p(ratio)


def test_what_rounding_may_do():
    f = LogDet(np.eye(3), 0.5)
    assert f.rounding(2, 9.0) == pytest.approx(2 * 2 * 10 * 2.0**-53 * 2 * 3)
    assert f.rounding(0, 1.0) == 0


@pytest.mark.parametrize("rho", [0, -1.0, math.nan, math.inf, None])
def test_rho(rho):
    with pytest.raises(ValueError, match=r"^rho: expected a finite number > 0, got "):
        LogDet(TILTED, rho)


@pytest.mark.parametrize("rho", [5e-320, 2.9 * 2.0**-32, 3.1 * 2.0**40])
def test_a_noise_of_another_world(rho):
    with pytest.raises(ValueError, match=r"^rho: expected max C_jj / rho from 2\^-40 to 2"):
        LogDet(TILTED, rho)


def test_how_large_a_noise_may_be():
    f = LogDet(TILTED, 3 * 2.0**40)
    assert f.value([0]) == pytest.approx(2.0**-41, rel=1e-3)
    assert LogDet(TILTED, 3 * 2.0**-32).rho == 3 * 2.0**-32


def test_a_determinant_below_0_is_an_error():
    f = LogDet([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]], 0.1)
    message = r"^C: expected a positive semidefinite matrix"
    with pytest.raises(ValueError, match=message):
        f.value([0, 1, 2])
    with pytest.raises(ValueError, match=message):
        f.ceilings([0, 1, 2], Cardinality(1))
    state = f.start()
    state.add(0)
    with pytest.raises(ValueError, match=message):
        state.add(1)


def test_a_zero_matrix_holds_no_information():
    f = LogDet(np.zeros((2, 2)), 1.0)
    assert f.value([0, 1]) == 0
    selection = select(f, budget=2)
    assert (selection.items, selection.upper_bound, selection.ratio) == ((), 0, 1)


def test_layers():
    f = LogDet(np.eye(3), 1.0, layers=["q", "v", "q"])
    assert f.layers == ("q", "v", "q")
    with pytest.raises(ValueError, match=r"^layers: expected one name for each of 3 candidates, g"):
        LogDet(np.eye(3), 1.0, layers=["q"])
    for given in ("qv", {0: "q", 1: "v"}):
        with pytest.raises(ValueError, match=r"^layers: expected one name a candidate, in their o"):
            LogDet(np.eye(2), 1.0, layers=given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^layers: expected strings, got 1$"):
        LogDet(np.eye(2), 1.0, layers=["q", 1])  # pyright: ignore[reportArgumentType]
