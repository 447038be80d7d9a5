"""A trained LoRA made smaller: the least loss of energy within a budget for all layers together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.compress needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.progress import progress_bar
from lorambo_adapters.ranks.adapter_config import peft_entries
from lorambo_adapters.ranks.budgets import (
    Budget,
    Bytes,
    Energy,
    Share,
    energy_target,
    parsed,
)
from lorambo_adapters.ranks.lora_metadata import new_metadata, read_metadata
from lorambo_adapters.ranks.lora_result import LoraResult
from lorambo_adapters.ranks.lora_rewrite import FileLayer, Rewrite, Weights, file_layers
from lorambo_adapters.ranks.new_folder import check_new, new_folder
from lorambo_adapters.ranks.tensor_writer import planned_as, tensor_writer, writing_order
from lorambo_adapters.spectra.lora_files import LoraFile
from lorambo_adapters.spectra.low_rank import low_rank_spectra
from lorambo_alloc import Allocation, BudgetCertificate, Certificate, allocate, minimize_budget
from lorambo_alloc.costs import UniformRank, whole_number
from lorambo_alloc.objectives import Objective

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def compress(
    lora: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    budget: Budget,
    output: str | os.PathLike[str] | None = None,
    *,
    curvature: Weights | None = None,
    objective: str | Objective = "frobenius",
    weights: Mapping[str, float] | None = None,
    min_rank: int | Mapping[str, int] = 0,
    max_rank: int | Mapping[str, int] | None = None,
    multiple_of: int = 1,
    time_limit: float | None = None,
    fold_scale: bool = False,
    keep_magnitude: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LoraResult:
    """Truncate a trained LoRA to the ranks that keep most of it within a budget.

    The spectrum of each layer's update s B A comes from its factors, `allocate` finds the ranks
    (with its certificate), and each update is replaced by its best approximation of that rank:
    no other LoRA with these ranks is nearer in the Frobenius norm (Eckart, Young 1936), and no
    other ranks within the budget would bring it nearer, to the certificate's gap.

    The adapter comes out as it came in: a folder of PEFT, or a file of diffusers, kohya's
    sd-scripts or LyCORIS (LoRA, also of convolutions, without a Tucker core), with the same keys,
    types and metadata. Each layer keeps its scale, so alpha becomes scale x rank (scale x
    sqrt(rank) with `use_rslora`); a stored alpha is rounded to its type, and B takes up the
    difference. Layers whose rank does not change keep their tensors to the bit. Layers of rank 0
    are left out, and PEFT's configuration then aims at the names of the others. What is no layer's
    factor (`modules_to_save`, embeddings, biases of the model) is copied, under the name that PEFT
    looks for where the layer is left out.

    Of a folder, the adapter's two files are written, and no others that lie there. Metadata is
    kept, but for kohya's and the modelspec's hashes of the old tensors. The file's
    `lorambo_compress` says what was done.

    Memory: one layer at a time: its factors as stored (of the file, up to 64 MB are mapped), about
    4 (d + k) r numbers in float64, and with curvature what `product_values` needs. Without
    `output`, all new tensors besides.

    Args:
        lora: a folder that PEFT saved, a `.safetensors` file, or a state dict with a file's keys
            and alphas. (`.bin` is read too; what is written is safetensors.) Save a live model
            first, or use `resize` on it.
        budget: parameters, a share, bytes or energy, see `budgets.parsed`. Parameters are those of
            the factors; bytes are those of all tensors that are written, without the header of
            the file (some 100 bytes a tensor).
        output: a new folder for a folder of PEFT, else a `.safetensors` file (an older one is
            replaced at the end; it may be the input). None: tensors are returned instead.
        curvature: as `lora_spectra` takes it: truncation and allocation then minimise
            tr((D - D')^T B (D - D') A) / 2, the loss in units of the quadratic model, and
            "captured" is of that. What a singular A or B does not see is dropped.
        objective: as `allocate` takes it.
        weights: layer to a factor >= 0 on its gains, for layers that matter more.
        min_rank: the least rank, for all layers or by name; a layer that has less keeps it.
        max_rank: the greatest rank; none is above what the layer has.
        multiple_of: ranks are multiples of this (a layer that has less is left out).
        time_limit: seconds after which the allocation stops with a certified gap.
        fold_scale: let every scale become 1 (alpha = rank) and B take it up.
        keep_magnitude: a DoRA is refused, as its update is no matrix of low rank. True truncates
            its B A, as if it were a LoRA, and keeps its magnitudes; every layer keeps rank >= 1.
            Energy and error are then those of B A, and not of the DoRA's update.
        device: where to compute; by default the CPU for files.
        progress: see `progress_bar`.

    Returns:
        The ranks by layer, with sizes, energy and certificate. Names are those of `lora_spectra`.

    Raises:
        FileNotFoundError: there is no such LoRA, or no folder for the output.
        FileExistsError: the output is to be a folder, and there is one that is not empty.
        ValueError: the LoRA is of another kind (LoHa, AdaLoRA, DoRA, Tucker form ...) or damaged,
            its initialisation changed the base model (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ), an
            argument is not of its form, factors leave the range of their type (`fold_scale`), or
            the budget buys no rank at all.
        InfeasibleError: the least ranks cost more than the budget (a `ValueError`).

    Example:
        >>> import torch
        >>> b, a = torch.diag(torch.tensor([8.0, 1.0, 4.0])), torch.eye(3)
        >>> state = {"q.lora_up.weight": b, "q.lora_down.weight": a, "q.alpha": torch.tensor(3.0)}
        >>> small = compress(state, budget=12)  # two ranks
        >>> dict(small), round(small.captured, 3), float(small.tensors["q.alpha"])
        ({'q': 2}, 0.988, 2.0)
        >>> (small.tensors["q.lora_up.weight"] @ small.tensors["q.lora_down.weight"]).round()
        tensor([[8., 0., 0.],
                [0., 0., 0.],
                [0., 0., 4.]])
    """
    wanted = parsed(budget)
    if not isinstance(lora, str | os.PathLike | Mapping):
        raise ValueError(
            f"expected a path or a state dict, got {type(lora).__name__}: save a live model first"
        )
    file = LoraFile(lora if isinstance(lora, Mapping) else Path(lora))
    _refuse_changed_bases(file)
    layers = file_layers(file, keep_magnitude)
    in_folder = "" in file.configs and not isinstance(lora, Mapping)
    path = None if output is None else _checked_output(Path(output), in_folder)
    updates = [update for layer in layers for update in layer.updates]
    spectra = low_rank_spectra(
        updates, source=file.label, curvature=curvature, device=device, progress=progress
    )
    costs, fixed, total, constant = _costs(file, layers, isinstance(wanted, Bytes))
    limits: dict[str, Any] = {
        "costs": costs,
        "fixed_costs": fixed,
        "objective": objective,
        "weights": weights,
        "min_rank": _least(layers, min_rank),
        "max_rank": _most(layers, max_rank),
        "multiple_of": multiple_of,
        "tied": [layer.names for layer in layers if len(layer.names) > 1],
        "time_limit": time_limit,
    }
    allocation, certificate = _solved(spectra, wanted, total, constant, limits)
    if not allocation.ranks.any():
        cheapest = min(costs[n] + fixed[n] for n in costs)
        if allocation.budget >= cheapest:
            raise ValueError(
                f"{file.label}: expected an update that is not zero in a layer that may have a "
                "rank, got none: the LoRA was not trained, or the limits leave nothing of it"
            )
        raise ValueError(
            f"budget {budget!r}: expected at least one rank to fit, got {allocation.budget:,} "
            f"where the cheapest costs {cheapest:,}"
        )
    new = Rewrite(
        file, layers, allocation, curvature=curvature, fold_scale=fold_scale, device=device
    )
    configs = {
        component: entries
        for component in file.configs
        if (entries := _entries(file, component, layers, allocation, new)) is not None
    }
    done = {
        "budget": str(budget),
        "objective": str(allocation.problem.objective),
        "weighted": curvature is not None,
        "parameters": [total, _parameters(layers, allocation)],
        "captured": _captured(spectra, allocation),
        "status": certificate.status,
    }
    metadata = new_metadata(read_metadata(lora), configs, done)
    tensors: dict[str, torch.Tensor] = {}
    with progress_bar("factors", float(len(new.planned)), progress) as advance:

        def made(key: str) -> torch.Tensor:
            advance(1.0, key)
            return new.make(key)

        order = writing_order(new.planned)
        if path is None:
            tensors = {key: made(key) for key in order}
        elif in_folder:
            with new_folder(path) as folder:
                _write(folder / _WEIGHTS, new, order, metadata, made)
                text = json.dumps(configs[""], indent=2) + "\n"
                (folder / _CONFIG).write_text(text, encoding="utf-8")
        else:
            _write(path, new, order, metadata, made)
    return LoraResult(
        allocation,
        certificate,
        {update.name: update.rank for update in updates},
        (total, _parameters(layers, allocation)),
        (
            sum(planned_as(info).nbytes for info in file.infos.values()),
            sum(plan.nbytes for plan in new.planned.values()),
        ),
        done["captured"],
        new.distance / new.energy if new.energy else 0.0,
        path,
        tensors,
        configs.get("", {}),
    )


def _refuse_changed_bases(file: LoraFile) -> None:
    """Refuse adapters whose base model PEFT changes by their ranks when it loads them.

    Raises:
        ValueError: the configuration has such an initialisation.
    """
    for config in file.configs.values():
        if config.changed_base is not None:
            raise ValueError(
                f"{file.label}: expected an adapter of unchanged weights, got init_lora_weights="
                f"{config.changed_base!r}: PEFT takes the first components of each weight out of "
                "it when it loads the adapter, as many as the adapter has ranks, and so others "
                "after compression. Save it with path_initial_model_for_weight_conversion (which "
                "makes a LoRA of it), or with the changed base model and init_lora_weights=True"
            )


def _checked_output(path: Path, in_folder: bool) -> Path:
    """The output's path, refused now if it cannot be written, and not after the work."""
    if in_folder:
        check_new(path)
    elif path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    elif path.suffix != ".safetensors":
        raise ValueError(f"output: expected a .safetensors file, as the LoRA is one, got {path}")
    elif not path.absolute().parent.is_dir():
        raise FileNotFoundError(2, "No such file or directory", str(path.absolute().parent))
    return path


