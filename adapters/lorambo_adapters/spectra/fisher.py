"""The terms of a loss, and what to back-propagate so that gradients square to the Fisher.

A loss L = (1/N) sum l_n is a mean over N terms: labelled samples, or a language model's labelled
tokens. Its Fisher information is

    F = (1/N) sum_n E[grad l_n grad l_n^T]

with the labels that the data has ("empirical"), or with labels drawn from the model's own output
distribution ("true"; for cross entropy and squared error this is the Gauss-Newton matrix).
Everything here back-propagates the *sum* of the terms, and divides by N once, at the end: whether
the caller's loss is a mean or a sum cannot then change the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lorambo_alloc.costs import whole_number

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.fisher needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

LossFn: TypeAlias = Callable[[torch.nn.Module, Any], torch.Tensor]
"""The model and a batch to the losses of its terms, or to their mean, a scalar."""

Terms: TypeAlias = int | Callable[[Any], int] | None
"""How many terms a batch has, where the losses themselves do not say."""

Predict: TypeAlias = Callable[
    [torch.nn.Module, Any], torch.Tensor | tuple[torch.Tensor, torch.Tensor]
]
"""The model and a batch to its outputs, and perhaps which of them count."""

_IGNORED = -100  # the label of transformers for what is not counted
_AGREEMENT = 1e-4


@dataclass(frozen=True)
class TrueFisher:
    """The Fisher with labels from the model's own output distribution.

    Args:
        predict: `predict(model, batch)` gives the outputs that the loss compares with labels: a
            tensor whose first dimension is the batch's samples, whose last one is the classes (the
            outputs of a regression), with one term for each index of the others. Or a pair of it
            and of a tensor of its shape without the last dimension, nonzero where a term counts.
            None: a transformers model's `logits`, where `labels` are not -100.
        likelihood: "categorical" (outputs are logits, l = cross entropy) or "gaussian" (l = half
            the squared error summed over the outputs; labels have variance 1).
        draws: how many labels are drawn a term; each takes a backward pass. "all": the expectation
            itself, one backward pass for each class times the most terms that a sample has, so for
            few classes only. It is exact where samples do not interact (no batch normalisation in
            training mode) and dropout is off.

    Raises:
        ValueError: an argument is not of this form.
    """

    predict: Predict | None = None
    likelihood: Literal["categorical", "gaussian"] = "categorical"
    draws: int | Literal["all"] = 1

    def __post_init__(self) -> None:
        if self.likelihood not in ("categorical", "gaussian"):
            raise ValueError(
                f"likelihood: expected 'categorical' or 'gaussian', got {self.likelihood!r}"
            )
        if self.draws != "all":
            whole_number(self.draws, "draws", 1)


Fisher: TypeAlias = Literal["empirical", "true"] | TrueFisher


class FisherLoss:
    """Sums of a loss's terms over a batch, and the losses whose gradients make up the Fisher.

    Args:
        loss_fn: as `curvature_factors` takes it.
        fisher: "empirical", "true" (`TrueFisher()`) or a `TrueFisher`.
        terms: as `curvature_factors` takes it.

    Raises:
        ValueError: fisher is none of these.
    """

    def __init__(self, loss_fn: LossFn | None, fisher: Fisher, terms: Terms) -> None:
        if not isinstance(fisher, TrueFisher) and fisher not in ("empirical", "true"):
            raise ValueError(
                f"fisher: expected 'empirical', 'true' or a TrueFisher, got {fisher!r}"
            )
        self._loss_fn, self._terms = loss_fn, terms
        self._true = TrueFisher() if fisher == "true" else fisher
        if self.empirical:
            return
        if loss_fn is not None and self._predict is None:
            raise ValueError(
                "fisher: expected TrueFisher(predict=...) where there is a loss_fn, as labels "
                "are drawn from the outputs; got no predict"
            )

    @property
    def empirical(self) -> bool:
        """Whether the labels are the data's."""
        return not isinstance(self._true, TrueFisher)

    @property
    def _predict(self) -> Predict | None:
        return self._true.predict if isinstance(self._true, TrueFisher) else None

    @property
    def description(self) -> str:
        """The Fisher in words."""
        if not isinstance(self._true, TrueFisher):
            return "empirical Fisher"
        draws = self._true.draws
        drawn = "expectation over labels" if draws == "all" else f"{draws} drawn labels a term"
        return f"true Fisher, {self._true.likelihood}, {drawn}"

    def total(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """The sum of a batch's terms, with the labels of the data, and their number.

        Raises:
            ValueError: the loss is not what `curvature_factors` says, or not finite.
        """
        if self._loss_fn is None:
            mean, _, counted = labelled_logits(model, batch)
            number = int(counted.sum())
            return _checked(_wide(mean) * number), number
        loss = self._loss_fn(model, batch)
        if not isinstance(loss, torch.Tensor):
            raise ValueError(f"loss_fn: expected a tensor, got {type(loss).__name__}")
        loss = _wide(loss)  # a sum of many terms leaves the range of float16
        number = self._terms(batch) if callable(self._terms) else self._terms
        if number is not None:
            number = whole_number(number, "terms", 1)
        if loss.ndim:
            return _checked(loss.sum()), loss.numel() if number is None else number
        if number is None:
            raise ValueError(
                "loss_fn: expected the losses of the batch's terms (samples, or labelled tokens), "
                "one each, got a scalar; if it is their mean, say of how many it is by terms="
            )
        return _checked(loss * number), number

    def check_terms(self, model: torch.nn.Module, batch: Any) -> None:
        """Refuse a loss and a `predict` that count terms in two ways: B would be of another unit.

        Raises:
            ValueError: the batch has not the same number of terms both ways.
        """
        if self._loss_fn is None or self._predict is None:
            return
        with torch.no_grad():
            drawn, labelled = self.moments(model, batch)[0], self.total(model, batch)[1]
        same_number(drawn, labelled)

    def moments(
        self, model: torch.nn.Module, batch: Any
    ) -> tuple[int, Iterator[tuple[torch.Tensor, bool]]]:
        """The number of terms, and scalars to back-propagate one after the other.

        The sum over these scalars of the gradient's outer products is N F for the batch: exactly,
        or in expectation where labels are drawn. The flag marks the last one, after which the
        graph is not needed any more.
        """
        if not isinstance(self._true, TrueFisher):
            loss, number = self.total(model, batch)
            return number, iter([(loss, True)])
        if self._true.predict is None:
            _, outputs, counted = labelled_logits(model, batch)
        else:
            found = self._true.predict(model, batch)
            outputs, counted = found if isinstance(found, tuple) else (found, None)
            if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2:
                raise ValueError(
                    "predict: expected outputs of shape (samples, ..., classes), got "
                    f"{tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else outputs!r}"
                )
            if counted is None:
                counted = torch.ones(outputs.shape[:-1], dtype=torch.bool, device=outputs.device)
            if counted.shape != outputs.shape[:-1]:
                raise ValueError(
                    f"predict: expected a mask of shape {tuple(outputs.shape[:-1])}, got "
                    f"{tuple(counted.shape)}"
                )
        counted = counted != 0
        number = int(counted.sum())
        if not number:
            raise ValueError("expected at least one term that counts in the batch, got none")
        outputs = outputs.flatten(1, -2) if outputs.ndim > 2 else outputs[:, None]
        return number, _cotangents(outputs, counted.reshape(outputs.shape[:-1]), self._true)


def same_number(drawn: int, labelled: int) -> None:
    """Refuse terms of the Fisher and of the loss that are not the same.

    Raises:
        ValueError: they differ in number.
    """
    if drawn != labelled:
        raise ValueError(
            f"fisher: expected predict to count the terms of the loss, {labelled} in this batch, "
            f"got {drawn}: the curvature would be of another mean than the gradient; give one loss "
            "a term (the error of all outputs of a regression is one), or say terms="
        )


def _cotangents(
    outputs: torch.Tensor, counted: torch.Tensor, fisher: TrueFisher
) -> Iterator[tuple[torch.Tensor, bool]]:
    """<v, outputs> for vectors v whose outer products sum to the Hessian of the terms."""
    wide = _wide(outputs)
    fixed = wide.detach()
    categorical = fisher.likelihood == "categorical"
    p = torch.softmax(fixed, -1) if categorical else fixed
    length, classes = fixed.shape[1:]
    keep = counted[..., None].to(fixed)
    if fisher.draws != "all":
        for draw in range(fisher.draws):
            if categorical:
                labels = torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:-1])
                v = p - torch.nn.functional.one_hot(labels, classes)
            else:
                v = torch.randn_like(fixed)
            scaled = v * keep / fisher.draws**0.5
            yield _checked((scaled * wide).sum()), draw == fisher.draws - 1
        return
    # diag(p) - p p^T = sum_c p_c (p - e_c)(p - e_c)^T. Terms of one sample share the layers' rows,
    # so each takes a pass of its own; samples do not interact.
    places = [place for place in range(length) if bool(counted[:, place].any())]
    for place in places:
        at = keep[:, place]
        for label in range(classes):
            v = p[:, place].clone() if categorical else torch.zeros_like(fixed[:, place])
            v[:, label] -= 1
            if categorical:
                v = v * p[:, place, label, None].sqrt()
            last = place == places[-1] and label == classes - 1
            yield _checked((v * at * wide[:, place]).sum()), last


