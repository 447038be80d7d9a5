"""The text in a LoRA file's header: kept, brought up to date, and extended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DONE = "lorambo_compress"
"""The key of what was done."""

_DIFFUSERS = "lora_adapter_metadata"
# Of the tensors as they were: kohya's, and those of the Stability AI model specification.
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def read_metadata(lora: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file, or of the one in a folder; empty for anything else."""
    if isinstance(lora, Mapping):
        return {}
    path = Path(lora)
    if path.is_dir():
        named = path / "adapter_model.safetensors"
        found = [named] if named.is_file() else sorted(path.glob("*.safetensors"))
        path = found[0] if len(found) == 1 else path
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return dict(file.metadata() or {})


def new_metadata(
    old: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]], done: Mapping[str, Any]
) -> dict[str, str]:
    """Metadata after the ranks have changed.

    Args:
        old: before.
        configs: component to PEFT's configuration after it, for what diffusers keeps in the file.
        done: what was done, as JSON can hold it.

    Example:
        >>> new_metadata({"ss_network_dim": "16", "sshs_model_hash": "c0"}, {}, {"budget": "50%"})
        {'ss_network_dim': 'Dynamic', 'lorambo_compress': '{"budget": "50%"}'}
    """
    new = {key: text for key, text in old.items() if key not in _HASHES}
    for key in ("ss_network_dim", "ss_network_alpha"):  # as kohya's resize_lora.py has it
        if key in new:
            new[key] = "Dynamic"
    if _DIFFUSERS in new:
        entries = {
            f"{component}.{key}" if component else key: value
            for component, config in configs.items()
            for key, value in config.items()
        }
        new[_DIFFUSERS] = json.dumps(entries, indent=2, sort_keys=True)
    new[DONE] = json.dumps(dict(done))
    return new
