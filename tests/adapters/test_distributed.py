"""Runs of several processes on this machine, against those of one."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import Spectra

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from lorambo_adapters.spectra.distributed import (  # noqa: E402
    Workers,
    balanced_shares,
    torchrun_workers,
)
from lorambo_adapters.spectra.partial import PartialResults  # noqa: E402
from lorambo_adapters.spectra.sketcher import GradientSketcher  # noqa: E402

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(WORKER))


@pytest.fixture
def folder(tmp_path, program):
    program["write_checkpoints"](tmp_path)
    return tmp_path


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def torchrun(count, *arguments):
    return subprocess.run(
        [*TORCHRUN, str(count), *arguments],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def own_processes(count, mode, folder):
    """Without torchrun, which ends the others as soon as one fails: exit codes and stderr."""
    port = _free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), mode, str(folder)],
            env=environment(
                RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def _free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize("count", [2, 4])
def test_all_sources_give_what_one_process_gives(folder, program, count):
    run = torchrun(count, str(WORKER), "all_sources", str(folder))
    assert run.returncode == 0, run.stderr
    saved = Spectra.load(folder / "saved.npz")
    alone = program["compute"](folder)
    assert len(alone) > 30
    for worker in range(count):
        found = torch.load(folder / f"found.{worker}", weights_only=True)
        assert list(found) == list(alone)
        for name, expected in alone.items():
            error = float((found[name] - expected).abs().max() / expected.abs().max())
            assert error < 1e-9, name
    assert {n: list(v) for n, v in saved.items()} == {
        name.removeprefix("checkpoint/"): values[:-1].tolist()
        for name, values in alone.items()
        if name.startswith("checkpoint/")
    }
    assert not list(folder.glob("*.partial*"))


def test_a_model_sharded_by_fsdp2(folder):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    run = torchrun(2, str(WORKER), "sharded_model", str(folder))
    assert run.returncode == 0, run.stderr


def test_a_killed_worker_ends_the_run_and_a_rerun_resumes(folder):
    codes, said = own_processes(2, "killed", folder)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1
    assert "WorkerLost: worker 0 of 2: another worker has stopped" in said[0]
    assert sorted(p.name for p in folder.glob("out*")) == ["out.npz.partial", "out.npz.partial.1"]
    # Worker 0 has finished its half; only the other half is left, for three workers this time.
    codes, said = own_processes(3, "resumed", folder)
    assert codes == [0, 0, 0], said
    assert 1 <= len(list(folder.glob("done.*"))) <= 4
    assert sorted(p.name for p in folder.glob("out*")) == ["out.npz"]
    codes, said = own_processes(1, "resumed", folder)
    assert codes == [1]  # nothing to resume any more: all layers anew, and some are marked as done
    assert "FileExistsError" in said[0]


def test_an_error_in_one_worker_ends_the_others(folder):
    codes, said = own_processes(2, "refusing", folder)
    assert codes == [1, 1]
    assert "ValueError: layer 'x': something is wrong with it" in said[1]
    assert "WorkerLost: worker 0 of 2" in said[0]
    assert not (folder / "out.npz").exists()


def test_workers_must_agree(folder):
    codes, said = own_processes(2, "other_options", folder)
    assert codes == [0, 0], said
    for worker in range(2):
        text = (folder / f"said.{worker}").read_text()
        assert text == (
            "expected the same layers and options in all 2 workers, got others than worker 0's in "
            "worker 1"
        )


def test_groups_of_workers_and_one_without_batches(tmp_path):
    codes, said = own_processes(4, "groups", tmp_path)
    assert codes == [0, 0, 0, 0], said


def test_the_command_under_torchrun(folder):
    command = ["-m", "lorambo_adapters", "spectra", "weights", str(folder / "base.safetensors")]
    run = torchrun(2, *command, "-o", str(folder / "two.npz"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("two.npz: Spectra(6 layers") == 1
    alone = subprocess.run(
        [sys.executable, *command, "-o", str(folder / "one.npz")],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    one, two = Spectra.load(folder / "one.npz"), Spectra.load(folder / "two.npz")
    assert list(one) == list(two)
    assert one.source == two.source
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])
    # An error is one line a worker, in torchrun's report besides.
    run = torchrun(2, *command[:-1], str(folder / "nothing"), "-o", str(folder / "no.npz"))
    assert run.returncode != 0
    assert "lorambo: " in run.stderr
    assert "nothing: No such file or directory" in run.stderr


def test_a_worker_killed_under_torchrun(folder):
    """The command's other worker is told to stop by torchrun, and keeps what it has done."""
    slow = (
        "import os, sys, time, signal\n"
        "from lorambo_adapters.spectra import extraction\n"
        "decompose = extraction._decompose\n"
        "def patched(matrix, options):\n"
        "    if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    result = decompose(matrix, options)\n"
        "    open(sys.argv.pop(), 'w').close() if patched.first else time.sleep(60)\n"
        "    patched.first = False\n"
        "    return result\n"
        "patched.first = True\n"
        "extraction._decompose = patched\n"
        "from lorambo_adapters.cli import main\n"
        "sys.exit(main(sys.argv[1:-1]))\n"
    )
    script = folder / "slow.py"
    script.write_text(slow)
    command = ["spectra", "weights", str(folder / "base.safetensors"), "-o", str(folder / "o.npz")]
    start = time.monotonic()
    run = torchrun(2, str(script), *command, str(folder / "begun"))
    assert time.monotonic() - start < 60
    assert run.returncode != 0
    assert "lorambo: this worker was told to stop" in run.stderr
    assert "start it again in the same way to continue" in run.stderr
    assert not (folder / "o.npz").exists()
    assert (folder / "o.npz.partial").exists()


