"""The tasks that run from packages alone: three pretrained models on movie-review snippets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from benchmarks.finetune import snippets
from benchmarks.finetune.sources import prepared
from benchmarks.finetune.task import Batch, Scores, Task

_LENGTH = 48  # tokens; longer snippets are cut


class SnippetSentiment:
    """Is a snippet of a film review positive? An encoder with a classifier of two classes.

    Args:
        name: a folder of `sources.PACKAGES`.
        targets: as PEFT's `target_modules`.
    """

    head = ("classifier",)
    peft_type = "SEQ_CLS"

    def __init__(self, name: str, targets: str) -> None:
        self.name, self.targets = name, targets

    @cached_property
    def splits(self) -> Mapping[str, Sequence[tuple[list[int], int]]]:
        """Token numbers and the label of each snippet."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(prepared(self.name))
        found: dict[str, list[tuple[list[int], int]]] = {}
        for split, texts in snippets.read(prepared("snippets") / "snippets.txt").items():
            encoded = tokenizer([s.text for s in texts], truncation=True, max_length=_LENGTH)
            labels = [snippet.label for snippet in texts]
            found[split] = list(zip(encoded.input_ids, labels, strict=True))
        self._padding = int(tokenizer.pad_token_id)
        return found

    def model(self) -> torch.nn.Module:
        """The encoder, with a new classifier."""
        import transformers

        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it reports that the classifier is new
        try:
            return transformers.AutoModelForSequenceClassification.from_pretrained(
                prepared(self.name), num_labels=2
            )
        finally:
            transformers.logging.set_verbosity(verbosity)

    def batch(self, examples: Sequence[tuple[list[int], int]]) -> Batch:
        """Padded to the longest one."""
        longest = max(len(tokens) for tokens, _ in examples)
        tokens = torch.full((len(examples), longest), self._padding)
        mask = torch.zeros_like(tokens)
        for row, (ids, _) in enumerate(examples):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        labels = torch.tensor([label for _, label in examples])
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Cross entropy, and whether the label is right."""
        logits = model(**{key: batch[key] for key in batch if key != "labels"}).logits.float()
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return Scores(losses, logits.argmax(1) == batch["labels"])


class SnippetLanguage:
    """The next token of movie-review snippets, by Gemma 3 270M (`pruned_gemma`).

    An example is a window of 64 tokens, the first one that of the beginning.
    """

    name = "gemma"
    targets = r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj"
    head = ()
    peft_type = "CAUSAL_LM"

    @cached_property
    def splits(self) -> Mapping[str, Sequence[Any]]:
        """Windows: rows of token numbers."""
        with np.load(prepared(self.name) / "windows.npz", allow_pickle=False) as file:
            return {split: torch.from_numpy(file[split].astype(np.int64)) for split in file}

    def model(self) -> torch.nn.Module:
        """The language model."""
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            prepared(self.name), attn_implementation="sdpa"
        )

    def batch(self, examples: Sequence[torch.Tensor]) -> Batch:
        """Windows are equally long, so nothing is padded."""
        tokens = torch.stack(list(examples))
        return {"input_ids": tokens, "labels": tokens}

    def scores(self, model: Any, batch: Batch) -> Scores:
        """The mean over a window's 63 predicted tokens."""
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        return Scores(losses.view(len(logits), -1).mean(1), None)


def local_task(name: str) -> Task:
    """One of "minilm", "mpnet" and "gemma".

    Raises:
        ValueError: another name.
    """
    layers = r".*encoder\.layer\.\d+\."
    if name == "minilm":
        return SnippetSentiment(name, layers + r"(.*\.(query|key|value)|.*\.dense)")
    if name == "mpnet":
        return SnippetSentiment(name, layers + r"(attention\.attn\.[qkvo]|.*\.dense)")
    if name == "gemma":
        return SnippetLanguage()
    raise ValueError(f"task: expected minilm, mpnet or gemma, got {name!r}")
