"""Layers that lose an adapter altogether (rank 0), and layers that get it back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.presence needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import SIDES, AdapterLayer, Side
from lorambo_adapters.ranks.growth import Gradient, new_rows
from lorambo_adapters.ranks.scaling import alpha_for, rank_factor
from lorambo_adapters.ranks.transaction import Transaction
from lorambo_adapters.spectra.lora_modules import lora_layers
from lorambo_adapters.targets import unwrap

_PREFIX = "base_model.model."
_LISTS = ("params", "param_names")
_SETTINGS = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias")


Arrival: TypeAlias = tuple[Any, torch.nn.Parameter, str]
"""An optimizer's group, a parameter that is to be in it, and its name."""


def spare_layers(model: torch.nn.Module, adapter: str) -> dict[str, Any]:
    """PEFT's layers that do not have this adapter now, by name; of parameters none."""
    return {
        name: module
        for name, module in dict(lora_layers(unwrap(model))).values()
        if adapter not in module.scaling and not hasattr(module, "parameter_name")
    }


def cannot_leave(layer: AdapterLayer) -> str | None:
    """Why a layer cannot lose its adapter, or None."""
    module, adapter = layer.module, layer.adapter
    what = None
    if hasattr(module, "parameter_name"):
        what = "a wrapped parameter's adapter, which PEFT has in all adapters or in none"
    elif layer.is_dora:
        what = "a DoRA, whose magnitudes change the layer beyond B A"
    elif module.lora_bias.get(adapter):
        what = "an adapter with a bias of its own"
    if what is None:
        return None
    return f"layer {layer.name!r}: expected a rank >= 1, got 0 for {what}; use mode='mask'"


def cannot_return(name: str, module: Any, template: AdapterLayer) -> str | None:
    """Why a layer cannot get the adapter, as `template` has it, or None."""
    other, adapter, base = template.module, template.adapter, module.get_base_layer()
    what = None
    if module.merged_adapters:
        what = "one with a merged adapter"
    elif template.is_dora or adapter in getattr(other, "lora_variant", {}):
        what = "an adapter that is no plain LoRA"
    elif other.lora_bias.get(adapter):
        what = "an adapter with a bias of its own"
    elif not module.in_features or getattr(base, "groups", 1) > 1:
        what = f"a {type(base).__name__}"
    if what is None:
        return None
    return f"layer {name!r}: expected a plain LoRA that can be given to the layer, got {what}"


def take_away(changes: Transaction, layer: AdapterLayer, optimizer: Any) -> None:
    """Note that a layer has the adapter no longer, nor the optimizer its factors.

    The layer keeps PEFT's wrapper, which calculates the base layer alone if it has no adapter.
    """
    module, adapter = layer.module, layer.adapter
    for name in (*module.adapter_layer_names, *module.other_param_names):
        entries: Any = getattr(module, name, {})
        if adapter in entries:
            modules = isinstance(entries, torch.nn.ModuleDict)
            changes.remove(entries._modules if modules else entries, adapter)
    if optimizer is None:
        return
    for side in SIDES:
        parameter = layer.parameter(side)
        for group in optimizer.param_groups:
            _leave(changes, group, parameter)
        if parameter in optimizer.state:
            changes.remove(optimizer.state, parameter)