def _costs(
    file: LoraFile, layers: list[FileLayer], in_bytes: bool
) -> tuple[dict[str, int], dict[str, int], int, int]:
    """Cost of a rank and of a layer by update, all parameters, and bytes that are kept anyway."""
    costs: dict[str, int] = {}
    fixed: dict[str, int] = {}
    total = constant = 0
    if in_bytes:
        constant = sum(planned_as(file.infos[key]).nbytes for key in file.others)
    for layer in layers:
        sizes = {part: planned_as(file.infos[key]) for part, key in layer.keys.items()}
        for update in layer.updates:
            d, k = update.shape
            total += update.rank * (d + k)
            costs[update.name], fixed[update.name] = d + k, 0
            if in_bytes:
                costs[update.name] = d * sizes["B"].dtype.itemsize + k * sizes["A"].dtype.itemsize
        if in_bytes:
            extra = sum(plan.nbytes for part, plan in sizes.items() if part not in ("A", "B"))
            fixed[layer.names[0]] = extra
    return costs, fixed, total, constant


def _least(layers: list[FileLayer], given: int | Mapping[str, int]) -> dict[str, int]:
    """The least rank of every update; what a layer has is enough."""
    asked = _by_name(layers, given, "min_rank")
    return {
        name: max(min(asked.get(name) or 0, layer.limit), int(layer.must_stay))
        for layer in layers
        for name in layer.names
    }


