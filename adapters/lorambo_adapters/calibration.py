"""How fast this machine is at what an extraction does: a few short measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.calibration needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.plan_layers import PlannedLayer
from lorambo_adapters.spectra.block_krylov import largest_basis, multiplied, orthonormal
from lorambo_adapters.spectra.decompose import arithmetic, decompose, exact_method, is_exact
from lorambo_adapters.spectra.gaussians import Gaussians
from lorambo_adapters.spectra.inputs import DenseInputs, may_round, sum_dtype
from lorambo_adapters.spectra.sketch import ExactSum, SubspaceSketch, TwoSidedSketch
from lorambo_adapters.spectra.sketch_sizes import gaussian_columns, is_summed_exactly

# Large enough for the rates that matter, small enough for about two seconds on one CPU core.
_SIDE, _TOKENS = 2048, 512
_FEWEST_SECONDS, _RUNS = 0.02, 3
_SVD_SIDE, _EIGEN_SIDE = 1024, 512
_WIDE = 1 << 23  # numbers that no CPU's cache holds


@dataclass(frozen=True)
class Speeds:
    """What is done in a second; see `plan_costs` for what is counted.

    Attributes:
        matmul: operations of a layer's product with its inputs, in the model's precision.
        float_matmul: the same in the precision of sums over tokens (second moments).
        elementwise: bytes read and written by operations that are no products.
        sketch: operations of a sketch of gradients.
        exact_sum: operations of a gradient that is summed itself.
        svdvals: `arithmetic` of exact decompositions of square matrices.
        qr: the same of those at least 1.5 times as long as wide.
        gram: the same of those at least 8 times as long as wide.
        krylov_products: operations of block Krylov's products with the matrix.
        krylov_basis: operations of keeping its basis orthogonal.
        eigvalsh: n^3 of eigenvalues of n x n matrices in float64.
        eigh: n^3 of eigenvectors besides.
    """

    matmul: float
    float_matmul: float
    elementwise: float
    sketch: float
    exact_sum: float
    svdvals: float
    qr: float
    gram: float
    krylov_products: float
    krylov_basis: float
    eigvalsh: float
    eigh: float

    def __post_init__(self) -> None:
        for field in fields(self):
            rate = getattr(self, field.name)
            if not 0 < rate < math.inf:
                raise ValueError(f"{field.name}: expected a positive rate, got {rate!r}")


def measure_speeds(
    layers: Sequence[PlannedLayer],
    device: torch.device | str = "cpu",
    *,
    values: int | None = 128,
    exact_below: int = 1024,
    width: int = 64,
    passes: int = 3,
    tokens: int = 2048,
) -> Speeds:
    """Measure with the code and the shapes that the extraction would use, cut to a moderate size.

    Takes one to three seconds. It is done by as many threads as torch uses; other programs that
    run at the same time make all estimates longer.

    Args:
        layers: of the model.
        device: where the extraction would run.
        values: how many singular values of weights are wanted; None for all.
        exact_below: as `decompose` takes it.
        width: of the sketches of gradients.
        passes: over the batches of gradients.
        tokens: a batch.
    """
    device = torch.device(device)
    largest = max(layers, key=lambda layer: layer.size)
    work = sum_dtype(largest.dtype)
    d, k = (min(side, _SIDE) for side in largest.shape)
    tokens = min(tokens, _TOKENS if device.type == "cpu" else 8 * _TOKENS)

    def normal(*shape: int, dtype: torch.dtype = work) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def rate(amount: float, work: Callable[[], Any]) -> float:
        return amount / _seconds(work, device)

    def matmul(dtype: torch.dtype) -> float:
        x, weight = normal(tokens, k, dtype=dtype), normal(d, k, dtype=dtype)
        return rate(2.0 * tokens * d * k, lambda: x @ weight.T)

    wide = normal(min(_WIDE, max(tokens * k, 1 << 16)), dtype=largest.dtype)
    moved = 4 * len(wide) * wide.element_size()
    exact = [layer for layer in layers if is_summed_exactly(layer.shape, width, passes)]
    sketched = [layer for layer in layers if not is_summed_exactly(layer.shape, width, passes)]
    products, basis = _krylov(layers, device, values, exact_below)
    square = normal(*[min(_EIGEN_SIDE, max(largest.shape))] * 2, dtype=torch.float64)
    square = square + square.T
    cube = float(len(square)) ** 3
    return Speeds(
        matmul=matmul(largest.dtype),
        float_matmul=matmul(work),
        elementwise=rate(moved, lambda: torch.tanh(wide * 0.5)),
        sketch=_sketching(sketched or exact, width, passes, tokens, device),
        exact_sum=_sketching(exact or sketched, 10**6, passes, tokens, device),
        svdvals=_exact("svdvals", layers, device),
        qr=_exact("qr", layers, device),
        gram=_exact("gram", layers, device),
        krylov_products=products,
        krylov_basis=basis,
        eigvalsh=rate(cube, lambda: torch.linalg.eigvalsh(square)),
        eigh=rate(cube, lambda: torch.linalg.eigh(square)),
    )


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few runs, after one that does not count."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = timed()
    runs = _RUNS if first > _FEWEST_SECONDS else 3 * _RUNS
    return max(min(timed() for _ in range(runs if first < 0.2 else 1)), 1e-9)


def _exact(method: str, layers: Sequence[PlannedLayer], device: torch.device) -> float:
    """Of the largest shape that takes this method, or else one that would, cut to a fair size."""
    shapes = [s.shape for s in layers if exact_method(s.shape) == method]
    longest = {"svdvals": 1.0, "qr": 4.0, "gram": 16.0}[method]
    if shapes:
        shape = max(shapes, key=lambda shape: arithmetic(shape, None))
        side, aspect = min(shape), max(shape) / min(shape)
    else:
        side, aspect = 256, longest
    side = min(side, _SVD_SIDE if method == "svdvals" else _EIGEN_SIDE)
    shape = max(1, math.floor(side * aspect)), side
    matrix = torch.randn(shape, device=device).to(torch.float64)
    amount = arithmetic(shape, None)
    return amount / _seconds(lambda: decompose(matrix), device)


def _krylov(
    layers: Sequence[PlannedLayer], device: torch.device, values: int | None, exact_below: int
) -> tuple[float, float]:
    """Of products with the largest matrix that takes block Krylov, and of its basis."""
    inexact = [
        layer
        for layer in layers
        if values is not None and not is_exact(layer.shape, values, exact_below)
    ]
    shape = max(inexact, key=lambda layer: layer.size).shape if inexact else (256, 256)
    most, block = largest_basis(min(shape), values or 16)
    share = min(1.0, _SIDE / max(shape))
    d, k = (max(block, math.floor(side * share)) for side in shape)
    matrix = torch.randn(d, k, device=device)
    rows = torch.randn(block, k, device=device)
    before = torch.linalg.qr(torch.randn(k, min(most // 2, k - 1), device=device))[0].T.contiguous()
    generator = torch.Generator().manual_seed(0)
    spent = _seconds(lambda: multiplied(matrix, rows), device)
    kept = _seconds(lambda: orthonormal(rows, before, generator), device)
    return 4.0 * d * k * block / spent, 8.0 * block * k * (len(before) + block) / kept


def _sketching(
    layers: Sequence[PlannedLayer], width: int, passes: int, tokens: int, device: torch.device
) -> float:
    """Of adding a batch to the largest layer's sketch."""
    largest = max(layers, key=lambda layer: layer.size)
    d, k = (min(side, _SIDE) for side in largest.shape)
    work = sum_dtype(largest.dtype)
    x = torch.randn(tokens, k, device=device).to(largest.dtype)
    gradient = torch.randn(tokens, d, device=device).to(largest.dtype)
    if is_summed_exactly((d, k), width, passes):
        total = ExactSum((d, k), (None, None), device, work)
        spent = _seconds(lambda: total.update(DenseInputs(x, work), gradient, 1.0), device)
        return 2.0 * tokens * d * k / spent
    rounded = may_round(largest.dtype)
    gaussians = Gaussians(max(d, k), *gaussian_columns(width, passes), 0)
    if passes == 1:
        sketch = TwoSidedSketch((d, k), width, gaussians, (None, None), device, work, rounded)
    else:
        sketch = SubspaceSketch(
            (d, k), width, passes, gaussians, (None, None), device, work, rounded
        )
    # An object of its own for each run, as it would keep the product with the test matrix.
    spent = _seconds(lambda: sketch.update(DenseInputs(x, work), gradient, 1.0), device)
    return 4.0 * tokens * (d + k) * width / spent
