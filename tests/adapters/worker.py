"""What one worker of tests/adapters/test_distributed.py runs, started by torchrun or by the test.

    python worker.py MODE FOLDER

MODE is a function below. Results go to FOLDER, a file a worker.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lorambo_adapters.spectra import extraction
from lorambo_adapters.spectra.activations import activation_spectra
from lorambo_adapters.spectra.checkpoints import checkpoint_spectra, delta_spectra
from lorambo_adapters.spectra.curvature import curvature_factors
from lorambo_adapters.spectra.directions import coupled_directions
from lorambo_adapters.spectra.distributed import Workers, torchrun_workers
from lorambo_adapters.spectra.gradients import gradient_spectra
from lorambo_adapters.spectra.loss_units import curvature_spectra

BATCHES = 8


class Model(torch.nn.Module):
    """A layer that is sketched, one whose inputs are wide, a small one, and one used at times."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(90, 110)
        self.wide = torch.nn.Linear(110, 1100)
        self.narrow = torch.nn.Linear(1100, 5)
        self.seldom = torch.nn.Linear(5, 5)

    def forward(self, x):
        y = self.narrow(torch.tanh(self.wide(torch.tanh(self.first(x)))))
        return self.seldom(y) if x[0, 0] > 5 else y


def make():
    """The model, its batches and a state that differs from the model's."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Model().double()
    decay = torch.arange(1, 91) ** -0.7
    batches = [(torch.randn(40 + i, 90) * decay).double() for i in range(BATCHES)]
    batches[3][0, 0] = 6.0  # the only one that uses `seldom`
    return model, batches


def losses(model, x):
    return model(x).square().sum(1)


def loss(model, x):
    return losses(model, x).mean()


def compute(folder, workers=None):
    """Every kind of spectra that workers share, by name, as arrays."""
    model, batches = make()
    mine = batches if workers is None else batches[workers.index :: workers.count]
    both: dict[str, Any] = {"targets": ["first", "wide", "narrow", "seldom"]}
    base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
    files = {"rank": 8, "workers": workers, "progress": False}
    data = {**both, "workers": workers}
    factors = curvature_factors(model, mine, losses, kind="ekfac", **data)
    narrow = curvature_factors(model, batches, losses, targets=["first", "narrow"])
    results = {
        "checkpoint": checkpoint_spectra(base, output=folder / "saved.npz", **files),
        "delta": delta_spectra(base, tuned, exact_below=32, **files),
        "gradients": gradient_spectra(model, mine, loss, 8, **data),
        "one pass": gradient_spectra(model, mine, loss, 8, passes=1, **data),
        "activations": activation_spectra(model, mine, 8, **data),
        "curvature": curvature_spectra(model, mine, losses, 8, curvature="diagonal", **data),
    }
    arrays = {
        f"{kind}/{name}": torch.tensor([*values, spectra.unresolved[name]])
        for kind, spectra in results.items()
        for name, values in spectra.items()
    }
    for name, (right, left) in factors.matrices().items():
        arrays |= {f"factors/{name}/right": right, f"factors/{name}/left": left}
    directions = candidates(narrow)
    if workers is not None and workers.index == 1:
        directions = {name: (u * 2, v) for name, (u, v) in directions.items()}  # worker 0's count
    b, gram, _, _ = coupled_directions(model, mine, losses, directions, workers=workers)
    own, joint, _, _ = coupled_directions(model, mine, losses, per_layer=2, **data)
    arrays |= {"b": torch.tensor(b), "C": torch.tensor(gram)}
    # The default candidates have any sign.
    return arrays | {"own b": torch.tensor(own).abs(), "own C": torch.tensor(joint).abs()}


def candidates(factors):
    generator = torch.Generator().manual_seed(1)

    def drawn(side):
        return torch.randn(side, 3, generator=generator).double()

    return {
        name: (drawn(factor.shape[0]), drawn(factor.shape[1])) for name, factor in factors.items()
    }


def write_checkpoints(folder):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(2)
    sides = [(40, 48), (96, 64), (33, 50), (64, 64), (128, 40), (70, 72)]
    state = {
        f"layers.{i}.weight": torch.randn(d, k, generator=generator)
        for i, (d, k) in enumerate(sides)
    }
    save_file(state, folder / "base.safetensors")
    more = {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in state.items()
    }
    save_file(more, folder / "tuned.safetensors")


def all_sources(folder):
    with torchrun_workers() as workers:
        assert workers.count == int(os.environ["WORLD_SIZE"])
        torch.save(compute(folder, workers), folder / f"found.{workers.index}")


def sharded_model(folder):
    """FSDP2: each worker holds a part of every weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torchrun_workers() as workers:
        model, batches = make()
        del batches[3:5]  # equally many for 2 workers, and all of them use the same layers
        targets = ["first", "wide"]
        options = {"rank": 8, "targets": targets}
        exact = gradient_spectra(model, batches, loss, **options)
        whole = checkpoint_spectra(model, progress=False, **options)
        mesh = init_device_mesh("cpu", (workers.count,))
        for module in (*model.children(), model):
            fully_shard(module, mesh=mesh)
        assert hasattr(model.first.weight, "full_tensor")
        mine = batches[workers.index :: workers.count]
        shared = gradient_spectra(model, mine, loss, workers=workers, **options)
        stored = checkpoint_spectra(model, workers=workers, progress=False, **options)
        for name in targets:
            assert abs(shared[name] - exact[name]).max() < 1e-9 * exact[name][0]
            assert abs(stored[name] - whole[name]).max() < 1e-9 * whole[name][0]


