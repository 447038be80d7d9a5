"""Running curves against their definitions, and what is made of missing estimates."""

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, OnlineAllocator, Spectra
from lorambo_alloc.online.running_curves import RunningCurve


@given(
    st.sampled_from([1.0, 0.9, 0.5]),
    st.lists(st.lists(st.floats(-9, 9), max_size=4), min_size=1, max_size=8),
)
def test_moments_are_those_of_their_definition(discount, rounds):
    curve = RunningCurve()
    for gains in rounds:
        curve.discount(discount)
        if gains:
            curve.add(np.array(gains))
    for rank in range(len(curve)):
        seen = [
            (discount ** (len(rounds) - 1 - t), row[rank])
            for t, row in enumerate(rounds)
            if len(row) > rank
        ]
        weights, values = (np.array(column) for column in zip(*seen, strict=True))
        mean = weights @ values / weights.sum()
        assert curve.means[rank] == pytest.approx(mean, abs=1e-12)
        spread = weights @ np.square(values - mean)
        freedom = weights.sum() - np.square(weights).sum() / weights.sum()
        if len(seen) > 1 and freedom > 1e-6:
            assert curve.variances()[rank] == pytest.approx(spread / freedom, rel=1e-6, abs=1e-9)
            share = np.square(weights).sum() / weights.sum() ** 2
            error = math.sqrt(spread / freedom * share)
            assert curve.standard_errors()[rank] == pytest.approx(error, rel=1e-6, abs=1e-6)
        elif len(seen) == 1:
            assert math.isnan(curve.variances()[rank])


def test_standard_errors_are_those_of_the_means():
    rng = np.random.default_rng(0)
    means, stated = [], []
    for _ in range(3000):
        curve = RunningCurve()
        for x in rng.normal(2.0, 1.5, size=12):
            curve.discount(0.8)
            curve.add(np.array([x]))
        means.append(curve.means[0])
        stated.append(curve.standard_errors()[0] ** 2)
    assert np.mean(means) == pytest.approx(2.0, abs=0.05)  # a biased one would be near 1.86
    assert np.mean(stated) == pytest.approx(np.var(means), rel=0.1)


def test_the_first_mean_is_what_was_seen():
    online = OnlineAllocator({"a": 1, "b": 1}, 4, discount=0.9)
    online.observe({"a": [0.0, 3.0, 4.0]})
    assert online.means()["a"].tolist() == [0.0, 3.0, 4.0]
    assert list(online.means()) == ["a"]
    assert np.isnan(online.standard_errors()["a"]).all()


def test_all_forms_of_curves_and_any_length():
    online = OnlineAllocator({"a": 1, "b": 1}, 4, discount=1.0)
    online.observe(GainCurves({"a": [0.0, 3.0, 4.0], "b": [0.0, 1.0]}))
    online.observe(Spectra({"a": [3.0], "b": [1.0, 0.5]}))
    online.observe({"b": [0.0]})
    assert online.means()["a"].tolist() == [0.0, 6.0, 7.0]
    assert online.means()["b"].tolist() == [0.0, 1.0, 1.25]
    assert online.rounds == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_what_is_not_finite_is_left_out_and_said(bad):
    online = OnlineAllocator({"a": 1, "b": 1}, 1)
    with pytest.warns(UserWarning, match="layer 'a': expected finite gains") as caught:
        online.observe({"a": [0.0, 1.0, bad], "b": [0.0, 2.0]})
    assert caught[0].filename == __file__
    assert online.rejected == {"a": 1}
    assert list(online.means()) == ["b"]
    proposal = online.propose()
    assert proposal.ranks == {"a": 0, "b": 1}
    assert proposal.notes == ("1 layer ('a') was never observed, and stays as it is",)


def test_where_warnings_are_errors_a_round_is_whole_all_the_same():
    online = OnlineAllocator({"a": 1, "b": 1}, 1)
    with pytest.raises(UserWarning, match="layer 'a'"):
        online.observe({"a": [0.0, math.nan], "b": [0.0, 2.0]})
    assert (online.rounds, online.rejected) == (1, {"a": 1})
    assert list(online.means()) == ["b"]


def test_gains_of_single_ranks_are_taken_as_they_are():
    """From the totals the second gain could not be told any more."""
    online = OnlineAllocator({"a": 1}, 2, ranks={"a": 2})
    online.observe(GainCurves.from_increments({"a": [1e10, -1e-10]}))
    assert online.propose().ranks == {"a": 1}


