"""What was written: the ranks of an adapter's layers, and how much of the update they keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorambo_alloc import Allocation, BudgetCertificate, Certificate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False, eq=False)
class LoraResult(Mapping[str, int]):
    """The ranks of the layers of an adapter that was written, by name; 0: not in it.

    Attributes:
        allocation: the ranks with the problem that they solve and the certificate.
        certificate: the allocation's, or for a target share of energy that of the least budget.
        before: layer to the rank it had (of a checkpoint's difference: the shorter side).
        parameters: of the layers' factors, before (of a difference: of the weights) and after.
        nbytes: of all tensors, before and after, without the files' headers.
        captured: share of the energy (sum of squared singular values; weighted by curvature, if
            that was given) that these ranks keep, by the spectra.
        error: |D - D'|_F^2 / |D|_F^2 over all layers, measured on the factors as they are stored,
            rounded to their type; D is the update before. Never weighted.
        path: the folder or file that was written, if one was.
        tensors: key to tensor, if nothing was written; else empty.
        config: PEFT's configuration; empty where there is none.
        others: keys of tensors that differ between two checkpoints, and are in no layer.
    """

    allocation: Allocation
    certificate: Certificate | BudgetCertificate
    before: Mapping[str, int]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    captured: float
    error: float
    path: Path | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    others: Sequence[str] = ()

    def __getitem__(self, name: str) -> int:
        return self.allocation[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.allocation)

    def __len__(self) -> int:
        return len(self.allocation)

    def summary(self) -> str:
        """Sizes, energy and proof in a few lines."""
        dropped = sum(rank == 0 for rank in self.values())
        whole = sum(self[name] == self.before[name] for name in self)
        share = self.parameters[1] / self.parameters[0] if self.parameters[0] else 1.0
        lines = [
            f"layers      {len(self)}: {whole} as they were, {dropped} without rank",
            f"parameters  {self.parameters[0]:,} -> {self.parameters[1]:,} ({share:.2%})",
            f"bytes       {self.nbytes[0]:,} -> {self.nbytes[1]:,}",
            f"energy      {self.captured:.4%} kept by the spectra; relative squared error of the "
            f"stored update {self.error:.3g}",
            f"status      {self.certificate.status.replace('_', ' ')}",
        ]
        if isinstance(self.certificate, BudgetCertificate):
            lines[-1] += f"; nothing below {self.certificate.lower_bound:,} keeps as much"
        if self.others:
            lines.append(
                f"left out    {len(self.others)} tensors that differ and are in no layer: "
                f"{', '.join(self.others[:3])}{' ...' if len(self.others) > 3 else ''}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{self.allocation!r}\n{self.summary()}"