def _stop_worker_1(action):
    """Let worker 1 do one layer, and then something else; worker 0 waits for it at the end."""
    decompose = extraction._decompose
    calls = []

    def patched(matrix, options):
        calls.append(matrix.name)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            action()
        return decompose(matrix, options)

    extraction._decompose = patched


def _extract(folder):
    # As a program of one's own does it, without torchrun_workers.
    dist.init_process_group("gloo")
    with Workers() as workers:
        options = {"rank": 8, "output": folder / "out.npz", "progress": False}
        spectra = checkpoint_spectra(folder / "base.safetensors", workers=workers, **options)
    dist.destroy_process_group()
    torch.save(dict(spectra), folder / f"found.{workers.index}")


def killed(folder):
    _stop_worker_1(lambda: os.kill(os.getpid(), signal.SIGKILL))
    _extract(folder)


def refusing(folder):
    def refuse():
        raise ValueError("layer 'x': something is wrong with it")

    _stop_worker_1(refuse)
    _extract(folder)


def resumed(folder):
    decompose = extraction._decompose

    def counted(matrix, options):
        (folder / f"done.{matrix.name}").touch(exist_ok=False)
        return decompose(matrix, options)

    extraction._decompose = counted
    _extract(folder)


def other_options(folder):
    dist.init_process_group("gloo")
    with Workers() as workers:
        try:
            checkpoint_spectra(
                folder / "base.safetensors", rank=8 + workers.index, workers=workers, progress=False
            )
        except ValueError as error:
            (folder / f"said.{workers.index}").write_text(str(error))
    dist.destroy_process_group()


def groups(folder):
    """Two data-parallel groups of two, as where processes also share a model."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs: list[Any] = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model, batches = make()
    mine = batches[rank % 2 :: 2]
    # One has all of its group's batches and the other has none.
    share = mine if rank < 2 else []
    outside = Workers(pairs[rank % 2])
    with pytest.raises(ValueError, match="enter them first"):
        outside.sum([torch.ones(1)])
    with Workers(pairs[rank % 2]) as workers:
        assert (workers.index, workers.count) == (rank // 2, 2)
        options = {"rank": 8, "targets": ["first", "narrow"]}
        shared = gradient_spectra(model, share, loss, workers=workers, **options)
        alone = gradient_spectra(model, mine, loss, **options)
    for name, values in alone.items():
        assert abs(shared[name] - values).max() < 1e-12 * values[0]
    for again in range(3):
        with Workers(pairs[rank % 2]) as workers:  # the first connection's addresses are closed
            assert workers.count_all(again + rank // 2) == 2 * again + 1
    dist.destroy_process_group()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
