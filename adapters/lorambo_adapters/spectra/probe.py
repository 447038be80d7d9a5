"""A short training run as a probe: which ranks would a LoRA use, if every layer had many?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.probe needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import LayerTargets, TargetLayer, find_layers
from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.batches import (
    as_it_was,
    for_passes,
    own_loss,
    same_random_numbers,
    warn_unreached,
)
from lorambo_adapters.spectra.expert_products import Product
from lorambo_adapters.spectra.experts import listening
from lorambo_adapters.spectra.hooks import GradientHooks
from lorambo_adapters.spectra.inputs import sum_dtype
from lorambo_adapters.spectra.low_rank import (
    LowRankUpdate,
    Pair,
    low_rank_spectra,
    misfits,
    refuse,
)
from lorambo_adapters.spectra.whitening import Factors
from lorambo_alloc import Spectra
from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import real_number

Loss: TypeAlias = Callable[[torch.nn.Module, Any], torch.Tensor]
"""The model and a batch to a scalar: the mean loss of the batch."""


def probe_spectra(
    model: torch.nn.Module,
    loss_fn: Loss | None,
    batches: Iterable[Any],
    rank: int = 8,
    steps: int = 50,
    *,
    targets: LayerTargets = "all-linear",
    learning_rate: float = 5e-4,
    alpha: float | None = None,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    curvature: Mapping[str, Pair | Factors] | None = None,
    seed: int | None = 0,
    source: str | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Train a LoRA of one rank in every layer for a few steps, and read the spectrum of each.

    Beside each target layer a plain LoRA computes s B A x, with s = alpha / rank, A uniform in
    +-1 / sqrt(k) and B zero at the start (of an embedding, A zero and B normal), as in PEFT. An
    expert of a 3-D parameter has factors of its own, beside its product (`experts.listening`). All
    are trained by AdamW at a constant rate; then the spectra of s B A are computed as by
    `lora_spectra`. The model's weights are frozen meanwhile. PEFT isn't needed.

    Afterwards, and also if the loss raises or the run is interrupted, the model is as it was, to
    the bit: parameters and their `grad`, `requires_grad`, buffers (batch statistics too), and the
    mode of each module, which is otherwise left as it is: call `model.train()` for dropout.

    Works with gradient checkpointing (of both kinds; for the reentrant one, modules must have
    `gradient_checkpointing` set, as those of transformers have), and with mixed precision: factors
    and branch are in float32 (float64 where the weights are) and the sum is cast to the type of the
    layer's output; `torch.autocast` inside `loss_fn` applies to the branch too. For float16,
    multiply the loss in `loss_fn` by a constant: AdamW's steps hardly depend on it.

    Memory beyond the model: 16 (d + k) rank bytes a layer (factors, gradients, AdamW's two states,
    in float32) and AdamW's temporaries, what training these LoRAs keeps for the backward pass, and
    a copy of the model's buffers.

    What comes out is what this run has learnt in so few steps, at this rate. A rank above `rank`
    has no value here, and nothing is said of what lies beyond (`unresolved` is 0). Whether such a
    probe guides an allocation better than the gradient is an open question.

    Args:
        model: any module on one process; a `PeftModel`'s adapters stay in place, frozen.
        loss_fn: `loss_fn(model, batch)` gives the mean loss of a batch, a scalar. None:
            `model(**batch).loss`, as transformers have it.
        batches: what `loss_fn` takes; run through again where they are fewer than needed. An
            iterator that can be used only once is kept as a list for that.
        rank: of every LoRA, >= 1.
        steps: of the optimizer, >= 1.
        targets: which layers, as PEFT's `target_modules`, or as `find_layers` has found them (by
            `target_parameters`, for one).
        learning_rate: of AdamW. None suits every model: take that of the run to come.
        alpha: the scale s = alpha / rank; by default the rank, so that s = 1.
        accumulate: batches whose mean gradient makes a step.
        weight_decay: of AdamW.
        curvature: as in `lora_spectra`; computed at the model as it is, by `curvature_factors`,
            for one.
        seed: of the LoRAs' start and of all of torch's random numbers during the run (CPU, and the
            model's CUDA devices), whose generators are left as they were. None takes random numbers
            from the generators as they stand, and so advances them.
        source: what to record as the spectra's origin, put before how they were computed.
        progress: None shows a bar if stderr is a terminal, False never.

    Returns:
        Spectra with shapes; min(rank, d, k) values a layer.

    Raises:
        ValueError: there is no batch, a loss is not a finite scalar or depends on no target layer,
            a target is a convolution with groups or an expert that is used in a way that is not
            understood, `curvature` does not fit, or an argument is out of range.

    Warns:
        UserWarning: no gradient reached some layers (experts without tokens among them), whose
            spectra are therefore zero.

    References:
        Hu et al.: LoRA. ICLR 2022. PEFT 0.21.2, `tuners/lora/layer.py`, for the start.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> x = torch.eye(3)
        >>> loss = lambda model, x: (model(x) - 1).square().mean()
        >>> spectra = probe_spectra(model, loss, [x], rank=1, steps=5, targets=["0"])
        >>> spectra.shapes, len(spectra["0"])
        ({'0': (2, 3)}, 1)
    """
    rank, steps = whole_number(rank, "rank", 1), whole_number(steps, "steps", 1)
    accumulate = whole_number(accumulate, "accumulate", 1)
    for name, value, open_below in (
        ("learning_rate", learning_rate, True),
        ("alpha", rank if alpha is None else alpha, True),
        ("weight_decay", weight_decay, False),
    ):
        number = real_number(value)
        if not (0 <= number < math.inf) or (open_below and number == 0):
            least = "> 0" if open_below else ">= 0"
            raise ValueError(f"{name}: expected a finite number {least}, got {value!r}")
    layers = find_layers(model, targets)
    refuse(list(misfits({layer.name: layer.shape for layer in layers}, curvature)))
    scale = 1.0 if alpha is None else alpha / rank
    loss_fn = own_loss if loss_fn is None else loss_fn
    generators = contextlib.nullcontext() if seed is None else same_random_numbers(model, seed)
    with generators, as_it_was(model):
        branches = [_Branch(layer, rank, scale) for layer in layers]
        factors = [factor for branch in branches for factor in (branch.a, branch.b)]
        optimizer = torch.optim.AdamW(factors, lr=learning_rate, weight_decay=weight_decay)
        losses = _train(model, loss_fn, batches, branches, optimizer, steps, accumulate, progress)
    warn_unreached([branch.layer.name for branch in branches if not branch.reached], "gradient")
    each = f", {accumulate} batches each" if accumulate > 1 else ""
    method = (
        f"LoRA of rank {rank} with scale {scale:g} after {steps} steps of AdamW{each} at rate "
        f"{learning_rate:g}, seed {seed}, loss {losses[0]:.4g} at the first and "
        f"{losses[-1]:.4g} at the last"
    )
    return low_rank_spectra(
        [branch.update for branch in branches],
        source=f"{source}; {method}" if source else method,
        curvature=curvature,
        progress=progress,
    )


