"""Models, tokenizers and data by their names on the Hugging Face hub, or out of local folders.

A folder takes the place of a name and nothing else changes: `from_pretrained` and `load_dataset`
read both. A folder of data holds one file (parquet, JSON lines) or more a split, named after it,
with the columns of the data set that it stands for, in itself or in a folder of the configuration's
name as on the hub (`glue/qnli/train-00000-of-00001.parquet`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def pretrained(kind: Any, name: str, device: str, **options: Any) -> torch.nn.Module:
    """A model in float32, on a device; what its checkpoint lacks is drawn from torch's numbers.

    Args:
        kind: one of transformers' classes with `from_pretrained`.
        name: on the hub, or a folder.
        device: as torch names it.
        **options: of the model's configuration.
    """
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports that a classifier is new
    try:
        model: torch.nn.Module = kind.from_pretrained(name, dtype=torch.float32, **options)
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.to(device)


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(name)


def load_splits(
    data: str, config: str, splits: Sequence[str], columns: Sequence[str]
) -> Mapping[str, Any]:
    """Some splits of a data set, with the columns that are needed.

    Args:
        data: its name on the hub, or a folder.
        config: the name of its configuration.
        splits: names of splits.
        columns: names of columns.

    Raises:
        ModuleNotFoundError: the package `datasets` is not there.
        ValueError: a split or a column is missing.
    """
    try:
        import datasets
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "the paper's settings need datasets: pip install 'lorambo-alloc[finetune]'",
            name=missing.name,
        ) from missing
    folder = Path(data)
    if folder.is_dir():
        inner = folder / config
        loaded: Any = datasets.load_dataset(str(inner if inner.is_dir() else folder))
    else:
        loaded = datasets.load_dataset(data, config)
    for split in splits:
        if split not in loaded:
            raise ValueError(f"{data}: expected a split {split!r}, got {', '.join(loaded)}")
        present = loaded[split].column_names
        for column in columns:
            if column not in present:
                raise ValueError(
                    f"{data}: {split}: expected a column {column!r}, got {', '.join(present)}"
                )
    return {split: loaded[split].select_columns(list(columns)) for split in splits}


def two_labels(data: str, split: str, labels: Iterable[int]) -> list[int]:
    """The labels of a split, each 0 or 1.

    Raises:
        ValueError: there is another one, as the -1 of GLUE's hidden test labels.
    """
    found = list(labels)
    wrong = next((label for label in found if label not in (0, 1)), None)
    if wrong is not None:
        raise ValueError(f"{data}: {split}: expected labels 0 and 1, got {wrong!r}")
    return found


def held_out(count: int, most: int = 2000, seed: int = 0) -> tuple[list[int], list[int]]:
    """The places of training examples that stay, and of those that become dev.

    A tenth, `most` at the most, drawn without regard to anything.

    Example:
        >>> kept, dev = held_out(30)
        >>> len(kept), len(dev), sorted(kept + dev) == list(range(30))
        (27, 3, True)
    """
    order = random.Random(seed).sample(range(count), count)
    size = min(most, count // 10)
    return sorted(order[size:]), sorted(order[:size])


def glue_splits(train: Sequence[T], validation: Sequence[T]) -> dict[str, list[T]]:
    """Train, dev and test of a task of GLUE, which keeps the labels of its test split to itself.

    Published figures are of the validation split. So that is what is called test here, looked at
    once, and dev is held out of train.
    """
    kept, dev = held_out(len(train))
    return {
        "train": [train[i] for i in kept],
        "dev": [train[i] for i in dev],
        "test": list(validation),
    }


def padded(
    rows: Sequence[Sequence[int]], value: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, filled up at their ends to the longest one, and the mask of what was there.

    Returns:
        Two rows x tokens tensors of whole numbers.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(tokens)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return tokens.to(device), mask.to(device)
