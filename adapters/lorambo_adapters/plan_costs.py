"""Time and memory of each kind of extraction, from shapes, counts and speeds.

Of a layer (d, k): T tokens a batch, s the sketch's width, v values wanted. Times are operations
over measured speeds; memory is what lies beside the model at once, at its peak. Each function's
docstring has its formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.plan_costs needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.calibration import Speeds
from lorambo_adapters.plan_layers import PlannedLayer
from lorambo_adapters.plan_trace import Run, Trace
from lorambo_adapters.spectra.activations import EXACT_SIDE
from lorambo_adapters.spectra.block_krylov import largest_basis
from lorambo_adapters.spectra.decompose import (
    arithmetic,
    exact_method,
    is_exact,
    working_memory,
)
from lorambo_adapters.spectra.inputs import sum_dtype
from lorambo_adapters.spectra.sketch import PROBES, two_sided_widths
from lorambo_adapters.spectra.sketch_sizes import (
    gaussian_columns,
    is_summed_exactly,
    sketch_numbers,
)
from lorambo_adapters.spectra.tensor_files import _MAPPED_BYTES

Place: TypeAlias = Literal["files", "memory", "device"]
"""Whether weights are read from files to the CPU, lie in memory, or are copied to a device."""

# Block Krylov's basis grew to 4.3 to 8 times the values wanted on noise (the more, the fewer are
# wanted of the matrix), and to 3.3 to 6 times on the weights of a small encoder.
_USUAL_BASIS = 6


@dataclass(frozen=True)
class Data:
    """What runs through the model: counts, and a trace of one batch where the model can be run.

    Attributes:
        tokens: a batch.
        batches: that one worker runs through.
        trace: of a batch; None where all is counted from the shapes of the layers.
    """

    tokens: int
    batches: int
    trace: Trace | None = None

    def rows(self, layer: PlannedLayer) -> int:
        """Rows of a layer's input."""
        if self.trace is None or layer.kind == "expert":
            return round(self.tokens * layer.share)
        return self.trace.tokens.get(layer.name, 0)

    def distinct(self, layers: Iterable[PlannedLayer]) -> list[PlannedLayer]:
        """One layer an input; without a trace every layer counts as having one of its own."""
        if self.trace is None:
            return list(layers)
        return list({self.trace.inputs.get(y.name, y.name): y for y in layers}.values())

    def run(self, layers: Sequence[PlannedLayer], backward: bool) -> Run:
        """A batch: without a trace 2 d k T operations forward, and 4 d k T with the backward pass.

        Memory is then that of the layers' inputs, each kept for the backward pass.
        """
        kept = {y.name: self.rows(y) * y.shape[1] * y.dtype.itemsize for y in layers}
        if self.trace is not None and not backward:
            return self.trace.forward
        if self.trace is not None:
            both = self.trace.both  # it has kept all inputs but those of experts
            experts = sum(kept[y.name] for y in layers if y.kind == "expert")
            return Run(both.operations, both.moved, both.peak + experts)
        operations = (4.0 if backward else 2.0) * sum(self.rows(y) * y.size for y in layers)
        inputs = kept.values()
        return Run(operations, 0.0, sum(inputs) if backward else max(inputs))


def decomposition_seconds(
    layer: PlannedLayer, values: int | None, exact_below: int, speeds: Speeds
) -> tuple[float, float]:
    """Of `decompose`: as a rule, and at most.

    Exact methods: `arithmetic`. Block Krylov with a basis of n columns, b at a time: 4 d k n for
    the products, (4 k + d) n^2 + 8 k b n to keep the basis orthogonal and for the Gram matrix,
    eigenvalues of its leading parts after each block past v; n is 6 v as a rule, and 8 v at most.
    """
    d, k = layer.shape
    if values is None or is_exact(layer.shape, values, exact_below):
        rate = getattr(speeds, exact_method(layer.shape))
        seconds = arithmetic(layer.shape, None) / rate
        return seconds, seconds
    largest, block = largest_basis(min(d, k), values)

    def of(n: int) -> float:
        eigenvalues = float(sum(m**3 for m in range(max(values, block), n + 1, block)))
        kept = (4.0 * k + d) * n**2 + 8.0 * k * block * n
        return (
            4.0 * d * k * n / speeds.krylov_products
            + kept / speeds.krylov_basis
            + eigenvalues / speeds.eigvalsh
        )

    return of(min(largest, _USUAL_BASIS * values)), of(largest)


