import json
import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from benchmarks.finetune import runs  # noqa: E402
from benchmarks.finetune.runs import Run, at_chosen_rates, execute, finished, grid  # noqa: E402

RUN = Run("minilm", "shuffled:gradient", 1, 1e-3, 7, "dev")


@pytest.fixture
def trained(monkeypatch):
    """Training is replaced by a note of what was trained."""
    seen: list[Run] = []

    def pretend(run, folder):
        seen.append(run)
        return {"loss": float(run.seed), "accuracy": None, "seconds": {}}

    monkeypatch.setattr(runs, "_train", pretend)
    return seen


def test_what_is_there_is_not_trained_again(tmp_path, trained):
    wanted = grid("minilm", ["uniform", "gradient"], [1, 2], [1e-3], [0, 1], "test")
    assert len(wanted) == len(set(wanted)) == 8
    assert execute(wanted[:3], tmp_path) == 3
    assert execute(wanted, tmp_path) == 5
    assert sorted(trained) == sorted(wanted)
    found = finished(tmp_path)
    assert set(found) == set(wanted)
    assert {run.seed for run in found if found[run]["loss"] == 1.0} == {1}


def test_a_run_that_another_process_works_on_is_passed_over(tmp_path, trained):
    claim = (tmp_path / RUN.path).with_suffix(".claim")
    claim.parent.mkdir(parents=True)
    claim.write_text(str(os.getppid()))
    assert execute([RUN], tmp_path) == 0
    claim.write_text("4194305")  # no process has this number
    assert execute([RUN], tmp_path) == 1
    assert not claim.exists()


def test_a_run_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(run, folder):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runs, "_train", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        execute([RUN], tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_no_run_is_begun_after_the_time(tmp_path, trained):
    assert execute([RUN], tmp_path, until=0.0) == 0
    assert not trained


def test_a_result_names_its_run_and_the_machine(tmp_path, trained):
    execute([RUN], tmp_path)
    content = json.loads((tmp_path / RUN.path).read_text())
    assert Run(**content["run"]) == RUN
    assert content["machine"]["threads"] == 1
    assert ":" not in RUN.path


def test_test_runs_have_the_rates_that_dev_chose():
    chosen = {("t", "uniform", 1): 1e-3, ("t", "ours", 1): 4e-3}
    found = at_chosen_rates("t", ["uniform", "shuffled:ours"], [1], [0, 1], chosen)
    assert {(run.arm, run.rate) for run in found} == {("uniform", 1e-3), ("shuffled:ours", 4e-3)}
    assert {run.split for run in found} == {"test"}
    with pytest.raises(ValueError, match="'ours': expected dev runs of t at the budget of rank 2"):
        at_chosen_rates("t", ["ours"], [2], [0], chosen)
