"""What one worker of tests/adapters/test_resize_mask.py runs, started by torchrun.

python resize_worker.py MODE FOLDER: "ddp" or "fsdp"; results go to FOLDER, a file a worker.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lorambo_adapters.ranks.mask import active_ranks
from lorambo_adapters.ranks.resize import resize
from lorambo_adapters.ranks.sharded import whole
from tests.adapters.resize_models import plain

RANKS = {"first": 2, "second": 3, "last": 1}
LATER = {"first": 4, "second": 2, "last": 3}


def batch(step, worker):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    half = slice(3 * worker, 3 * worker + 3)
    return x[half], torch.sin(x[:, :3] * 2)[half]


def train(model, optimizer, steps, worker):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(step, worker)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def refusal(*arguments, **options):
    try:
        resize(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "none"


def wrapped(mode, model):
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for name in ("first", "second"):
        fully_shard(model.get_base_model().get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(mode, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    worker = dist.get_rank()
    model = plain()
    parallel = wrapped(mode, model)
    trained = [p for p in parallel.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.05)
    losses = train(parallel, optimizer, range(4), worker)
    refusals = [refusal(parallel, {"first": 1 + worker}, optimizer, mode="mask")]
    refusals.append(refusal(parallel, {"first": 1}, optimizer))
    if mode == "ddp":
        refusals.append(refusal(model, {"first": 1}, optimizer))
    resize(parallel, RANKS, optimizer, mode="mask")
    ranks = [active_ranks(parallel)]
    losses += train(parallel, optimizer, range(4, 8), worker)
    resize(parallel, LATER, optimizer, mode="mask")
    ranks.append(active_ranks(parallel))
    losses += train(parallel, optimizer, range(8, 12), worker)
    parameters = {
        name: whole(p.detach()).clone() for name, p in model.named_parameters() if "lora_" in name
    }
    results = {"ranks": ranks, "losses": losses, "parameters": parameters, "refusals": refusals}
    if mode == "ddp":
        del parallel
        resize(model, {"first": 1}, optimizer)  # outside of the wrapper it can be
        assert active_ranks(model)["first"] == 1
    torch.save(results, folder / f"{worker}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
