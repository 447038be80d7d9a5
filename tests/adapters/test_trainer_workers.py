"""Two processes whose ranks move together; and what becomes of one if the other does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("trainer_worker.py")


def run(folder, *modes):
    """Both processes' exit statuses; nobody ends one because the other has ended."""
    for mode in modes:
        (folder / mode).mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    shared = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *modes],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [process.returncode for process in started], errors


def result(folder, worker):
    return json.loads((folder / f"{worker}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both workers found, by mode, where neither ends before its time."""
    folder, modes = tmp_path_factory.mktemp("workers"), ("ddp", "fsdp", "probe", "batches")
    codes, errors = run(folder, *modes)
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
    codes, _ = run(tmp_path, "move")
    assert codes == [3, 3]
    one, other = (result(tmp_path / "move", worker) for worker in range(2))
    assert one["error"][0] == "WorkerLost"
    assert other["error"][0] == "ZeroDivisionError"
    check_files(tmp_path / "move", one)


def test_a_worker_killed_in_the_middle_of_a_move_ends_the_other_with_a_clear_error(tmp_path):
    codes, _ = run(tmp_path, "kill")
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
