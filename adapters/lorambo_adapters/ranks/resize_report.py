"""What a change of ranks did to each layer, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChange:
    """One layer whose ranks were to change.

    Attributes:
        name: the layer's; all experts of a parameter are one.
        before: ranks that counted.
        after: ranks that count.
        energy: |s B A|_F^2 before.
        lost: |D' - D|_F^2, the truncation and the rounding of the factors to their type; 0 where
            directions were added only.
        lost_in_loss: 1/2 tr((D' - D)^T B (D' - D) A) with the curvature given; None without.
        per_rank: parameters that a rank has.
    """

    name: str
    before: int
    after: int
    energy: float
    lost: float
    lost_in_loss: float | None
    per_rank: int


@dataclass(frozen=True)
class ResizeReport:
    """What `resize` did.

    Attributes:
        changes: the layers whose ranks changed, in the order of the model.
        mode: "resize" or "mask".
        ranks: of all layers of the adapter, afterwards: those that count.
        parameters: of the adapter's factors at these ranks.
    """

    changes: tuple[LayerChange, ...]
    mode: str
    ranks: dict[str, int]
    parameters: int

    @property
    def lost(self) -> float:
        """|D' - D|_F^2 over all layers."""
        return sum(change.lost for change in self.changes)

    @property
    def lost_in_loss(self) -> float | None:
        """The loss that the truncations cost in the quadratic model; None without curvature."""
        known = [c.lost_in_loss for c in self.changes if c.lost_in_loss is not None]
        return sum(known) if len(known) == len(self.changes) else None

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        count = len(self.changes)
        layers = "1 layer" if count == 1 else f"{count} layers"
        yield (
            f"{layers} changed (mode {self.mode}), {len(self.ranks)} in all; "
            f"{self.parameters:,} parameters"
        )
        width = max(map(len, ["layer", *(change.name for change in self.changes)]))
        if count:
            yield f"{'layer':<{width}}  ranks        energy lost  share"
        for change in self.changes:
            moved = f"{change.before} -> {change.after}"
            share = change.lost / change.energy if change.energy else 0.0
            yield f"{change.name:<{width}}  {moved:<11}  {change.lost:<11.4g}  {share:.2%}"
