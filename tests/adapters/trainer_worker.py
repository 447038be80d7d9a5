"""What one worker of tests/adapters/test_trainer_workers.py runs.

python trainer_worker.py FOLDER MODE...: "ddp", "fsdp", "probe" (a probe that fails in worker 1),
"batches" (a collection that fails there), "move" or "kill" (a move breaks off there, by an
exception or by SIGKILL). Results go to FOLDER/MODE, a file a worker.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lorambo_adapters.ranks.mask import active_ranks
from lorambo_adapters.ranks.transaction import Transaction
from lorambo_adapters.spectra.distributed import WorkerLost
from lorambo_adapters.trainer import RankController, allocator_for
from lorambo_alloc import uniform_rank
from lorambo_alloc.storage import replacing
from tests.adapters.trained_models import Loop, Told, batch, classifier, curves

STEPS = 9


def wrapped(mode, model):
    if mode != "fsdp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for name in ("first", "second"):
        fully_shard(model.get_base_model().get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def break_in_the_second_move(how):
    """Let the worker fail in the middle of its second move."""
    commit, count = Transaction.commit, []

    def breaking(self):
        count.append(None)
        if len(count) == 2:
            self._steps.insert(len(self._steps) // 2, (how, lambda: None))
        commit(self)

    Transaction.commit = breaking


class Own(Loop):
    """A loop over the worker's own batches."""

    def __init__(self, model, call, worker):
        super().__init__(model, accumulate=1, call=call)
        self.worker = worker

    def one(self):
        given = batch(2 * self.steps + self.worker)
        loss = self.call(**given).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.losses.append(float(loss.detach()))


def main(mode, folder):
    worker = dist.get_rank()
    model = classifier()
    loop = Own(model, wrapped(mode, model), worker)
    loop.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    probe = batches = None
    loss_fn: Any = None
    if mode in ("move", "kill"):
        probe = Told(curves(first=9.0, last=0.2), curves(first=0.1, second=9.0, last=3.0))
    if worker == 1 and mode == "probe":
        loss_fn = lambda model, batch: 1 / 0  # noqa: E731
    if mode == "batches":
        batches = [batch(i) for i in range(4)] if worker == 0 else []
    if worker == 1 and mode in ("move", "kill"):
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        break_in_the_second_move(kill if mode == "kill" else lambda: 1 / 0)
    allocator = allocator_for(
        model, uniform_rank(2), mode="mask", period=3, discount=0.1, switching_cost=0.0
    )
    ranks, texts, error = [], [], None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller = RankController(
            loop.call, loop.optimizer, allocator, mode="mask", probe=probe, loss_fn=loss_fn,
            batches=batches,
        )  # fmt: skip
    try:
        with warnings.catch_warnings(record=True) as more, controller:
            warnings.simplefilter("always")
            for _ in range(STEPS):
                loop.one()
                controller.step()
                ranks.append(gathered(active_ranks(loop.call)))
                with replacing(folder / f"state-{worker}.json") as file:
                    file.write(json.dumps(controller.state_dict()).encode())
            texts = [str(warning.message) for warning in (*caught, *more)]
    except (WorkerLost, ZeroDivisionError) as raised:
        error = type(raised).__name__, str(raised)
    events = [e["event"] for e in controller.history.events]
    result = {"ranks": ranks, "losses": loop.losses, "events": events, "error": error}
    result |= {"warnings": texts, "estimates": controller.state_dict()["allocator"]["estimates"]}
    with replacing(folder / f"{worker}.json") as file:
        file.write(json.dumps(result).encode())
    if error is not None:
        sys.stderr.write(str(error))
        os._exit(3)  # as an error that nobody catches; without waiting for the others


if __name__ == "__main__":
    torch.set_num_threads(1)
    # By a file: a port that was free when it was looked for can be another process's by now.
    dist.init_process_group(
        "gloo",
        init_method=(Path(sys.argv[1]) / "rendezvous").absolute().as_uri(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    for mode in sys.argv[2:]:
        main(mode, Path(sys.argv[1]) / mode)
    dist.destroy_process_group()
