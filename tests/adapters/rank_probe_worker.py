"""What one worker of tests/adapters/test_rank_probe_workers.py runs: FOLDER MODE ...

"same" (a model in each), "ddp", "fsdp" (`fully_shard`), "true" (likewise, the true Fisher, and a
model with a loss of its own), "fault" (worker 1 fails in its second pass), "memory" (in its first),
"few" (it has one batch) or "lost" (it ends). Results go to FOLDER, a file a worker.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lorambo_adapters.spectra.distributed import WorkerLost, Workers
from lorambo_adapters.spectra.fisher import TrueFisher
from lorambo_adapters.training.probe import ProbeFailed, RankProbe
from lorambo_alloc.storage import replacing
from tests.adapters.resize_models import plain
from tests.adapters.trained_models import batch, classifier

BATCHES = 4


def make(**options):
    torch.set_num_threads(1)
    model = plain(**options)
    torch.manual_seed(7)
    batches = [
        (torch.randn(6 + i, 8).double(), torch.randn(6 + i, 3).double()) for i in range(2 * BATCHES)
    ]
    return model, batches


def make_own():
    """A model whose loss is its own, and whose outputs `fully_shard` finds no tensors in."""
    torch.set_num_threads(1)
    model = classifier(dtype=torch.float64).eval()
    return model, [batch(i, torch.float64) for i in range(2 * BATCHES)]


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1)


def shares(batches, index, count):
    """First halves and second halves, such that all workers' are those of one process."""
    half = len(batches) // 2
    return [*batches[:half][index::count], *batches[half:][index::count]]


def wrapped(mode, model):
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if mode not in ("fsdp", "true"):
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("first", "second", "last")[: 2 if mode == "true" else 3]:
        fully_shard(model.get_base_model().get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(tensor):
    return None if tensor is None else getattr(tensor, "_local_tensor", tensor).tolist()


def held(model):
    """Parameters, their gradients and whether they are trained, as this process has them."""
    return [
        (n, local(p.detach()), local(p.grad), p.requires_grad) for n, p in model.named_parameters()
    ]


def train(model, batch):
    loss = model(**batch).loss if isinstance(batch, dict) else squares(model, batch).mean()
    loss.backward()


def run(mode, folder):
    model, batches = make_own() if mode == "true" else make()
    rank, count = dist.get_rank(), dist.get_world_size()
    model = wrapped(mode, model)
    calls = []

    def losses(model, batch):
        calls.append(None)
        if rank == 1 and mode == "fault" and len(calls) == BATCHES // 2 + 1:
            raise RuntimeError("a device failed")
        if rank == 1 and mode == "memory":
            raise MemoryError("full")
        if rank == 1 and mode == "lost":
            os._exit(3)
        return squares(model, batch)

    mine = shares(batches, rank, count)
    if mode == "few" and rank == 1:
        mine = mine[:1]
    found: dict[str, Any] = {}
    with Workers() as workers:
        train(model, mine[0])
        before = held(model)
        try:
            options: Any = {"fisher": TrueFisher(draws="all")} if mode == "true" else {}
            options.setdefault("loss_fn", None if options else losses)
            probe = RankProbe(model, ahead=3, workers=workers, **options)
            measured = probe.measure(mine)
            found = {name: curve.tolist() for name, curve in measured.curves.items()}
            for name, (u, v) in measured.directions.items():
                found[f"{name}: directions"] = [u.tolist(), v.tolist()]
        except (ProbeFailed, ValueError, WorkerLost) as error:
            found = {"error": type(error).__name__, "text": str(error)}
            found["cause"] = type(error.__cause__).__name__
            if isinstance(error, WorkerLost):
                write(folder, rank, found)
                os._exit(0)
        found["as it was"] = str(held(model)) == str(before)
        train(model, mine[0])  # a wrapper goes on
    write(folder, rank, found)


def write(folder, rank, found):
    with replacing(Path(folder) / f"{rank}.json") as file:
        file.write(json.dumps(found).encode())


if __name__ == "__main__":
    # By a file: a port that was free when it was looked for can be another process's by now.
    dist.init_process_group(
        "gloo",
        init_method=(Path(sys.argv[1]) / "rendezvous").absolute().as_uri(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    for mode in sys.argv[2:]:
        run(mode, Path(sys.argv[1]) / mode)
    dist.destroy_process_group()
