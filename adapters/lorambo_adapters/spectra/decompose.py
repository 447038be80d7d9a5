"""The largest singular values of one matrix, and how much energy they leave out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.decompose needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.block_krylov import block_krylov, largest_basis, row_major
from lorambo_alloc.costs import whole_number

Method = Literal["svdvals", "qr", "gram", "block_krylov", "zero"]

# Where the longer side is so many times the shorter one, a QR factorisation before svdvals, and
# the Gram matrix instead of it, are the quicker ways (measured on shapes of BERT and Llama).
_QR_ASPECT, _GRAM_ASPECT = 1.5, 8.0
# A basis of three ranks usually suffices; asking for more than an eighth of the values would make
# the largest basis that is allowed by default longer than the matrix.
_LARGEST_SHARE = 8
_SAFE = 2.0**100  # a matrix with a squared norm up to this is far from overflow in float32


@dataclass(frozen=True)
class Decomposition:
    """What `decompose` found; `values, unresolved = decompose(...)` unpacks it.

    Attributes:
        values: singular values, float64, descending.
        unresolved: squared Frobenius norm of the matrix less the sum of `values` squared, >= 0.
        method: "svdvals", "qr" (svdvals of the triangular factor), "gram", "block_krylov", or
            "zero" for a matrix of zeros.
        shortfall: estimate of how much larger, relatively, the sum of the largest values squared
            is than what `values` captured of it; 0 unless the method is "block_krylov", infinite
            if it took fewer than three blocks past `rank` columns to end.
    """

    values: npt.NDArray[np.float64]
    unresolved: float
    method: Method = "svdvals"
    shortfall: float = 0.0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.unresolved))


def decompose(
    matrix: torch.Tensor,
    rank: int | None = None,
    *,
    exact_below: int = 1024,
    oversample: int | None = None,
    power_iterations: int = 32,
    tolerance: float = 3e-5,
    seed: int = 0,
) -> Decomposition:
    """Compute the `rank` largest singular values of a matrix, or all of them.

    With s the shorter side and l the longer one:

    | case | method | error of a value sigma |
    |---|---|---|
    | all values, s < `exact_below`, or rank > s / 8 | svdvals in float64; from l >= 1.5 s of the factor R of a QR factorisation | about eps sigma_1 |
    | the same, and l >= 8 s | eigenvalues of the s x s Gram matrix in float64 | about eps sigma_1^2 / sigma, at most sqrt(eps) sigma_1; of sigma^2, about eps sigma_1^2 |
    | else | block Krylov, in float32 (float64 for a float64 matrix) | see below |

    Here eps is 2.2e-16, float64's. The entries are taken as they are given: what was lost when a
    weight was rounded to bfloat16 is not an error of these methods.

    **Block Krylov.** From a seeded Gaussian block, multiplications with A and its transpose grow an
    orthonormal basis V by blocks, each made orthogonal to all before; the values are those of A V
    (whose Gram matrix is kept in float64). Each is at most the true one, but for rounding, so
    captured energy is never overstated and `unresolved` never understated. The basis stops growing
    once the energy that is estimated to be missing from the `rank` largest values (the last two
    blocks' gains, continued as a geometric series) is below `tolerance` of theirs, or at its
    greatest size. Blocks are rank / 4 columns wide: narrower ones than the rank reach the same
    accuracy with less arithmetic. The estimate is no bound, and tight clusters mislead it: with
    half of 1100 values near 1 and half near 0.5, each within 1 %, 0.2 % of the energy was missed
    where 5e-6 was estimated. The smallest of the values converge
    last: a `tolerance` of 3e-5 of the energy left them up to 1 % too small on power laws. Flat
    spectra, such as those of noise, take the largest basis and may still fall short of `tolerance`,
    which `shortfall` then says. `benchmarks/run_decompose.py` measures all of this.
    Rounding in float32 adds an error of about 1e-6 sigma_1 to a value and of about 1e-6 |A|_F^2 to
    `unresolved`, which says nothing below that.

    **Memory** beyond the matrix, in bytes: exact, 8 d k for a float64 copy and as much again within
    LAPACK (8 s^2 of it for the Gram matrix); block Krylov, 4 d k if the matrix is neither float32 nor
    float64 (for a float32 copy), and at most (8 d + 4 k) (rank + oversample) (or 8 k + 4 d, if the columns lie
    in one piece), of which the CPU touches only as much as the basis grows to.

    Args:
        matrix: d x k, of a floating-point type with 16 bits or more, on any device that knows
            float64 (Apple's MPS does not). It is not written to.
        rank: how many of the largest values are wanted, >= 1; None for all, by an exact method.
        exact_below: a shorter side below it is decomposed exactly.
        oversample: columns of the largest basis beyond `rank`; by default 7 rank, and 128 - rank
            for ranks below 16.
        power_iterations: blocks in which the largest basis is built, >= 1: each is (rank +
            oversample) / power_iterations columns wide, and 8 at least. With 1 it is the
            randomised range finder of Halko, Martinsson and Tropp.
        tolerance: see above; 0 grows the basis to the end.
        seed: of the Gaussian block, >= 0. Drawn on the CPU, so devices differ by rounding only.

    Returns:
        The values, min(rank, s) of them, and the energy that they leave unresolved.

    Raises:
        ValueError: the matrix is not 2-D, is empty, has no data (meta device), is of another type,
            or is not finite; or a number is out of its range.

    References:
        N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness", SIAM Review
        53, 2011. J. A. Tropp, R. J. Webber, "Randomized algorithms for low-rank matrix
        approximation: design, analysis, and applications", 2023, section on block Krylov iteration.
        R. Meyer, C. Musco, C. Musco, "On the unreasonable effectiveness of single vector Krylov
        methods for low-rank approximation", SODA 2024, for the narrow blocks.

    Example:
        >>> import torch
        >>> values, unresolved = decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> values.round(6), round(unresolved, 6)
        (array([3., 2.]), 1.0)
    """  # noqa: E501  (a table's rows)
    _check_matrix(matrix)
    wanted = None if rank is None else whole_number(rank, "rank", 1)
    whole_number(exact_below, "exact_below", 0)
    whole_number(seed, "seed", 0)
    blocks = whole_number(power_iterations, "power_iterations", 1)
    extra = None if oversample is None else whole_number(oversample, "oversample", 0)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number from 0 to below 1, got {tolerance!r}")

    matrix = matrix.detach()
    shorter = min(matrix.shape)
    exact = wanted is None or is_exact((shorter, shorter), wanted, exact_below)
    work = torch.float64 if exact else torch.promote_types(matrix.dtype, torch.float32)
    energy, scale = squared_norm(matrix, work), 1.0
    if not 1 / _SAFE < energy < _SAFE:
        low, high = torch.aminmax(matrix)
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            raise ValueError("expected a matrix of finite numbers, got NaN or infinity")
        if largest == 0:
            return Decomposition(np.zeros(min(shorter, wanted or shorter)), 0.0, "zero")
        # The squares would leave the range of doubles, or the products that of float32.
        scale = 2.0 ** math.frexp(largest)[1]
        matrix = matrix.to(torch.float64) / scale
        energy = squared_norm(matrix, work)
    matrix = matrix.to(work)

    if wanted is None or exact:
        values, method = _all_values(matrix)
        tail = values[wanted or shorter :] * scale
        return Decomposition(values[:wanted] * scale, float(tail @ tail), method)
    basis, block = largest_basis(shorter, wanted, extra, blocks)
    values, shortfall, *_ = block_krylov(matrix, wanted, basis, block, tolerance, seed)
    unresolved = max(0.0, energy - math.fsum(values * values)) * scale * scale
    return Decomposition(values * scale, unresolved, "block_krylov", shortfall)


def squared_norm(matrix: torch.Tensor, dtype: torch.dtype = torch.float64) -> float:
    """The squared Frobenius norm of a matrix of any float type.

    In pieces, so that memory holds a converted copy of one megabyte (on a device 128) at a time.

    Args:
        matrix: of two dimensions.
        dtype: in which the entries of a piece are squared and summed; the pieces' sums are added up
            in float64. float32 is faster, and off by about 1e-8 of the result.
    """
    flat = row_major(matrix.detach()).view(-1)
    # float32 sums are kept short: some processors add up a piece in few accumulators.
    size = 1 << ((17 if dtype == torch.float64 else 14) if matrix.device.type == "cpu" else 24)
    buffer = torch.empty(min(size, len(flat)), dtype=dtype, device=matrix.device)
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for part in flat.split(size):
        piece = part if part.dtype == dtype else buffer[: len(part)].copy_(part)
        total += torch.dot(piece, piece)
    return float(total)


def is_exact(shape: tuple[int, int], rank: int | None, exact_below: int = 1024) -> bool:
    """Whether `decompose` computes all values of a matrix of this shape, in float64."""
    shorter = min(shape)
    return rank is None or shorter < exact_below or rank * _LARGEST_SHARE > shorter


def exact_method(shape: tuple[int, int]) -> Method:
    """By which of the exact methods all values of a matrix of this shape are found."""
    aspect = max(shape) / min(shape)
    if aspect >= _GRAM_ASPECT:
        return "gram"
    return "qr" if aspect >= _QR_ASPECT else "svdvals"


def working_memory(
    shape: tuple[int, int],
    rank: int | None,
    dtype: torch.dtype = torch.float32,
    exact_below: int = 1024,
    basis: int | None = None,
) -> int:
    """Bytes that `decompose` takes beyond the matrix, with its defaults.

    With s the shorter side, and b columns of the basis:

    - svdvals: 8 d k for LAPACK's copy; qr: the same and 8 s^2; gram: 16 s^2; for all three, 8 d k
      more for a matrix that is not float64;
    - block Krylov: (8 d + 4 k) b for the basis and its products (8 d + 8 k for a float64 matrix),
      16 b^2 for the Gram matrix and its eigenvalues, and 4 d k for a matrix that is neither float32
      nor float64.

    Args:
        shape: (d, k), rows in one piece.
        rank: as `decompose` takes it.
        dtype: of the matrix.
        exact_below: as `decompose` takes it.
        basis: columns that the basis grows to, as far as the CPU touches it; by default the most.
    """
    d, k = shape
    shorter = min(shape)
    if rank is None or is_exact(shape, rank, exact_below):
        copy = 0 if dtype == torch.float64 else 8 * d * k
        own = {"svdvals": 8 * d * k, "qr": 8 * d * k + 8 * shorter**2, "gram": 16 * shorter**2}
        return copy + own[exact_method(shape)]
    most, _ = largest_basis(shorter, rank)
    basis = most if basis is None else min(basis, most)
    copy = 4 * d * k if dtype in (torch.bfloat16, torch.float16) else 0
    number = 8 if dtype == torch.float64 else 4
    return copy + (8 * d + number * k) * basis + 16 * basis**2


def arithmetic(shape: tuple[int, int], rank: int | None, exact_below: int = 1024) -> float:
    """About how many floating-point operations `decompose` needs with its defaults.

    For sharing work out and for showing progress: within a factor of about two of what is done
    (svdvals' are the slower ones), and of no meaning beyond that.
    """
    shorter, longer = sorted(shape)
    if rank is None or is_exact(shape, rank, exact_below):
        return 4.0 * longer * shorter**2 + 22.0 * shorter**3
    return 4.0 * longer * shorter * 3 * rank


def _check_matrix(matrix: torch.Tensor) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"expected a matrix of at least 1 x 1, got shape {tuple(matrix.shape)}")
    if matrix.is_meta:
        raise ValueError("expected a matrix, got one without data (meta device)")
    kind = matrix.dtype if matrix.layout is torch.strided else matrix.layout
    if kind not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"expected a floating-point matrix of 16 bits or more an entry, got {kind}"
        )


def _all_values(tall: torch.Tensor) -> tuple[npt.NDArray[np.float64], Method]:
    """All singular values of a float64 matrix."""
    if tall.shape[0] < tall.shape[1]:
        tall = tall.T
    method = exact_method((tall.shape[0], tall.shape[1]))
    if method == "gram":
        values = torch.linalg.eigvalsh(tall.T @ tall).flip(0).clamp_min(0).sqrt()
    elif method == "qr":
        values = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    else:
        values = torch.linalg.svdvals(tall)
    return values.cpu().numpy(), method
