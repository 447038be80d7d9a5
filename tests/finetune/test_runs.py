import fcntl
import json
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from benchmarks.finetune import runs  # noqa: E402
from benchmarks.finetune.__main__ import main  # noqa: E402
from benchmarks.finetune.protocol import FILE, protocol  # noqa: E402
from benchmarks.finetune.runs import (  # noqa: E402
    Run,
    at_chosen_rates,
    check_protocol,
    execute,
    finished,
    grid,
)

AGREED = protocol("minilm").stamp
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
    with claim.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert execute([RUN], tmp_path) == 0
    assert claim.exists()  # its owner is gone
    assert execute([RUN], tmp_path) == 1
    assert not claim.exists()


def test_what_another_process_has_just_finished_is_not_trained_again(
    tmp_path, trained, monkeypatch
):
    def slow(file, how, lock=fcntl.flock):  # the other finishes between opening and locking
        (tmp_path / RUN.path).with_suffix(".claim").unlink()
        lock(file, how)

    monkeypatch.setattr(runs.fcntl, "flock", slow)
    assert execute([RUN], tmp_path) == 0
    assert not trained


def test_results_of_another_protocol_are_refused():
    check_protocol({RUN: {"protocol": "new"}}, "minilm", "new")
    check_protocol({RUN: {"protocol": "old"}}, "mpnet", "new")
    with pytest.raises(ValueError, match=r"s7\.json: expected a run of the protocol new, .* old;"):
        check_protocol({RUN: {"protocol": "old"}}, "minilm", "new")


def test_a_protocol_that_tests_with_a_dev_seed_is_refused(tmp_path):
    text = FILE.read_text()
    changed = text.replace("\nseeds = [0, ", "\nseeds = [100, ")
    assert changed != text
    (tmp_path / "p.toml").write_text(changed)
    with pytest.raises(ValueError, match=r"\[minilm\]: expected other seeds .* got 100 in both"):
        protocol("minilm", tmp_path / "p.toml")


def test_a_stamp_tells_settings_apart_and_is_that_of_runs_from_before_an_entry(tmp_path):
    text = FILE.read_text()

    def stamp(replaced):
        path = tmp_path / "p.toml"
        path.write_text(text.replace("steps = 300\n", f"steps = 300\n{replaced}"))
        return protocol("minilm", path).stamp

    assert stamp("") == stamp("grouped = 1\n") == AGREED
    assert len({AGREED, stamp("grouped = 2\n"), stamp("grouped = 3\n"), stamp("clip = 2.0\n")}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "test", "--arms", "uniform", "--rates", "1e-3"], "--rates: expected none"),
        (["--stage", "test", "--arms", "uniform", "--seeds", "100"], "--seeds: 100 is not one"),
        (["--stage", "dev", "--arms", "uniform", "--seeds", "0"], "--seeds: 0 is not one"),
        (["--stage", "dev", "--arms", "uniform", "--budgets", "0"], "2"),
        (["--stage", "dev", "--arms", "uniform", "unifrom"], "arm: expected one of"),
        (["--stage", "test", "--arms", "uniform"], "1 is an end of those run on dev"),
    ],
)
def test_what_the_protocol_forbids_is_not_begun(monkeypatch, options, message):
    found = {
        Run("minilm", "uniform", rank, 1.0, seed, "dev"): {"loss": 1.0, "protocol": AGREED}
        for rank in (1, 2, 8)
        for seed in (100, 101)
    }
    monkeypatch.setattr(runs, "finished", lambda: found)
    monkeypatch.setattr(runs, "execute", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(SystemExit, match=message), warnings.catch_warnings():
        main(["run", "minilm", *options])


@pytest.mark.parametrize("stage", ["dev", "test"])
def test_a_report_of_nothing_says_so(monkeypatch, stage):
    monkeypatch.setattr(runs, "finished", dict)
    with pytest.raises(SystemExit, match=f"minilm: expected runs of the stage {stage}, got none"):
        main(["report", "minilm", "--stage", stage])


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
    one = at_chosen_rates("t", ["uniform", "shuffled:ours"], [1], [0], chosen, "uniform")
    assert [run.rate for run in one] == [1e-3, 1e-3]
    with pytest.raises(ValueError, match="'eva': expected dev runs of t at the budget of rank 1"):
        at_chosen_rates("t", ["uniform"], [1], [0], chosen, "eva")
