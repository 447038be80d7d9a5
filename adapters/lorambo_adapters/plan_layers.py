"""The layers of a model that is to be planned for, from headers, a config or a module alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.plan_layers needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer, find_layers
from lorambo_adapters.spectra.stored_layers import stored_layers

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_WEIGHTS += (".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class PlannedLayer:
    """What is known of a layer before it is read.

    Attributes:
        name: the layer's.
        shape: (d, k); of a checkpoint's headers as it is stored (GPT-2's `Conv1D` is k x d).
        dtype: of its matrix.
        stored: the bytes that it takes where it lies.
        kind: as `TargetLayer` has it; "linear" or "expert" for tensors in files.
        hooked: whether data can be run through it: not for a convolution with groups.
        share: of the tokens, how many reach it: of an expert as many as of each other one.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    stored: int
    kind: str = "linear"
    hooked: bool = True
    share: float = 1.0

    @property
    def size(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class PlannedModel:
    """Where an extraction would find its layers.

    Attributes:
        label: what to call it.
        layers: in the order in which they would be read.
        module: where there is one, perhaps on the meta device.
        in_files: whether the weights would be read from disk: not a live module's.
    """

    label: str
    layers: tuple[PlannedLayer, ...]
    module: torch.nn.Module | None
    in_files: bool


def planned_model(
    source: str | os.PathLike[str] | torch.nn.Module,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
) -> PlannedModel:
    """Find the layers. No weight is read, and nothing is downloaded.

    Args:
        source: a folder or file of weights, of which the headers are read; a folder without
            weights but with a transformers `config.json`, or that file, whose model is built on the
            meta device; or a module.
        targets: as PEFT's `target_modules`.
        exclude: as PEFT's `exclude_modules`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is none of these, no layer is a target, or stored weights are quantised.
        ModuleNotFoundError: a config needs transformers, which is not installed.
    """
    if isinstance(source, torch.nn.Module):
        return PlannedModel(f"the {type(source).__name__}", _live(source, targets, exclude),
                            source, False)  # fmt: skip
    path = Path(source)
    config = _config(path)
    if config is not None:
        module = _on_meta(config)
        label = config.resolve().parent.name if config.name == "config.json" else config.name
        return PlannedModel(label, _live(module, targets, exclude), module, True)
    found = stored_layers(path, targets, exclude)
    layers: list[PlannedLayer] = []
    for name, layer in found.layers.items():
        if not layer.info.is_float:
            raise ValueError(
                f"{found.label}: expected floating-point weights of 16 bits or more, got "
                f"{layer.place} of type {layer.info.dtype}"
            )
        dtype: torch.dtype = getattr(torch, layer.info.dtype)
        stored = layer.shape[0] * layer.shape[1] * dtype.itemsize
        kind = "linear" if len(layer.info.shape) == 2 else "expert"
        layers.append(PlannedLayer(name, layer.shape, dtype, stored, kind))
    return PlannedModel(found.label, tuple(layers), None, True)


def _live(
    module: torch.nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str] | None
) -> tuple[PlannedLayer, ...]:
    config: Any = getattr(module, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    found = find_layers(module, targets, exclude=exclude)
    return tuple(_planned(layer, chosen) for layer in found)


def _planned(layer: TargetLayer, chosen: int | None) -> PlannedLayer:
    weight: Any = getattr(layer.module, layer.parameter)
    # A weight of 4 or 8 bits comes out in half precision.
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float16
    count = 1 if layer.expert is None else weight.shape[0]
    groups = getattr(layer.module, "groups", 1) if layer.kind == "conv2d" else 1
    stored = weight.numel() * weight.element_size() // count
    share = 1.0 if layer.expert is None or chosen is None else min(1.0, chosen / count)
    return PlannedLayer(layer.name, layer.shape, dtype, stored, layer.kind, groups == 1, share)


def _config(path: Path) -> Path | None:
    """The config to build from, if the path is or has nothing else."""
    if path.is_dir():
        inside = path / "config.json"
        weights = any(f.name.endswith(_WEIGHTS) for f in path.iterdir())
        return inside if inside.is_file() and not weights else None
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        return path
    return None


def _on_meta(path: Path) -> torch.nn.Module:
    try:
        import transformers
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{path} needs transformers: pip install 'lorambo-alloc[peft]'", name=missing.name
        ) from missing
    try:
        # Left open, it would ask on the terminal whether to run code that lies in the folder.
        config: Any = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    # Wrong values fail in the config's own code, in any way.
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(
            f"{path}: expected a config.json of a model that transformers knows: {reason}"
        ) from error
    named: list[Any] = [
        getattr(transformers, str(name), None) for name in config.architectures or ()
    ]
    builders = [cls._from_config for cls in named if hasattr(cls, "_from_config")]
    builders += [transformers.AutoModelForCausalLM.from_config, transformers.AutoModel.from_config]
    reasons: list[Exception] = []
    for build in builders:
        try:
            with torch.device("meta"):
                return build(config).eval()
        # A config with sizes that do not fit fails in the model's own code, in any way.
        except Exception as error:
            reasons.append(error)
    reason = str(reasons[0]).partition("\n")[0]
    raise ValueError(f"{path}: expected a config of which a model can be built: {reason}")