def test_one_process_is_the_only_worker():
    with torchrun_workers() as workers:
        assert (workers.index, workers.count) == (0, 1)
        tensor = torch.ones(3)
        workers.sum([tensor])
        workers.broadcast([tensor])
        workers.barrier()
        workers.agree("anything", "text")
        assert workers.gather(b"message") == [b"message"]
        assert torch.equal(tensor, torch.ones(3))


@given(st.lists(st.floats(0, 1e6), max_size=12), st.integers(1, 5))
def test_shares_are_balanced(costs, parts):
    shares = balanced_shares(costs, parts)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[i] for i in share) for share in shares]
    # Graham's bound, with the best sharing replaced by what it cannot be below.
    if costs:
        least = max(max(costs), sum(costs) / parts)
        assert max(loads) <= (2 - 1 / parts) * least * (1 + 1e-9)
    # Longest first: nothing could move from the largest part to the smallest and balance better.
    for i in shares[loads.index(max(loads))]:
        assert min(loads) + costs[i] >= max(loads) * (1 - 1e-9)


def test_costs_of_a_model_are_shared_evenly():
    costs = [3.0] * 64 + [7.0] * 32 + [1.0] * 64
    loads = [sum(costs[i] for i in share) for share in balanced_shares(costs, 8)]
    assert max(loads) <= 1.02 * sum(costs) / 8


def test_worker_0_removes_what_more_workers_have_left(tmp_path):
    output = tmp_path / "out.npz"
    first, other, third = (PartialResults(output, {"key": 1}, i) for i in range(3))
    other.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz.partial", "out.npz.partial.2"]
    first.remove()
    assert not list(tmp_path.iterdir())
    third.remove()  # is no error where worker 0 was faster


def test_a_failed_start_leaves_no_signal_handler(monkeypatch):
    def refuse(backend):
        raise RuntimeError("no such address")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="no such address"), torchrun_workers():
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_all_workers_take_the_bases_of_worker_0():
    """Other hardware may find other vectors, so the sums of a pass must be of the same ones."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(150, 140)).double()
    x = torch.randn(200, 150).double()
    theirs = torch.linalg.qr(torch.randn(140, 32).double()).Q

    class Second(Workers):
        def broadcast(self, tensors):
            for tensor in tensors:
                tensor.copy_(theirs)

    sketcher = GradientSketcher(model, targets=["0"], rank=16, passes=2)
    for number in (1, 2):
        with sketcher:
            sketcher.begin()
            model(x).square().sum().backward()
        if number == 1:
            sketcher.next_pass(Second.alone())
    gradient = 2 * model(x).detach().T @ x
    expected = torch.linalg.svdvals(theirs.T @ gradient)[:16].numpy()
    np.testing.assert_allclose(sketcher.spectra()["0"], expected, rtol=1e-9)
