"""Coverage and modular functions."""

import numpy as np
import pytest

from lorambo_alloc.submodular import Coverage, Modular


def test_points_are_counted_once():
    f = Coverage([[0, 1, 1], [1, 2], []])
    assert f.kind == "submodular"
    assert f.incremental
    assert f.weights.tolist() == [1, 1, 1]
    assert [f.value(s) for s in ([0], [1], [2], [0, 1], [2, 1, 0])] == [2, 2, 0, 3, 3]
    assert f.start().gains().tolist() == [2, 2, 0]
    assert f.start().gains(np.array([1])).tolist() == [2]


def test_weights_may_be_more_than_the_points():
    f = Coverage([[0], [2]], [0.5, 7, 2, 9])
    assert f.value([0, 1]) == 2.5


def test_sums_are_correctly_rounded():
    assert Coverage([range(10)], [0.1] * 10).value([0]) == 1.0
    assert Modular([2.0**53, 1.0, 1.0]).value([0, 1, 2]) == 2.0**53 + 2


def test_modular():
    f = Modular([3, 0, 2])
    assert f.kind == "modular"
    assert f.value([0, 2]) == 5
    state = f.start()
    state.add(0)
    assert state.gains().tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("sets", "weights", "message"),
    [
        ([[0], [-1]], None, r"^sets: element 1: expected a whole number >= 0, got -1$"),
        ([[0.5]], None, r"^sets: element 0: expected a whole number >= 0, got 0.5$"),
        ([[3]], [1, 1, 1], r"^weights: expected one for each of 4 points, got 3$"),
        (
            [[0, 1]],
            [1e308, 1e308],
            r"^weights: expected a sum of at most 2\^900, got inf; choose o",
        ),
        ([[0, 1]], [2.0**900, 2.0**850], r"^weights: expected a sum of at most 2\^900, got 8"),
        ([[0]], [-1.0], r"^weights: expected numbers >= 0, got -1.0 at 0$"),
    ],
)
def test_what_is_no_coverage(sets, weights, message):
    with pytest.raises(ValueError, match=message):
        Coverage(sets, weights)


def test_a_modular_weight_may_not_be_negative():
    with pytest.raises(ValueError, match=r"^weights: expected numbers >= 0, got -2.0 at 1$"):
        Modular([1, -2])


def test_how_large_weights_may_be():
    assert Modular([2.0**900, 0.0]).value([0]) == 2.0**900


def test_as_text():
    assert repr(Modular([1.0, 2.0])) == "Modular of 2 elements, modular"


def test_an_element_without_a_collection_of_points_is_named():
    with pytest.raises(ValueError, match=r"^sets: element 1: expected a collection of points, got"):
        Coverage([{0}, 2])  # pyright: ignore[reportArgumentType]
