"""Factors, gradients and moments of a layer, carried over to another rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.carry needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import AdapterLayer, Side
from lorambo_adapters.ranks.growth import Gradient, new_rows
from lorambo_adapters.ranks.moments import Law
from lorambo_adapters.ranks.projection import Projection, best_projection
from lorambo_adapters.ranks.sharded import whole
from lorambo_adapters.spectra.low_rank import Pair, product_values


@dataclass(frozen=True)
class Move:
    """What happens to the ranks of one expert.

    Attributes:
        projection: from the old rows (all that the tensors have) to those kept.
        slots: where the kept rows are in the new tensors.
        fresh: where new directions are.
        new: their rows on the side that is not zero; None: what is there already (masked rows).
        size: rows of the new tensors.
    """

    projection: Projection
    slots: torch.Tensor
    fresh: torch.Tensor
    new: torch.Tensor | None
    size: int

    @property
    def rotates(self) -> bool:
        """Whether kept directions are combinations of old ones."""
        return self.projection.p is not None


def plan(
    layer: AdapterLayer,
    rank: int,
    *,
    masked: bool,
    curvature: Sequence[Pair],
    gradients: Sequence[Gradient | None],
    initialisation: object,
) -> list[Move]:
    """Decide the moves of a layer's experts; nothing is changed.

    Args:
        layer: the layer, with finite factors.
        rank: how many directions are to count afterwards.
        masked: keep the tensors' shape.
        curvature: (A, B), an expert each.
        gradients: for new directions, an expert each.
        initialisation: PEFT's `init_lora_weights`.

    Raises:
        ValueError: factors are not finite, or as `best_projection` and `new_rows`.
    """
    moves: list[Move] = []
    for expert in range(layer.experts):
        left, right = layer.factors(expert)
        for name, factor in (("B", left), ("A", right)):
            if not bool(torch.isfinite(factor).all()):
                raise ValueError(f"expected finite numbers, got NaN or infinity in {name}")
        left, right = (_precise(factor) for factor in (left, right))
        active = layer.active
        if rank < len(active):
            found = best_projection(left, right, rank, curvature[expert])
        else:
            found = Projection(torch.arange(len(active)))
        rows = active[found.rows.cpu()]
        p, q = (_spread(part, active, layer.rank) for part in (found.p, found.q))
        count = rank - len(rows)
        if masked:
            free = torch.ones(layer.rank, dtype=torch.bool)
            free[rows] = False
            fresh = free.nonzero()[:count, 0]
            slots, size = rows, layer.rank
        else:
            slots, fresh, size = torch.arange(len(rows)), torch.arange(len(rows), rank), rank
        new = None
        if count and not (masked and gradients[expert] is None):
            new_left = left[:, found.rows] if found.p is None else left @ found.p
            new_right = right[found.rows] if found.q is None else found.q.T @ right
            new = new_rows(
                count,
                new_left,
                new_right,
                embedding=layer.is_embedding,
                gradient=gradients[expert],
                initialisation=initialisation,
            )
        moves.append(Move(Projection(rows, p, q), slots, fresh, new, size))
    return moves


def carried(
    layer: AdapterLayer,
    moves: Sequence[Move],
    side: Side,
    tensor: torch.Tensor,
    law: Law | Literal["factor"],
) -> torch.Tensor:
    """A factor, or a tensor of its shape that goes with it, at the new ranks.

    Args:
        layer: the layer.
        moves: of its experts.
        side: which factor.
        tensor: the old one, of the factor's shape.
        law: "factor" for the factor itself, else see `moment_laws`. New directions have the
            gradient 0 and as squares the mean of the others: with a 0 there, an Adam long under way
            would make its first steps in these directions more than three times too large, having
            no bias left to correct.

    Returns:
        A new tensor in the old one's type and on its device.
    """
    old = layer.rows(side, whole(tensor.detach()))
    parts: list[torch.Tensor] = []
    for expert, move in enumerate(moves):
        before = old[expert]
        kept = _applied(move.projection, side, before, law)
        if move.size == len(before):  # masked: the other rows stay, but for what would move them
            after = before.clone()
            rest = torch.ones(move.size, dtype=torch.bool)
            rest[move.slots] = False
            if law == "gradient" or (law == "factor" and side == "B"):
                after[rest.to(after.device)] = 0
        else:
            after = before.new_zeros(move.size, before.shape[1])
        after[move.slots.to(after.device)] = kept
        if len(move.fresh):
            fresh = move.fresh.to(after.device)
            if law == "square":
                active = layer.active.to(before.device)
                after[fresh] = before[active].mean(0) if len(active) else 0
            elif law == "factor" and move.new is not None:
                zero = side == ("A" if layer.is_embedding else "B")
                after[fresh] = 0 if zero else move.new.to(after)
        parts.append(after)
    return layer.tensor(side, torch.stack(parts), tensor)


def carried_moments(
    layer: AdapterLayer,
    moves: Sequence[Move],
    side: Side,
    state: Mapping[str, torch.Tensor],
    laws: Mapping[str, Law],
) -> dict[str, torch.Tensor]:
    """What an optimizer keeps of a factor, at the new ranks.

    A centred RMSprop divides by the root of `square_avg` - `grad_avg`^2, an estimate of a variance.
    Without cross terms the new square can be below the new mean's own, and the root be NaN. So
    where directions are combined, the variances follow by the law of squares, and the square is
    their sum with the new mean's.

    Args:
        layer: the layer.
        moves: of its experts.
        side: which factor.
        state: the factor's entries.
        laws: of the entries that follow, as `moment_laws` finds them.
    """
    moments = {key: carried(layer, moves, side, state[key], law) for key, law in laws.items()}
    if {"square_avg", "grad_avg"} <= laws.keys() and any(move.rotates for move in moves):
        spread = (state["square_avg"] - state["grad_avg"].square()).clamp(min=0)
        square = moments["grad_avg"].square()
        # Rounding is not to put it below the square, either.
        square *= 1 + 2 * torch.finfo(square.dtype).eps
        moments["square_avg"] = carried(layer, moves, side, spread, "square") + square
    return moments


def change(
    layer: AdapterLayer,
    moves: Sequence[Move],
    new: Mapping[Side, torch.Tensor],
    curvature: Sequence[Pair] | None,
) -> tuple[float, float, float | None]:
    """|D|^2 before, |D' - D|^2, and the latter in the curvature: 1/2 tr(E^T B E A).

    Of what is stored, so that rounding to the factors' type is part of it. Summed over experts, in
    float64, from the factors alone.

    Args:
        layer: the layer, still as it was.
        moves: of its experts; none: the layer loses the adapter.
        new: the new factors.
        curvature: (A, B), an expert each; None: the last number is None.
    """
    energy = lost = 0.0
    loss = None if curvature is None else 0.0
    for expert in range(layer.experts):
        left, right = (_precise(factor) for factor in layer.factors(expert))
        energy += _energy(left, right)
        if not moves:
            lost += _energy(left, right)
            if curvature is not None and loss is not None:
                loss += 0.5 * _energy(left, right, curvature[expert])
            continue
        move = moves[expert]
        if not move.rotates and len(move.slots) == left.shape[1]:
            continue  # the kept ones are the old ones, and new ones have a zero side
        new_left = _precise(layer.rows("B", new["B"])[expert].T)
        new_right = _precise(layer.rows("A", new["A"])[expert])
        both = torch.cat([left, -new_left], 1), torch.cat([right, new_right])
        lost += _energy(*both)
        if curvature is not None and loss is not None:
            loss += 0.5 * _energy(*both, curvature[expert])
    square = layer.scale**2
    return energy * square, lost * square, None if loss is None else loss * square


def _applied(
    projection: Projection, side: Side, rows: torch.Tensor, law: Law | Literal["factor"]
) -> torch.Tensor:
    """The kept rows: A' = Q^T A and B'^T = P^T B^T; their gradients with P and Q exchanged."""
    if projection.p is None or projection.q is None:
        return rows[projection.rows.to(rows.device)]
    matrix = projection.q if (side == "A") == (law == "factor") else projection.p
    matrix = matrix.square() if law == "square" else matrix
    wide = _precise(rows)
    return (matrix.to(wide.device).T @ wide).to(rows)


def _spread(part: torch.Tensor | None, active: torch.Tensor, size: int) -> torch.Tensor | None:
    """P or Q for all rows of the tensors: rows that do not count get zeros."""
    if part is None:
        return None
    full = part.new_zeros(size, part.shape[1])
    full[active.to(part.device)] = part
    return full


def _energy(left: torch.Tensor, right: torch.Tensor, curvature: Pair = (None, None)) -> float:
    return float(product_values(left, right, curvature).square().sum()) if len(right) else 0.0


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, on the same device if that has it."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)