def weights_memory(
    layers: Sequence[PlannedLayer], values: int | None, exact_below: int, place: Place
) -> int:
    """The largest layer's `working_memory`, and what of the weights lies beside it.

    Of files what is mapped: up to 64 MiB and the layer; of another device the layer's copy there;
    of a live module nothing, unless it is dequantised.
    """
    beside = _beside(layers, place)
    work = [_working_memory(y.shape, values, y.dtype, exact_below, place) for y in layers]
    return max(map(sum, zip(beside, work, strict=True)))


def delta_memory(
    layers: Sequence[PlannedLayer], values: int | None, exact_below: int, place: Place
) -> int:
    """As `weights_memory` for two checkpoints, and the difference: 4 d k bytes, or 8 if exact."""
    peak = 0
    for y, beside in zip(layers, _beside(layers, place), strict=True):
        exact = values is None or is_exact(y.shape, values, exact_below)
        wide = torch.float64 if exact or y.dtype == torch.float64 else torch.float32
        difference = y.size * wide.itemsize
        # While two types are subtracted, one of them is converted.
        converted = 0 if y.dtype == wide else difference
        work = max(converted, _working_memory(y.shape, values, wide, exact_below, place))
        # A device holds the difference, and the base's tensor only while it is subtracted.
        peak = max(peak, 2 * beside + difference + work)
    return peak


def _working_memory(
    shape: tuple[int, int],
    values: int | None,
    dtype: torch.dtype,
    exact_below: int,
    place: Place,
) -> int:
    """The CPU's memory grows with the basis; a device has all of it from the start."""
    basis = None if values is None or place == "device" else _USUAL_BASIS * values
    return working_memory(shape, values, dtype, exact_below, basis)


def _beside(layers: Sequence[PlannedLayer], place: Place) -> list[int]:
    if place == "files":
        return _mapped(layers)
    if place == "device":
        return [y.stored for y in layers]
    return [y.size * y.dtype.itemsize if y.kind == "quantized" else 0 for y in layers]


def _mapped(layers: Sequence[PlannedLayer]) -> list[int]:
    """What of a file is mapped once each layer is read: `TensorFiles` maps one of many anew."""
    sizes: list[int] = []
    before = 0
    for layer in layers:
        before = before if before <= _MAPPED_BYTES else 0
        before += layer.stored
        sizes.append(before)
    return sizes


def model_seconds(run: Run, speeds: Speeds) -> float:
    """Products of matrices, and what all other operations move."""
    return run.operations / speeds.matmul + run.moved / speeds.elementwise


def gradient_memory(
    layers: Sequence[PlannedLayer], width: int, passes: int, data: Data, device: torch.device
) -> int:
    """Sketches of the fullest pass (`sketch_numbers`), test matrices, and the larger of two.

    These are a batch's own memory, and, between passes and at the end, six float64 copies (the
    product, its mean, a factorisation and its parts) of the largest layer's sums.
    """
    return (
        sketch_memory(layers, width, passes)
        + gaussian_memory(layers, width, passes, device)
        + max(data.run(layers, True).peak, _factorising(layers, width, passes))
    )


def sketch_memory(layers: Sequence[PlannedLayer], width: int, passes: int) -> int:
    """Of all layers, in the pass in which they hold most; 4 bytes a number (8 of float64)."""
    each = [
        [n * sum_dtype(y.dtype).itemsize for n in sketch_numbers(y.shape, width, passes)]
        for y in layers
    ]
    return max(map(sum, zip(*each, strict=True)))


