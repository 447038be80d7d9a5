"""WikiText-103: the next token of articles, by a model of GPT-2's kind.

The perplexity is exp of the mean loss of a token of the model's own vocabulary. It is lower than a
perplexity by word, since a word has more than one token; figures by word are not comparable. The
windows do not overlap, so that the first tokens of a window have little to go by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.finetune.hub import load_splits, pretrained, tokenizer_of
from benchmarks.finetune.task import Batch, Scores

WINDOW = 1024  # tokens, the most that GPT-2 takes

_CHUNK = 1000  # rows of text that are tokenised at once
_ROWS = 4  # windows whose logits are held at once in evaluation
_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


class ArticleWindows:
    """Articles run together and cut into windows.

    Args:
        name: of the setting.
        model: name on the hub, or a folder, of a GPT-2.
        data: name on the hub, or a folder: `text`, a line a row.
        config: of the data.
        device: where model and batches are.
    """

    targets = r"transformer\.h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)"
    head: tuple[str, ...] = ()
    peft_type = "CAUSAL_LM"

    def __init__(self, name: str, model: str, data: str, config: str, device: str) -> None:
        self.name, self._model, self._data = name, model, data
        self._config, self._device = config, device

    @cached_property
    def splits(self) -> Mapping[str, npt.NDArray[np.int32]]:
        """Windows x tokens. The real train split has over 10^8 tokens, four bytes each."""
        loaded = load_splits(self._data, self._config, tuple(_SPLITS.values()), ("text",))
        tokenizer = tokenizer_of(self._model)
        length = min(WINDOW, self._longest())
        return {
            ours: _windows(self._data, theirs, loaded[theirs], tokenizer, length)
            for ours, theirs in _SPLITS.items()
        }

    def _longest(self) -> int:
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(self._model)
        return int(config.max_position_embeddings)

    def model(self) -> torch.nn.Module:
        """The pretrained language model."""
        import transformers

        return pretrained(transformers.AutoModelForCausalLM, self._model, self._device)

    def batch(self, examples: Sequence[npt.NDArray[np.int32]]) -> Batch:
        """Windows are equally long, so nothing is padded."""
        tokens = torch.from_numpy(np.stack(examples).astype(np.int64)).to(self._device)
        return {"input_ids": tokens, "labels": tokens}

    def scores(self, model: Any, batch: Batch) -> Scores:
        """The mean over a window's predicted tokens: all but its first."""
        return Scores(
            torch.cat([_mean_losses(model, rows) for rows in batch["input_ids"].split(_ROWS)]), None
        )


def _mean_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(tokens), -1).mean(1)


def _windows(
    data: str, split: str, rows: Any, tokenizer: Any, length: int
) -> npt.NDArray[np.int32]:
    """All rows' tokens in their order, cut; what is left over at the end is dropped.

    Raises:
        ValueError: they do not fill one window.
    """
    parts: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(rows), _CHUNK):
        texts = rows[start : start + _CHUNK]["text"]
        lines = [text if text.endswith("\n") else text + "\n" for text in texts if text]
        if lines:
            tokens = tokenizer(lines, add_special_tokens=False)["input_ids"]
            parts.append(np.array([t for line in tokens for t in line], dtype=np.int32))
    stream = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    count = len(stream) // length
    if not count:
        raise ValueError(
            f"{data}: {split}: expected at least one window of {length} tokens, got {len(stream)}"
        )
    return stream[: count * length].reshape(count, length)
