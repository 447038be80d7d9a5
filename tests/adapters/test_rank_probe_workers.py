"""A probe in two processes gives what it gives in one, or the same error in both."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402
from lorambo_adapters.training.probe import RankProbe  # noqa: E402
from tests.adapters.two_processes import run_two  # noqa: E402

WORKER = Path(__file__).with_name("rank_probe_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    modes = ("same", "ddp", "fsdp", "true", "fault", "memory", "few")
    codes, errors = run_two(WORKER, folder, *modes)
    assert codes == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return {
        mode: [json.loads((folder / mode / f"{i}.json").read_text()) for i in range(2)]
        for mode in modes
    }


@pytest.fixture(scope="module")
def alone():
    program = runpy.run_path(str(WORKER))
    before = torch.get_num_threads()
    model, batches = program["make"]()
    found = RankProbe(model, loss_fn=program["squares"], ahead=3).measure(batches)
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("mode", ["same", "ddp", "fsdp"])
def test_all_workers_have_the_curves_of_one_process(results, alone, mode):
    one, other = results[mode]
    assert one == other  # to the bit
    assert one["as it was"]
    for name, curve in alone.curves.items():
        np.testing.assert_allclose(one[name], curve, rtol=1e-8, atol=1e-12)
    for name, (u, _) in alone.directions.items():
        found = torch.tensor(one[f"{name}: directions"][0], dtype=u.dtype)
        torch.testing.assert_close((found.T @ u).abs(), torch.eye(3).to(u), rtol=0, atol=1e-7)


def test_parameters_that_a_backward_pass_frees_are_gathered_for_the_next_one(results):
    program = runpy.run_path(str(WORKER))
    before = torch.get_num_threads()
    model, batches = program["make_own"]()
    wanted = RankProbe(model, fisher=TrueFisher(draws="all"), ahead=3).measure(batches)
    torch.set_num_threads(before)
    one, other = results["true"]
    assert one == other
    assert "error" not in one, one
    assert one["as it was"]
    for name, curve in wanted.curves.items():
        # The model's loss is in float32.
        np.testing.assert_allclose(one[name], curve, rtol=1e-4, atol=1e-6 * abs(curve).max())


@pytest.mark.parametrize(
    ("mode", "kind", "cause"),
    [
        ("fault", "ProbeFailed", "RuntimeError"),
        ("memory", "ProbeFailed", "MemoryError"),
        ("few", "ValueError", "NoneType"),
    ],
)
def test_if_one_worker_fails_all_are_told(results, mode, kind, cause):
    one, other = results[mode]
    assert one["error"] == "ProbeFailed"
    assert one["cause"] == "NoneType"
    assert "1 of 2 workers failed" in one["text"]
    assert other["error"] == kind
    assert other["cause"] == cause
    assert one["as it was"]
    assert other["as it was"]


def test_a_worker_that_ends_is_told_as_lost(tmp_path):
    codes, errors = run_two(WORKER, tmp_path, "lost")
    assert codes == [0, 3], errors[0][-3000:]
    assert json.loads((tmp_path / "lost" / "0.json").read_text())["error"] == "WorkerLost"
