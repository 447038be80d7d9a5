"""A fine-tuned checkpoint less its base, as a LoRA within a budget for all layers together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.extract needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.lora_keys import PREFIX
from lorambo_adapters.progress import progress_bar
from lorambo_adapters.ranks.adapter_config import extracted_entries
from lorambo_adapters.ranks.budgets import Budget, parsed
from lorambo_adapters.ranks.extract_parts import FactorParts, LayerFactors
from lorambo_adapters.ranks.extract_ranks import captured_share, solved_ranks
from lorambo_adapters.ranks.extract_targets import (
    Stored,
    check_stored,
    is_transposed,
    other_differences,
    refuse_others,
)
from lorambo_adapters.ranks.lora_result import LoraResult
from lorambo_adapters.ranks.new_folder import check_new, new_folder
from lorambo_adapters.ranks.tensor_writer import Planned, tensor_writer
from lorambo_adapters.spectra.checkpoints import delta_spectra, differences, layer_pairs
from lorambo_adapters.spectra.decompose import arithmetic
from lorambo_adapters.spectra.extraction import MatrixReader
from lorambo_adapters.spectra.leading import leading_factors, residual
from lorambo_alloc import Spectra
from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import Objective


def extract_lora(
    base: Stored,
    tuned: Stored,
    budget: Budget,
    output: str | os.PathLike[str] | None = None,
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
    objective: str | Objective = "frobenius",
    weights: Mapping[str, float] | None = None,
    min_rank: int = 0,
    max_rank: int = 128,
    multiple_of: int = 1,
    time_limit: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    fan_in_fan_out: bool | None = None,
    exact_below: int = 1024,
    tolerance: float = 3e-5,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LoraResult:
    """Turn what fine-tuning changed into a LoRA that PEFT loads onto the base.

    Two passes over the layers, one tensor of each checkpoint at a time: the spectra of
    W_tuned - W_base first (`delta_spectra`), by which `allocate` finds the ranks, with its
    certificate; then the best approximation of each difference of the rank it was given. That
    reads and decomposes the layers that get a rank twice, and needs no factors of ranks that
    nobody wants.

    What no layer holds (norms, biases, embeddings, heads) is not in the adapter; those of these
    tensors that differ are listed in the result (`others`). A layer that was not trained gets
    no rank. What rounding to bfloat16 did to a checkpoint is part of the difference
    (`delta_spectra`).

    Memory: that of `delta_spectra`, then that of `leading_factors` for one layer.

    Interrupted (Ctrl-C too), what is finished stays in the folder `<output>.partial`, and a later
    run with the same checkpoints and options goes on there; with another budget it takes over the
    spectra and the factors of layers whose rank is the same. The folder is removed at the end.
    State dicts have nothing by which to know them, and begin anew.

    Args:
        base: the checkpoint before fine-tuning: a folder or file, or a state dict.
        tuned: the one after it.
        budget: parameters, or bytes, or energy, see `budgets.parsed`; a share is of the parameters
            of the layers' weights. Energy is of all, with what the spectra leave unresolved.
        output: a new folder, for PEFT. None: tensors are returned instead.
        targets: see `checkpoint_spectra`; no embedding tables and no stacked experts.
        exclude: names that are no target.
        objective: as `allocate` takes it.
        weights: layer to a factor >= 0 on its gains.
        min_rank: the least rank of every layer.
        max_rank: the greatest rank of any layer; the spectra hold as many values. A larger uniform
            rank as the budget is refused.
        multiple_of: ranks are multiples of this.
        time_limit: seconds after which the allocation stops with a certified gap.
        scale: of every layer: B A is the difference over it, and alpha = scale x rank.
        dtype: of the factors; by default that of the tuned weight.
        fan_in_fan_out: whether weights are stored as in x out, as GPT-2's are. None: by the
            `model_type` in the base's config.json, and False without one.
        exact_below: see `decompose`.
        tolerance: see `decompose`.
        seed: see `decompose`.
        device: where to compute; by default where the tuned weight lies.
        progress: see `progress_bar`.

    Returns:
        The ranks by layer, with sizes, energy, certificate and what was left out.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no folder for the output.
        FileExistsError: the output, or its partial folder, is something else already.
        ValueError: as `delta_spectra`; a target is an embedding table or a stack of experts; an
            argument is not of its form; or the budget buys no rank.
        InfeasibleError: the least ranks cost more than the budget (a `ValueError`).

    References:
        mergekit, `scripts/extract_lora.py` (a fixed rank for all layers).

    Example:
        >>> import torch
        >>> base = {"up.weight": torch.zeros(3, 3), "down.weight": torch.zeros(3, 3)}
        >>> tuned = {"up.weight": torch.diag(torch.tensor([3.0, 2.0, 0.0])), **base}
        >>> tuned = {**tuned, "up.weight": torch.diag(torch.tensor([3.0, 2.0, 0.0]))}
        >>> lora = extract_lora(base, tuned, 12)
        >>> dict(lora), lora.config["r"], round(lora.captured, 6), lora.certificate.status
        ({'up': 2, 'down': 0}, 2, 1.0, 'optimal_exact')
    """
    wanted = parsed(budget)
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale: expected a finite number that is not 0, got {scale!r}")
    max_rank = whole_number(max_rank, "max_rank", 1)
    check_stored(base, tuned)
    path = None if output is None else Path(output)
    if path is not None:
        check_new(path)
    before, after = layer_pairs(base, tuned, targets, exclude)
    refuse_others(before)
    flipped = is_transposed(base) if fan_in_fan_out is None else fan_in_fan_out
    key = {"base": before.fingerprint, "tuned": after.fingerprint, "layers": list(before.layers)}
    known = before.fingerprint is not None and after.fingerprint is not None
    options = [str(dtype), scale, max_rank, flipped, exact_below, tolerance, seed]
    parts = FactorParts(path, before.layers, {**key, "options": options} if known else None)
    with parts:
        spectra = parts.spectra(
            lambda file: delta_spectra(
                base, tuned, targets=targets, exclude=exclude, rank=max_rank, seed=seed,
                exact_below=exact_below, tolerance=tolerance, device=device, output=file,
                progress=progress,
            )
        )  # fmt: skip
        types = {
            name: dtype or getattr(torch, layer.info.dtype) for name, layer in after.layers.items()
        }
        limits: dict[str, Any] = {
            "objective": objective,
            "weights": weights,
            "min_rank": min_rank,
            "max_rank": max_rank,
            "multiple_of": multiple_of,
            "time_limit": time_limit,
        }
        allocation, certificate = solved_ranks(spectra, wanted, types, limits)
        ranks = {name: rank for name, rank in allocation.items() if rank}
        if not ranks:
            raise ValueError(
                f"budget {budget!r}: expected at least one rank to fit and to gain something, got "
                f"none; the cheapest costs {int(allocation.problem.costs.min()):,}"
            )
        matrices = {m.name: m for m in differences(before, after, max_rank, exact_below, device)}
        work = {n: arithmetic(matrices[n].shape, r, exact_below) for n, r in ranks.items()}

        def factors() -> Iterator[tuple[str, LayerFactors]]:
            with progress_bar("factors", sum(work.values()), progress) as advance:
                for name, rank in ranks.items():
                    advance(0.0, name)

                    def make(name: str = name, rank: int = rank) -> LayerFactors:
                        how = (exact_below, tolerance, seed)
                        return _factors(matrices[name], rank, scale, types[name], flipped, how)

                    yield name, parts.of(name, rank, make)
                    advance(work[name], "")

        energy = {n: float(v @ v) + spectra.unresolved[n] for n, v in spectra.items()}
        lost = [energy[name] for name in spectra if name not in ranks]
        config = extracted_entries(
            allocation,
            scale,
            base=None if isinstance(base, Mapping) else os.fspath(base),
            flipped=flipped,
        )
        done = {
            "base": before.label,
            "tuned": after.label,
            "budget": str(budget),
            "captured": captured_share(spectra, allocation, energy),
            "status": certificate.status,
        }
        tensors: dict[str, torch.Tensor] = {}
        if path is None:
            for name, found in factors():
                tensors |= {_key(name, "A"): found.right, _key(name, "B"): found.left}
                lost.append(found.distance)
        else:
            # All are finished and kept before the adapter is put together.
            lost += [found.distance for _, found in factors()]
            plan = _plan(spectra, ranks, types, flipped)
            metadata = {"format": "pt", "lorambo_extract": json.dumps(done)}
            with new_folder(path) as folder:
                weights_file = folder / "adapter_model.safetensors"
                with tensor_writer(weights_file, plan, metadata) as writer:
                    for name in _by_size(ranks, types):
                        found = parts.stored(name, ranks[name])
                        writer.add(_key(name, "A"), found.right)
                        writer.add(_key(name, "B"), found.left)
                text = json.dumps(config, indent=2) + "\n"
                (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        parts.finish()
    assert spectra.shapes is not None
    shapes = spectra.shapes
    whole = {name: math.prod(shape) for name, shape in shapes.items()}
    small = {name: rank * sum(shapes[name]) for name, rank in ranks.items()}
    total = math.fsum(energy.values())
    return LoraResult(
        allocation,
        certificate,
        {name: min(shape) for name, shape in shapes.items()},
        (sum(whole.values()), sum(small.values())),
        (
            sum(whole[n] * types[n].itemsize for n in whole),
            sum(small[n] * types[n].itemsize for n in small),
        ),
        done["captured"],
        math.fsum(lost) / total if total else 0.0,
        path,
        tensors,
        config,
        others=other_differences(base, tuned, {layer.key for layer in before.layers.values()}),
    )


def _factors(
    matrix: MatrixReader,
    rank: int,
    scale: float,
    dtype: torch.dtype,
    flipped: bool,
    how: tuple[int, float, int],
) -> LayerFactors:
    difference = matrix.read()
    exact_below, tolerance, seed = how
    try:
        left, right = leading_factors(
            difference, rank, exact_below=exact_below, tolerance=tolerance, seed=seed
        )
    except ValueError as error:
        raise ValueError(f"layer {matrix.name!r} of {matrix.files}: {error}") from error
    left, right = (left / scale).to(dtype), right.to(dtype)
    if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        raise ValueError(
            f"layer {matrix.name!r}: expected factors in the range of {dtype}, got an overflow "
            f"with scale {scale!r}; give another dtype or scale"
        )
    distance = residual(difference, left.to(torch.float64) * scale, right.to(torch.float64))
    if flipped:
        left, right = right.T, left.T
    return LayerFactors(left.contiguous().cpu(), right.contiguous().cpu(), distance)


def _key(name: str, part: str) -> str:
    return f"{PREFIX}{name}.lora_{part}.weight"


def _by_size(ranks: Mapping[str, int], types: Mapping[str, torch.dtype]) -> list[str]:
    return sorted(ranks, key=lambda name: -types[name].itemsize)


def _plan(
    spectra: Spectra,
    ranks: Mapping[str, int],
    types: Mapping[str, torch.dtype],
    flipped: bool,
) -> dict[str, Planned]:
    assert spectra.shapes is not None
    plan: dict[str, Planned] = {}
    for name in _by_size(ranks, types):
        d, k = spectra.shapes[name][:: -1 if flipped else 1]
        plan[_key(name, "A")] = Planned((ranks[name], k), types[name])
        plan[_key(name, "B")] = Planned((d, ranks[name]), types[name])
    return plan
