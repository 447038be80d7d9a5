"""An adapter's tensors under PEFT's keys, and the folder that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.adapter_writer needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.lora_keys import PREFIX
from lorambo_adapters.ranks.new_folder import new_folder
from lorambo_adapters.ranks.tensor_writer import Planned, tensor_writer, writing_order


def adapter_tensors(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    biases: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Tensors by PEFT's keys, on the CPU, none of which shares memory with a model.

    Args:
        factors: layer to lora_A and lora_B.
        biases: layer to its bias; PEFT wraps the layers that have factors.
        saved: tensors of whole modules, by the name that the model's `state_dict` has.
    """
    named = {f"{name}.lora_A.weight": right for name, (right, _) in factors.items()}
    named |= {f"{name}.lora_B.weight": left for name, (_, left) in factors.items()}
    named |= {f"{n}.{'base_layer.' * (n in factors)}bias": bias for n, bias in biases.items()}
    named |= saved
    return {f"{PREFIX}{key}": tensor.detach().to("cpu", copy=True) for key, tensor in named.items()}


def write_adapter(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """A new folder with adapter_model.safetensors and adapter_config.json, whole or not at all.

    Args:
        path: of the folder.
        tensors: by PEFT's keys.
        config: PEFT's.
        about: how the adapter was made, for the file's header.

    Raises:
        OSError: the folder is there and not empty, or cannot be made.
    """
    plan = {key: Planned(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    metadata = {"format": "pt", "lorambo_extract": json.dumps(about)}
    with new_folder(path) as folder:
        with tensor_writer(folder / "adapter_model.safetensors", plan, metadata) as writer:
            for key in writing_order(plan):
                writer.add(key, tensors[key])
        text = json.dumps(config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
