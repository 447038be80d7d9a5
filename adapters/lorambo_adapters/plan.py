"""What an extraction would take, in time and memory, before it is run."""

from __future__ import annotations

import math
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.plan needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters import plan_costs as costs
from lorambo_adapters.calibration import Speeds, measure_speeds
from lorambo_adapters.layers import find_layers
from lorambo_adapters.plan_costs import Data
from lorambo_adapters.plan_layers import PlannedLayer, PlannedModel, planned_model
from lorambo_adapters.plan_table import aligned, bytes_text, kind_of, time_text
from lorambo_adapters.plan_trace import Trace, example_batch, trace
from lorambo_adapters.spectra.decompose import arithmetic
from lorambo_adapters.spectra.distributed import balanced_shares
from lorambo_alloc.costs import training_bytes, whole_number

_WIDTH = 80
_KINDS = 8  # kinds of layers that a table shows, the largest first
CURVATURES = ("input", "kfac", "ekfac", "diagonal")


@dataclass(frozen=True)
class Estimate:
    """Of one kind of extraction.

    Attributes:
        source: "weights", "delta", "gradients", "activations", "curvature input" and so on.
        seconds: about how long it takes; of several workers, the one with most to do.
        most_seconds: how long at most, where that depends on the spectra (a flat one takes
            longest).
        memory: bytes beyond the model at the peak, of one worker.
        read: bytes of files that are read, by all workers.
        layers: how many it covers.
    """

    source: str
    seconds: float
    most_seconds: float
    memory: int
    read: int
    layers: int


@dataclass(frozen=True)
class Plan:
    """Estimates by source, the layers, and what a LoRA beside them takes. Prints as a table.

    Attributes:
        label: what is planned for.
        layers: the targets.
        estimates: one a kind of extraction.
        rank: of the LoRA.
        adapter_bytes: that training the LoRA takes (`training_bytes`: float32 weights, gradients
            and AdamW's states, and the activations that depend on the rank).
        settings: what the estimates assume, in words.
        notes: what they leave out.
    """

    label: str
    layers: tuple[PlannedLayer, ...]
    estimates: tuple[Estimate, ...]
    rank: int
    adapter_bytes: int
    settings: str
    notes: tuple[str, ...]

    @property
    def weights(self) -> int:
        """How many weights the layers have."""
        return sum(layer.size for layer in self.layers)

    @property
    def adapter_parameters(self) -> int:
        """How many parameters a LoRA of the rank beside every layer has."""
        return self.rank * sum(sum(layer.shape) for layer in self.layers)

    def __getitem__(self, source: str) -> Estimate:
        for estimate in self.estimates:
            if estimate.source == source:
                return estimate
        raise KeyError(source)

    def __repr__(self) -> str:
        return _table(self)


