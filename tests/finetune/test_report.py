import base64

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from benchmarks.finetune.report import (
    chosen_rates,
    dev_table,
    frame,
    learning,
    rows,
    table,
    unsettled,
)
from benchmarks.finetune.runs import Run


def result(losses, **more):
    values = np.asarray(losses, dtype="<f4")
    return {
        "loss": float(values.mean()),
        "accuracy": 0.5,
        "losses": base64.b64encode(values.tobytes()).decode(),
        "parameters": 10,
        "seconds": {"measure": 1.0, "train": 4.0, "online": None, "evaluate": 1.0},
    } | more


def test_the_rate_of_the_lowest_mean_loss_on_dev_is_chosen():
    losses = {(1e-3, 0): 0.5, (1e-3, 1): 0.7, (2e-3, 0): 0.55, (2e-3, 1): 0.55, (4e-3, 0): 0.1}
    results = {
        Run("t", "a", 1, rate, seed, "dev"): result([loss]) for (rate, seed), loss in losses.items()
    }
    results[Run("t", "a", 1, 9.0, 0, "test")] = result([0.0])
    assert chosen_rates(results) == {("t", "a", 1): 2e-3}  # 4e-3 has not all the seeds
    assert "0.5500 0.5500" in dev_table(results, "t")


def test_differences_are_paired_by_seed_and_example():
    generator = np.random.default_rng(0)
    results = {}
    for seed in range(4):
        base = generator.exponential(1.0, 200)
        results[Run("t", "uniform", 1, 1e-3, seed, "test")] = result(base)
        results[Run("t", "ours", 1, 1e-3, seed, "test")] = result(base - 0.25, accuracy=0.75)
    results[Run("t", "ours", 1, 1e-3, 9, "test")] = result(np.full(200, 99.0))  # without a pair
    ours, uniform = rows(results, "t")
    assert uniform.difference is None
    assert ours.difference == pytest.approx((-0.25, -0.25, -0.25), abs=1e-6)
    assert ours.accuracy_difference == pytest.approx(0.25)
    assert ours.share == pytest.approx(0.2)
    assert ours.measuring == 1.0
    assert "-0.2500 [-0.2500, -0.2500]" in table([ours, uniform])


def test_budgets_are_compared_with_their_own_uniform_ranks():
    results = {
        Run("t", arm, rank, 1e-3, 0, "test"): result(np.full(9, loss))
        for arm, rank, loss in [
            ("uniform", 1, 2.0),
            ("uniform", 2, 1.0),
            ("a", 1, 1.5),
            ("a", 2, 1.5),
        ]
    }
    found = {(row.rank, row.arm): row.difference for row in rows(results, "t")}
    for rank, difference in ((1, -0.5), (2, 0.5)):
        interval = found[rank, "a"]
        assert interval is not None
        assert interval.mean == pytest.approx(difference)


def test_more_parameters_are_set_against_the_least_uniform_rank():
    results = {
        Run("t", arm, rank, 1e-3, seed, "test"): result(np.full(9, loss + seed))
        for arm, rank, loss in [
            ("head", 2, 9.0),
            ("uniform", 8, 1.5),
            ("uniform", 2, 2.0),
            ("full", 2, 1.0),
            ("a", 2, 7.0),
        ]
        for seed in (0, 1)
    }
    differences = {
        (row.arm, row.rank): row.difference and row.difference.mean for row in frame(results, "t")
    }
    assert differences == {
        ("uniform", 2): None,
        ("uniform", 8): pytest.approx(-0.5),
        ("full", 2): pytest.approx(-1.0),
        ("head", 2): pytest.approx(7.0),
    }
    assert {row.arm for row in rows(results, "t")} == {"a", "uniform"}
    assert frame({}, "t") == []


def test_a_rate_that_diverged_is_not_chosen():
    losses = {1e-3: np.nan, 2e-3: 0.5}
    results = {Run("t", "a", 1, rate, 0, "dev"): result([loss]) for rate, loss in losses.items()}
    assert chosen_rates(results) == {("t", "a", 1): 2e-3}


def test_rates_are_compared_with_the_same_seeds():
    results = {
        Run("t", "a", 1, rate, seed, "dev"): result([loss])
        for rate, seed, loss in [(1e-3, 0, 0.5), (1e-3, 1, 0.9), (2e-3, 0, 0.4), (2e-3, 2, 0.1)]
    }
    assert chosen_rates(results) == {}