def gaussian_memory(
    layers: Sequence[PlannedLayer], width: int, passes: int, device: torch.device
) -> int:
    """Test matrices as long as the longest side that is sketched, in float32 on the CPU.

    Each length of a side has a copy on the device in the precision of the sums, unless it is some
    whole rows of what was drawn; in the last of several passes 8 columns more.
    """
    sketched = [y for y in layers if not is_summed_exactly(y.shape, width, passes)]
    longest = max((max(y.shape) for y in sketched), default=1)
    drawn = gaussian_columns(width, passes)
    parts: set[tuple[int, int, int, torch.dtype]] = set()
    for y in sketched:
        d, k = y.shape
        dtype = sum_dtype(y.dtype)
        if passes == 1:
            narrow, wide = two_sided_widths(width)
            right, left = (narrow, wide) if d >= k else (wide, narrow)
            parts |= {(0, k, right, dtype), (1, d, left, dtype)}
        else:
            side = 1 - passes % 2
            parts |= {(0, k, 2 * width, dtype), (side, d if side else k, PROBES, dtype)}
    host = device.type == "cpu"
    copied = [
        rows * columns * dtype.itemsize
        for side, rows, columns, dtype in parts
        if not host or (columns, dtype) != (drawn[side], torch.float32)
    ]
    return (4 * longest * sum(drawn) if host else 0) + sum(copied)


def _factorising(layers: Sequence[PlannedLayer], width: int, passes: int) -> int:
    columns = 2 * width + PROBES
    exact = [y.size for y in layers if is_summed_exactly(y.shape, width, passes)]
    sketched = [max(y.shape) * columns for y in layers]
    return 8 * max(3 * max(exact, default=0), 6 * max(sketched) if len(exact) < len(layers) else 0)


def gradient_seconds(
    layers: Sequence[PlannedLayer], width: int, passes: int, data: Data, speeds: Speeds
) -> float:
    """Passes over the batches, and what is decomposed between them.

    A batch takes the model's forward and backward pass and, a layer, 4 (d + k) s T operations for
    a sketch in each pass, or 2 d k T for an exact sum in the first one. Between passes, a QR
    factorisation of the longer side times 2 s numbers a layer; at the end singular values of as
    many, or of the sum.
    """
    exact = [y for y in layers if is_summed_exactly(y.shape, width, passes)]
    sketched = [y for y in layers if not is_summed_exactly(y.shape, width, passes)]
    passes = passes if sketched else 1
    batch = model_seconds(data.run(layers, True), speeds)
    for y in sketched:
        batch += 4.0 * data.rows(y) * sum(y.shape) * width / speeds.sketch
    once = sum(2.0 * data.rows(y) * y.size for y in exact) / speeds.exact_sum
    end = sum(arithmetic(y.shape, None) for y in exact)
    for y in sketched:
        end += (passes + 1) / 2 * arithmetic((max(y.shape), min(2 * width, *y.shape)), None)
    return data.batches * (passes * batch + once) + end / speeds.svdvals


def activation_memory(layers: Sequence[PlannedLayer], width: int, passes: int, data: Data) -> int:
    """For X^T X P, k min(k, 2 s) numbers a layer (k^2 up to 1,024 features).

    With several passes as many for P where k is larger, once an input; the test matrices; one more
    product; and the larger of a batch's own memory with its inputs in float64, twice, and of five
    float64 copies of the largest product.
    """
    numbers = {y.name: y.shape[1] * _columns(y, width) for y in layers}
    total = sum(numbers[y.name] * sum_dtype(y.dtype).itemsize for y in layers)
    large = [y for y in layers if _columns(y, width) < y.shape[1]]
    if passes > 1:
        total += sum(numbers[y.name] * sum_dtype(y.dtype).itemsize for y in data.distinct(large))
    total += 4 * max((numbers[y.name] for y in large), default=0)
    largest = max(numbers.values())
    inputs = max(16 * data.rows(y) * y.shape[1] for y in layers)
    return total + 4 * largest + max(data.run(layers, False).peak + inputs, 40 * largest)


