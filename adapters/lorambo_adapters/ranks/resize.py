"""Change the ranks of a live PEFT model, and its optimizer's memory with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.resize needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import SIDES, AdapterLayer, Side, adapter_layers
from lorambo_adapters.ranks.carry import Move, carried, carried_moments, change, plan
from lorambo_adapters.ranks.growth import Gradient
from lorambo_adapters.ranks.mask import remove_mask, set_mask
from lorambo_adapters.ranks.moments import holds, moment_laws
from lorambo_adapters.ranks.presence import Arrival, bring_back, join, spare_layers, take_away
from lorambo_adapters.ranks.resize_checks import problems_of, wanted_ranks
from lorambo_adapters.ranks.resize_config import (
    alpha_of,
    config_of,
    configured,
    exact_targets,
    warn_changed_base,
)
from lorambo_adapters.ranks.resize_report import LayerChange, ResizeReport
from lorambo_adapters.ranks.sharded import agree, flattened, peeled, same_everywhere
from lorambo_adapters.ranks.transaction import Transaction
from lorambo_adapters.spectra.low_rank import Pair, misfits, pair_of, refuse
from lorambo_adapters.spectra.whitening import Factors


def resize(
    model: torch.nn.Module,
    ranks: Mapping[str, int],
    optimizer: Any = None,
    adapter: str = "default",
    *,
    curvature: Mapping[str, Pair | Factors] | None = None,
    gradients: Mapping[str, Gradient] | None = None,
    new_directions: Literal["gradient", "peft"] | None = None,
    mode: Literal["resize", "mask"] = "resize",
) -> ResizeReport:
    """Give the layers of a LoRA other ranks, with the least change of what it computes.

    A layer that loses ranks keeps the best approximation of its B A (`projection`); one that gains
    some computes what it did, as each new direction is zero on one side (`growth`). The scale of
    s B A stays in every layer (alpha follows the rank; a factor set by `set_scale` stays too). Any
    other adapter, `requires_grad`, devices and types stay as they are. Either all of it is done, or
    an exception leaves model and optimizer as they were.

    - The optimizer's parameters are replaced in place in their groups, so group options and
      learning-rate schedulers go on, and their state follows by `moment_laws`. Where directions
      are only added, the old ones' moments stay bit for bit. Gradients that are there (`.grad`)
      follow as the first moments do, and are 0 for new directions.
    - A DoRA's magnitudes stay. Adding ranks changes nothing, as for a LoRA; after a truncation,
      what is reported is the change of s B A, which the norms in W + s B A then pass on.
    - The configuration gets exact keys in `rank_pattern` and `alpha_pattern`, so `save_pretrained`
      writes an adapter that loads with these ranks and scales.
    - Rank 0 takes the adapter from the layer, and its factors from the optimizer; PEFT's wrapper
      stays. So a rank >= 1 later brings it back, as a new adapter begins (`bring_back`), in its
      place among the optimizer's parameters (`join`). Both write exact `target_modules`. A layer
      that PEFT has never wrapped cannot be given ranks, and a DoRA, an adapter with a bias and a
      wrapped parameter's cannot be taken from their layer.
    - A model in torch.compile is compiled again for the new shapes at its next call.

    mode="mask" keeps every tensor's shape, for DistributedDataParallel, FSDP2 (`fully_shard`) and
    compiled models: ranks up to those that the adapter was made with. The kept directions are put
    into some rows; the others have a zero column in B, their output is masked (so is the gradient),
    and their first moments are 0, so that the optimizer does not move them; only its weight decay
    shrinks their rows of A. Ranks can come back: they begin with B = 0 and the row of A that is
    there, or the gradient's. Rank 0 masks all. The report and `active_ranks` count what is left,
    PEFT's configuration and files go on with the full shapes, and what is saved computes the same.
    The mask is not in the files: what is loaded into masked tensors later is masked as they are.
    Every process has to make the call; unequal ranks are an error in all of them. The first call
    changes the class of each A, for which a compiled model is compiled again once.

    Args:
        model: a `PeftModel`, or a model into which PEFT has put LoRA layers; compiled or not.
        ranks: by layer, as PEFT names it without "base_model.model."; an `Allocation` is one.
            Experts of a 3-D parameter, "<parameter>.<index>", have one rank. Layers that are not
            named keep their rank; in mode "resize" their masked ranks are taken out too, and a
            layer with nothing else has rank 0. Unknown layers may have rank 0.
        optimizer: what trains the adapter, if something does; left out, it would go on with
            parameters that the model has no longer (or in mode "mask" with momentum in what is
            masked). Of torch.optim or made like those: `param_groups` and `state`.
        adapter: the adapter's name; active or not.
        curvature: as `lora_spectra` takes it, of layers that lose ranks: what is lost is then least
            in 1/2 tr(E^T B E A), which is reported too.
        gradients: of layers that gain ranks, the gradient of the loss with respect to W + s B A, or
            directions (U, V) as `candidate_directions` finds them.
        new_directions: "gradient" needs `gradients` for every layer that gains ranks; "peft" takes
            PEFT's initialisation. By default "gradient" where `gradients` has the layer.
        mode: see above.

    Returns:
        What was done, layer by layer, with the energy that was lost.

    Raises:
        ValueError: a layer or the adapter is not there, or a rank is not a whole number >= 0, or
            cannot be given to the layer: see `adapter_layers`, `moment_laws`, `holds`,
            `mask_problem`, `cannot_leave` and `cannot_return`; or all ranks are 0. In mode "resize"
            also for a model inside DistributedDataParallel or FSDP, for one around the
            model that has PEFT's configuration, and for parameters with hooks.

    Warns:
        UserWarning: the adapter's initialisation has changed the base's weights (PiSSA and others)
            as its rank was then: on the original base the saved adapter is not this one any more.

    Note:
        Memory: the new factors and moments of all layers that change, beside the old ones, and in
        float64 the factors of one layer three times. Arithmetic: O((d + k) r^2) a layer.

    References:
        PEFT 0.21.2, `tuners/lora/layer.py`.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> resize(model, {"0": 1, "1": 3}, optimizer)
        2 layers changed (mode resize), 2 in all; 38 parameters
        layer  ranks        energy lost  share
        0      2 -> 1       0            0.00%
        1      2 -> 3       0            0.00%
    """
    for what, value, known in (
        ("mode", mode, ("resize", "mask")),
        ("new_directions", new_directions, ("gradient", "peft", None)),
    ):
        if value not in known:
            raise ValueError(f"{what}: expected one of {known}, got {value!r}")
    inner, parallel = peeled(model)
    masked = mode == "mask"
    if masked:
        if flattened(inner):
            raise ValueError(
                "expected a model without FullyShardedDataParallel, which flattens its parameters, "
                "for mode='mask'; use fully_shard (FSDP2)"
            )
        # What each process was asked, before anything that could end in one of them alone.
        asked = sorted(ranks.items(), key=str) if isinstance(ranks, Mapping) else None
        agree(asked, parallel, "ranks")
    layers = adapter_layers(inner, adapter)
    spare = {} if masked else spare_layers(inner, adapter)
    wanted = wanted_ranks(layers, spare, ranks, masked)
    refuse(list(problems_of(inner, layers, wanted, parallel, masked)))
    if optimizer is not None:
        ids = {id(layer.parameter(side)) for layer in layers.values() for side in SIDES}
        if not holds(optimizer, ids):
            raise ValueError(
                f"optimizer: expected one that trains adapter {adapter!r}, got one with none of "
                "its parameters"
            )
    configs, config = config_of(inner, adapter, masked)
    moving = {
        name: layer
        for name, layer in layers.items()
        if (wanted[name] != len(layer.active) or (not masked and wanted[name] != layer.rank))
        and (masked or wanted[name])
    }
    moves = _plans(moving, wanted, masked, curvature, gradients, new_directions, config)
    if masked and parallel is not None:
        agree([m.slots.tolist() for found in moves.values() for m in found], parallel, "kept ranks")
    changes, done = Transaction(), dict[str, LayerChange]()
    for name, layer in moving.items():
        new: dict[Side, torch.Tensor] = {
            s: carried(layer, moves[name], s, layer.parameter(s), "factor") for s in SIDES
        }
        if masked:
            same_everywhere(new.values(), parallel)
        done[name] = _reported(layer, wanted[name], moves[name], new, curvature)
        for side in SIDES:
            _replace(changes, layer, moves[name], side, new[side], optimizer, masked)
        if masked:
            set_mask(changes, layer, torch.cat([moves[name][0].slots, moves[name][0].fresh]))
        else:
            remove_mask(changes, layer)
            _new_shape(changes, layer, wanted[name])
    alphas = {key: alpha_of(layer, wanted[key]) for key, layer in layers.items() if wanted[key]}
    for name, layer in layers.items():
        if not masked and not wanted[name]:
            done[name] = _reported(layer, 0, [], {}, curvature)
            take_away(changes, layer, optimizer)
    per_rank = {name: _per_rank(layer) for name, layer in layers.items()}
    arrivals: list[Arrival] = []
    for name, module in spare.items():
        if wanted[name]:
            per_rank[name], alphas[name], added = bring_back(
                changes,
                name,
                module,
                wanted[name],
                layers,
                optimizer,
                gradient=_given(gradients, new_directions).get(name),
                initialisation=getattr(config, "init_lora_weights", True),
            )
            arrivals += added
            done[name] = LayerChange(name, 0, wanted[name], 0.0, 0.0, None, per_rank[name])
    join(changes, inner, arrivals)
    if done and not masked and configs is not None:
        present = {name: wanted[name] for name in alphas}
        modules = [n for n in present if n not in layers or not _is_parameter(layers[n])]
        others = present.keys() ^ layers.keys()
        targets = exact_targets(inner, modules) if others else None
        changes.item(configs, adapter, configured(config, present, alphas, targets))
        warn_changed_base(inner, adapter)
    changes.commit()
    for layer in moving.values():
        if layer.is_dora:  # norms that PEFT keeps, if told to
            layer.module.lora_magnitude_vector[adapter]._cache_clear()
    final = {name: wanted[key] for key, layer in layers.items() for name in layer.names}
    final |= {name: wanted[name] for name in spare if name in ranks}
    parameters = sum(wanted[name] * count for name, count in per_rank.items())
    order = {name: i for i, name in enumerate((*layers, *spare))}
    changed = sorted(done.values(), key=lambda change: order[change.name])
    return ResizeReport(tuple(changed), mode, final, parameters)


def _reported(
    layer: AdapterLayer,
    rank: int,
    moves: Sequence[Move],
    new: Mapping[Side, torch.Tensor],
    curvature: Mapping[str, Pair | Factors] | None,
) -> LayerChange:
    """What a change that has not been made yet will do to a layer; without moves it loses all."""
    before = len(layer.active)
    pairs = _pairs(layer, curvature) if rank < before else None
    energy, lost, in_loss = change(layer, moves, new, pairs if curvature is not None else None)
    if curvature is not None and pairs is None:
        in_loss = 0.0
    return LayerChange(layer.name, before, rank, energy, lost, in_loss, _per_rank(layer))


def _per_rank(layer: AdapterLayer) -> int:
    """Parameters that a rank has, in all experts."""
    return sum(layer.parameter(side).numel() for side in SIDES) // layer.rank


def _is_parameter(layer: AdapterLayer) -> bool:
    return hasattr(layer.module, "parameter_name")


def _given(
    gradients: Mapping[str, Gradient] | None, new_directions: str | None
) -> Mapping[str, Gradient]:
    return {} if gradients is None or new_directions == "peft" else gradients


def _plans(
    moving: Mapping[str, AdapterLayer],
    wanted: Mapping[str, int],
    masked: bool,
    curvature: Mapping[str, Pair | Factors] | None,
    gradients: Mapping[str, Gradient] | None,
    new_directions: str | None,
    config: Any,
) -> dict[str, list[Move]]:
    shapes = {
        name: _shape(layer)
        for key, layer in moving.items()
        if wanted[key] < len(layer.active)
        for name in layer.names
    }
    problems = list(misfits(shapes, curvature))
    given = _given(gradients, new_directions)
    if new_directions == "gradient":
        problems += [
            f"gradients: layer {name!r} gains ranks and is missing"
            for key, layer in moving.items()
            if wanted[key] > len(layer.active)
            for name in layer.names
            if name not in given
        ]
    refuse(problems)
    moves: dict[str, list[Move]] = {}
    for key, layer in moving.items():
        try:
            moves[key] = plan(
                layer,
                wanted[key],
                masked=masked,
                curvature=_pairs(layer, curvature if wanted[key] < len(layer.active) else None),
                gradients=[given.get(name) for name in layer.names],
                initialisation=getattr(config, "init_lora_weights", True),
            )
        except ValueError as error:
            problems.append(f"layer {key!r}: {error}")
    refuse(problems)
    return moves


def _replace(
    changes: Transaction,
    layer: AdapterLayer,
    moves: Sequence[Move],
    side: Side,
    new: torch.Tensor,
    optimizer: Any,
    masked: bool,
) -> None:
    """Note a factor's new numbers, and those of its gradient and its state."""
    old = layer.parameter(side)
    where = f"layer {layer.name!r}, {side}"
    state = {} if optimizer is None else optimizer.state.get(old, {})
    laws, kept = ({}, {}) if optimizer is None else moment_laws(optimizer, old, where)
    moments = carried_moments(layer, moves, side, state, laws)
    gradient = None if old.grad is None else carried(layer, moves, side, old.grad, "gradient")
    if masked:
        changes.write(old, new)
        if gradient is not None and old.grad is not None:
            changes.write(old.grad, gradient)
        for key, value in moments.items():
            changes.write(state[key], value)
        return
    parameter = torch.nn.Parameter(new, requires_grad=old.requires_grad)
    vars(parameter).update(vars(old))
    parameter.grad = gradient
    mapping, key = layer.holder(side)
    changes.item(mapping, key, parameter)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for i, other in enumerate(group["params"]):
            if other is old:
                changes.element(group["params"], i, parameter)
    if old in optimizer.state:
        entries = {key: moments.get(key, kept.get(key)) for key in state}
        changes.remove(optimizer.state, old)
        changes.item(optimizer.state, parameter, entries)


def _new_shape(changes: Transaction, layer: AdapterLayer, rank: int) -> None:
    """Note the rank and alpha, and what the factors' modules say of their shape."""
    module, adapter = layer.module, layer.adapter
    if not layer.is_embedding:
        rows = rank * layer.experts
        for side in SIDES:
            factor, end = layer.factor_module(side), "out" if side == "A" else "in"
            for name in (f"{end}_features", f"{end}_channels"):
                if hasattr(factor, name):
                    changes.attribute(factor, name, rows)
    changes.item(module.r, adapter, rank)
    changes.item(module.lora_alpha, adapter, alpha_of(layer, rank))


def _pairs(layer: AdapterLayer, curvature: Mapping[str, Pair | Factors] | None) -> list[Pair]:
    if curvature is None:
        return [(None, None)] * layer.experts
    return [pair_of(curvature[name]) for name in layer.names]


def _shape(layer: AdapterLayer) -> tuple[int, int]:
    left, right = (layer.rows(s, layer.parameter(s).detach()) for s in ("B", "A"))
    return left.shape[2], right.shape[2]
