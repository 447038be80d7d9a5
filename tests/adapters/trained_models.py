"""A tiny classifier with a LoRA, and a training loop with what real ones have."""

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lorambo_adapters.ranks.mask import active_ranks
from lorambo_adapters.trainer import RankController, allocator_for
from lorambo_adapters.training.probe import Measurement
from tests.adapters.resize_models import adapted

NAMES = ["first", "second", "last"]
COSTS = {"first": 8 + 7, "second": 7 + 9, "last": 9 + 4}


class Classifier(torch.nn.Module):
    """Three layers, and a loss of its own, as models of transformers have it."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 7)
        self.norm = torch.nn.BatchNorm1d(7)
        self.second = torch.nn.Linear(7, 9)
        self.last = torch.nn.Linear(9, 4)
        self.calls = []

    def forward(self, x, labels=None):
        x = torch.tanh(self.norm(self.first(x)))
        logits = self.last(torch.tanh(self.second(x)))
        self.calls.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        return SimpleNamespace(loss=loss, logits=logits)


def classifier(seed=0, dtype=torch.float32, **options) -> Any:
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": NAMES, **options}
    return adapted(Classifier(), dtype=dtype, **options)


def batch(number, dtype=torch.float32):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, 8, dtype=dtype, generator=generator)
    return {"x": x, "labels": (3 * x[:, 0]).long().clamp(-1, 2) + 1}


class Loop:
    """A loop with accumulation, bfloat16, a scaler, clipping and a scheduler.

    What `scaled` is for alone is left out where `scaled` is False.
    """

    def __init__(self, model, scaled=False, accumulate=2, call=None):
        self.model, self.accumulate, self.scaled = model, accumulate, scaled
        self.call = model if call is None else call
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 2e-2, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        self.losses = []
        self.steps = 0

    def run(self, count, controller=None, after=None):
        model = self.model
        for _ in range(count):
            total = 0.0
            for part in range(self.accumulate):
                # Two generators beside torch's, as data pipelines use them.
                noise = float(np.random.rand()) + random.random()  # noqa: NPY002
                given = batch(self.steps * self.accumulate + part)
                given["x"] = given["x"] + 0.01 * noise
                with torch.autocast("cpu", torch.bfloat16, enabled=self.scaled):
                    loss = self.call(**given).loss / self.accumulate
                self.scaler.scale(loss).backward()
                total += float(loss.detach())
            self.scaler.unscale_(self.optimizer)
            trained = [p for p in model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.steps += 1
            self.losses.append(total)
            if controller is not None:
                controller.step()
            if after is not None:
                after()
        return self.losses

    def state(self):
        parts = self.optimizer, self.scheduler, self.scaler
        return [part.state_dict() for part in parts], torch.get_rng_state(), self.steps

    def load(self, state):
        parts, generator, self.steps = state
        for part, saved in zip((self.optimizer, self.scheduler, self.scaler), parts, strict=True):
            part.load_state_dict(saved)
        torch.set_rng_state(generator)


def seed_all(seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def generators():
    # The third is where numpy's global generator stands.
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


def present(model, mode="resize"):
    """The trainable parameters that count, by the tensors themselves."""
    if mode == "mask":
        return sum(COSTS[name] * rank for name, rank in active_ranks(model).items())
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and p.requires_grad)


class Told:
    """In place of a probe: curves that a test gives, a list a measurement."""

    def __init__(self, *rounds):
        self.rounds = list(rounds)
        self.batches = []

    def measure(self, batches):
        self.batches.append(list(batches))
        found = self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        if isinstance(found, BaseException):
            raise found
        return Measurement({name: np.array(curve) for name, curve in found.items()}, {}, {}, 0.0)


def curves(**first):
    """Curves up to rank 8 whose gains halve from rank to rank."""
    gains = 0.5 ** np.arange(8)
    return {name: np.append(0, np.cumsum(first.get(name, 1.0) * gains)) for name in NAMES}


def controlled(loop, budget, *, mode: Any = "resize", options: Any = None, **more: Any) -> Any:
    options = {"period": 3} | (options or {})
    allocator = allocator_for(loop.model, budget, mode=mode, **options)
    return RankController(loop.call, loop.optimizer, allocator, mode=mode, **more)


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))
