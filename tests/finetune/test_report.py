import base64

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from benchmarks.finetune.report import chosen_rates, dev_table, rows, table
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
