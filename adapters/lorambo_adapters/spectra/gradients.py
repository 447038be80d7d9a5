"""Spectra of gradients: what a few batches of data say about each frozen layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.gradients needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import LayerTargets
from lorambo_adapters.spectra.batches import (
    MaskOf,
    attention_masks,
    for_passes,
    frozen,
    own_loss,
    same_random_numbers,
    shown,
)
from lorambo_adapters.spectra.decompose import decompose
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.kronecker import Curvature
from lorambo_adapters.spectra.sketch import Whitening
from lorambo_adapters.spectra.sketcher import GradientSketcher, positive_scale
from lorambo_alloc import Spectra

Loss: TypeAlias = Callable[[torch.nn.Module, Any], torch.Tensor]
"""The model and a batch to a scalar: the mean loss of the batch."""


def gradient_spectra(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss | None = None,
    rank: int = 64,
    curvature: Mapping[str, Whitening] | Curvature | None = None,
    targets: LayerTargets = "all-linear",
    *,
    passes: int = 3,
    width: int | None = None,
    mask: MaskOf | None = None,
    loss_scale: Any = 1.0,
    workers: Workers | None = None,
    seed: int = 0,
    source: str | None = None,
) -> Spectra:
    """Spectra of the gradient of the mean loss, with respect to each frozen layer's weight.

    A gradient G (d x k) is never formed unless it is smaller than its sketch. A pass takes
    2 (d + k) s multiplications a token and layer beyond the forward and backward pass. How good the
    values are depends on the passes over the batches:

    - 1: a two-sided sketch, of at most 3 s / 4 values. Coarse where the spectrum is flat: on the
      gradients of a small pretrained encoder (384 wide), with s = 64 and ten seeds, values 1 to 16
      are off by 4.3 % (root mean square), and single ones by up to 26 %. Not all of that is noise:
      even the exact product of G with a basis found by 64 random vectors misses some by 11 %.
    - 3, the default: subspace iteration, of at most 2 s values; lower bounds of the true ones up to
      rounding (which is bfloat16's where the weights are: `sketch`). On the same gradients, values
      1 to 16 are within 0.3 %; with 2 passes within 5 %.

    All passes see the same random numbers, so that dropout is the same in each. The model's mode
    is left as it is. Parameters that require a gradient do not while this runs, and get none.
    For mixed precision, enter `torch.autocast` inside `loss_fn`.

    Args:
        model: any module; no parameter needs `requires_grad`.
        batches: what `loss_fn` takes, one after the other. An iterator that can be used only once
            is kept as a list where there are several passes.
        loss_fn: `loss_fn(model, batch)` gives the mean loss of a batch, a scalar. By default
            `model(**batch).loss`, as transformers have it. All batches have the same weight.
        rank: at most this many values a layer. Every sketch has the width s = max(rank, 16).
        curvature: from `curvature_factors`, or layer to (A^-1/2, B^-1/2): the spectra are those of
            B^-1/2 G A^-1/2 (`GradientSketcher`); `curvature_spectra` has them in units of the loss.
        targets: which layers, as PEFT's `target_modules`, or from `find_layers`.
        passes: how often to run through the batches; a single time if all layers are so small that
            their gradients are summed exactly.
        width: s, if it should be another.
        mask: batch to the mask of its tokens (`GradientSketcher.begin`). By default the entry
            `attention_mask` of a batch that is a mapping; in models that are encoder and decoder
            it is applied outside the decoder only.
        loss_scale: the loss is multiplied by it before the backward pass, and the gradients are
            divided by it: for float16, a number or a `torch.amp.GradScaler`.
        workers: data-parallel processes, each with batches of its own and the same arguments
            besides: the sums are added up after each pass, and all get the spectra of the mean over
            all batches. Only sums travel, (d + k) s numbers a layer and pass. The model may be a
            copy in each or sharded by FSDP2 (then all need equally many batches).
        seed: of the test matrices, and of the random numbers during each pass (worker i: seed + i).
        source: what to record as the spectra's origin, put before how they were computed.

    Returns:
        Spectra with shapes, and an estimate of the energy that the values leave out (0 for what
        was summed exactly and kept whole).

    Raises:
        ValueError: there is no batch, a loss is not a finite scalar or depends on no target layer,
            a gradient is not finite, or an argument is out of range.
        WorkerLost: another worker has stopped.

    Warns:
        UserWarning: no gradient reached some layers, whose spectra are therefore zero.

    References:
        Tropp, Yurtsever, Udell, Cevher 2017 and Halko, Martinsson, Tropp 2011 (`sketch`).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> batches = [torch.eye(3), torch.ones(1, 3)]
        >>> spectra = gradient_spectra(model, batches, lambda m, x: m(x).sum(), targets=["0"])
        >>> spectra["0"].round(6), spectra.shapes
        (array([2.44949, 0.     ]), {'0': (2, 3)})
    """
    sketcher = GradientSketcher(
        model, rank=rank, targets=targets, curvature=curvature, width=width, passes=passes,
        seed=seed,
    )  # fmt: skip
    sketch_gradients(
        model, batches, own_loss if loss_fn is None else loss_fn, sketcher, mask=mask,
        loss_scale=loss_scale, workers=workers, seed=seed,
    )  # fmt: skip
    return sketcher.spectra(source)


def sketch_gradients(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss,
    sketcher: GradientSketcher,
    *,
    mask: MaskOf | None = None,
    loss_scale: Any = 1.0,
    workers: Workers | None = None,
    seed: int = 0,
) -> None:
    """Take a sketcher through all of its passes over the batches; see `gradient_spectra`."""
    workers = Workers.alone() if workers is None else workers
    mask = attention_masks(model, sketcher.layers) if mask is None else mask
    passes = 1 if sketcher.complete else sketcher.passes
    batches = for_passes(batches, passes)
    with frozen(model), sketcher, shown(batches, passes, "gradients") as one_pass:
        while True:
            with same_random_numbers(model, seed + workers.index), torch.enable_grad():
                for batch in one_pass(sketcher.number):
                    scale = positive_scale(loss_scale)
                    sketcher.begin(mask(batch), scale)
                    loss = loss_fn(model, batch)
                    _check_loss(loss, sketcher.batches)
                    (loss * scale).backward()
            sketcher.reduce(workers)
            if not sketcher.batches:
                raise ValueError("batches: expected at least one batch, got none")
            if sketcher.complete:
                return
            sketcher.next_pass(workers)


def loraga_spectra(
    model: torch.nn.Module, *, rank: int | None = None, source: str | None = None
) -> Spectra:
    """Spectra of the gradients that PEFT's `preprocess_loraga` has stored in a model.

    Read them before `get_peft_model` initialises the adapters, which deletes them. They are
    decomposed one at a time (`decompose`).

    Args:
        model: a model after `peft.tuners.lora.loraga.preprocess_loraga(model, config, train_step)`.
        rank: at most this many values a layer; all by default.
        source: what to record as the spectra's origin.

    Returns:
        Spectra with shapes, by the names of the modules.

    Raises:
        ValueError: no module holds such a gradient, or one is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> model[0]._peft_loraga_grad = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> loraga_spectra(model)["0"]
        array([4., 3.])
    """
    values: dict[str, npt.NDArray[np.float64]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    unresolved: dict[str, float] = {}
    for name, module in model.named_modules():
        gradient = getattr(module, "_peft_loraga_grad", None)
        if not isinstance(gradient, torch.Tensor):
            continue
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"layer {name!r}: expected a finite gradient, got NaN or infinity")
        # transformers' Conv1D stores its weight, and so its gradient, as k x d.
        gradient = gradient.T if type(module).__name__ == "Conv1D" else gradient
        rank_here = None if rank is None else min(rank, *gradient.shape)
        found = decompose(gradient, rank_here)
        values[name], unresolved[name] = found.values, found.unresolved
        shapes[name] = gradient.shape[0], gradient.shape[1]
    if not values:
        raise ValueError(
            "expected modules with a stored gradient, got none; call peft's preprocess_loraga "
            "first, and get_peft_model after this"
        )
    method = f"{len(values)} gradients stored by LoRA-GA, decomposed one by one"
    return Spectra(
        values,
        shapes=shapes,
        source=f"{source}; {method}" if source else method,
        unresolved=unresolved,
    )


def _check_loss(loss: Any, number: int) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"batch {number}: expected a scalar tensor as the loss, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"batch {number}: the loss depends on no layer among the targets")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"batch {number}: expected a finite loss, got {loss.item()}")
