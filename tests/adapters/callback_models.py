"""A small Llama, what it is trained on, and how, for the tests of ranks under the Trainer."""

from typing import Any

import peft
import torch
import transformers

from lorambo_adapters.ranks.mask import active_ranks
from lorambo_adapters.trainer import allocator_for
from lorambo_adapters.trainer_callback import RankCallback
from lorambo_alloc import uniform_rank
from tests.adapters.resize_models import quiet

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
STEPS, PERIOD = 12, 3


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    base = transformers.LlamaForCausalLM(config)
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS, "lora_dropout": 0.1, **options}
    with quiet():
        return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def sentences(count=64):
    """Tokens that follow from the one before, of which some are not to be predicted."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(0, 23, (count,), generator=generator)
    rows = (starts[:, None] + torch.arange(10) * (1 + starts[:, None] % 3)) % 23
    labels = torch.where(torch.arange(10) < 1 + starts[:, None] % 4, -100, rows)
    return [{"input_ids": r, "labels": n} for r, n in zip(rows, labels, strict=True)]


def arguments(folder, **options):
    return transformers.TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "bf16": True,
            "max_grad_norm": 0.5,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_steps": 5,
            "seed": 3,
            **options,
        },
    )


def callback_for(model, budget=None, *, mode: Any = "resize", period=PERIOD, **options):
    budget = uniform_rank(2) if budget is None else budget
    allocator = allocator_for(model, budget, mode=mode, warmup=period, period=period)
    return RankCallback(allocator, mode=mode, ahead=3, **options)


def trainer_of(model, args, *callbacks, **options):
    data: Any = sentences()  # a list will do
    return transformers.Trainer(
        model, args, train_dataset=data, callbacks=list(callbacks), **options
    )


def losses(trainer):
    return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


class Held(transformers.TrainerCallback):
    """The ranks after every step."""

    def __init__(self):
        self.ranks = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.ranks[state.global_step] = active_ranks(kwargs["model"])
