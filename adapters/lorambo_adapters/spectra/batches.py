"""Running a model over batches of data: masks, random numbers, modes and progress."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.batches needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.hooks import Mask

_PACKAGE = __name__.partition(".")[0]

MaskOf: TypeAlias = Callable[[Any], Mask]
"""A batch to the mask of its tokens."""


def attention_masks(model: torch.nn.Module, layers: Sequence[TargetLayer]) -> MaskOf:
    """The default: the entry `attention_mask` of a batch that is a mapping, else no mask.

    In a model that is encoder and decoder it belongs to the encoder's tokens, and is applied
    outside the decoder only (where the number of tokens could be the same by chance).
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return lambda batch: batch.get("attention_mask") if hasattr(batch, "get") else None
    outside = [layer.name for layer in layers if "decoder" not in layer.name.split(".")]

    def masks(batch: Any) -> Mask:
        mask: torch.Tensor | None = batch.get("attention_mask") if hasattr(batch, "get") else None
        if mask is None:
            return None
        return {name: mask for name in outside}

    return masks


def for_passes(batches: Iterable[Any], passes: int) -> Iterable[Any]:
    """The batches such that they can be run through so often: an iterator is kept as a list.

    Raises:
        ValueError: they are not an iterable of batches, or perhaps a single batch.
    """
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, (str, Mapping)) or not iterable:
        single = "; wrap it in a list" if isinstance(batches, Mapping) else ""
        got = type(batches).__name__
        raise ValueError(f"batches: expected a list of batches or the like, got {got}{single}")
    return list(batches) if passes > 1 and iter(batches) is batches else batches


def model_on(model: torch.nn.Module, batch: Any) -> Any:
    """The model's output for a batch that is a mapping of its arguments.

    Raises:
        ValueError: it is not one.
    """
    if not hasattr(batch, "keys"):
        raise ValueError(
            f"batch: expected a mapping of the model's arguments, got {type(batch).__name__}; pass "
            "a function of model and batch for others"
        )
    return model(**batch)


def own_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The loss that a transformers model has computed itself.

    Raises:
        ValueError: it has not.
    """
    loss = getattr(model_on(model, batch), "loss", None)
    if loss is None:
        raise ValueError(
            "expected a model that computes its loss, got none; without loss_fn a batch needs "
            "'labels'"
        )
    return loss


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Generator[None]:
    """No parameter requires a gradient inside."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def as_it_was(model: torch.nn.Module) -> Generator[None]:
    """Freeze the parameters inside; restore that, buffers and modes afterwards, in any case."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with frozen(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Generator[None]:
    """Evaluation mode and no gradients inside; each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def same_random_numbers(model: torch.nn.Module, seed: int) -> Generator[None]:
    """Seed the generators inside, and leave them as they were outside."""
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def shown(
    batches: Iterable[Any], passes: int, title: str
) -> Generator[Callable[[int], Iterator[Any]]]:
    """A function of the pass's number that gives the batches, with a progress bar on a terminal.

    There is none where the number of batches is not known.
    """
    # Any iterable will do; `hasattr` is what tells that this one has a length.
    count = len(batches) if hasattr(batches, "__len__") else 0  # pyright: ignore[reportArgumentType]
    with progress_bar(title, float(count * passes), shown=None if count else False) as advance:

        def one_pass(number: int) -> Iterator[Any]:
            for batch in batches:
                yield batch
                advance(1.0, f"pass {number} of {passes}")

        yield one_pass


def warn_unreached(names: Sequence[str], what: str) -> None:
    """Warn that these layers got nothing, at the line outside this package that led here."""
    if not names:
        return
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    more = ", ..." if len(names) > 3 else ""
    warnings.warn(
        f"no {what} reached {len(names)} layers, whose spectra are zero: "
        f"{', '.join(map(repr, names[:3]))}{more}",
        stacklevel=level,
    )