def _most(layers: list[FileLayer], given: int | Mapping[str, int] | None) -> dict[str, int]:
    """The greatest rank of every update."""
    asked = _by_name(layers, given, "max_rank")
    return {
        name: layer.limit if (rank := asked.get(name)) is None else min(rank, layer.limit)
        for layer in layers
        for name in layer.names
    }


def _by_name(
    layers: list[FileLayer], given: int | Mapping[str, int] | None, what: str
) -> dict[str, int | None]:
    names = [name for layer in layers for name in layer.names]
    asked = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, rank in asked.items():
        if name not in names:
            raise ValueError(f"{what}: layer {name!r} is not in the LoRA")
        if rank is not None:
            whole_number(rank, f"{what}: layer {name!r}", 0)
    return dict(asked)


def _solved(
    spectra: Any,
    wanted: int | UniformRank | Share | Bytes | Energy,
    total: int,
    constant: int,
    limits: dict[str, Any],
) -> tuple[Allocation, Certificate | BudgetCertificate]:
    if isinstance(wanted, Energy):
        target = energy_target(wanted, spectra, 0.0, limits)
        cheapest = minimize_budget(spectra, value=target, **limits)
        return cheapest.allocation, cheapest.certificate
    if isinstance(wanted, Share):
        wanted = math.floor(wanted.share * total)
    elif isinstance(wanted, Bytes):
        if wanted.count < constant:
            raise ValueError(
                f"budget: expected more than the {constant:,} bytes of tensors that are no "
                f"layer's, got {wanted.count:,}"
            )
        wanted = wanted.count - constant
    allocation = allocate(spectra, wanted, **limits)
    return allocation, allocation.certificate


def _entries(
    file: LoraFile,
    component: str,
    layers: list[FileLayer],
    ranks: Mapping[str, int],
    new: Rewrite,
) -> dict[str, Any] | None:
    """The new entries of a component's configuration; None if none of its layers is left."""
    own = [layer for layer in layers if layer.component == component]
    kept = {layer.pattern_name: layer for layer in own if layer.raw in new.scales}
    if not kept and component:
        return None
    return peft_entries(
        file.configs[component].entries,
        {name: ranks[layer.names[0]] for name, layer in kept.items()},
        {name: new.scales[layer.raw] for name, layer in kept.items()},
        parameters=[layer.pattern_name for layer in own if layer.is_parameter],
        left_out=[layer.pattern_name for layer in own if layer.raw not in new.scales],
    )


def _parameters(layers: list[FileLayer], ranks: Mapping[str, int]) -> int:
    return sum(ranks[u.name] * sum(u.shape) for layer in layers for u in layer.updates)


def _captured(spectra: Mapping[str, Any], ranks: Mapping[str, int]) -> float:
    """The share of the energy that the ranks keep."""
    kept = math.fsum(float(v @ v) for n, values in spectra.items() for v in (values[: ranks[n]],))
    energy = math.fsum(float(values @ values) for values in spectra.values())
    return kept / energy if energy else 1.0


def _write(path: Path, new: Rewrite, order: list[str], metadata: dict[str, str], made: Any) -> None:
    with tensor_writer(path, new.planned, metadata) as writer:
        for key in order:
            writer.add(key, made(key))
