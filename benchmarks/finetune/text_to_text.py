"""SST-2 as text to text: a sentence of a film review in, the word "positive" or "negative" out.

Prefix and words are those that T5 was trained with (Raffel et al. 2020, appendix D). SST-2's
training texts are phrases that overlap with each other, so that dev, held out of them, looks better
than validation does; it only chooses learning rates.
"""

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

PREFIX = "sst2 sentence: "
WORDS = ("negative", "positive")

_LENGTH = 128  # tokens; longer texts are cut
_IGNORED = -100  # a label that transformers leave out of the loss

Example = tuple[list[int], int]


class SentimentWords:
    """An encoder-decoder of T5's kind that writes the label.

    Args:
        name: of the setting.
        model: name on the hub, or a folder, of a T5.
        data: name on the hub, or a folder: `sentence`, `label`.
        config: of the data.
        device: where model and batches are.
    """

    targets = (
        r"(encoder|decoder)\.block\.\d+\.layer\.\d+\."
        r"((Self|EncDec)Attention\.[qkvo]|DenseReluDense\.w[io](_\d)?)"
    )
    head: tuple[str, ...] = ()
    peft_type = "SEQ_2_SEQ_LM"

    def __init__(self, name: str, model: str, data: str, config: str, device: str) -> None:
        self.name, self._model, self._data = name, model, data
        self._config, self._device = config, device

    @cached_property
    def splits(self) -> Mapping[str, Sequence[Example]]:
        """Token numbers and the label of each text."""
        loaded = load_splits(
            self._data, self._config, ("train", "validation"), ("sentence", "label")
        )
        encoded = {split: self._encoded(split, rows) for split, rows in loaded.items()}
        return glue_splits(encoded["train"], encoded["validation"])

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self._model)

    @cached_property
    def answers(self) -> list[list[int]]:
        """The tokens of each label's word, the end-of-sequence token included."""
        return list(self._tokenizer(text_target=list(WORDS))["input_ids"])

    def _encoded(self, split: str, rows: Any) -> list[Example]:
        texts = [PREFIX + text for text in rows["sentence"]]
        labels = two_labels(self._data, split, rows["label"])
        tokens = self._tokenizer(texts, truncation=True, max_length=_LENGTH)
        return list(zip(tokens["input_ids"], labels, strict=True))

    def model(self) -> torch.nn.Module:
        """The pretrained model; it needs no new head."""
        import transformers

        return pretrained(transformers.AutoModelForSeq2SeqLM, self._model, self._device)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Padded to the longest one; labels are tokens of the words."""
        tokens, mask = padded(
            [ids for ids, _ in examples], self._tokenizer.pad_token_id, self._device
        )
        labels, _ = padded([self.answers[label] for _, label in examples], _IGNORED, self._device)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def scores(self, model: Any, batch: Batch) -> Scores:
        """The mean over the word's tokens, and whether greedy decoding would write just the word.

        It does where the word's every token is the likeliest after those before it, which one pass
        over the word shows: as long as greedy decoding is right, that is what it has written.
        """
        logits, labels = model(**batch).logits.float(), batch["labels"]
        counted = labels != _IGNORED
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none"
        ).view(labels.shape)
        right = ((logits.argmax(-1) == labels) | ~counted).all(1)
        return Scores(losses.sum(1) / counted.sum(1), right)
