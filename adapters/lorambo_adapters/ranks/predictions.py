"""What two models predict on the same batches, and how far apart that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.predictions needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.batches import model_on
from lorambo_adapters.spectra.fisher import LossFn, Predict, labelled_logits

LogProbabilities = Callable[[Any], torch.Tensor]
"""A batch to log-probabilities, predictions x classes."""

_KEPT = 2**30  # bytes of the tuned model's predictions


def own_predictions(loss_fn: LossFn | None) -> Predict:
    """A transformers model's logits, and which of them count.

    Those that have a label, where the model computes its loss itself (`loss_fn` is None) and the
    batch has labels; else all that `attention_mask` keeps.
    """

    def predict(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if loss_fn is None and hasattr(batch, "keys") and batch.get("labels") is not None:
            _, logits, counted = labelled_logits(model, batch)
            return logits, counted
        logits = getattr(model_on(model, batch), "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.ndim < 2:
            raise ValueError("expected a model that returns logits, got none; pass predict")
        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == counted.shape:
            counted = mask.to(logits.device) != 0
        return logits, counted

    return predict


def log_probabilities(predict: Predict, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """A model's predictions that count, as log-probabilities: predictions x classes.

    Raises:
        ValueError: there are no two classes, or another number of predictions than the mask says.
    """
    found = predict(model, batch)
    outputs, counted = found if isinstance(found, tuple) else (found, None)
    if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or outputs.shape[-1] < 2:
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else outputs
        raise ValueError(
            "predict: expected logits of at least two classes, of shape (samples, ..., classes), "
            f"got {shape!r}; a regression is not refitted (refit=0)"
        )
    if counted is not None:
        if counted.shape != outputs.shape[:-1]:
            raise ValueError(
                f"predict: expected a mask of shape {tuple(outputs.shape[:-1])}, got "
                f"{tuple(counted.shape)}"
            )
        outputs = outputs[counted != 0]
    half = outputs.dtype in (torch.float16, torch.bfloat16)
    return (outputs.float() if half else outputs).flatten(0, -2).log_softmax(-1)


class Wanted:
    """The tuned model's predictions on each batch, kept up to a GiB and else computed anew.

    Args:
        predict: the model and a batch to its logits.
        model: the tuned one.
        batches: by whose number they are asked for.
    """

    def __init__(self, predict: Predict, model: torch.nn.Module, batches: Sequence[Any]) -> None:
        self._predict, self._model, self._batches = predict, model, batches
        self._kept: dict[int, torch.Tensor] = {}
        self._bytes = 0

    def __call__(self, number: int) -> torch.Tensor:
        """Log-probabilities, predictions x classes, without gradients."""
        if number in self._kept:
            return self._kept[number]
        with torch.no_grad():
            found = log_probabilities(self._predict, self._model, self._batches[number])
        self._bytes += found.nbytes
        if self._bytes <= _KEPT:
            self._kept[number] = found
        return found