def plan_extraction(
    source: str | os.PathLike[str] | torch.nn.Module,
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
    rank: int = 8,
    values: int | None = 128,
    exact_below: int = 1024,
    tokens: int = 2048,
    batches: int = 16,
    passes: int = 3,
    width: int = 64,
    workers: int = 1,
    device: torch.device | str | None = None,
    batch: Any = None,
    speeds: Speeds | None = None,
) -> Plan:
    """Estimate time and memory of every kind of extraction, without reading a weight.

    Formulas stand in `plan_costs`, function by function: operations over speeds that are measured
    here for about two seconds (`measure_speeds`), and bytes of what is held at once. With T tokens:

    | source | operations | memory beyond the model |
    |---|---|---|
    | weights, delta | `decompose.arithmetic`, or block Krylov's | the largest layer's |
    | gradients | passes x batches x (4 d k T + 4 (d + k) s T) | 2 (d + k) s numbers a layer, and a batch's |
    | activations | passes x batches x (2 d k T + 8 k s T) | k min(k, 2 s) numbers a layer, and a batch's |
    | curvature | batches x (4 d k T + 2 (k^2 + d^2) T), and eigh | 4 to 8 (k^2 + d^2) bytes a layer, and a batch's |

    A model that can run without its weights (a config's or a module) is run on tensors that have
    shapes alone, which counts its operations, all that it keeps for the backward pass, and which
    layers share an input. Of a checkpoint only the shapes are known: of a batch's memory the
    layers' inputs alone are counted, and time without attention and other operations.

    **How good.** Times are for this machine as it is now, to about a factor of two; with `speeds`
    of another machine, for that one. `most_seconds` is for spectra that are flat. Not counted:
    reading from disk, start-up, the loading of the model, and exchange between workers. Memory is
    that of all tensors held at once: not what kernels take inside, nor what an allocator keeps of
    freed memory. On small models (tensors below 32 MB) glibc kept as much again; with
    `MALLOC_MMAP_THRESHOLD_=65536` in the environment a process's peak was within a fifth.

    **Workers.** Weights are shared out by layer in balanced loads; of batches each worker runs
    through its part. Each is taken to be as fast as this process: with cores or a GPU of its own.

    Args:
        source: see `planned_model`: a folder or file of weights, a `config.json`, or a module.
        targets: as PEFT's `target_modules`.
        exclude: as PEFT's `exclude_modules`.
        rank: of the LoRA whose size is told.
        values: how many singular values of weights are wanted; None for all.
        exact_below: as `decompose` takes it.
        tokens: a batch; of a transformers model in as few sequences as its positions allow.
        batches: of gradients, activations and curvature, over all workers.
        passes: over the batches, for gradients; activations take two at most.
        width: s, of the sketches.
        workers: processes of torchrun.
        device: where to extract; by default the module's own, or the CPU.
        batch: an example that the model takes, of which the shapes count; instead of `tokens`.
        speeds: measured earlier, or on another machine; None measures them now.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the source is none of these, no layer is a target, or a number is out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 100))
        >>> plan = plan_extraction(model, batch=torch.empty(32, 300), rank=4)
        >>> plan.adapter_parameters, [estimate.source for estimate in plan.estimates][:3]
        (3200, ['weights', 'delta', 'gradients'])
    """  # noqa: E501  (a table's rows)
    for name, number, least in (
        ("rank", rank, 1), ("tokens", tokens, 1), ("batches", batches, 1), ("passes", passes, 1),
        ("width", width, 4), ("workers", workers, 1), ("exact_below", exact_below, 0),
        ("values", 1 if values is None else values, 1),
    ):  # fmt: skip
        whole_number(number, name, least)
    model = planned_model(source, targets, exclude)
    where = _place(model, device)
    hooked = [layer for layer in model.layers if layer.hooked]
    seen, notes = _traced(model, hooked, targets, exclude, tokens, batch, where)
    if seen is not None:
        tokens = max(seen.tokens.values(), default=tokens)
    if speeds is None:
        speeds = measure_speeds(
            model.layers, where, values=values, exact_below=exact_below, width=width,
            passes=passes, tokens=tokens,
        )  # fmt: skip
    estimates = _decompositions(model, values, exact_below, workers, where, speeds)
    data = Data(tokens, -(-batches // workers), seen)
    if hooked:
        estimates += _runs(hooked, data, passes, width, where, speeds)
    if any(y.kind == "expert" and y.share == 1 for y in hooked):
        notes.append(
            "how many of the experts a token passes is not known: each is taken to get all tokens, "
            "which makes batches longer and larger than they are"
        )
    if model.in_files and getattr(getattr(model.module, "config", None), "quantization_config", 0):
        notes.append("the config's quantization is not counted: weights as if they had none")
    if len(hooked) < len(model.layers):
        notes.append(
            f"{len(model.layers) - len(hooked)} layers are convolutions with groups, which weights "
            "and delta alone can take"
        )
    settings = (
        f"{batches} batches of {tokens:,} tokens, {passes} passes of width {width} for gradients; "
        f"{'all' if values is None else values} values a weight; "
        f"{workers} worker{'s' if workers > 1 else ''} on {where}"
        + (f", threads: {torch.get_num_threads()}" if where.type == "cpu" else "")
    )
    used = {y.name: y.shape for y in model.layers}
    each = training_bytes(used, tokens={y.name: data.rows(y) for y in model.layers})
    return Plan(
        model.label, model.layers, tuple(estimates), rank, rank * sum(each.values()), settings,
        tuple(notes),
    )  # fmt: skip


def _place(model: PlannedModel, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if model.in_files or model.module is None:
        return torch.device("cpu")
    own = next(model.module.parameters()).device
    return torch.device("cpu") if own.type == "meta" else own


def _traced(
    model: PlannedModel,
    hooked: Sequence[PlannedLayer],
    targets: Any,
    exclude: Any,
    tokens: int,
    batch: Any,
    device: torch.device,
) -> tuple[Trace | None, list[str]]:
    """A batch's trace, or a note that says why there is none."""
    alone = (
        "a batch counts by the layers' shapes alone: without attention and other operations, and "
        "in memory their inputs alone, one each (layers with one input share it)"
    )
    if model.module is None:
        return None, [f"{alone}; its config.json, if there is one, would tell more: plan that file"]
    batch = example_batch(model.module, tokens) if batch is None else batch
    if batch is None:
        return None, [f"{alone}: pass an example as batch= for more"]
    names = {layer.name for layer in hooked}
    layers = [
        y
        for y in find_layers(model.module, targets, exclude=exclude)
        if y.name in names and y.kind != "expert"
    ]
    try:
        return trace(model.module, layers, batch, device), []
    # The model's own code runs there, and may do anything on tensors without data.
    except Exception as error:
        reason = str(error).partition("\n")[0][:80] or type(error).__name__
        return None, [f"{alone}: the model does not run without data ({reason})"]


def _decompositions(
    model: PlannedModel,
    values: int | None,
    exact_below: int,
    workers: int,
    device: torch.device,
    speeds: Speeds,
) -> list[Estimate]:
    layers = model.layers
    times = [costs.decomposition_seconds(y, values, exact_below, speeds) for y in layers]
    work = [arithmetic(y.shape, values, exact_below) for y in layers]
    shares = balanced_shares(work, workers)
    usual, most = (max(sum(times[i][which] for i in share) for share in shares) for which in (0, 1))
    place: costs.Place = "device" if device.type != "cpu" else "memory"
    if model.in_files and place == "memory":
        place = "files"
    read = sum(y.stored for y in layers) if model.in_files else 0
    found: list[Estimate] = []
    for source, count, memory in (
        ("weights", 1, costs.weights_memory), ("delta", 2, costs.delta_memory),
    ):  # fmt: skip
        peak = memory(layers, values, exact_below, place)
        found.append(Estimate(source, usual, most, peak, count * read, len(layers)))
    return found


def _runs(
    layers: Sequence[PlannedLayer],
    data: Data,
    passes: int,
    width: int,
    device: torch.device,
    speeds: Speeds,
) -> list[Estimate]:
    def estimate(source: str, seconds: float, memory: int, count: int) -> Estimate:
        return Estimate(source, seconds, seconds, memory, 0, count)

    found = [
        estimate(
            "gradients",
            costs.gradient_seconds(layers, width, passes, data, speeds),
            costs.gradient_memory(layers, width, passes, data, device),
            len(layers),
        )
    ]
    dense = [layer for layer in layers if layer.kind != "embedding"]
    if dense:
        twice = min(passes, 2)
        seconds = costs.activation_seconds(dense, width, twice, data, speeds)
        memory = costs.activation_memory(dense, width, twice, data)
        found.append(estimate("activations", seconds, memory, len(dense)))
    for kind in CURVATURES:
        seconds = costs.curvature_seconds(layers, kind, data, speeds)
        memory = costs.curvature_memory(layers, kind, data)
        found.append(estimate(f"curvature {kind}", seconds, memory, len(layers)))
    return found


def _table(plan: Plan) -> str:
    dtypes = sorted({str(y.dtype).removeprefix("torch.") for y in plan.layers})
    stored = bytes_text(sum(y.stored for y in plan.layers))
    lines = [
        f"{plan.label}: {len(plan.layers)} layers, {plan.weights:,} weights, {stored} "
        f"({', '.join(dtypes)})",
        "",
    ]
    rows = [("extraction", "layers", "time", "at most", "memory", "read")]
    for found in plan.estimates:
        varies = found.most_seconds > found.seconds
        rows.append(
            (
                found.source,
                f"{found.layers}",
                time_text(found.seconds),
                time_text(found.most_seconds) if varies else "",
                bytes_text(found.memory),
                bytes_text(found.read) if found.read else "",
            )
        )
    lines += [*aligned(rows), "", *aligned(_kinds(plan)), ""]
    lines += [
        f"LoRA of rank {plan.rank}: {plan.adapter_parameters:,} parameters, "
        f"{bytes_text(plan.adapter_bytes)} to train (float32, AdamW)",
        f"assumed: {plan.settings}",
        "memory: what tensors take at once beyond the model, of each worker; an allocator may "
        "keep more",
        "time: by the speed of this machine now, to a factor of two; without reading from disk",
        *plan.notes,
    ]
    return "\n".join(line for text in lines for line in _wrapped(text))


def _kinds(plan: Plan) -> list[tuple[str, ...]]:
    """Layers by name without numbers and by shape, the largest together first, and the total."""
    kinds: dict[tuple[str, tuple[int, int]], int] = Counter(
        (kind_of(y.name), y.shape) for y in plan.layers
    )
    largest = sorted(kinds, key=lambda kind: -kinds[kind] * math.prod(kind[1]))
    rows = [("largest layers", "shape", "layers", "weights", f"rank {plan.rank}")]

    def row(name: str, shape: str, chosen: Sequence[tuple[str, tuple[int, int]]]) -> None:
        weights = sum(kinds[kind] * math.prod(kind[1]) for kind in chosen)
        adapter = plan.rank * sum(kinds[kind] * sum(kind[1]) for kind in chosen)
        count = sum(kinds[kind] for kind in chosen)
        rows.append((name, shape, f"{count}", f"{weights:,}", f"{adapter:,}"))

    for kind in largest[:_KINDS]:
        name, (d, k) = kind
        row(name, f"{d} x {k}", [kind])
    if len(largest) > _KINDS:
        row(f"{len(largest) - _KINDS} other kinds", "", largest[_KINDS:])
    row("total", "", largest)
    # The end of a name tells more than its beginning.
    room = _WIDTH - sum(2 + max(map(len, column)) for column in list(zip(*rows, strict=True))[1:])
    room = max(room, len(rows[0][0]))
    return [(n if len(n) <= room else f"...{n[3 - room :]}", *rest) for n, *rest in rows]


def _wrapped(text: str) -> list[str]:
    # Rows of a table are short enough already, and their spaces count.
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ") if len(text) > _WIDTH else [text]