class _Branch:
    """The factors of one layer's LoRA, and the hook that adds s B A x to the layer's output."""

    def __init__(self, layer: TargetLayer, rank: int, scale: float) -> None:
        module: Any = layer.module
        if layer.kind == "conv2d" and module.groups > 1:
            raise ValueError(
                f"layer {layer.name!r}: expected a convolution without groups, got "
                f"{module.groups}; leave it out of the targets"
            )
        weight = getattr(module, layer.parameter)
        if weight.is_meta:
            raise ValueError(
                f"layer {layer.name!r}: expected a weight with data, got a meta tensor"
            )
        d, k = layer.shape
        self.layer, self.scale, self.reached = layer, scale, False
        like = {"device": weight.device, "dtype": sum_dtype(weight.dtype)}
        if layer.kind == "embedding":
            self.a = torch.zeros(rank, k, **like, requires_grad=True)
            self.b = torch.randn(d, rank, **like).requires_grad_()
        else:
            self.a = ((torch.rand(rank, k, **like) * 2 - 1) / math.sqrt(k)).requires_grad_()
            self.b = torch.zeros(d, rank, **like, requires_grad=True)

    @property
    def update(self) -> LowRankUpdate:
        """What was learnt."""
        return LowRankUpdate(
            self.layer.name,
            self.layer.shape,
            len(self.a),
            self.scale,
            lambda: (self.b.detach(), self.a.detach()),
        )

    def hook(self, module: Any, args: Any, kwargs: Any, output: Any) -> torch.Tensor:
        """A forward hook (with keywords): the output with the branch's."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, torch.Tensor) or not isinstance(output, torch.Tensor):
            raise ValueError(
                f"layer {self.layer.name!r}: expected a tensor in and a tensor out, got "
                f"{type(x).__name__} and {type(output).__name__}"
            )
        return (output + self._of(module, x) * self.scale).to(output.dtype)

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The branch's output s B A x, for tokens in rows."""
        functional = torch.nn.functional
        inner = functional.linear(x.to(self.a.dtype), self.a)
        return functional.linear(inner, self.b) * self.scale

    def _of(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        functional = torch.nn.functional
        if self.layer.kind == "embedding":
            rows = functional.embedding(x, self.a.T, padding_idx=module.padding_idx)
            # transformers' scaled word embeddings multiply what they look up.
            return functional.linear(rows, self.b) * getattr(module, "embed_scale", 1.0)
        x = x.to(self.a.dtype)
        if self.layer.kind != "conv2d":
            return functional.linear(functional.linear(x, self.a), self.b)
        padding = module.padding
        if module.padding_mode != "zeros":
            sides = module._reversed_padding_repeated_twice
            x, padding = functional.pad(x, sides, mode=module.padding_mode), 0
        kernel = self.a.view(len(self.a), module.in_channels, *module.kernel_size)
        inner = functional.conv2d(x, kernel, None, module.stride, padding, module.dilation)
        return functional.conv2d(inner, self.b[..., None, None])


def _train(
    model: torch.nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    branches: Sequence[_Branch],
    optimizer: torch.optim.Optimizer,
    steps: int,
    accumulate: int,
    progress: bool | None,
) -> list[float]:
    """Train the branches; the mean loss of each step."""
    losses: list[float] = []
    stream = cycled(batches)
    # Without layers of their own, these hooks see to it that reentrant checkpoints have gradients.
    checkpointing = GradientHooks([], lambda *_: None, model=model)
    with _attached(branches), checkpointing, torch.enable_grad():
        with progress_bar("probe", float(steps), progress) as advance:
            for step in range(1, steps + 1):
                total = 0.0
                for _ in range(accumulate):
                    loss = loss_fn(model, next(stream))
                    total += _checked(loss, step) / accumulate
                    (loss / accumulate).backward()
                _fill(branches)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(total)
                advance(1.0, f"loss {total:.4g}")
    return losses


def _fill(branches: Sequence[_Branch]) -> None:
    """Note which branches have a gradient, and give a zero one to experts that have none."""
    parameters: set[tuple[int, str]] = set()
    for branch in branches:
        if branch.a.grad is not None or branch.b.grad is not None:
            branch.reached = True
            parameters.add((id(branch.layer.module), branch.layer.parameter))
    for branch in branches:
        layer = branch.layer
        if layer.kind == "expert" and (id(layer.module), layer.parameter) in parameters:
            # To PEFT they are parts of one tensor, which AdamW moves on by its mean gradient.
            for factor in (branch.a, branch.b):
                factor.grad = torch.zeros_like(factor) if factor.grad is None else factor.grad


@contextlib.contextmanager
def _attached(branches: Sequence[_Branch]) -> Generator[None]:
    experts = {branch.layer.name: branch for branch in branches if branch.layer.kind == "expert"}

    def add(product: Product, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        matrix = product.rows(x)
        places, added = [], []
        for layer, index in product.groups(matrix):
            places.append(torch.arange(len(matrix), device=x.device)[index])
            added.append(experts[layer.name].of_rows(matrix[index]))
        if not added:
            return output
        parts = torch.cat(added)
        whole = parts.new_zeros(len(matrix), parts.shape[1])
        whole = whole.index_add(0, torch.cat(places), parts)
        return (output + product.like_output(whole)).to(output.dtype)

    with contextlib.ExitStack() as stack:
        stack.enter_context(listening([branch.layer for branch in experts.values()], add))
        for branch in branches:
            if branch.layer.kind == "expert":
                continue
            handle = branch.layer.module.register_forward_hook(branch.hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def cycled(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches over and over; those of an iterator are kept."""
    batches = for_passes(batches, 1)
    kept: list[Any] | None = [] if iter(batches) is batches else None
    while True:
        count = 0
        for batch in batches:
            count += 1
            if kept is not None:
                kept.append(batch)
            yield batch
        if not count:
            raise ValueError("batches: expected at least one batch, got none")
        if kept is not None:
            batches, kept = kept, None


def _checked(loss: Any, step: int) -> float:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"step {step}: expected a scalar tensor as the loss, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"step {step}: the loss depends on no layer among the targets")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(
            f"step {step}: expected a finite loss, got {value}; perhaps the learning rate is too "
            "high"
        )
    return value
