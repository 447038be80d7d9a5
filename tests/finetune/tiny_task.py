"""A task that trains in a moment: a BERT of two small layers that tells two kinds of rows apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.finetune.task import Batch, Scores


class TinyTask:
    """Rows of six tokens; the label is whether the first is an even number."""

    name = "tiny"
    targets = r".*encoder\.layer\.\d+\.(.*\.(query|key|value)|.*\.dense)"
    head: tuple[str, ...] = ("classifier",)
    peft_type = "SEQ_CLS"

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(1, 30, (96, 6), generator=draw)
        self.splits: Mapping[str, Any] = {"train": rows[:48], "dev": rows[48:72], "test": rows[72:]}

    def model(self) -> torch.nn.Module:
        import transformers

        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
        return transformers.BertForSequenceClassification(config).eval()

    def batch(self, examples: Sequence[Any]) -> Batch:
        tokens = torch.stack(list(examples))
        mask = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": mask, "labels": (tokens[:, 0] + 1) % 2}

    def scores(self, model: Any, batch: Batch) -> Scores:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits.float()
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return Scores(losses, logits.argmax(1) == batch["labels"])


class UnevenTask(TinyTask):
    """The same rows, cut to two to six tokens and padded in a batch."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.splits = {
            split: [row[: int(torch.randint(2, 7, (), generator=draw))] for row in rows]
            for split, rows in self.splits.items()
        }

    def batch(self, examples: Sequence[Any]) -> Batch:
        tokens = torch.nn.utils.rnn.pad_sequence(list(examples), batch_first=True)
        return {
            "input_ids": tokens,
            "attention_mask": (tokens > 0).long(),
            "labels": (tokens[:, 0] + 1) % 2,
        }
