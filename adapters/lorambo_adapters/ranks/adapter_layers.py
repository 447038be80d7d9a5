"""The layers of one adapter in a live PEFT model, and their factors as rows, a rank each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.adapter_layers needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.sharded import is_sharded, whole
from lorambo_adapters.spectra.lora_modules import lora_layers, variant_of
from lorambo_adapters.spectra.low_rank import refuse
from lorambo_adapters.targets import unwrap

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")

# Variants whose function depends on B A alone, and on what keeps its shape (DoRA's magnitudes).
_SUPPORTED = ("Dora", "_Dora", "ALora")


@dataclass(frozen=True)
class AdapterLayer:
    """One adapter's factors in one layer of PEFT's LoRA.

    Attributes:
        name: the module's as PEFT's patterns see it; of a wrapped parameter, the parameter's.
        module: PEFT's layer.
        adapter: the adapter's name.
        experts: how many matrices the adapter has here; 1 but for a 3-D parameter.
        stacked: whether each expert is a layer of its own, `name.index`.
    """

    name: str
    module: Any
    adapter: str
    experts: int
    stacked: bool

    @property
    def names(self) -> list[str]:
        """What an allocation calls the layer: one name, or one an expert."""
        return [f"{self.name}.{i}" for i in range(self.experts)] if self.stacked else [self.name]

    @property
    def rank(self) -> int:
        """Rows of A (of an expert)."""
        return int(self.module.r[self.adapter])

    @property
    def scale(self) -> float:
        """The factor of B A that is in use."""
        return float(self.module.scaling[self.adapter])

    @property
    def is_embedding(self) -> bool:
        """Whether the factors are parameters of the layer itself, not modules in it."""
        return self.adapter in self.module.lora_embedding_A

    @property
    def is_dora(self) -> bool:
        """Whether there is a magnitude beside the factors."""
        return self.adapter in self.module.lora_magnitude_vector

    def holder(self, side: Side) -> tuple[Any, str]:
        """Where the factor is a parameter: a mapping from names to parameters, and the name."""
        if self.is_embedding:
            return getattr(self.module, f"lora_embedding_{side}"), self.adapter
        return self.factor_module(side)._parameters, "weight"

    def factor_module(self, side: Side) -> Any:
        """The linear layer or convolution that is the factor."""
        return getattr(self.module, f"lora_{side}")[self.adapter]

    def parameter(self, side: Side) -> torch.nn.Parameter:
        """The factor."""
        mapping, key = self.holder(side)
        return mapping[key]

    @property
    def active(self) -> torch.Tensor:
        """The ranks that count: all, or those that a mask leaves (`mask.py`)."""
        mask = None if self.is_embedding else getattr(self.factor_module("A"), "rank_mask", None)
        if mask is None:
            return torch.arange(self.rank)
        return mask.nonzero()[:, 0].cpu()

    def rows(self, side: Side, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the factor's shape as experts x rank x width.

        PEFT keeps an expert's rows of A together, and its columns of B `experts` apart.
        """
        flat = tensor.flatten(1)
        if side == "A":
            return flat.view(self.experts, -1, flat.shape[1])
        return flat.view(flat.shape[0], -1, self.experts).permute(2, 1, 0)

    def tensor(self, side: Side, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`, in the type, on the device and in the dimensions of `like`."""
        experts, rank, width = rows.shape
        if side == "A":
            shape = (experts * rank, *like.shape[1:])
        else:
            rows = rows.permute(2, 1, 0)
            shape = (width, experts * rank, *like.shape[2:])
        return rows.reshape(shape).to(like.device, like.dtype).contiguous()

    def factors(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, A) of an expert, d x r and r x k, detached, with the ranks that count."""
        left, right = (self.rows(side, whole(self.parameter(side).detach())) for side in ("B", "A"))
        active = self.active.to(left.device)
        return left[expert][active].T, right[expert][active]


def adapter_layers(model: torch.nn.Module, adapter: str) -> dict[str, AdapterLayer]:
    """Find the layers that have this adapter, in the order of the model's modules.

    Args:
        model: a `PeftModel`, or any model into which PEFT has put LoRA layers.
        adapter: the adapter's name.

    Raises:
        ValueError: there is no such adapter, or its factors in some layer cannot be resized: they
            are merged, of another kind of adapter, of a convolution with groups, shared with
            another layer, not plain parameters (sharded, quantised) or without data.
    """
    layers: dict[str, AdapterLayer] = {}
    known: set[str] = set()
    for name, module in dict(lora_layers(unwrap(model))).values():
        known |= set(module.scaling)
        if adapter in module.scaling:
            parameter = getattr(module, "parameter_name", None)
            full = name if parameter is None else f"{name}.{parameter}"
            stacked = parameter is not None and module.get_param().ndim == 3
            experts = int(getattr(module, "num_experts", 1))
            layers[full] = AdapterLayer(full, module, adapter, experts, stacked)
    if not layers:
        raise ValueError(
            f"adapter: expected one of {', '.join(map(repr, sorted(known))) or 'PEFT (none found)'}"
            f", got {adapter!r}"
        )
    refuse([problem for layer in layers.values() for problem in _problems(layer)])
    owners: dict[int, str] = {}
    for layer in layers.values():
        for side in SIDES:
            other = owners.setdefault(id(layer.parameter(side)), layer.name)
            if other != layer.name:
                raise ValueError(
                    f"layer {layer.name!r}: expected factors of its own, got those of {other!r}"
                )
    return layers


def _problems(layer: AdapterLayer) -> Iterator[str]:
    module, where = layer.module, f"layer {layer.name!r}"
    if module.merged_adapters:
        yield f"{where}: expected no merged adapter; call unmerge_adapter() first"
        return
    variant = variant_of(module, layer.adapter)
    if variant and not variant.startswith(_SUPPORTED):
        yield f"{where}: expected a plain LoRA or a DoRA, got {variant}"
        return
    for side in SIDES:
        mapping, key = layer.holder(side)
        if key not in mapping:
            yield f"{where}: expected {side} to be a parameter, got one that is calculated"
            return
        weight = layer.parameter(side)
        if type(weight) is not torch.nn.Parameter and not is_sharded(weight):
            kind = type(weight).__name__
            yield f"{where}: expected {side} to be a parameter, got {kind}"
        elif weight.is_meta or not weight.numel():
            yield f"{where}: expected {side} to have its numbers here, got none (meta, or sharded)"
        elif not weight.is_floating_point():
            yield f"{where}: expected {side} in floating point, got {weight.dtype}"
    if not layer.is_embedding and getattr(layer.factor_module("B"), "groups", 1) > 1:
        yield f"{where}: expected a convolution without groups, among which PEFT splits the ranks"
