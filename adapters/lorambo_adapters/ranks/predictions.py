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
from lorambo_adapters.spectra.fisher import LossFn, Predict, compared

LogProbabilities = Callable[[Any], torch.Tensor]
"""A batch to log-probabilities, predictions x classes."""

_IGNORED = -100  # the label of transformers for what is not counted
_KEPT = 2**30  # bytes of the tuned model's predictions


def own_predictions(loss_fn: LossFn | None) -> Predict:
    """A transformers model's logits, and which of them count.

    Those that have a label, where the model computes its loss itself (`loss_fn` is None) and this
    is the mean cross entropy of the batch's labels; else all that `attention_mask` keeps, or in a
    model that is encoder and decoder `decoder_attention_mask`.

    Raises:
        ValueError: the model does not choose one of several classes, by its `problem_type` or the
            labels' type.
    """

    def predict(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels: Any = batch.get("labels") if hasattr(batch, "keys") else None
        config = getattr(model, "config", None)
        _check_kind(getattr(config, "problem_type", None), labels)
        outputs = model_on(model, batch)
        if loss_fn is None and labels is not None and getattr(outputs, "loss", None) is not None:
            found = compared(model, batch, outputs)
            if found is not None:
                return found
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.ndim < 2:
            raise ValueError("expected a model that returns logits, got none; pass predict")
        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        both = getattr(config, "is_encoder_decoder", False)
        mask = batch.get("decoder_attention_mask" if both else "attention_mask")
        if mask is not None and mask.shape == counted.shape:
            counted = mask.to(logits.device) != 0
        return logits, counted

    return predict


def check_alike(
    base: torch.nn.Module, tuned: torch.nn.Module, batch: Any, predict: Predict | None
) -> None:
    """Refuse two models whose predictions cannot be compared, by a batch.

    Args:
        base: in evaluation mode.
        tuned: likewise.
        batch: of examples.
        predict: None for the models' own logits.

    Raises:
        ValueError: they have other classes, or not as many predictions; or as `log_probabilities`.
    """
    with torch.no_grad():
        if predict is None:
            # Of labels only that there are some: a model of few classes knows no others.
            labels: Any = batch.get("labels") if hasattr(batch, "keys") else None
            if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
                batch = {**batch, "labels": torch.full_like(labels, _IGNORED)}
            predict = own_predictions(lambda model, batch: torch.zeros(()))
        before, after = (log_probabilities(predict, model, batch).shape for model in (base, tuned))
    if before[1] != after[1]:
        raise ValueError(
            f"expected models that predict the same classes, got {before[1]} of the base and "
            f"{after[1]} of the tuned model; give the base as many (num_labels, "
            "resize_token_embeddings), with the layers that have them in modules_to_save, or pass "
            "a predict whose logits are those of the classes that both have; a head of another "
            "size that is to stay the base's is left out with exclude, and then needs refit=0"
        )
    if before != after:
        raise ValueError(
            "predict: expected as many predictions of both models, got "
            f"{before[0]} of the base and {after[0]} of the tuned model in the first batch"
        )


def _check_kind(problem: object, labels: Any) -> None:
    if problem in ("multi_label_classification", "regression"):
        got = f"problem_type {problem!r}"
    elif isinstance(labels, torch.Tensor) and labels.is_floating_point():
        got = f"labels of {labels.dtype}"
    else:
        got = None
    if got is not None:
        raise ValueError(
            f"expected a model that chooses one of several classes, got {got}; pass refit=0 with "
            "a loss_fn, or a predict whose last dimension are classes (of labels that are yes or "
            "no: torch.stack([logits, 0 * logits], -1))"
        )


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
