"""The layers whose ranks can be measured while they train, and why others cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.probe_layers needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.ranks.adapter_layers import AdapterLayer, adapter_layers
from lorambo_adapters.ranks.presence import spare_layers
from lorambo_adapters.spectra.lora_modules import lora_layers, variant_of
from lorambo_adapters.targets import is_conv1d, unwrap
from lorambo_adapters.training.curves import Triplets, product_pairs


@dataclass(frozen=True)
class Place:
    """A layer that can be measured.

    Attributes:
        layer: its base.
        present: how many ranks it has.
        pairs: (U, sigma, V) of s B A, without those that are zero as they have learnt nothing yet.
    """

    layer: TargetLayer
    present: int
    pairs: Triplets


def find_places(model: torch.nn.Module, adapter: str) -> tuple[dict[str, Place], dict[str, str]]:
    """The layers that can be measured, in the order of the model, and why others cannot.

    Layers from which the adapter was taken away are among them, with 0 ranks.

    Raises:
        ValueError: there is no such adapter, or it is not active, or no layer can be measured.
        FloatingPointError: factors are not finite; the message names the layer.

    Note:
        Sharded factors are gathered, which every process has to do.
    """
    skipped: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, layer in adapter_layers(model, adapter).items():
        module = layer.module
        if adapter not in module.active_adapters or module.disable_adapters:
            raise ValueError(
                f"adapter: expected an active one, got {adapter!r}, which is not in layer {name!r}"
            )
        problem = _problem(layer)
        skipped.update(dict.fromkeys(layer.names, problem) if problem else {})
        if not problem:
            found[name] = layer
    for name, module in spare_layers(model, adapter).items():
        problem = _base_problem(module.get_base_layer())
        if problem:
            skipped[name] = problem
        else:
            found[name] = module
    order = [name for _, (name, _) in lora_layers(unwrap(model)) if name in found]
    places = {name: _place(name, found[name]) for name in order}
    if not places:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"expected a layer that can be measured, got none ({reasons})")
    return places, skipped


def _problem(layer: AdapterLayer) -> str | None:
    """Why an adapter's layer cannot be measured, or None."""
    module = layer.module
    if hasattr(module, "parameter_name"):
        return "a wrapped parameter, of whose tokens the samples are not known"
    variant = variant_of(module, layer.adapter)
    if variant.startswith("ALora"):
        return "an aLoRA, which applies to some of the tokens only"
    dropout = module.lora_dropout[layer.adapter] if layer.adapter in module.lora_dropout else None
    if variant and module.training and not isinstance(dropout, torch.nn.Identity | None):
        return "a DoRA with dropout, whose base output lacks part of the gradient"
    return _base_problem(module.get_base_layer())


def _base_problem(base: torch.nn.Module) -> str | None:
    if isinstance(base, torch.nn.Linear) or is_conv1d(base):
        return None
    kind = type(base).__name__
    return f"a {kind}: expected a linear layer, whose tokens are its samples' own"


def _place(name: str, found: Any) -> Place:
    """A layer of the adapter, or a module of PEFT's from which it was taken."""
    module = found.module if isinstance(found, AdapterLayer) else found
    base = module.get_base_layer()
    shape = module.out_features, module.in_features
    layer = TargetLayer(name, shape, "conv1d" if is_conv1d(base) else "linear", base)
    if isinstance(found, AdapterLayer):
        left, right = found.factors(0)
        if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise FloatingPointError(
                f"layer {name!r}: expected finite factors, got NaN or infinity"
            )
    else:
        device = base.weight.device
        left, right = (
            torch.zeros(shape[0], 0, device=device),
            torch.zeros(0, shape[1], device=device),
        )
    scale = found.scale if isinstance(found, AdapterLayer) else 1.0
    return Place(layer, left.shape[1], product_pairs(left, right, scale))
