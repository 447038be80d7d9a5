"""Log-determinants."""

import math

import numpy as np
import pytest

from lorambo_alloc.submodular import Cardinality, LogDet, select

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


def test_a_pivot_at_rounding_level_gains_nothing():
    f = LogDet(np.full((2, 2), 1e12), 1.0)
    state = f.start()
    state.add(0)
    assert state.gains().tolist() == [0, 0]
    state.add(1)
    assert state.items == (0, 1)
    assert select(f, constraint=Cardinality(2)).items == (0,)


@pytest.mark.parametrize("rho", [0, -1.0, math.nan, math.inf, None])
def test_rho(rho):
    with pytest.raises(ValueError, match=r"^rho: expected a finite number > 0, got "):
        LogDet(TILTED, rho)


@pytest.mark.parametrize("rho", [5e-320, 2.0**-900, 3.1 * 2.0**40])
def test_a_noise_of_another_world(rho):
    with pytest.raises(ValueError, match=r"^rho: expected max C_jj / rho from 2\^-40 to 2"):
        LogDet(TILTED, rho)


def test_how_large_a_noise_may_be():
    f = LogDet(TILTED, 3 * 2.0**40)
    assert f.value([0]) == pytest.approx(2.0**-41, rel=1e-3)
    assert LogDet(TILTED, 3 * 2.0**-900).rho == 3 * 2.0**-900


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
    with pytest.raises(ValueError, match=r"^layers: expected strings, got 1$"):
        LogDet(np.eye(2), 1.0, layers=["q", 1])  # pyright: ignore[reportArgumentType]
