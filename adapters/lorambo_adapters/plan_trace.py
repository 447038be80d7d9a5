"""What a batch's forward and backward pass take, counted on a model without data."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.plan_trace needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.spectra.hooks import GradientHooks


@dataclass
class Run:
    """What a run of the model takes.

    Attributes:
        operations: floating-point operations in products of matrices and in attention.
        moved: bytes that all other operations read and write.
        peak: bytes of all tensors alive at a time, beyond parameters and batch.
    """

    operations: float = 0.0
    moved: float = 0.0
    peak: int = 0


@dataclass
class Trace:
    """Of one batch.

    Attributes:
        forward: without gradients.
        both: forward and backward, each target's input kept by `GradientHooks`.
        tokens: layer to rows of its input; layers that were not called are absent.
        inputs: layer to a number that is equal where layers have one input (q, k and v).
    """

    forward: Run = field(default_factory=Run)
    both: Run = field(default_factory=Run)
    tokens: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)


def trace(
    model: torch.nn.Module,
    layers: list[TargetLayer],
    batch: Any,
    device: torch.device,
) -> Trace:
    """Run a copy of the model whose tensors have shapes alone, as on a device.

    The loss is the mean cross entropy of the `logits` in float32, or else the mean of the first
    output. Memory within a kernel is not seen.

    Args:
        model: on any device, the meta device too; it is not written to, and no weight is copied.
        layers: of this model, of which hooks see the inputs.
        batch: a mapping of keyword arguments, or a single argument; of its tensors the shapes and
            types count.
        device: of the run.

    Raises:
        Exception: whatever the model raises on tensors without data, where what it does depends on
            the numbers (a mixture of experts), or where the batch is not what it takes.
    """
    found = Trace()
    with _unlogged(), FakeTensorMode(allow_non_fake_inputs=True):

        def without_data(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        memo: dict[int, Any] = {
            id(p): torch.nn.Parameter(without_data(p), requires_grad=False)
            for p in model.parameters()
        }
        memo |= {id(b): without_data(b) for b in model.buffers()}
        shadow = copy.deepcopy(model, memo)
        inside = [
            TargetLayer(layer.name, layer.shape, layer.kind, memo[id(layer.module)])
            for layer in layers
        ]
        batch = tree_map_only(torch.Tensor, without_data, batch)
        given = [
            x
            for x in (*shadow.parameters(), *shadow.buffers(), *tree_leaves(batch))
            if isinstance(x, torch.Tensor)
        ]
        with torch.no_grad(), _Counter(found.forward, given):
            _call(shadow, batch)
        with _Watch(inside, found, shadow) as hooks, _Counter(found.both, given):
            hooks.begin()
            _loss(_call(shadow, batch)).backward()
    return found


def example_batch(model: torch.nn.Module, tokens: int) -> Mapping[str, torch.Tensor] | None:
    """A batch of about so many tokens for a transformers model, on the meta device.

    Token ids, in as few sequences as the model's positions allow, for the decoder of an encoder and
    decoder too; or pixels. None: the model takes neither, or is not of transformers.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    if kind == "input_ids":
        longest = getattr(config, "max_position_embeddings", None) or tokens
        sequences = -(-tokens // longest)
        ids = torch.empty(sequences, -(-tokens // sequences), dtype=torch.long, device="meta")
        if getattr(config, "is_encoder_decoder", False):
            return {"input_ids": ids, "decoder_input_ids": ids}
        return {"input_ids": ids}
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if kind == "pixel_values" and isinstance(side, int) and isinstance(patch, int):
        images = max(1, round(tokens / (side // patch) ** 2))
        shape = images, getattr(config, "num_channels", 3), side, side
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.empty(shape, dtype=dtype, device="meta")}
    return None


class _Watch(GradientHooks):
    """Keeps the inputs as a sketch's hooks do, and notes their sizes instead of summing."""

    def __init__(self, layers: list[TargetLayer], found: Trace, model: torch.nn.Module) -> None:
        super().__init__(layers, lambda layer, inputs, gradient: None, model=model)
        self._found = found
        self._known: list[Any] = []
        self._number = 0

    def _forward(self, layer: TargetLayer) -> Callable[..., Any]:
        keep = super()._forward(layer)

        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, torch.Tensor):
                # Positions of the output, for a convolution; else tokens.
                channels = output.shape[-3 if layer.kind == "conv2d" else -1]
                rows = output.numel() // channels
                tokens = self._found.tokens
                tokens[layer.name] = tokens.get(layer.name, 0) + rows
                # The hook holds what it has seen last, so that no other input takes its place.
                if not self._known or self._known[-1] is not x:
                    self._known = [x]
                    self._number = len(set(self._found.inputs.values()))
                self._found.inputs[layer.name] = self._number
            return keep(module, args, kwargs, output)

        return hook

    def _deliver(self, layer: TargetLayer, x: torch.Tensor, gradient: torch.Tensor) -> None:
        pass


class _Counter(TorchDispatchMode):
    """Counts operations, bytes moved and bytes alive while it is entered."""

    def __init__(self, run: Run, given: list[torch.Tensor]) -> None:
        super().__init__()
        self._run = run
        # Weights and the batch do not count; a view of them shows their storage.
        self._given = {id(s): s for s in (tensor.untyped_storage() for tensor in given)}
        self._live: dict[int, weakref.ref[Any]] = {}
        self._now = 0
        self._flops = FlopCounterMode(display=False)

    def __enter__(self) -> Any:
        self._flops.__enter__()
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        self._flops.__exit__(kind, error, traceback)
        self._run.operations = float(self._flops.get_total_flops())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not func.is_view and func._overloadpacket not in flop_registry:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self._run.moved += sum(x.numel() * x.element_size() for x in (*given, *results))
        for tensor in results:
            storage = tensor.untyped_storage()
            if id(storage) not in self._live and id(storage) not in self._given:
                size = storage.nbytes()
                self._live[id(storage)] = weakref.ref(storage, self._freeing(id(storage), size))
                self._now += size
                self._run.peak = max(self._run.peak, self._now)
        return out

    def _freeing(self, key: int, size: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._live.pop(key, None)
            self._now -= size

        return freed


@contextlib.contextmanager
def _unlogged() -> Generator[None]:
    """Torch logs a trace of calls that fail without data, on stderr; the error says enough."""
    logger = logging.getLogger(fake_tensor.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _call(model: torch.nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _loss(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor) and logits.ndim >= 2:
        flat = logits.flatten(0, -2).float()
        labels = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
        return torch.nn.functional.cross_entropy(flat, labels)
    first = next(x for x in tree_leaves(output) if isinstance(x, torch.Tensor))
    return first.float().mean()
