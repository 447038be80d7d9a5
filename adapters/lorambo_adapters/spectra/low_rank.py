"""The spectrum of a product B A from its factors alone, plain or weighted by curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.low_rank needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.whitening import Factors
from lorambo_alloc import Spectra

Pair: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]
"""(A, B) of a layer: k x k and d x d matrices, or 1-D diagonals, or None for the identity."""

_BLOCK = 1024  # rows of a curvature factor that are converted to float64 at a time
# How far below zero rounding may take an eigenvalue, relative to the trace. Summed in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class LowRankUpdate:
    """The matrix scale * B A of a layer.

    Attributes:
        name: the layer's.
        shape: (d, k).
        rank: columns of B and rows of A.
        scale: a factor.
        read: makes (B, A), d x rank and rank x k; called once, and the result is dropped at once.
        place: where the factors lie, for messages.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scale: float
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    place: str = ""


def low_rank_spectra(
    updates: Iterable[LowRankUpdate],
    *,
    source: str,
    curvature: Mapping[str, Pair | Factors] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Compute the spectra of low-rank updates, one layer at a time.

    Several updates of one name are added up: their factors are put side by side, and the spectrum
    is that of the sum.

    Args:
        updates: of any layers, in the order in which these are to stand in the spectra.
        source: what the updates are; how the values were computed is added to it.
        curvature: of all these layers, and perhaps others (`lora.lora_spectra`).
        device: where to compute; by default where a layer's factors lie.
        progress: see `progress_bar`.

    Returns:
        The spectra with shapes; no energy is unresolved.

    Raises:
        ValueError: factors are not finite, or a curvature factor is missing, of another shape or
            not positive semidefinite; one message lists all layers that have one of these faults.
    """
    layers: dict[str, list[LowRankUpdate]] = {}
    for update in updates:
        layers.setdefault(update.name, []).append(update)
    shapes = {name: parts[0].shape for name, parts in layers.items()}
    problems = list(_differing(layers)) + list(misfits(shapes, curvature))
    refuse(problems)
    found: dict[str, torch.Tensor] = {}
    with progress_bar("spectra", float(len(layers)), progress) as advance:
        for name, parts in layers.items():
            advance(0.0, name)
            try:
                weights = (None, None) if curvature is None else pair_of(curvature[name])
                found[name] = _values(parts, weights, curvature is not None, device)
            except ValueError as error:
                places = sorted({part.place for part in parts} - {""})
                where = f" ({', '.join(places)})" if places else ""
                problems.append(f"layer {name!r}{where}: {error}")
            advance(1.0, "")
    refuse(problems)
    method = "QR of the factors in float64"
    if curvature is not None:
        made = getattr(curvature, "source", "")
        method += (
            f"; weighted by {made or 'curvature'} and divided by sqrt(2): squares in units of the "
            "loss, if A and B are both known"
        )
    return Spectra(_on_host(found), shapes=shapes, source=f"{source}; {method}")


def product_values(
    left: torch.Tensor, right: torch.Tensor, curvature: Pair = (None, None)
) -> torch.Tensor:
    """Singular values of B^1/2 (left right) A^1/2 without forming any of these products.

    With left = Q_l R_l and right^T = Q_r R_r (QR), the values are those of the r x r matrix
    S_B R_l R_r^T S_A^T, where S_B^T S_B = Q_l^T B Q_l and likewise for A. (B^1/2 U and S_B R_l
    have the same Gram matrix U^T B U if U = Q_l R_l, so they differ by an orthogonal factor.) No
    factor of A or B in full is needed.

    Accuracy: everything is in float64. The error of each value is of the order of 2e-16 |left|
    |right| (spectral norms) without curvature. With it, an eigenvalue of Q_l^T B Q_l that is lost
    in rounding, 2e-16 |B|, comes back as a square root of up to 1.5e-8 |B|^1/2: values that small
    beside the largest, in directions where the curvature vanishes, are rounding.

    Memory and arithmetic: 2 (d + k) r numbers and O((d + k) r^2) operations; with curvature
    another (d + k) r numbers and O((d^2 + k^2) r) operations.

    Args:
        left: d x r, of any floating-point type.
        right: r x k, on the same device.
        curvature: (A, B), k x k and d x d, symmetric and positive semidefinite; or 1-D diagonals;
            or None for the identity.

    Returns:
        min(d, r, k) values in float64, descending. Values that are rounding are not set to zero.

    Raises:
        ValueError: a factor or the product is not finite, or a curvature factor is not finite or
            not positive semidefinite (in the factors' span).
    """
    for name, factor in (("B", left), ("A", right)):
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"expected finite numbers, got NaN or infinity in the factor {name}")
    on_right, on_left = curvature
    core_left = weighted_core(left.to(torch.float64), on_left, "B")
    core_right = weighted_core(right.to(torch.float64).T, on_right, "A")
    core = core_left @ core_right.T
    if not bool(torch.isfinite(core).all()):
        raise ValueError("expected a product within the range of doubles, got an overflow")
    return torch.linalg.svdvals(core)


def refuse(problems: Sequence[str], what: str = "") -> None:
    """Raise one ValueError that lists the problems, if there are any.

    Args:
        problems: one sentence each.
        what: of what they are.
    """
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise ValueError(f"{what}{': ' if what else ''}{count}{shown}{more}")


def weighted_core(tall: torch.Tensor, weight: torch.Tensor | None, name: str) -> torch.Tensor:
    """A small matrix C with the Gram matrix C^T C = tall^T weight tall.

    Args:
        tall: n x r, float64.
        weight: n x n, positive semidefinite; or its diagonal; or None for the identity.
        name: of the weight, for messages.

    Raises:
        ValueError: the weight is not finite or not positive semidefinite in the span of `tall`.
    """
    if weight is None:
        return torch.linalg.qr(tall, mode="r").R
    basis, triangle = torch.linalg.qr(tall)
    if weight.ndim == 1:
        product = weight.to(basis)[:, None] * basis
    else:
        product = torch.empty_like(basis)
        for rows in range(0, len(weight), _BLOCK):
            block = slice(rows, rows + _BLOCK)
            product[block] = weight[block].to(basis) @ basis
    inner = basis.T @ product
    if not bool(torch.isfinite(inner).all()):
        raise ValueError(f"expected a finite curvature factor {name}, got NaN or infinity")
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    diagonal = weight if weight.ndim == 1 else weight.diagonal()
    if float(values[0]) < -_ROUNDING * float(diagonal.to(torch.float64).abs().sum()):
        raise ValueError(
            f"expected a positive semidefinite curvature factor {name}, got one with u^T {name} u "
            f"= {float(values[0]):.3g} for a unit vector u"
        )
    return values.clamp(min=0).sqrt()[:, None] * (vectors.T @ triangle)


def _values(
    parts: Sequence[LowRankUpdate],
    curvature: Pair,
    in_loss: bool,
    device: torch.device | str | None,
) -> torch.Tensor:
    lefts: list[torch.Tensor] = []
    rights: list[torch.Tensor] = []
    for part in parts:
        left, right = part.read()
        lefts.append(left.to(device or left.device, torch.float64) * part.scale)
        rights.append(right.to(lefts[0].device, torch.float64))
    left = torch.cat([part.to(lefts[0].device) for part in lefts], 1)
    values = product_values(left, torch.cat(rights), curvature)
    return values / math.sqrt(2) if in_loss else values


def pair_of(curvature: Pair | Factors) -> Pair:
    """A and B, damped if they are `Factors`."""
    return curvature.powers(1.0) if isinstance(curvature, Factors) else curvature


def _differing(layers: Mapping[str, Sequence[LowRankUpdate]]) -> Iterator[str]:
    for name, parts in layers.items():
        for part in parts:
            if part.shape != parts[0].shape:
                yield (
                    f"layer {name!r}: expected updates of one shape to add up, got "
                    f"{parts[0].shape} and {part.shape}"
                )


def misfits(
    shapes: Mapping[str, tuple[int, int]], curvature: Mapping[str, Pair | Factors] | None
) -> Iterator[str]:
    """What curvature lacks, or has of another shape, for these layers: a sentence each."""
    if curvature is None:
        return
    for name, (d, k) in shapes.items():
        if name not in curvature:
            yield f"curvature: layer {name!r} is missing"
            continue
        given = curvature[name]
        if isinstance(given, Factors):
            if given.shape != (d, k):
                yield f"curvature: layer {name!r}: expected shape {(d, k)}, got {given.shape}"
            continue
        try:
            on_right, on_left = given
        except (TypeError, ValueError):
            yield f"curvature: layer {name!r}: expected (A, B), got {given!r}"
            continue
        for side, weight, size in (("A", on_right, k), ("B", on_left, d)):
            if weight is not None and tuple(weight.shape) not in ((size, size), (size,)):
                yield (
                    f"curvature: layer {name!r}: expected {side} of shape ({size}, {size}) or "
                    f"({size},), got {tuple(weight.shape)}"
                )


def _on_host(found: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """The values as arrays; of each device in one copy."""
    arrays: dict[str, object] = {}
    for device in {values.device for values in found.values()}:
        here = {name: values for name, values in found.items() if values.device == device}
        flat = torch.cat(list(here.values())).cpu()
        lengths = [len(values) for values in here.values()]
        for name, values in zip(here, flat.split(lengths), strict=True):
            arrays[name] = values.numpy()
    return {name: arrays[name] for name in found}
