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
            nothing was refitted. The refit has seen these very examples: on others expect more.
        predictions: how many they are the mean of.
        beside: parameters of the biases and saved modules that the adapter also holds.
    """

    divergences: Sequence[float] = ()
    predictions: int = 0
    beside: int = 0

    def summary(self) -> str:
        """Sizes, energy, proof and divergence in a few lines."""
        lines = [super().summary()]
        lines.append(
            "note        the energy is that of a plain cut of these ranks; cut in another norm, "
            "the stored update has no smaller squared error, and the refit may enlarge it"
        )
        if self.beside:
            lines.append(f"beside      {self.beside:,} parameters of biases and saved modules")
        if self.divergences:
            first, last = self.divergences[0], self.divergences[-1]
            lines.append(
                f"KL          {first:.4g} -> {last:.4g} nats a prediction in "
                f"{len(self.divergences) - 1} steps, on the {self.predictions:,} predictions that "
                "they were fitted to"
            )
        return "\n".join(lines)