def test_what_dev_still_wants_is_told():
    losses = {1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.6}
    results = {Run("t", "a", 1, rate, 7, "dev"): result([loss]) for rate, loss in losses.items()}
    assert unsettled(results, "t", ["a"], [1], [7]) == []
    (missing,) = unsettled(results, "t", ["shuffled:a"], [1], [7, 8])
    assert missing == "a at the budget of rank 1: expected a dev run with seed 8, got none"
    del results[Run("t", "a", 1, 4e-3, 7, "dev")]
    (end,) = unsettled(results, "t", ["a"], [1], [7])
    assert end.endswith("the chosen rate 0.002 is an end of those run on dev")


def test_the_next_rate_is_settled_by_the_seeds_that_it_has():
    chosen = {Run("t", "a", 1, 2e-3, seed, "dev"): result([0.4 + seed / 10]) for seed in (0, 1)}
    lower = {Run("t", "a", 1, 1e-3, 1, "dev"): result([0.6])}
    for loss, settled in ((0.45, True), (0.35, False), (np.nan, True)):
        higher = {Run("t", "a", 1, 4e-3, 0, "dev"): result([loss])}
        found = unsettled(chosen | lower | higher, "t", ["a"], [1], [0, 1])
        assert (found == []) == settled


def test_an_arm_that_was_tested_at_two_rates_is_refused():
    results = {
        Run("t", "a", 1, rate, seed, "test"): result([0.5, 0.6])
        for rate, seed in [(1e-3, 0), (2e-3, 1)]
    }
    with pytest.raises(ValueError, match=r"expected test runs at one rate, got 0\.001 and 0\.002"):
        rows(results, "t")


def test_arms_are_compared_at_their_own_rates_or_at_one() -> None:
    loss = {("uniform", 1e-3): 2.0, ("a", 1e-3): 3.0, ("a", 2e-3): 1.0, ("inverted:a", 2e-3): 4.0}
    results = {
        Run("t", arm, 1, rate, 0, "test"): result(np.full(9, value))
        for (arm, rate), value in loss.items()
    }
    for (arm, rate), value in {("uniform", 1e-3): 0.2, ("a", 1e-3): 0.2, ("a", 2e-3): 0.1}.items():
        results[Run("t", arm, 1, rate, 0, "dev")] = result([value])
    assert [(row.arm, row.loss) for row in rows(results, "t")] == [
        ("a", 1.0), ("inverted:a", 4.0), ("uniform", 2.0),
    ]  # fmt: skip
    assert [(row.arm, row.loss) for row in rows(results, "t", one_rate="uniform")] == [
        ("a", 3.0), ("uniform", 2.0),
    ]  # fmt: skip


def test_learning_is_compared_tenth_by_tenth_with_the_same_seed_at_one_rate() -> None:
    curve = np.linspace(0.7, 0.4, 10)
    results = {}
    for seed, shift in enumerate((0.1, 0.2, 0.3)):
        for arm, rate, losses in (
            ("uniform", 1e-3, curve + seed),
            ("a", 1e-3, curve + seed - shift),
            ("a", 2e-3, curve),
        ):
            run = Run("t", arm, 1, rate, seed, "test")
            results[run] = result([1.0], train_losses=list(losses))
    results[Run("t", "b", 1, 1e-3, 0, "test")] = result([1.0], train_losses=list(curve))
    for arm, rate, loss in (("uniform", 1e-3, 0.2), ("a", 1e-3, 0.2), ("a", 2e-3, 0.1)):
        results[Run("t", arm, 1, rate, 0, "dev")] = result([loss])
    found = learning(results, "t")
    assert list(found) == ["a"]  # one seed of b tells nothing of others
    assert len(found["a"]) == 10
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of two degrees of freedom, 97.5 %
    for interval in found["a"]:
        assert interval == pytest.approx((-0.2, -0.2 - half, -0.2 + half), abs=1e-6)


def test_a_row_says_how_many_seeds_its_difference_is_of():
    results = {
        Run("t", arm, 1, 1e-3, seed, "test"): result(np.arange(4) + seed * (arm == "a"))
        for arm, seeds in (("uniform", 2), ("a", 3))
        for seed in range(seeds)
    }
    ours, _ = rows(results, "t")
    assert (len(ours.seeds), ours.paired) == (3, 2)
    assert ours.crossed is not None
    assert ours.difference is not None
    assert ours.crossed.low < ours.difference.low
    assert "3 (2)" in table([ours])
