"""What an extraction by examples returns: ranks and sizes, and how near the predictions come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorambo_adapters.ranks.lora_result import LoraResult


@dataclass(frozen=True, repr=False, eq=False)
class CalibratedLora(LoraResult):
    """An adapter from `extract_calibrated`; sizes are those of the layers' factors.

    Attributes:
        divergences: KL(tuned || extracted) in nats, mean over the predictions on the calibration
            examples: before the refit, and after each step of it that was taken. Empty where
            nothing was refitted.
        beside: parameters of the biases and saved modules that the adapter also holds.
    """

    divergences: Sequence[float] = ()
    beside: int = 0

    def summary(self) -> str:
        """Sizes, energy, proof and divergence in a few lines."""
        lines = [super().summary()]
        if self.beside:
            lines.append(f"beside      {self.beside:,} parameters of biases and saved modules")
        if self.divergences:
            first, last = self.divergences[0], self.divergences[-1]
            lines.append(
                f"KL          {first:.4g} -> {last:.4g} nats a prediction on the calibration "
                f"examples, in {len(self.divergences) - 1} steps"
            )
        return "\n".join(lines)