@pytest.mark.parametrize("rounds", [1, 60, 300, 2000])
def test_what_is_not_observed_any_more_is_not_known_better(rounds):
    online = OnlineAllocator({"a": 1}, 1, discount=0.5, exploration=1.0)
    for gain in (1.0, 2.0, 4.0):
        online.observe({"a": [0.0, gain]})
    error, optimism = online.standard_errors()["a"][0], optimism_of(online)
    for _ in range(rounds):
        online.observe({})
        assert optimism_of(online) >= optimism
        optimism = optimism_of(online)
    assert online.standard_errors()["a"][0] == pytest.approx(error, rel=1e-9)
    assert online.means()["a"][1] == pytest.approx(3.0, rel=1e-12)


def optimism_of(online):
    """What the value of a single rank has on top of its mean."""
    allocation = online.propose().allocation
    assert allocation is not None
    return allocation.value - online.means()["a"][1]


def test_a_layer_that_comes_back_has_no_negative_variance():
    online = OnlineAllocator({"a": 1}, 1, discount=0.5)
    online.observe({"a": [0.0, 6.1]})
    for _ in range(1200):
        online.observe({})
    for _ in range(2):
        online.observe({"a": [0.0, 0.3]})  # 6.1 + (0.3 - 6.1) is below 0.3 in doubles
    assert 0 <= online.standard_errors()["a"][0] < 1e-6


def test_a_spike_costs_no_more_than_the_moves_allowed_and_passes():
    online = OnlineAllocator(
        dict.fromkeys("abcd", 1), 8, ranks=dict.fromkeys("abcd", 2), max_moves=2, discount=0.5
    )
    usual = {name: [0.0, 2.0, 3.0, 3.1, 3.1] for name in "abcd"}
    online.observe(usual)
    online.observe({**usual, "a": [0.0, 1e9, 2e9, 3e9, 4e9]})
    proposal = online.propose()
    assert proposal.ranks["a"] == 3
    online.accept(proposal)
    for _ in range(60):
        online.observe(usual)
    online.accept(online.propose())
    assert online.ranks == dict.fromkeys("abcd", 2)


