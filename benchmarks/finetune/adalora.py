"""AdaLoRA's ranks: those that PEFT's own AdaLoRA has left after a short run of it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from benchmarks.finetune.signals import Measuring
from benchmarks.finetune.task import shuffled

STEPS = 120


def adalora_ranks(measuring: Measuring, steps: int = STEPS) -> dict[str, int]:
    """Run AdaLoRA for some steps, from twice the rank down to it, and count what is left.

    AdaLoRA counts ranks, not parameters; who needs an exact number of parameters adjusts these.
    """
    import peft

    rank, task = measuring.rank, measuring.task
    config = peft.AdaLoraConfig(
        init_r=2 * rank + 2,
        target_r=rank,
        tinit=steps // 6,
        tfinal=steps // 3,
        deltaT=1,
        total_step=steps,
        lora_alpha=2 * (2 * rank + 2),
        target_modules=task.targets,
        modules_to_save=list(task.head) or None,
    )
    model: Any = peft.get_peft_model(measuring.model, config)  # pyright: ignore[reportArgumentType]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=measuring.rate, weight_decay=0.0)
    size = len(next(iter(measuring.batches[0].values())))
    for step, batch in enumerate(islice(shuffled(task, size, measuring.seed), steps)):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    kept = {
        name.removeprefix("base_model.model.").partition(".lora_E.")[0]: int((values != 0).sum())
        for name, values in model.named_parameters()
        if ".lora_E." in name
    }
    return {layer.name: kept[layer.name] for layer in measuring.layers}
