"""QNLI: does a sentence answer a question? An encoder of RoBERTa's kind with a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from benchmarks.finetune.hub import (
    glue_splits,
    load_splits,
    padded,
    pretrained,
    tokenizer_of,
    two_labels,
)
from benchmarks.finetune.task import Batch, Scores

_LENGTH = 256  # tokens of question and sentence together; longer ones are cut
_PAIR = ("question", "sentence")

Example = tuple[list[int], int]


class QuestionPairs:
    """A question and a sentence in, a label of two out.

    Args:
        name: of the setting.
        model: name on the hub, or a folder, of a RoBERTa or BERT.
        data: name on the hub, or a folder: `question`, `sentence`, `label`.
        config: of the data.
        device: where model and batches are.
    """

    targets = r".*encoder\.layer\.\d+\.(.*\.(query|key|value)|.*\.dense)"
    head: tuple[str, ...] = ("classifier",)
    peft_type = "SEQ_CLS"

    def __init__(self, name: str, model: str, data: str, config: str, device: str) -> None:
        self.name, self._model, self._data = name, model, data
        self._config, self._device = config, device

    @cached_property
    def splits(self) -> Mapping[str, Sequence[Example]]:
        """Token numbers and the label of each pair."""
        loaded = load_splits(self._data, self._config, ("train", "validation"), (*_PAIR, "label"))
        encoded = {split: self._encoded(split, rows) for split, rows in loaded.items()}
        return glue_splits(encoded["train"], encoded["validation"])

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self._model)

    def _encoded(self, split: str, rows: Any) -> list[Example]:
        questions, sentences = (list(rows[column]) for column in _PAIR)
        labels = two_labels(self._data, split, rows["label"])
        tokens = self._tokenizer(questions, sentences, truncation=True, max_length=_LENGTH)
        return list(zip(tokens["input_ids"], labels, strict=True))

    def model(self) -> torch.nn.Module:
        """The encoder, with a new classifier."""
        import transformers

        kind = transformers.AutoModelForSequenceClassification
        return pretrained(kind, self._model, self._device, num_labels=2)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Padded to the longest one."""
        tokens, mask = padded(
            [ids for ids, _ in examples], self._tokenizer.pad_token_id, self._device
        )
        labels = torch.tensor([label for _, label in examples]).to(self._device)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Cross entropy, and whether the label is right."""
        logits = model(**{key: batch[key] for key in batch if key != "labels"}).logits.float()
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return Scores(losses, logits.argmax(1) == batch["labels"])