class Attached:
    """Like a tensor that a gradient is recorded for."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call detach first")


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([1.0], "expected a mapping"),
        ({"x": [0.0, 1.0]}, "layer 'x' is not among the layers"),
        ({"a": [1.0, 2.0]}, r"layer 'a': expected a curve that starts with F\(0\) = 0, got 1.0"),
        ({"a": [[0.0, 1.0]]}, "layer 'a': expected a 1-D gain curve"),
        ({"a": []}, "layer 'a': expected a non-empty gain curve"),
        ({"a": "curve"}, "layer 'a': expected a 1-D gain curve"),
        ({"a": ["0", "1"]}, "layer 'a': expected a 1-D gain curve of real numbers"),
        ({"a": [0, 1j]}, "layer 'a': expected a 1-D gain curve of real numbers, got dtype complex"),
        ({"a": [0, None]}, "layer 'a': expected a 1-D gain curve of real numbers"),
        (
            {"a": Attached()},
            "layer 'a': expected a 1-D gain curve, got Attached: call detach first",
        ),
    ],
)
def test_curves_of_another_form_are_refused_and_change_nothing(curves, message):
    online = OnlineAllocator({"a": 1, "b": 1}, 1)
    online.observe({"a": [0.0, 1.0]})
    before = json.dumps(online.state_dict())
    with pytest.raises(ValueError, match=message):
        online.observe(curves)
    assert json.dumps(online.state_dict()) == before


def test_layers_never_observed_keep_their_rank():
    online = OnlineAllocator({"a": 2, "b": 3, "c": 2}, 20, ranks={"a": 2, "b": 3, "c": 1})
    assert online.propose().reason == "no layer has been observed yet"
    online.observe({"a": [0.0, 9.0, 17.0, 24.0, 30.0, 35.0, 39.0]})
    proposal = online.propose()
    assert proposal.ranks == {"a": 4, "b": 3, "c": 1}
    assert proposal.notes == ("2 layers ('b', 'c') were never observed, and each stays as it is",)


def test_over_budget_without_estimates_ranks_become_equal():
    online = OnlineAllocator(
        {"a": 2, "b": 3, "c": 5}, 2 * (2 + 3 + 5), ranks={"a": 6, "b": 4, "c": 3}, warmup=100
    )
    assert online.due
    proposal = online.propose()
    assert proposal.ranks == {"a": 2, "b": 2, "c": 2}
    assert proposal.notes[0] == "the present ranks cost 39, more than the budget 20"
    assert "valued by a stand-in" in proposal.notes[1]
    online.accept(proposal)
    assert not online.due
    assert online.propose().reason == "warming up until step 100"


def test_over_budget_an_unknown_layer_never_grows():
    online = OnlineAllocator({"a": 1, "b": 1}, 6, ranks={"a": 7, "b": 1})
    online.observe({"a": [0.0, *np.cumsum(2.0 ** -np.arange(8.0))]})
    ranks = online.propose().ranks
    assert ranks["b"] <= 1
    assert sum(ranks.values()) <= 6


def test_ranks_beyond_the_observations_are_valued_as_the_last_one():
    online = OnlineAllocator({"a": 1, "b": 1}, 6, ranks={"a": 4, "b": 2})
    online.observe({"a": [0.0, 5.0, 9.0], "b": [0.0, 3.5, 6.5, 9.0]})
    # Ranks 3 and 4 of a are worth 4.0, like rank 2; of b the third is worth 2.5.
    assert online.propose().ranks == {"a": 4, "b": 2}
    online = OnlineAllocator({"a": 1, "b": 1}, 9, ranks={"a": 1, "b": 2})
    online.observe({"a": [0.0, 5.0, 9.0], "b": [0.0, 3.5, 6.5, 9.0]})
    assert online.propose().ranks == {"a": 2, "b": 3}  # and not beyond what was seen


def test_a_forgotten_layer_is_tried_again_with_exploration_only():
    """A layer with rank 0, of which nothing is seen any more, was just unlucky at first."""
    taken = {}
    for exploration in (0.0, 1.0):
        online = OnlineAllocator(
            {"a": 1, "b": 1}, 2, ranks={"a": 1, "b": 1}, discount=0.9, exploration=exploration
        )
        rng = np.random.default_rng(0)
        online.observe({"a": [0.0, 1.0, 1.9], "b": [0.0, 0.2, 0.3]})
        online.observe({"a": [0.0, 1.0, 1.8], "b": [0.0, 0.5, 0.6]})
        seen = 0
        for _ in range(60):
            online.accept(online.propose())
            curves: dict[str, Any] = {"a": [0.0, 1.0, 1.9] + 0.05 * rng.normal(size=3) * [0, 1, 1]}
            if online.ranks["b"]:
                seen += 1
                curves["b"] = [0.0, 1.5, 1.6]
            online.observe(curves)
        taken[exploration] = seen
    assert taken[0.0] == 0
    assert taken[1.0] > 20


def test_with_exploration_a_layer_never_observed_gets_one_rank():
    online = OnlineAllocator({"a": 1, "b": 4}, 8, ranks={"a": 5}, exploration=0.1)
    online.observe({"a": [0.0, *np.cumsum(np.linspace(3, 1, 8))]})
    proposal = online.propose()
    assert proposal.ranks == {"a": 4, "b": 1}
    assert "valued like the best layer" in proposal.notes[0]


def test_a_negative_gain_is_left_where_no_limit_forces_it():
    online = OnlineAllocator({"a": 1, "b": 1}, 6, ranks={"a": 3, "b": 3}, min_rank={"b": 1})
    online.observe({"a": [0.0, 1.0, 0.5, 0.2], "b": [0.0, -1.0, -2.0, -3.0]})
    assert online.propose().ranks == {"a": 1, "b": 1}


def test_nothing_is_warned_of_in_a_usual_round():
    online = OnlineAllocator({"a": 1}, 1, exploration=1.0, switching_share=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2000):
            online.observe({})  # the weights of "a" vanish
        online.observe({"a": [0.0, 0.0]})
        online.propose()


def test_optimism_is_that_of_its_formula():
    online = OnlineAllocator({"a": 1, "b": 1}, 2, discount=0.5, exploration=2.0)
    online.observe({"a": [0.0, 4.0], "b": [0.0, 3.0]})
    online.observe({"a": [0.0, 6.0]})
    online.observe({})
    total = 1 + 0.5 + 0.25
    # "a" was seen with weights 1/4 and 1/2: mean 16/3, variance 2; "b" once, weight 1/4: sigma 3.
    a = 16 / 3 + 2 * math.sqrt(2.0 * math.log1p(total) / 0.75)
    b = 3.0 + 2 * 3.0 * math.sqrt(math.log1p(total) / 0.25)
    allocation = online.propose().allocation
    assert allocation is not None
    assert allocation.value == pytest.approx(a + b, rel=1e-12)
