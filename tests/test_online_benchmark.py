"""The planted problems of the hindsight benchmark, and a short run of it."""

import json

import numpy as np
import pytest

from benchmarks import run_online
from benchmarks.planted_curves import RANKS, SCENARIOS, UNIFORM, Planted, Scenario


@pytest.fixture
def planted() -> Planted:
    return Planted(Scenario("noisy", absolute=0.5), seed=0, rounds=10)


def test_noise_is_the_same_whatever_the_ranks_let_one_see(planted):
    few = planted.observed(3, np.full(24, 1))
    many = planted.observed(3, np.full(24, 9))
    assert [len(curve) for curve in few.values()] == [1 + 1 + 4] * 24
    for name, curve in few.items():
        np.testing.assert_array_equal(curve, many[name][:6])
    assert not np.array_equal(few["layers.0"], planted.observed(4, np.full(24, 1))["layers.0"])


def test_noise_has_no_bias(planted):
    true = planted.gains(0)
    everything = np.full(24, RANKS)
    rounds = [planted.observed(t, everything) for t in range(400)]
    seen = np.mean([[np.diff(curve) for curve in shown.values()] for shown in rounds], axis=0)
    unit = np.median(true[:, UNIFORM - 1])
    errors = np.sqrt((2 * 0.3**2 * true**2 + 0.5**2 * unit**2) / 400)
    assert np.max(np.abs(seen - true) / errors) < 5


def test_what_is_observed_is_as_the_scenario_says():
    third = Planted(Scenario("third", share=1 / 3), 3, 200)
    ranks = np.full(96, 4)
    assert len(third.observed(0, ranks)) == 96
    counts = [len(third.observed(t, ranks)) for t in range(1, 100)]
    assert np.mean(counts) == pytest.approx(32, rel=0.1)
    blind = Planted(Scenario("blind", seen_at_0=False), 0, 10)
    assert [*blind.observed(0, np.arange(24))] == [f"layers.{i}" for i in range(1, 24)]


def test_drift_goes_from_one_order_of_importance_to_another():
    still, drifting = (Planted(Scenario("", drift=drift), 1, 11) for drift in (False, True))
    np.testing.assert_array_equal(still.gains(0), still.gains(10))
    first, middle, last = (drifting.gains(t)[:, 0] for t in (0, 5, 10))
    np.testing.assert_allclose(np.sort(first), np.sort(last))
    assert not np.allclose(first, last)
    np.testing.assert_allclose(middle, np.sqrt(first * last))


def test_value_and_hindsight(planted):
    uniform = np.full(24, UNIFORM)
    assert planted.budget == UNIFORM * planted.costs.sum()
    assert planted.value(0, uniform) == pytest.approx(planted.gains(0)[:, :UNIFORM].sum())
    best = planted.best(2, 10)
    assert best.certificate.status != "gap_certified"
    assert planted.value(0, best.ranks) == pytest.approx(best.value)
    assert best.value > planted.value(0, uniform)


def test_exponent_of_a_known_power():
    root = np.sqrt(np.arange(1, 401, dtype=np.float64))
    regret = np.array([3 * root, 5 * root])
    assert run_online.exponent(regret) == pytest.approx(0.5)
    assert run_online.exponent(regret - 30) is None


def test_failures_are_found():
    scenario = SCENARIOS[0]
    good = {arm: np.linspace(1, 2, 40) for arm in run_online.TO_BEAT}
    own = run_online.meant(scenario)

    def failures(share: float, regret: np.ndarray) -> list[str]:
        runs = [
            {
                own: {"share": share + 0.001 * seed, "regret": regret, "moved": 1.0},
                **{arm: {"share": 0.9, "regret": good[arm], "moved": 0.0} for arm in good},
            }
            for seed in range(3)
        ]
        return run_online.failures_of(scenario, run_online.summary(scenario, runs))

    rounds = np.arange(1, 41)
    assert failures(0.99, rounds**0.5) == []
    assert len(failures(0.99, rounds**1.0)) == 1
    assert "94.0%" in failures(0.94, rounds**0.5)[0]
    assert len(failures(0.89, rounds**0.5)) == 1 + len(run_online.TO_BEAT)


def test_a_short_run_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_online, "SCENARIOS", [SCENARIOS[-1]])
    output = tmp_path / "online.json"
    short = ["--seeds", "1", "--rounds", "4", "--warmup", "1", "--workers", "1", "--no-picture"]
    status = run_online.main([*short, "--max-moves", "2", "--output", str(output)])
    assert status in (0, 1)  # too short to keep its promises
    content = json.loads(output.read_text())
    arms = {row["arm"] for row in content["rows"]}
    assert arms == {
        *run_online.SETTINGS,
        "online, discount 1, at most 2 moves",
        *run_online.RULES,
        run_online.UNIFORM,
        run_online.ORACLE,
    }
    for row in content["rows"]:
        assert 0 < row["share"] < 1.1
        if row["arm"] == "online, discount 1, at most 2 moves":
            assert row["moved_a_round"] <= 2
    assert capsys.readouterr().out.startswith("| scenario")