def activation_seconds(
    layers: Sequence[PlannedLayer], width: int, passes: int, data: Data, speeds: Speeds
) -> float:
    """Forward passes, 2 T k^2 operations an input up to 1,024 features and 8 T k s above.

    At the end eigenvalues, or singular values of k x 2 s numbers, a layer.
    """
    distinct = data.distinct(layers)
    large = {y.name for y in layers if _columns(y, width) < y.shape[1]}
    batch = model_seconds(data.run(layers, False), speeds)
    end = 0.0
    for y in distinct:
        k, columns = y.shape[1], _columns(y, width)
        twice = 2 if y.name in large else 1
        batch += 2.0 * data.rows(y) * k * columns * twice / speeds.float_matmul
        batch += 8.0 * data.rows(y) * k * 4 / speeds.elementwise
    for y in layers:
        k, columns = y.shape[1], _columns(y, width)
        if y.name in large:
            end += 1.5 * arithmetic((k, columns), None) / speeds.svdvals
        else:
            end += k**3 / speeds.eigvalsh
    return (passes if large else 1) * data.batches * batch + end


def _columns(layer: PlannedLayer, width: int) -> int:
    k = layer.shape[1]
    return k if k <= max(EXACT_SIDE, 2 * width) else 2 * width


def curvature_memory(layers: Sequence[PlannedLayer], kind: str, data: Data) -> int:
    """Of sums and then of eigenvectors, layer by layer in the sums' place.

    For "kfac": 4 (k^2 + d^2) bytes a layer (8 for float64) while summing, besides two times k^2
    numbers and a batch's own memory; then 8 (k^2 + d^2) for eigenvectors, A once an input, and
    40 n^2 while a factor is decomposed. "input" has no d^2; "ekfac" runs the batches a second time
    beside the eigenvectors; "diagonal" takes 16 (k + d) instead of all that. An embedding table's A
    is diagonal.
    """
    forward = kind == "input"
    batch = data.run(layers, not forward).peak
    vectors = sum(16 * sum(y.shape) for y in layers)
    if kind == "diagonal":
        # Squares of the largest layer's inputs and gradients, in float64.
        return vectors + batch + max(16 * data.rows(y) * max(y.shape) for y in layers)
    right = {y.name: 0 if y.kind == "embedding" else y.shape[1] ** 2 for y in layers}
    left = {y.name: 0 if forward else y.shape[0] ** 2 for y in layers}
    width = {y.name: sum_dtype(y.dtype).itemsize for y in layers}
    held = sum(width[y.name] * (right[y.name] + left[y.name]) for y in layers)
    peak = held + 2 * 4 * max(right.values()) + batch
    first = {y.name for y in data.distinct(reversed(layers))}
    for y in layers:
        for side in (right, left):
            held -= width[y.name] * side[y.name]
            if side is right and y.name not in first:
                continue
            peak = max(peak, held + 40 * side[y.name] + width[y.name] * side[y.name])
            held += 8 * side[y.name]
    if kind == "ekfac":
        one = max(max(right.values()), max(left.values()))
        peak = max(peak, held + vectors + batch + 4 * one)
    return peak


def curvature_seconds(
    layers: Sequence[PlannedLayer], kind: str, data: Data, speeds: Speeds
) -> float:
    """The model's passes, 2 T (k^2 + d^2) operations a layer, and `eigh` of the factors.

    "ekfac" takes two passes, in the second one for every layer. A counts once an input; "diagonal"
    moves 16 T (k + d) bytes instead; "input" runs forward, and has no B.
    """
    forward = kind == "input"
    batch = model_seconds(data.run(layers, not forward), speeds)
    if kind == "diagonal":
        moved = sum(16.0 * data.rows(y) * sum(y.shape) for y in layers)
        return data.batches * (batch + moved / speeds.elementwise)
    rights = [y for y in data.distinct(layers) if y.kind != "embedding"]
    sums = sum(2.0 * data.rows(y) * y.shape[1] ** 2 for y in rights)
    cubes = sum(float(y.shape[1]) ** 3 for y in rights)
    if not forward:
        sums += sum(2.0 * data.rows(y) * y.shape[0] ** 2 for y in layers)
        cubes += sum(float(y.shape[0]) ** 3 for y in layers)
    seconds = data.batches * (batch + sums / speeds.float_matmul)
    if kind == "ekfac":
        again = sum(2.0 * data.rows(y) * (y.shape[0] ** 2 + y.shape[1] ** 2) for y in layers)
        seconds += data.batches * (batch + again / speeds.float_matmul)
    return seconds + cubes / speeds.eigh
