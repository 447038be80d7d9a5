"""What one worker of tests/adapters/test_trainer_callback.py runs, started by torchrun.

python callback_worker.py FOLDER: a training whose ranks are masked, and again from a checkpoint.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tests.adapters.callback_models import Held, arguments, callback_for, llama, losses, trainer_of


def run(folder, checkpoint):
    model, held = llama(r=4), Held()
    ranks = callback_for(model, mode="mask")
    args = arguments(folder, ddp_backend="gloo", per_device_train_batch_size=2)
    trainer = trainer_of(model, args, ranks, held)
    trainer.train(resume_from_checkpoint=checkpoint)
    history = ranks.history
    return {
        "ranks": held.ranks,
        "losses": losses(trainer),
        "history": history.to_json(),
        "spent": history.spent.tolist()[1:],
        "budget": 2 * sum(history.costs.values()),
    }


def main(folder):
    args = arguments(folder, ddp_backend="gloo")
    refusal = "none"
    try:
        trainer_of(llama(), args, callback_for(llama()))
    except ValueError as error:
        refusal = str(error)
    runs = [run(folder, None), run(folder, str(folder / "checkpoint-5"))]
    found = {"refusal": refusal, "runs": runs}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
