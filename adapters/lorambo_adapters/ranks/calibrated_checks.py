"""What `extract_calibrated` looks at before the long part, and what it warns of after it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.calibrated_checks needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.fisher import (
    Fisher,
    FisherLoss,
    LossFn,
    Predict,
    Terms,
    TrueFisher,
)
from lorambo_alloc.objectives import real_number

_ENOUGH = 3  # predictions for each singular value


def check_numbers(
    damping: float, scale: float, largest_change: float | None, dtype: torch.dtype | None
) -> None:
    """Refuse arguments that are out of range.

    Raises:
        ValueError: the message names which.
    """
    if not 0 <= real_number(damping) < math.inf:
        raise ValueError(f"damping: expected a finite number >= 0, got {damping!r}")
    if not (math.isfinite(real_number(scale)) and scale != 0):
        raise ValueError(f"scale: expected a finite number that is not 0, got {scale!r}")
    if largest_change is not None and not real_number(largest_change) > 0:
        raise ValueError(f"largest_change: expected a number above 0, got {largest_change!r}")
    if dtype is None:
        return
    given: Any = dtype
    if not isinstance(given, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype: expected a floating-point torch.dtype of 16 bits or more, got {given!r}"
        )


def fisher_loss(
    fisher: Fisher, loss_fn: LossFn | None, predict: Predict, terms: Terms, refit: int
) -> FisherLoss:
    """The losses that the gradients are of; labels of the true Fisher are drawn from `predict`.

    Raises:
        ValueError: as `FisherLoss`; or a likelihood that cannot be refitted.
    """
    if fisher == "true":
        fisher = TrueFisher(predict)
    elif isinstance(fisher, TrueFisher):
        if fisher.likelihood != "categorical" and refit:
            raise ValueError(
                "fisher: expected a categorical likelihood, as the refit compares probabilities "
                f"of classes, got {fisher.likelihood!r}; pass refit=0"
            )
        fisher = fisher if fisher.predict is not None else replace(fisher, predict=predict)
    return FisherLoss(loss_fn, fisher, terms)


def warn_few(predictions: int, values: int) -> None:
    """Warn the caller's caller where a refit has so few predictions that it may learn these."""
    if predictions < _ENOUGH * values:
        warnings.warn(
            f"{values} singular values are refitted to {predictions} predictions, fewer than "
            f"{_ENOUGH} for each: they may fit these examples alone; compare the adapter with one "
            "of refit=0 on others, or give more examples",
            stacklevel=3,
        )