def labelled_logits(
    model: torch.nn.Module, batch: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A transformers model's mean loss, its logits and which of them have a label.

    A causal language model compares logits with the next token's label, others with the label at
    the same place. Which it is shows in the value of the loss: the model's own must be the mean
    cross entropy one way or the other.
    """
    if not hasattr(batch, "keys") or batch.get("labels") is None:
        raise ValueError("batch: without loss_fn, expected a mapping with labels, got none")
    outputs: Any = model(**batch)
    found = compared(model, batch, outputs)
    if found is None:
        raise ValueError(
            "expected model(**batch).loss to be the mean cross entropy of its logits and the "
            "labels, got another loss; pass a loss_fn (and terms)"
        )
    return outputs.loss, *found


def compared(
    model: torch.nn.Module, batch: Any, outputs: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The logits that a model has compared with the batch's labels, and which of them have one.

    None where the loss is not the mean cross entropy of these: to 1e-4, or to four roundings of
    the type that the model has computed it in (encoders' heads do so in half precision).

    Raises:
        ValueError: no label counts.
    """
    loss, logits, labels = outputs.loss, outputs.logits, batch["labels"]
    whole = not labels.is_floating_point()
    if whole and _none(labels):
        raise ValueError("batch: expected at least one label that is not -100, got none")
    own = float(loss.detach())
    if whole and labels.ndim == 2 and math.isnan(own) and _none(labels[:, 1:]):
        raise ValueError(
            "batch: expected a label after the first token, which a language model does not "
            "predict, got none; leave texts of one token out"
        )
    found: list[tuple[float, torch.Tensor, torch.Tensor]] = []
    pairs = [(logits, labels)]
    if labels.ndim == 2:
        pairs.append((logits[:, :-1], labels[:, 1:]))
    for predicted, wanted in pairs:
        if predicted.ndim < 2 or predicted.shape[:-1] != wanted.shape or not whole or _none(wanted):
            continue
        wanted = wanted.to(predicted.device)
        mean = torch.nn.functional.cross_entropy(
            predicted.detach().float().flatten(0, -2), wanted.flatten(), ignore_index=_IGNORED
        )
        found.append((abs(float(mean) - own), predicted, wanted != _IGNORED))
    nearest = max(_AGREEMENT, 4 * torch.finfo(loss.dtype).eps) * max(1.0, abs(own))
    distance, predicted, counted = min(found, key=lambda each: each[0], default=(1e9, loss, loss))
    if not distance <= nearest:
        return None
    if len(found) == 2 and max(each[0] for each in found) <= nearest:
        # The values do not tell: a head of zeros gives log V for any label.
        if loss.requires_grad:
            shifted = _is_shifted(loss, logits, found[0][2], found[1][2])
        else:
            shifted = _leaves_out_the_first(model, batch)
        _, predicted, counted = found[shifted]
    return predicted, counted


def _none(labels: torch.Tensor) -> bool:
    return bool((labels == _IGNORED).all())


def _is_shifted(
    loss: torch.Tensor, logits: torch.Tensor, here: torch.Tensor, following: torch.Tensor
) -> bool:
    """Whether no label is compared with the logits at its own place, by the loss's gradient."""
    (slope,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    # The last of some labelled tokens is followed by none, so there is such a place.
    own = here & ~torch.nn.functional.pad(following, (0, 1))
    return slope is None or not bool(slope[own.to(slope.device)].any())


def _leaves_out_the_first(model: torch.nn.Module, batch: Any) -> bool:
    """Whether a label of the first token alone is compared with nothing, by another pass."""
    labels = torch.full_like(batch["labels"], _IGNORED)
    labels[0, 0] = batch["labels"].max()
    value = float(model(**{**batch, "labels": labels}).loss)
    return not math.isfinite(value) or value == 0


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, if its precision is half of that."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _checked(loss: torch.Tensor) -> torch.Tensor:
    if not loss.requires_grad and torch.is_grad_enabled():
        raise ValueError("the loss depends on no layer among the targets")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"expected a finite loss, got {loss.item()}")
    return loss
