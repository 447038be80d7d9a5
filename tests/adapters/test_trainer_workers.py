"""Two processes whose ranks move together; and what becomes of one if the other does not."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
from tests.adapters.two_processes import run_two  # noqa: E402

WORKER = Path(__file__).with_name("trainer_worker.py")


def result(folder, worker):
    return json.loads((folder / f"{worker}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both workers found, by mode, where neither ends before its time."""
    folder, modes = tmp_path_factory.mktemp("workers"), ("ddp", "fsdp", "probe", "batches")
    codes, errors = run_two(WORKER, folder, *modes)
    assert codes == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return {mode: [result(folder / mode, worker) for worker in range(2)] for mode in modes}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_workers_hold_the_same_ranks_at_every_step(results, mode):
    one, other = results[mode]
    assert len(one["ranks"]) == 9
    assert all(first == second for first, second in one["ranks"])
    assert one["ranks"] == other["ranks"]
    assert one["losses"] != other["losses"]
    assert one["events"] == other["events"]
    assert one["events"].count("moved") >= 2
    assert one["estimates"] == other["estimates"]
    assert not one["warnings"]
    assert not other["warnings"]


@pytest.mark.parametrize("mode", ["probe", "batches"])
def test_a_probe_that_fails_in_one_worker_fails_in_both(results, mode):
    one, other = results[mode]
    assert all(first == second for first, second in one["ranks"])
    events = ["start", "moved", *["failed"] * 3]
    if mode == "batches":  # which are there at the start, to cut ranks by
        events.insert(1, "failed")
    for found in (one, other):
        assert [event.split(":")[0] for event in found["events"]] == events
        assert "probing has failed" in found["warnings"][0]
    if mode == "batches":
        assert "worker 1: ValueError: batches: expected at least one" in one["warnings"][0]
        assert "worker 1" not in other["warnings"][0]


def test_a_move_that_breaks_off_in_one_worker_ends_both(tmp_path):
    codes, _ = run_two(WORKER, tmp_path, "move")
    assert codes == [3, 3]
    one, other = (result(tmp_path / "move", worker) for worker in range(2))
    assert one["error"][0] == "WorkerLost"
    assert other["error"][0] == "ZeroDivisionError"
    check_files(tmp_path / "move", one)


def test_a_worker_killed_in_the_middle_of_a_move_ends_the_other_with_a_clear_error(tmp_path):
    codes, _ = run_two(WORKER, tmp_path, "kill")
    assert codes == [3, -9]
    survivor = result(tmp_path / "kill", 0)
    kind, text = survivor["error"]
    assert kind == "WorkerLost"
    assert "another worker has stopped" in text
    check_files(tmp_path / "kill", survivor)


def check_files(folder, survivor):
    """Both workers' last states are whole, and of the step before the move."""
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    for worker in range(2):
        state = json.loads((folder / f"state-{worker}.json").read_text())
        assert state["allocator"]["steps"] == len(survivor["ranks"]) == 2
        assert state["allocator"]["ranks"] == survivor["ranks"][-1][worker]
