"""What of two checkpoints a LoRA can hold, and what it leaves out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.extract_targets needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.stored_layers import StoredLayers
from lorambo_adapters.spectra.tensor_files import TensorFiles, TensorInfo, tensor_info

Stored = str | os.PathLike[str] | Mapping[str, torch.Tensor]
"""A folder or file of a checkpoint, or a state dict."""

# Whose linear layers are stored as in x out (transformers' Conv1D).
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_EMBEDDINGS = re.compile(
    r"(.*\.)?(embed(_\w+)?|\w*embeddings?|wte|wpe|shared|relative_attention_bias)"
)


def check_stored(*checkpoints: object) -> None:
    """Refuse what is neither a path nor a state dict.

    Raises:
        ValueError: one is something else.
    """
    for which in checkpoints:
        if not isinstance(which, str | os.PathLike | Mapping):
            raise ValueError(
                f"expected a path or a state dict, got {type(which).__name__}: pass the "
                "state_dict() of a model"
            )


def refuse_others(layers: StoredLayers) -> None:
    """Refuse embedding tables, by their names, and stacked experts.

    Raises:
        ValueError: there are some.
    """
    experts = [name for name, layer in layers.layers.items() if len(layer.info.shape) == 3]
    tables = [name for name in layers.layers if _EMBEDDINGS.fullmatch(name)]
    for what, names in (("stacked experts", experts), ("embedding tables", tables)):
        if names:
            raise ValueError(
                f"{layers.label}: expected linear layers, got {what} ({names[0]!r} and "
                f"{len(names) - 1} more), which are not extracted: leave them out with exclude"
            )


def is_transposed(base: Stored) -> bool:
    """Whether a checkpoint's config.json says that linear layers are stored as in x out."""
    if isinstance(base, Mapping):
        return False
    path = Path(base)
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") in _TRANSPOSED
    except (OSError, ValueError, AttributeError):
        return False


def other_differences(base: Stored, tuned: Stored, covered: Collection[str]) -> list[str]:
    """The keys of tensors that are not covered, and not equal in both checkpoints."""
    infos, read = zip(*(_tensors(which) for which in (base, tuned)), strict=True)
    found: list[str] = []
    for key in dict.fromkeys([*infos[0], *infos[1]]):
        if key in covered:
            continue
        both = key in infos[0] and key in infos[1] and infos[0][key].shape == infos[1][key].shape
        if both:
            before, after = (one(key) for one in read)
            common = torch.promote_types(before.dtype, after.dtype)
            both = torch.equal(before.to(common), after.to(before.device, common))
        if not both:
            found.append(key)
    return found


def _tensors(
    which: Stored,
) -> tuple[Mapping[str, TensorInfo], Callable[[str], torch.Tensor]]:
    if isinstance(which, Mapping):
        state = {key: value for key, value in which.items() if isinstance(value, torch.Tensor)}
        return {key: tensor_info(value) for key, value in state.items()}, state.__getitem__
    files = TensorFiles(which)
    return files, files.read
