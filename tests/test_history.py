"""The record of a run: entries, their file, and a table."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import storage
from lorambo_alloc.history import RankHistory

COSTS = {"q": 16, "v": 12}


@pytest.fixture
def history() -> RankHistory:
    history = RankHistory(COSTS, {"q": 3, "v": 0})
    history.record(0, {"q": 0, "v": 2}, budget=50, event="start")
    history.record(
        100,
        {"v": 1, "q": 2},
        budget=50,
        price=0.1 + 0.2,
        status="optimal_exact",
        reason="the price of moving is less",
        notes=["v: never observed"],
        estimates={"q": [0.0, 5.0, math.nan, -math.inf], "v": np.array([0.0, 1 / 3])},
        event="moved",
    )
    history.record(100, {"q": 2, "v": 1}, budget=47, event="failed: out of memory ☃")
    return history


def same(a: RankHistory, b: RankHistory) -> None:
    assert a.names == b.names
    assert a.costs == b.costs
    assert a.fixed_costs == b.fixed_costs
    assert a.events == b.events
    for what in ("steps", "ranks", "budgets", "spent", "prices"):
        np.testing.assert_array_equal(getattr(a, what), getattr(b, what), strict=True)
    for ours, theirs in zip(a.estimates, b.estimates, strict=True):
        assert list(ours) == list(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], strict=True)


class TestEntries:
    def test_are_arrays_by_entry(self, history):
        assert len(history) == 3
        assert history.steps.tolist() == [0, 100, 100]
        assert history.ranks.tolist() == [[0, 2], [2, 1], [2, 1]]
        assert history.ranks.dtype == history.steps.dtype == history.spent.dtype == np.int64
        assert history.budgets.tolist() == [50, 50, 47]
        np.testing.assert_array_equal(history.prices, [math.nan, 0.1 + 0.2, math.nan])
        assert history.events[1] == {
            "event": "moved",
            "status": "optimal_exact",
            "reason": "the price of moving is less",
            "notes": ["v: never observed"],
        }

    def test_cost_counts_fixed_costs_of_ranks_above_0_only(self, history):
        assert history.spent.tolist() == [2 * 12, 2 * 16 + 3 + 12, 2 * 16 + 3 + 12]

    def test_estimates_are_copies(self):
        history, curve = RankHistory({"q": 1}), np.array([0.0, 1.0])
        history.record(0, {"q": 1}, budget=1, estimates={"q": curve})
        curve[1] = 7.0
        assert history.estimates[0]["q"].tolist() == [0.0, 1.0]

    def test_of_none(self):
        history = RankHistory(COSTS)
        assert len(history) == 0
        assert history.ranks.shape == (0, 2)
        assert history.spent.dtype == history.budgets.dtype == np.int64
        assert repr(history) == "RankHistory: 0 entries of 2 layers"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"step": 99}, "step: expected at least 100, the last entry's, got 99"),
            ({"step": 100.5}, "step: expected a whole number"),
            ({"ranks": {"q": 1}}, "ranks: layer 'v' is missing"),
            ({"ranks": {"q": 1, "v": 1, "k": 1}}, "ranks: layer 'k' is not among"),
            ({"ranks": {"q": 1, "v": -1}}, "ranks: layer 'v': expected a whole number >= 0"),
            ({"budget": 1 << 62}, "budget: expected a number below 2"),
            ({"budget": -1}, "budget: expected a whole number >= 0"),
            ({"price": math.nan}, "price: expected a finite number or None, got nan"),
            ({"price": "high"}, "price: expected a finite number or None, got 'high'"),
            ({"estimates": {"k": [0.0]}}, "estimates: layer 'k' is not among"),
            ({"estimates": {"v": [[0.0]]}}, "estimates: layer 'v': expected a sequence"),
            ({"estimates": {"v": "text"}}, "estimates: layer 'v': expected a sequence"),
            ({"event": None}, "event: expected text, got None"),
            ({"notes": ["fine", 1]}, "notes: expected text, got 1"),
        ],
    )
    def test_what_is_refused_changes_nothing(self, history, change, message):
        before = history.to_json()
        step = change.pop("step", 101)
        ranks = change.pop("ranks", {"q": 1, "v": 1})
        with pytest.raises(ValueError, match=message):
            history.record(step, ranks, **{"budget": 50, **change})
        assert history.to_json() == before

    def test_ranks_over_the_budget_are_recorded_unless_they_overflow(self):
        history = RankHistory({"q": 1 << 53})
        history.record(0, {"q": 511}, budget=1)
        assert history.spent.tolist() == [511 << 53]
        with pytest.raises(ValueError, match="ranks: their cost: expected a number below 2"):
            history.record(0, {"q": 512}, budget=1)
        assert len(history) == 1

    def test_costs_are_whole_numbers_by_name(self):
        with pytest.raises(ValueError, match="costs: layer 'v': expected a whole number >= 1"):
            RankHistory({"q": 1, "v": 0})
        with pytest.raises(ValueError, match="costs: expected a mapping"):
            RankHistory([1, 2])  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="fixed_costs: layer 'v' is missing"):
            RankHistory(COSTS, {"q": 1})


@st.composite
def histories(draw: st.DrawFn) -> RankHistory:
    names = draw(st.lists(st.text(max_size=5), max_size=4, unique=True))
    history = RankHistory({name: draw(st.integers(1, 1 << 53)) for name in names})
    number = st.floats(allow_nan=True)
    for step in sorted(draw(st.lists(st.integers(0, 9), max_size=4))):
        some = [name for name in names if draw(st.booleans())]
        history.record(
            step,
            {name: draw(st.integers(0, 50)) for name in names},
            budget=draw(st.integers(0, (1 << 62) - 1)),
            price=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
            event=draw(st.text(max_size=9)),
            notes=draw(st.lists(st.text(max_size=9), max_size=2)),
            estimates={name: draw(st.lists(number, max_size=4)) for name in some},
        )
    return history


class TestFile:
    @given(history=histories())
    def test_json_keeps_every_bit(self, history):
        text = json.dumps(history.to_json(), allow_nan=False)
        same(history, RankHistory.from_json(json.loads(text)))

    def test_round_trip_and_going_on(self, history, tmp_path):
        path = tmp_path / "ranks.json"
        history.save(path)
        loaded = RankHistory.load(path)
        same(history, loaded)
        for each in (history, loaded):
            each.record(200, {"q": 0, "v": 0}, budget=47)
        same(history, loaded)

    def test_to_json_is_a_copy(self, history):
        content = history.to_json()
        content["entries"][1]["notes"].append("more")
        content["entries"][1]["ranks"][0] = 9
        assert history.events[1]["notes"] == ["v: never observed"]
        assert history.ranks[1].tolist() == [2, 1]

    def test_a_failing_write_leaves_the_old_file(self, history, tmp_path, monkeypatch):
        path = tmp_path / "ranks.json"
        history.save(path)
        before = path.read_bytes()
        history.record(300, {"q": 0, "v": 0}, budget=47)

        def fail(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(storage.os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            history.save(path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["ranks.json"]

    def test_what_is_no_history_is_refused_by_name(self, history, tmp_path):
        path = tmp_path / "ranks.json"
        with pytest.raises(FileNotFoundError):
            RankHistory.load(path)
        path.write_text('{"kind": "rank history", "ver')
        with pytest.raises(ValueError, match=r"ranks\.json: "):
            RankHistory.load(path)
        path.write_text("[" * 100_000)
        with pytest.raises(ValueError, match=r"ranks\.json: "):
            RankHistory.load(path)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"ranks\.json: "):
            RankHistory.load(path)
        path.write_text("[1, 2]")
        with pytest.raises(ValueError, match=r"ranks\.json: expected a rank history, got 'list'"):
            RankHistory.load(path)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda c: c.update(kind="allocation"), "expected a rank history, got 'allocation'"),
            (lambda c: c.update(version=2), "version 1 or older, got 2: a newer lorambo-alloc"),
            (lambda c: c.update(version=None), "version 1 or older, got None"),
            (lambda c: c.pop("costs"), "damaged: 'costs'"),
            (lambda c: c.update(entries=3), "damaged"),
            (lambda c: c["entries"].append("text"), "damaged"),
            (lambda c: c["entries"][1]["ranks"].pop(), "damaged: entry 1: "),
            (lambda c: c["entries"][1].update(step=-1), "entry 1: step: expected a whole number"),
            (lambda c: c["entries"][1].update(other=1), "entry 1: .*'other'"),
            (lambda c: c["entries"][2].pop("budget"), "entry 2: .*'budget'"),
        ],
    )
    def test_damage_is_told(self, history, damage, message):
        content = history.to_json()
        damage(content)
        with pytest.raises(ValueError, match=message):
            RankHistory.from_json(content)


class TestTable:
    def test_long_ones_show_both_ends(self):
        history = RankHistory({"q": 1000})
        for step in range(30):
            history.record(step, {"q": step // 3}, budget=10_000, event="kept")
        lines = repr(history).splitlines()
        assert lines[0] == "RankHistory: 30 entries of 1 layer"
        assert lines[2].split() == ["0", "kept", "-", "0", "10,000", "-"]
        assert lines[8].split() == ["..."] * 6
        assert lines[-1].split() == ["29", "kept", "0", "9,000", "10,000", "-"]
        assert len(lines) == 15
        assert len({len(line) for line in lines[1:]}) == 1

    def test_a_failure_is_named_without_its_details(self, history):
        lines = repr(history).splitlines()
        assert lines[3].split() == ["100", "moved", "3", "47", "50", "0.3"]
        assert lines[4].split() == ["100", "failed", "0", "47", "47", "-"]
