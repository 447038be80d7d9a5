"""Ranks that come and go in tensors of fixed shape: a mask between the two factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.mask needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import AdapterLayer, adapter_layers
from lorambo_adapters.ranks.sharded import peeled
from lorambo_adapters.ranks.transaction import Transaction


class MaskedLinear(torch.nn.Linear):
    """A factor A whose masked rows have no part in the output, and get the gradient 0."""

    rank_mask: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """A x, times the mask."""
        product = super().forward(input)
        return product * self.rank_mask.to(product.dtype)


class MaskedConv2d(torch.nn.Conv2d):
    """`MaskedLinear` for the factor A of a convolution."""

    rank_mask: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The convolution, times the mask by channels."""
        product = super().forward(input)
        return product * self.rank_mask.to(product.dtype)[:, None, None]


_MASKED: Mapping[type, type] = {
    torch.nn.Linear: MaskedLinear,
    torch.nn.Conv2d: MaskedConv2d,
}


def active_ranks(model: torch.nn.Module, adapter: str = "default") -> dict[str, int]:
    """The ranks that count, by layer: those of the factors, less masked ones.

    Args:
        model: as `resize` takes it.
        adapter: the adapter's name.

    Raises:
        ValueError: as `adapter_layers`.
    """
    layers = adapter_layers(peeled(model)[0], adapter)
    return {name: len(layer.active) for layer in layers.values() for name in layer.names}


def mask_problem(layer: AdapterLayer) -> str | None:
    """Why a layer's ranks cannot be masked, or None."""
    if layer.is_embedding or hasattr(layer.module, "parameter_name"):
        return (
            f"layer {layer.name!r}: expected factors that are modules, got an embedding's or a "
            "wrapped parameter's, which PEFT multiplies without calling them; leave its rank as it "
            "is, or use mode='resize'"
        )
    kind = type(layer.factor_module("A"))
    if kind not in _MASKED and kind not in _MASKED.values():
        return f"layer {layer.name!r}: expected a Linear or Conv2d as A, got {kind.__name__}"
    return None


def set_mask(changes: Transaction, layer: AdapterLayer, active: torch.Tensor) -> None:
    """Note that these ranks alone are to count; the first time the class of A's module changes."""
    module: Any = layer.factor_module("A")
    mask = torch.zeros(layer.rank, dtype=torch.bool, device=module.weight.device)
    mask[active.to(mask.device)] = True
    if type(module) in _MASKED.values():
        changes.write(module.rank_mask, mask)
        return
    # A subclass in place, not a hook: torch.compile notices it, also in a model compiled before.
    # Not in the state dict, whose keys PEFT checks: what is masked has zero columns in B anyway.
    changes.item(module._buffers, "rank_mask", mask)
    names = module._non_persistent_buffers_set
    changes.do(lambda: names.add("rank_mask"), lambda: names.discard("rank_mask"))
    changes.attribute(module, "__class__", _MASKED[type(module)])


def remove_mask(changes: Transaction, layer: AdapterLayer) -> None:
    """Note that all ranks are to count, if some are masked."""
    module: Any = None if layer.is_embedding else layer.factor_module("A")
    plain = next((plain for plain, masked in _MASKED.items() if type(module) is masked), None)
    if plain is not None:
        names = module._non_persistent_buffers_set
        changes.attribute(module, "__class__", plain)
        changes.do(lambda: names.discard("rank_mask"), lambda: names.add("rank_mask"))
        changes.remove(module._buffers, "rank_mask")
