"""Pairs of small models, before and after an update, and examples to calibrate on."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from tests.adapters.conftest import TINY, quiet

BERT = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}


def bert(transformers: Any, **changes: Any) -> Any:
    """A classifier into three classes that tells inputs apart: its weights are not small."""
    torch.manual_seed(0)
    settings = {**BERT, "initializer_range": 0.4, "num_labels": 3, "max_position_embeddings": 16}
    config = transformers.BertConfig(**settings | changes)
    return transformers.BertForSequenceClassification(config)


def llama(transformers: Any) -> Any:
    """A language model without biases."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config)


def gpt2(transformers: Any) -> Any:
    """A language model whose layers are `Conv1D`, with biases; its head is the embedding."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config)


def updated(model: Any, size: float = 0.3, seed: int = 1) -> Any:
    """A copy with every tensor changed, matrices by falling spectra."""
    generator = torch.Generator().manual_seed(seed)
    tuned = deepcopy(model)
    with torch.no_grad():
        for i, parameter in enumerate(tuned.parameters()):
            if parameter.ndim < 2:
                parameter += 0.1 * size * torch.randn(parameter.shape, generator=generator)
                continue
            d, k = parameter.shape
            r = min(d, k)
            u, v = (torch.linalg.qr(torch.randn(n, r, generator=generator)).Q for n in (d, k))
            fall = (0.4 + 0.05 * (i % 7)) ** torch.arange(r) * size * (1 + i % 3)
            parameter += (u * fall) @ v.T
    return tuned


def examples(kind: str, count: int = 5, labelled: bool = True) -> list[dict[str, torch.Tensor]]:
    """Batches of eight rows, every third one padded: of a classifier or a language model ("lm")."""
    generator = torch.Generator().manual_seed(7)
    batches: list[dict[str, torch.Tensor]] = []
    for _ in range(count):
        ids = torch.randint(1, 40, (8, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, 5:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        labels = torch.randint(0, 3, (8,), generator=generator)
        if kind == "lm":
            labels = torch.where(mask == 1, ids, -100)
        batches.append({**batch, "labels": labels} if labelled else batch)
    return batches


def loaded(peft: Any, base: Any, folder: Any) -> Any:
    """PEFT's own reading of the folder, onto a copy of the base."""
    with quiet():
        return peft.PeftModel.from_pretrained(deepcopy(base), folder).eval()


@torch.no_grad()
def log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What counts of a model's predictions, worked out here: rows are predictions."""
    model.eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits.double()
    if logits.ndim == 3:
        logits = logits[:, :-1][batch["labels"][:, 1:] != -100]
    return logits.log_softmax(-1)


def divergence(tuned: Any, model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """KL(tuned || model), mean over the predictions."""
    parts = [(log_probabilities(tuned, b), log_probabilities(model, b)) for b in batches]
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in parts)
    return total / sum(len(p) for p, _ in parts)
