"""How other tools choose ranks when they shrink a LoRA or extract one: each layer by itself.

Every rule takes a layer's singular values in descending order and one parameter. They were written
from the definitions in the tools' sources (2026):

- kohya-ss sd-scripts, `networks/resize_lora.py`: `sv_ratio`, `sv_cumulative` and `sv_fro`, of the
  update without its scale, and a fixed rank. Ranks are at least 1 and at most `--new_rank`.
- LyCORIS, `lycoris/utils/__init__.py`: `threshold`, `ratio` and `quantile` of its extraction, and a
  fixed rank.
- PEFT, `tuners/lora/conversion.py`: `save_as_lora(rank=float)`, a share of the squares.
- mergekit, `scripts/extract_lora.py`: a fixed rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Rule = Callable[[Values, float], int]


def fixed(values: Values, rank: float) -> int:
    """The same rank in every layer, as far as it has one."""
    return min(int(rank), len(values))


def sv_ratio(values: Values, ratio: float) -> int:
    """Kohya: values above the largest one divided by the ratio."""
    return max(1, min(int(np.sum(values > values[0] / ratio)), len(values)))


def sv_cumulative(values: Values, share: float) -> int:
    """Kohya: the fewest values whose sum is at least this share of the sum."""
    return _first(np.cumsum(values) / values.sum(), share)


def sv_fro(values: Values, share: float) -> int:
    """Kohya: the fewest values that keep this share of the Frobenius norm."""
    return _first(np.cumsum(values**2) / np.sum(values**2), share**2)


def peft_energy(values: Values, share: float) -> int:
    """PEFT: the fewest values that keep this share of the sum of squares."""
    return _first(np.cumsum(values**2) / np.sum(values**2), share)


def threshold(values: Values, least: float) -> int:
    """LyCORIS: values above a threshold that all layers share."""
    return max(1, int(np.sum(values > least)))


def ratio(values: Values, share: float) -> int:
    """LyCORIS: values above this share of the largest one."""
    return max(1, int(np.sum(values > share * values[0])))


def quantile(values: Values, share: float) -> int:
    """LyCORIS: how many partial sums are below this share of the sum."""
    return max(1, int(np.sum(np.cumsum(values) < share * values.sum())))


RULES: Mapping[str, Rule] = {
    "fixed": fixed,
    "kohya sv_ratio": sv_ratio,
    "kohya sv_cumulative": sv_cumulative,
    "kohya sv_fro": sv_fro,
    "PEFT save_as_lora": peft_energy,
    "LyCORIS threshold": threshold,
    "LyCORIS ratio": ratio,
    "LyCORIS quantile": quantile,
}
"""Rule by name."""


def ranks_by(rule: Rule, spectra: Mapping[str, Values], parameter: float) -> dict[str, int]:
    """The ranks of all layers by one rule, each by its own values."""
    return {
        name: rule(values, parameter) if values.any() else 1 for name, values in spectra.items()
    }


def at_most(
    rule: Rule, spectra: Mapping[str, Values], costs: Mapping[str, int], size: float
) -> tuple[float, dict[str, int]]:
    """The rule's parameter at which its ranks cost the most that is within a size.

    The size is monotone in the parameter, so that bisection finds it, for increasing and decreasing
    rules alike. A rule may stay well below the size where it jumps over it.
    """
    largest = max(float(values[0]) for values in spectra.values())
    most = max(len(values) for values in spectra.values())
    span = {fixed: (0.0, float(most + 1)), sv_ratio: (1.0, 1e6), threshold: (largest, 0.0)}
    low, high = span.get(rule, (1.0, 0.0) if rule is ratio else (0.0, 1.0))

    def cost(parameter: float) -> int:
        return sum(costs[n] * r for n, r in ranks_by(rule, spectra, parameter).items())

    for _ in range(60):
        middle = (low * high) ** 0.5 if rule is sv_ratio else (low + high) / 2
        low, high = (middle, high) if cost(middle) <= size else (low, middle)
    return low, ranks_by(rule, spectra, low)


def _first(shares: Values, share: float) -> int:
    return max(1, min(int(np.searchsorted(shares, share)) + 1, len(shares)))