def bring_back(
    changes: Transaction,
    name: str,
    module: Any,
    rank: int,
    layers: Mapping[str, AdapterLayer],
    optimizer: Any,
    *,
    gradient: Gradient | None,
    initialisation: object,
) -> tuple[int, int | float, list[Arrival]]:
    """Note that a layer has the adapter: B = 0 (of an embedding A = 0), as the others have it.

    Its scale, dropout, type and `requires_grad` are those of the adapter's first layer, and in the
    optimizer its factors belong to the group that has those of the other layers.

    Returns:
        The parameters of a rank, alpha, and what is to `join` the optimizer.

    Raises:
        ValueError: the gradient does not fit, or the others' factors are in several groups.
    """
    template = next(iter(layers.values()))
    adapter, other = template.adapter, template.module
    shapes, factors = _blank(module, rank)
    d, k = shapes["B"][0], math.prod(shapes["A"][1:])
    device = next(module.get_base_layer().parameters()).device
    empty = torch.zeros(d, 0, device=device), torch.zeros(0, k, device=device)
    embedding = not factors
    rows = new_rows(
        rank, *empty, embedding=embedding, gradient=gradient, initialisation=initialisation
    )
    arrivals: list[Arrival] = []
    for side in SIDES:
        like = template.parameter(side)
        value = torch.zeros(shapes[side], dtype=like.dtype, device=device)
        if side == ("B" if embedding else "A"):
            value.copy_(rows.T if embedding else rows.view(shapes["A"]))
        parameter = torch.nn.Parameter(value, requires_grad=like.requires_grad)
        if embedding:
            changes.item(getattr(module, f"lora_embedding_{side}"), adapter, parameter)
        else:
            factors[side].weight = parameter
            factors[side].train(module.training)
            changes.item(getattr(module, f"lora_{side}")._modules, adapter, factors[side])
        if optimizer is not None:
            group = _group(optimizer, [layer.parameter(side) for layer in layers.values()], name)
            path = (
                f"lora_{'embedding_' * embedding}{side}.{adapter}{'' if embedding else '.weight'}"
            )
            inside = any(n.startswith(_PREFIX) for n in group.get("param_names", ()))
            arrivals.append((group, parameter, f"{_PREFIX * inside}{name}.{path}"))
    rslora = bool(other.use_rslora[adapter])
    scale = other.lora_alpha[adapter] / rank_factor(template.rank, rslora)
    alpha = alpha_for(rank, scale, rslora)
    settings = (rank, alpha, scale, rslora, False, False)
    for key, value in zip(_SETTINGS, settings, strict=True):
        changes.item(getattr(module, key), adapter, value)
    dropout = copy.deepcopy(other.lora_dropout[adapter])
    changes.item(module.lora_dropout._modules, adapter, dropout)
    return d + k, alpha, arrivals


def join(changes: Transaction, model: torch.nn.Module, arrivals: Sequence[Arrival]) -> None:
    """Note that parameters enter their groups, each before those that come later in the model.

    An optimizer's `state_dict` tells parameters by their place alone, so at another place they
    would get each other's state when it is loaded into an optimizer of the saved model.

    Args:
        changes: what is noted so far, with the modules that get the parameters.
        model: with these modules.
        arrivals: groups, parameters and their names.
    """
    if not arrivals:
        return
    lists = [group[key] for group, _, _ in arrivals for key in _LISTS if key in group]
    before = [list(items) for items in lists]

    def step() -> None:
        order = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        for group, parameter, name in arrivals:
            own, others = order[id(parameter)], group["params"]
            later = (i for i, other in enumerate(others) if order.get(id(other), -1) > own)
            place = next(later, len(others))
            others.insert(place, parameter)
            if "param_names" in group:
                group["param_names"].insert(place, name)

    def undo() -> None:
        for items, old in zip(lists, before, strict=True):
            items[:] = old

    changes.do(step, undo)


def _blank(module: Any, rank: int) -> tuple[dict[Side, tuple[int, ...]], dict[Side, Any]]:
    """The factors' shapes, and modules of these shapes without numbers; none for an embedding."""
    base, k, d = module.get_base_layer(), module.in_features, module.out_features
    if isinstance(base, torch.nn.Embedding):
        return {"A": (rank, k), "B": (d, rank)}, {}
    if hasattr(base, "kernel_size"):
        kind, ones = type(base), (1,) * (base.weight.ndim - 2)
        down = kind(k, rank, base.kernel_size, base.stride, base.padding, bias=False, device="meta")
        up = kind(rank, d, ones, ones, bias=False, device="meta")
    else:
        down = torch.nn.Linear(k, rank, bias=False, device="meta")
        up = torch.nn.Linear(rank, d, bias=False, device="meta")
    return {"A": tuple(down.weight.shape), "B": tuple(up.weight.shape)}, {"A": down, "B": up}


def _group(optimizer: Any, others: Sequence[torch.Tensor], name: str) -> Any:
    """The one group that has all of these that it trains."""
    ids = {id(other) for other in others}
    found = [g for g in optimizer.param_groups if any(id(p) in ids for p in g["params"])]
    if len(found) != 1:
        raise ValueError(
            f"layer {name!r}: expected one group of the optimizer with the other layers' factors, "
            f"to which its own belong, got {len(found)}; keep its rank >= 1, or use mode='mask'"
        )
    return found[0]


def _leave(changes: Transaction, group: Any, parameter: torch.Tensor) -> None:
    """Note that a group has this parameter no longer, nor its name, if it keeps names."""
    lists = [group[key] for key in _LISTS if key in group]
    before = [list(items) for items in lists]

    def step() -> None:
        place = next(i for i, other in enumerate(group["params"]) if other is parameter)
        for items in lists:
            del items[place]

    def undo() -> None:
        for items, old in zip(lists, before, strict=True):
            items[:] = old

    if any(other is parameter for other in group["params"]):
        changes.do(step, undo)
