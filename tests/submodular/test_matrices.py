"""Checks of symmetric matrices, and the factor that grows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc.submodular.matrices import (
    DEPENDENT,
    GrowingFactor,
    bounded_below,
    least_eigenvalue,
    principal,
    symmetric,
)
from tests.strategies import seeds
from tests.submodular import drawn


def test_a_symmetric_matrix_is_not_copied():
    matrix = np.array([[2.0, 1.0], [1.0, 2.0]])
    assert symmetric(matrix, "C") is matrix
    assert symmetric([[1]], "C").tolist() == [[1.0]]
    assert symmetric(np.zeros((0, 0)), "C").shape == (0, 0)


def test_a_nearly_symmetric_matrix_is_averaged():
    matrix = np.array([[2.0, 1.0], [1.0 + 1e-10, 2.0]])
    averaged = symmetric(matrix, "C")
    assert averaged[0, 1] == averaged[1, 0] == (1.0 + (1.0 + 1e-10)) / 2
    assert matrix[0, 1] == 1.0


def with_entry(n: int, i: int, j: int, value: float) -> np.ndarray:
    matrix = np.eye(n)
    matrix[i, j] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((2, 3)), r"^C: expected a square matrix, got shape \(2, 3\)$"),
        ([1.0], r"^C: expected 2 dimensions, got shape \(1,\)$"),
        ([[-1.0]], r"^C: expected a positive semidefinite matrix, got .*-1.0.* at \[0, 0\]$"),
        (
            [[1.0, 0.5], [0.4, 1.0]],
            r"^C: expected a symmetric matrix, got 0.5 at \[0, 1\] and 0.4 at \[1, 0\]$",
        ),
        (
            [[1.0, 2.0], [2.0, 1.0]],
            r"^C: .* but 2.0 at \[0, 1\] is above sqrt\(C_ii C_jj\) = 1.0$",
        ),
        # Beyond the first block of rows.
        (
            with_entry(300, 290, 270, 0.5),
            r"^C: .*, got 0.0 at \[270, 290\] and 0.5 at \[290, 270\]$",
        ),
        (
            with_entry(300, 290, 270, 3.0) + with_entry(300, 270, 290, 3.0) - np.eye(300),
            r"^C: .* but 3.0 at \[270, 290\] is above",
        ),
    ],
)
def test_what_is_not_positive_semidefinite(matrix, message):
    with pytest.raises(ValueError, match=message):
        symmetric(matrix, "C")


def test_rounding_above_the_minors_is_allowed():
    matrix = np.array([[1.0, 1.0 + 2e-16], [1.0 + 2e-16, 1.0]])
    assert symmetric(matrix, "C") is matrix


@given(seeds())
def test_the_least_eigenvalue_is_a_lower_bound(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    eigenvalues = 2.0 ** rng.integers(-6, 7, n)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    matrix = (basis * eigenvalues) @ basis.T
    bound = least_eigenvalue((matrix + matrix.T) / 2)
    assert 0.999 * eigenvalues.min() - 1e-11 <= bound < eigenvalues.min()


def test_no_least_eigenvalue_above_0():
    assert least_eigenvalue(np.ones((2, 2))) == 0.0
    assert least_eigenvalue(np.diag([1.0, -1.0])) == 0.0
    assert least_eigenvalue(np.zeros((0, 0))) == 0.0
    assert least_eigenvalue(np.diag([1.0, 2.0**-60])) == 0.0


@pytest.mark.parametrize(("estimate", "believed"), [(0.5, True), (1.0, True), (1.01, False)])
def test_an_estimate_is_believed_only_if_a_factor_proves_it(monkeypatch, estimate, believed):
    monkeypatch.setattr("scipy.linalg.eigvalsh", lambda *_, **__: np.array([estimate]))
    bound = least_eigenvalue(np.diag([1.0, 2.0]))
    assert bound == (pytest.approx(estimate, rel=1e-5) if believed else 0.0)
    assert bound <= 1


@given(st.data())
def test_the_factor_is_that_of_the_principal_block(data):
    n = data.draw(st.integers(1, 6))
    matrix = drawn.gram(data.draw, n)
    order = data.draw(st.permutations(range(n)))
    factor = GrowingFactor(matrix, 0.5, 1.0, "C")
    full = 0.5 * matrix + np.eye(n)
    assert factor.diagonal.tolist() == factor.pivots.tolist() == full.diagonal().tolist()
    for size, element in enumerate(order, start=1):
        pivot = factor.pivots[element]
        assert factor.add(element)[1] == np.sqrt(pivot)
        assert factor.rows.shape == (size, n)
        chosen = list(order[:size])
        assert factor.items == chosen
        lower = factor.rows[:, chosen].T
        assert lower @ lower.T == pytest.approx(full[np.ix_(chosen, chosen)], abs=1e-9)
        left = full.diagonal() - (factor.rows**2).sum(axis=0)
        assert factor.pivots == pytest.approx(left, abs=1e-9)
        assert (factor.pivots[chosen] == 0).all()


def test_what_depends_on_the_chosen_adds_nothing():
    factor = GrowingFactor(np.ones((3, 3)), 1.0, 0.0, "C")
    factor.add(1)
    row, root = factor.add(0)
    assert row.tolist() == [0, 0, 0]
    assert root == np.inf
    assert factor.items == [1, 0]
    assert factor.pivots.tolist() == [0, 0, 0]


def test_how_small_a_pivot_may_be():
    for pivot, dependent in [(DEPENDENT, True), (2 * DEPENDENT, False)]:
        factor = GrowingFactor(np.array([[1.0]]), 1.0, 0.0, "C")
        factor.pivots[0] = pivot
        assert (factor.add(0)[1] == np.inf) == dependent


def test_a_copy_grows_on_its_own():
    factor = GrowingFactor(np.diag([1.0, 4.0, 9.0, 16.0, 25.0, 36.0]), 1.0, 0.0, "C")
    factor.add(0)
    other = factor.copy()
    other.add(1)
    factor.add(2)
    assert (factor.items, other.items) == ([0, 2], [0, 1])
    assert factor.rows[1].tolist() == [0, 0, 3, 0, 0, 0]
    assert other.rows[1].tolist() == [0, 2, 0, 0, 0, 0]
    assert other.pivots.tolist() == [0, 0, 9, 16, 25, 36]


def test_a_failed_pivot_names_the_entry():
    matrix = np.array([[1.0, 0.8, 0.8], [0.8, 1.0, 0.0], [0.8, 0.0, 1.0]])
    assert symmetric(matrix, "C") is matrix  # its 2 x 2 minors are fine
    factor = GrowingFactor(matrix, 1.0, 0.0, "C")
    factor.add(0)
    message = (
        r"^C: expected a positive semidefinite matrix, but eliminating \[0, 1\] leaves "
        r"-0\.77\d* at \[2, 2\]$"
    )
    with pytest.raises(ValueError, match=message):  # 0.36 - 0.64^2 / 0.36
        factor.add(1)


def test_a_shift_does_not_hide_a_failed_pivot():
    # 2 C + 2 I is semidefinite: only against the shift does its pivot show that C is not.
    factor = GrowingFactor(np.array([[1.0, 2.0], [2.0, 1.0]]), 2.0, 2.0, "C")
    with pytest.raises(ValueError, match=r"eliminating \[0\] leaves -1\.0 at \[1, 1\]$"):
        factor.add(0)


def test_principal_blocks():
    matrix = np.array([[1.0, 2.0, 3.0], [2.0, 5.0, 6.0], [3.0, 6.0, 9.0]])
    assert principal(matrix, [2, 0], 2.0, 1.0).tolist() == [[19.0, 6.0], [6.0, 3.0]]
    assert principal(matrix, [], 2.0, 1.0).shape == (0, 0)


@given(seeds())
def test_a_floor_is_proved_only_if_it_is_one(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    eigenvalues = rng.integers(-4, 9, n).astype(float)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    matrix = (basis * eigenvalues) @ basis.T
    matrix = (matrix + matrix.T) / 2
    before = matrix.copy()
    assert bounded_below(matrix, eigenvalues.min() - 1e-12)
    assert not bounded_below(matrix, eigenvalues.min() + 1e-12)
    assert (matrix == before).all()


def test_a_floor_within_rounding_is_not_proved():
    assert not bounded_below(np.ones((2, 2)), 0.0)
    assert not bounded_below(np.ones((2, 2)), -(2.0**-50))
    assert bounded_below(np.ones((2, 2)), -(2.0**-47))
