"""Block Krylov iteration: the largest singular values of a matrix by products with blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.block_krylov needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

_LEAST_BLOCK = 8
_PASSES = 8
_STRIP_BYTES, _LEAST_ROWS = 1 << 19, 16


class Krylov(NamedTuple):
    """What `block_krylov` found.

    Attributes:
        values: the largest, float64, descending.
        shortfall: estimate of the energy that they lack, relative to theirs.
        products: (A V)^T, a row a vector of V, float64.
        gram: of these rows; the lower triangle is filled.
    """

    values: npt.NDArray[np.float64]
    shortfall: float
    products: torch.Tensor
    gram: torch.Tensor


def largest_basis(
    shorter: int, rank: int, oversample: int | None = None, power_iterations: int = 32
) -> tuple[int, int]:
    """How many columns the basis of block Krylov grows to at most, and how many at a time."""
    columns = max(8 * rank, 16 * _LEAST_BLOCK) if oversample is None else rank + oversample
    block = min(shorter, max(_LEAST_BLOCK, math.ceil(columns / power_iterations)))
    return min(columns, shorter), block


def block_krylov(
    matrix: torch.Tensor, rank: int, basis: int, block: int, tolerance: float, seed: int
) -> Krylov:
    """The largest values of A V, V an orthonormal basis of a Krylov space, and what they lack.

    Algorithm RBKI of Tropp and Webber 2023, with one basis alone made orthogonal throughout, and
    the Gram matrix of A V in place of the block bidiagonal one: it is right for whatever V came
    out.
    """
    matrix = row_major(matrix)
    d, k = matrix.shape
    like = {"dtype": matrix.dtype, "device": matrix.device}
    # Vectors are rows: their blocks are then contiguous, and in the order that LAPACK's QR takes.
    v = torch.empty(basis, k, **like)
    products = torch.empty(basis, d, dtype=torch.float64, device=matrix.device)
    gram = torch.empty(basis, basis, dtype=torch.float64, device=matrix.device)
    generator = torch.Generator().manual_seed(seed)
    following = torch.randn(min(block, basis), d, generator=generator).to(**like) @ matrix

    values = torch.empty(0)
    captured: list[float] = []
    missing = math.inf
    end = 0
    while end < basis:
        start, end = end, min(end + block, basis)
        v[start:end] = orthonormal(following[: end - start], v[:start], generator)
        product, following = multiplied(matrix, v[start:end])
        products[start:end] = product.T
        gram[start:end, :end] = products[start:end] @ products[:end].T
        if end >= rank:
            # eigvalsh reads the lower triangle, which is the one that is filled.
            squares = torch.linalg.eigvalsh(gram[:end, :end]).flip(0)[:rank].clamp_min(0)
            values = squares.sqrt()
            captured.append(float(squares.sum()))
            missing = _missing(captured)
            if missing <= tolerance * captured[-1]:
                break
    complete = end == min(d, k)
    shortfall = 0.0 if complete else missing / captured[-1]
    return Krylov(values.cpu().numpy(), shortfall, products[:end], gram[:end, :end])


def multiplied(matrix: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A V and (A^T A V)^T for rows v = V^T.

    On one thread of a CPU in strips of rows that stay in its cache, so that A comes from memory
    once, not twice: with blocks as narrow as these that is half of the time. Several threads would
    wait for each other at every strip, for seconds in all where other programs keep a core busy.
    """
    product = matrix.new_empty(len(matrix), len(v))
    twice = torch.zeros_like(v)
    columns = v.T.contiguous()
    rows = len(matrix)
    if matrix.device.type == "cpu" and torch.get_num_threads() == 1:
        rows = max(_LEAST_ROWS, _STRIP_BYTES // (matrix.shape[1] * matrix.element_size()))
    for strip, out in zip(matrix.split(rows), product.split(rows), strict=True):
        torch.mm(strip, columns, out=out)
        twice.addmm_(out.T, strip)
    return product, twice


def row_major(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix or its transpose, whichever has its rows in one piece; else a copy."""
    if matrix.T.is_contiguous():
        return matrix.T
    return matrix.contiguous()


def orthonormal(
    rows: torch.Tensor, basis: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Orthonormal rows that span `rows` less their part in `basis`.

    One projection leaves rounding errors in the basis, and a second one of the normalised rest
    removes them ("twice is enough", Kahan and Parlett) unless the rest was nothing but such errors:
    the Krylov space is exhausted. Directions lost in this way are drawn anew, which is as good as
    any other start, and the passes go on until every row has kept most of its length.
    """
    for attempt in range(_PASSES):
        rows = rows - (rows @ basis.T) @ basis
        q, r = torch.linalg.qr(rows.T)
        rows = q.T
        kept = r.diagonal().abs()
        if attempt > 0 and float(kept.min()) > 0.5:
            break
        lost = torch.nonzero(kept <= 1e-3 * kept.max()).view(-1)
        if attempt > 0 and len(lost):
            fresh = torch.randn(len(lost), rows.shape[1], generator=generator).to(rows)
            rows[lost] = fresh / math.sqrt(rows.shape[1])
    return rows


def _missing(captured: list[float]) -> float:
    """What further blocks would add, if each adds the same share of what the one before did."""
    if len(captured) < 3:
        return math.inf
    gain, before = captured[-1] - captured[-2], captured[-2] - captured[-3]
    if gain <= 0:
        return 0.0
    ratio = min(gain / before, 0.99) if before > 0 else 0.99
    return gain * ratio / (1 - ratio)
