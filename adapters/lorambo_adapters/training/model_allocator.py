"""An `OnlineAllocator` for the adapter of a live model: its layers, costs, limits and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.model_allocator needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import AdapterLayer, adapter_layers
from lorambo_adapters.ranks.mask import active_ranks, mask_problem
from lorambo_adapters.ranks.presence import cannot_leave, cannot_return, spare_layers
from lorambo_adapters.ranks.sharded import peeled
from lorambo_adapters.spectra.lora_modules import lora_layers
from lorambo_adapters.targets import unwrap
from lorambo_alloc import BudgetSchedule, OnlineAllocator
from lorambo_alloc.costs import UniformRank
from lorambo_alloc.limits import Limit


def allocator_for(
    model: torch.nn.Module,
    budget: int | UniformRank | BudgetSchedule,
    adapter: str = "default",
    *,
    mode: Literal["resize", "mask"] = "resize",
    **options: Any,
) -> OnlineAllocator:
    """An `OnlineAllocator` whose layers, costs, limits and present ranks are those of a model.

    A rank of a d x k layer costs d + k parameters, so the budget is a number of parameters. Experts
    of one parameter are tied. Limits are what `resize` can do: at least rank 1 where it cannot take
    an adapter away, at most min(d, k), in mode "mask" at most the rank of the tensors, and the
    present rank where it cannot be changed. A layer from which the adapter was taken away is among
    them with rank 0, if no other adapter is there; one that PEFT has not wrapped is not.

    Args:
        model: as `resize` takes it.
        budget: as `OnlineAllocator` takes it; `uniform_rank(r)` counts all of these layers.
        adapter: the adapter's name.
        mode: as `RankController` is to have it.
        options: of `OnlineAllocator`. Limits and ties among them hold in addition; `costs=`,
            `ranks=` replace what is found.

    Raises:
        ValueError: as `adapter_layers`, or as `OnlineAllocator`.
        InfeasibleError: the least ranks cost more than the budget.

    Example:
        >>> import torch
        >>> from lorambo_alloc import uniform_rank
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> allocator = allocator_for(model, uniform_rank(2), period=100)
        >>> allocator.costs, allocator.ranks, allocator.budget_at(0)
        ({'0': 11, '1': 9}, {'0': 2, '1': 2}, 40)
    """
    if mode not in ("resize", "mask"):
        raise ValueError(f"mode: expected 'resize' or 'mask', got {mode!r}")
    inner, _ = peeled(model)
    masked = mode == "mask"
    layers = adapter_layers(inner, adapter)
    template = next(iter(layers.values()))
    adapted = {id(layer.module): layer for layer in layers.values()}
    costs: dict[str, int] = {}
    ranks: dict[str, int] = {}
    least: dict[str, int] = {}
    most: dict[str, int] = {}
    tied: list[list[str]] = []
    spare = {} if masked else spare_layers(inner, adapter)
    for name, module in dict(lora_layers(unwrap(inner))).values():
        layer = adapted.get(id(module))
        if layer is not None:
            cost, present, bounds = _of_layer(layer, masked)
            for each in layer.names:
                costs[each], ranks[each] = cost, present
                least[each], most[each] = bounds
            if layer.stacked:
                tied.append(layer.names)
        elif name in spare and not module.scaling and not cannot_return(name, module, template):
            k = module.in_features * math.prod(getattr(module.get_base_layer(), "kernel_size", ()))
            d = module.out_features
            costs[name], ranks[name], least[name], most[name] = k + d, 0, 0, min(k, d)
    options["tied"] = [*tied, *options.get("tied", ())]
    options["min_rank"] = _both(least, options.get("min_rank"), max)
    options["max_rank"] = _both(most, options.get("max_rank"), min)
    chosen: dict[str, Any] = {"costs": costs, "ranks": ranks} | options
    return OnlineAllocator(budget=budget, **chosen)


def _of_layer(layer: AdapterLayer, masked: bool) -> tuple[int, int, tuple[int, int]]:
    """The cost of a rank (of one expert), the present rank, and the least and the greatest one."""
    present = len(layer.active)
    d, k = (layer.parameter(s).numel() // (layer.rank * layer.experts) for s in ("B", "A"))
    attention = isinstance(layer.module.get_base_layer(), torch.nn.MultiheadAttention)
    if attention or (masked and mask_problem(layer)):
        bounds = present, present
    elif masked:
        bounds = 0, layer.rank
    else:
        bounds = int(cannot_leave(layer) is not None), min(d, k)
    return d + k, present, bounds


def _both(own: Mapping[str, int], given: Limit, stricter: Callable[..., int]) -> dict[str, int]:
    """The model's limits, and those that the caller gave for all layers or some."""
    if given is None:
        return dict(own)
    named = given if isinstance(given, Mapping) else dict.fromkeys(own, given)
    return (
        {**named}
        | {name: stricter(limit, named[name]) for name, limit in own.items() if name in named}
        | {name: limit for name, limit in own.items() if name not in named}
    )


def ranks_of(model: torch.nn.Module, adapter: str, names: Iterable[str]) -> dict[str, int]:
    """The ranks that these layers have; 0 where there is no adapter."""
    present = active_ranks(model, adapter)
    return {name: present.get(name, 0) for name in names}


def check_ranks(allocator: OnlineAllocator, model: torch.nn.Module, adapter: str) -> None:
    """Make sure that the allocator's layers and ranks are the model's.

    Raises:
        ValueError: a layer is not there, or has another rank.
    """
    present, spare = active_ranks(model, adapter), spare_layers(model, adapter)
    for name, rank in allocator.ranks.items():
        if name not in present and name not in spare:
            raise ValueError(
                f"layer {name!r}: expected one that has adapter {adapter!r}, or from "
                "which it was taken away, got none; make the adapter with the layers that the "
                "training began with, then give it the checkpoint's ranks (restore_ranks)"
            )
        if rank != present.get(name, 0):
            raise ValueError(
                f"layer {name!r}: expected the allocator to have the model's rank, "
                f"{present.get(name, 0)}, got {rank}; make it by allocator_for, or give the "
                "model the checkpoint's ranks first (restore_ranks)"
            )
