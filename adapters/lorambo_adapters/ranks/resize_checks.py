"""What can be asked of a live model: the ranks, and whether its parameters can be replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.resize_checks needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import SIDES, AdapterLayer
from lorambo_adapters.ranks.mask import mask_problem
from lorambo_adapters.ranks.presence import cannot_leave, cannot_return
from lorambo_adapters.ranks.sharded import flattened, is_sharded, wrapper_of
from lorambo_adapters.spectra.low_rank import refuse
from lorambo_alloc.costs import whole_number

_WAY_OUT = (
    "use mode='mask', or drop the wrapper, resize the model inside in every process (with one seed "
    "for torch, which draws new directions) and wrap it anew"
)


def wanted_ranks(
    layers: Mapping[str, AdapterLayer],
    spare: Mapping[str, Any],
    ranks: Mapping[str, int],
    masked: bool,
) -> dict[str, int]:
    """The rank of every layer afterwards, by `AdapterLayer.name`, and of those in `spare`."""
    if not isinstance(ranks, Mapping):
        raise ValueError(f"ranks: expected a mapping of layer to rank, got {type(ranks).__name__}")
    given: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    returning = dict.fromkeys(spare, 0)
    owner = {name: key for key, layer in layers.items() for name in (*layer.names, key)}
    for name, rank in ranks.items():
        key = owner.get(name)
        rank = whole_number(rank, f"layer {name!r}: rank", 0)
        if key is None:
            if name in spare:
                returning[name] = rank
                problem = cannot_return(name, spare[name], next(iter(layers.values())))
                problems += [problem] if rank and problem else []
            elif rank:
                problems.append(
                    f"layer {name!r}: expected one that has the adapter, or in mode 'resize' one "
                    "it was taken from, got another; give it a rank where the adapter is made"
                )
            continue
        given.setdefault(key, {})[name] = rank
        if masked and rank > layers[key].rank:
            problems.append(
                f"layer {name!r}: expected at most {layers[key].rank} ranks, those of its tensors, "
                f"for mode='mask', got {rank}"
            )
    for key, found in given.items():
        names = layers[key].names
        if len(set(found.values())) > 1 or (key not in found and set(found) != set(names)):
            problems.append(
                f"layer {key!r}: expected one rank for all of its {len(names)} experts, which "
                f"share an adapter in PEFT, got {found}; allocate with tied=[...] for these layers"
            )
    wanted = {
        key: next(iter(given[key].values())) if key in given else len(layer.active)
        for key, layer in layers.items()
    }
    if not masked:  # a layer that is not named, too, if all of its ranks are masked
        leaving = [layer for key, layer in layers.items() if not wanted[key]]
        problems += [problem for layer in leaving if (problem := cannot_leave(layer))]
    refuse(problems, "ranks")
    wanted |= returning
    if not masked and not any(wanted.values()):
        raise ValueError("ranks: expected a rank >= 1 for some layer, got 0 for all")
    return wanted


def problems_of(
    model: torch.nn.Module,
    layers: Mapping[str, AdapterLayer],
    wanted: Mapping[str, int],
    parallel: Any,
    masked: bool,
) -> Iterator[str]:
    """Why this cannot be done in this mode."""
    changing = [
        layer
        for key, layer in layers.items()
        if wanted[key] != len(layer.active) or (not masked and wanted[key] != layer.rank)
    ]
    attention = {n for n, layer in layers.items() if _is_attention(layer)}
    inside = attention | {f"{name}.out_proj" for name in attention}
    for layer in changing:
        if layer.name in inside:
            yield (
                f"layer {layer.name!r}: expected a layer with a rank of its own, got torch's "
                "MultiheadAttention, to whose two projections PEFT gives one, and which it merges"
            )
    if masked:
        yield from (found for layer in changing if (found := mask_problem(layer)))
        return
    if parallel is not None or (wrapper_of(model) is not None):
        yield (
            "expected a model outside DistributedDataParallel, which goes on averaging the old "
            f"parameters' gradients, and not the new ones'; {_WAY_OUT}"
        )
    parameters = [layer.parameter(side) for layer in changing for side in SIDES]
    if flattened(model) or any(is_sharded(p) or hasattr(p, "ds_id") for p in parameters):
        yield f"expected a model that is not sharded (FSDP, DeepSpeed); {_WAY_OUT}"
    for layer in changing:
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        if any(getattr(layer.parameter(side), hook, None) for side in SIDES for hook in hooks):
            yield (
                f"layer {layer.name!r}: expected parameters without gradient hooks, which new ones "
                "would not have; remove them first, or use mode='mask'"
            )


def _is_attention(layer: AdapterLayer) -> bool:
    return isinstance(layer.module.get_base_layer(), torch.nn.MultiheadAttention)
