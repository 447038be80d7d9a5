import numpy as np
import pytest

from benchmarks.finetune.intervals import crossed_interval, paired_interval


def test_it_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered, trials = 0, 200
    for trial in range(trials):
        seeds = generator.normal(0, 1, (8, 1))
        examples = generator.normal(0, 3, (1, 100))
        both = generator.normal(0, 1, (8, 100))
        found = paired_interval(0.7 + seeds + examples + both, draws=400, seed=trial)
        covered += found.low <= 0.7 <= found.high
    assert 0.85 <= covered / trials <= 0.99


def test_the_noise_of_seeds_is_not_averaged_away_by_many_examples():
    differences = np.repeat([[-1.0], [1.0], [0.0], [0.5]], 5_000, axis=1)
    found = paired_interval(differences, draws=2_000)
    assert found.mean == pytest.approx(0.125)
    assert found.high - found.low > 1


def test_the_noise_of_examples_is_not_averaged_away_by_many_seeds():
    differences = np.repeat([[-1.0, 1.0, 0.0, 0.5]], 500, axis=0)
    found = paired_interval(differences, draws=2_000)
    assert found.high - found.low > 1


def test_pairing_removes_what_is_common():
    generator = np.random.default_rng(1)
    losses = generator.exponential(1.0, (5, 300))
    found = paired_interval((losses - 0.01) - losses)
    assert found.low == pytest.approx(-0.01)
    assert found.high == pytest.approx(-0.01)


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[np.nan]], np.zeros((0, 3))])
def test_what_is_no_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="differences: expected a finite matrix"):
        paired_interval(bad)


@pytest.mark.parametrize("spread", [(1.0, 0.0, 0.1), (0.05, 1.0, 0.5), (0.0, 0.0, 1.0)])
def test_three_seeds_are_enough_for_students_interval(spread):
    of_seeds, of_examples, of_both = spread
    generator = np.random.default_rng(0)
    covered, trials = 0, 400
    for _ in range(trials):
        found = crossed_interval(
            0.7
            + generator.normal(0, of_seeds, (3, 1))
            + generator.normal(0, of_examples, (1, 200))
            + generator.normal(0, of_both, (3, 200))
        )
        assert found is not None
        covered += found.low <= 0.7 <= found.high
    assert 0.91 <= covered / trials <= 0.99


def test_one_seed_has_no_students_interval_and_equal_differences_have_a_point():
    assert crossed_interval([[1.0, 2.0]]) is None
    assert crossed_interval(np.full((2, 3), 0.25)) == (0.25, 0.25, 0.25)
