"""What an online allocator proposes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorambo_alloc.allocation import Allocation


@dataclass(frozen=True)
class Proposal:
    """Ranks to change to, or why to stay; true where something is to be done.

    Attributes:
        step: when it was made.
        before: the ranks that were there.
        ranks: those to have; where nothing is to be done, the same.
        budget: the least of the steps up to the next proposal, which the ranks keep to.
        reason: why nothing is to be done, in words; empty where something is.
        notes: what else should be known: layers never observed, estimates made up for them.
        allocation: `ranks` with their certificate, of estimated gain (and optimism) minus s_i for
            each rank moved, plus the constant sum_i s_i r_i of the ranks that were there, where s_i
            is the switching cost. Its bound is on any number of moves. None where no problem was
            solved.
        lost: where `max_moves` limits the moves, at most this much is lost beside the best ranks
            with as few; 0.0 where these are the best, and where nothing is limited.
    """

    step: int
    before: dict[str, int]
    ranks: dict[str, int]
    budget: int
    reason: str = ""
    notes: tuple[str, ...] = ()
    allocation: Allocation | None = None
    lost: float = 0.0

    def __bool__(self) -> bool:
        return self.ranks != self.before

    @property
    def moves(self) -> dict[str, int]:
        """By layer that changes, the ranks it gains (or, below 0, loses)."""
        return {
            name: rank - self.before[name]
            for name, rank in self.ranks.items()
            if rank != self.before[name]
        }

    @property
    def price(self) -> float | None:
        """About what one more unit of budget would gain; None where no problem was solved."""
        return None if self.allocation is None else self.allocation.certificate.price

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if not self:
            yield f"step {self.step}: stay ({self.reason})"
        else:
            moves = self.moves
            moved = sum(map(abs, moves.values()))
            ranks = "1 rank" if moved == 1 else f"{moved} ranks"
            layers = "1 layer" if len(moves) == 1 else f"{len(moves)} layers"
            yield f"step {self.step}: {ranks} of {layers} {'moves' if moved == 1 else 'move'}"
            width = max(map(len, moves))
            for name in moves:
                yield f"  {name:<{width}}  {self.before[name]} -> {self.ranks[name]}"
        if self.allocation is not None:
            certificate = self.allocation.certificate
            yield (
                f"  price {certificate.price:.4g}, budget {self.budget:,}, "
                f"{certificate.status.replace('_', ' ')}"
            )
        yield from (f"  {note}" for note in self.notes)
