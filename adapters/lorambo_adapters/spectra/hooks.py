"""Hooks that hand over what a layer was given, and the gradient that came back to its output.

Frozen layers get no weight gradient and keep no input; these hooks take both sides of the product
G = g^T x (rows are tokens) where the backward pass has them, so that nobody has to form G.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.hooks needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.spectra.expert_products import Product
from lorambo_adapters.spectra.experts import listening
from lorambo_adapters.spectra.inputs import (
    DenseInputs,
    Inputs,
    TokenInputs,
    patches,
    sum_dtype,
)

Mask: TypeAlias = torch.Tensor | Mapping[str, torch.Tensor] | None
"""Which tokens count: nonzero entries of one tensor, or one a layer by name; None is all."""


class _Hooks:
    """Forward hooks on the layers' modules, and inputs as matrices. A context manager."""

    def __init__(self, layers: Iterable[TargetLayer]) -> None:
        self.layers = list(layers)
        for layer in self.layers:
            groups = getattr(layer.module, "groups", 1) if layer.kind == "conv2d" else 1
            if groups > 1:
                raise ValueError(
                    f"layer {layer.name!r}: expected a convolution without groups, got {groups}, "
                    "among which PEFT splits the ranks; leave it out of the targets"
                )
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._listening = contextlib.ExitStack()
        self._active = False
        self._rows: dict[str | None, torch.Tensor | None] = {}
        self._sizes: dict[str | None, int] = {}
        self._last: tuple[Any, torch.Tensor, DenseInputs] | None = None
        self.called: set[str] = set()
        self.finished: set[str] = set()

    def __enter__(self):
        experts = [layer for layer in self.layers if layer.kind == "expert"]
        self._listening.enter_context(listening(experts, self._product, self._masked))
        for layer in self.layers:
            if layer.kind != "expert":
                self._handles.append(
                    layer.module.register_forward_hook(self._forward(layer), with_kwargs=True)
                )
        self._listening.enter_context(_uncompiled())
        self._active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._listening.close()
        self._active = False
        self._last = None

    def begin(self, mask: Mask = None) -> None:
        """Set the mask of the next forward pass.

        Args:
            mask: nonzero where a token counts, of the shape of a layer's input without its last
                dimension (or flattened). A layer whose input has another number of rows, such as
                a pooler's, is not masked. A mapping gives a mask a layer, and none to the others.
                An expert's tokens are the rows of its module's input, wherever they were sent.
        """
        self._last = None
        self._rows, self._sizes = {}, {}
        masks = mask if isinstance(mask, Mapping) else {None: mask}
        for name, tensor in masks.items():
            if tensor is None:
                continue
            if not isinstance(tensor, torch.Tensor):
                what = "mask" if name is None else f"layer {name!r}: mask"
                raise ValueError(f"{what}: expected a tensor, got {type(tensor).__name__}")
            flat = tensor.detach().reshape(-1) != 0
            self._sizes[name] = len(flat)
            self._rows[name] = None if bool(flat.all()) else flat.nonzero().squeeze(1)

    def _forward(self, layer: TargetLayer) -> Callable[..., Any]:
        raise NotImplementedError  # what to do with an input is each subclass's own

    def _product(self, product: Product, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError  # as is what to do with an expert's

    def _masked(self) -> bool:
        """Whether a mask leaves any token out."""
        return any(rows is not None for rows in self._rows.values())

    def _parts(
        self, product: Product, x: torch.Tensor
    ) -> Iterator[tuple[TargetLayer, slice | torch.Tensor]]:
        """The layers that got tokens which the mask keeps, and which rows of `x` these are."""
        for layer, index in product.groups(x):
            name = layer.name if layer.name in self._sizes else None
            size = self._sizes.get(name)
            kept = None if size is None else self._kept(layer, size, x.device)
            if kept is None or size is None:
                yield layer, index
                continue
            rows = torch.arange(len(x), device=x.device)[index]
            other = layer.expert is None and size != product.inputs
            if product.inputs % size or other:
                yield layer, index
                continue
            tokens = product.tokens_of(size)
            if tokens is None:
                raise ValueError(
                    f"layer {layer.name!r}: expected calls through which each row's token can be "
                    "followed, because a mask leaves tokens out, got others in or before "
                    f"{type(layer.module).__name__}; pass batches without padding, or no mask for "
                    "this layer, to count all tokens"
                )
            rows = rows[torch.isin(tokens[rows], kept)]
            if len(rows):
                yield layer, rows

    def _kept(self, layer: TargetLayer, tokens: int, device: torch.device) -> torch.Tensor | None:
        """The rows of a layer's input that the mask keeps, or None where it keeps them all."""
        name = layer.name if layer.name in self._sizes else None
        rows = self._rows.get(name)
        if rows is None or self._sizes[name] != tokens:
            return None
        if rows.device != device:
            rows = self._rows[name] = rows.to(device)
        return rows

    def _inputs(
        self, layer: TargetLayer, x: torch.Tensor, rows: torch.Tensor | None, dtype: torch.dtype
    ) -> Inputs:
        """The input as a matrix; layers with one input (q, k and v) share one object."""
        if layer.kind == "embedding":
            ids = x.reshape(-1)
            return TokenInputs(ids if rows is None else ids[rows], dtype)
        if layer.kind == "conv2d":
            return DenseInputs(patches(layer.module, x), dtype)
        version = 0 if x.is_inference() else x._version
        which = None if rows is None else rows.data_ptr()
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, version, which, dtype)
        # The tensor is held too, or its memory could be another input's by the next call.
        if self._last is None or self._last[0] != key:
            matrix = x.reshape(-1, x.shape[-1])
            matrix = matrix if rows is None else matrix[rows]
            self._last = key, x, DenseInputs(matrix, dtype)
        return self._last[2]


class InputHooks(_Hooks):
    """Calls `receive(layer, inputs)` at every forward call of a layer.

    An expert of a 3-D parameter is called where it is multiplied by tokens (`experts.listening`),
    and its inputs are the tokens that the router sent there; one without tokens isn't called.

    Args:
        layers: where to listen.
        receive: gets the layer and its input, a `DenseInputs` or, for an embedding table, a
            `TokenInputs`, without the tokens that the mask leaves out.

    Raises:
        ValueError: as `GradientHooks`.
    """

    def __init__(
        self, layers: Iterable[TargetLayer], receive: Callable[[TargetLayer, Inputs], None]
    ) -> None:
        super().__init__(layers)
        self._receive = receive

    def _forward(self, layer: TargetLayer) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.called.add(layer.name)
            x = _first_tensor(layer, args, kwargs)
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                tokens = x.numel() if layer.kind == "embedding" else x[..., 0].numel()
                rows = self._kept(layer, tokens, x.device)
                self._receive(layer, self._inputs(layer, x.detach(), rows, sum_dtype(x.dtype)))

        return hook

    def _product(self, product: Product, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            matrix = product.rows(x.detach())
            for layer, index in self._parts(product, matrix):
                self.called.add(layer.name)
                inputs = self._inputs(layer, matrix[index], None, sum_dtype(x.dtype))
                self._receive(layer, inputs)
        return output


class GradientHooks(_Hooks):
    """Calls `receive(layer, inputs, g)` when the backward pass reaches a layer.

    No weight needs `requires_grad`: where the output of a layer would not be part of the graph, the
    hook makes it so. The input is kept for the backward pass through autograd's own saved tensors,
    as training a LoRA keeps it, so gradient checkpointing (of both kinds) drops and recomputes it,
    and each call counts once. A layer called several times in one pass is received several times.
    Experts of 3-D parameters are received as by `InputHooks`.

    Args:
        layers: where to listen.
        receive: gets the layer, its input (`DenseInputs`, or `TokenInputs` for an embedding table)
            and the gradient of its output, tokens x d, both without the tokens that the mask
            leaves out, in float32 (float64 where the gradient is). Autocast is off inside.
        model: where given and one of its modules has `gradient_checkpointing` on, the outputs of
            its embedding tables join the graph; else reentrant checkpoints would have no gradient.
        convert: False leaves the gradient in the model's precision, for a receiver that converts
            it piece by piece to `inputs.dtype`.

    Raises:
        ValueError: a layer is a convolution with groups, or has no tensor as its input; or, in the
            model's forward, an expert is used in a way that is not understood, or calls in which
            its module's rows cannot be followed where a mask leaves tokens out.

    Example:
        >>> import torch
        >>> from lorambo_adapters.layers import find_layers
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).requires_grad_(False)
        >>> def show(layer, inputs, g):
        ...     print(layer.name, (g.T @ inputs.matrix).tolist())
        >>> with GradientHooks(find_layers(model, ["0"]), show):
        ...     model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
        0 [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """

    def __init__(
        self,
        layers: Iterable[TargetLayer],
        receive: Callable[[TargetLayer, Inputs, torch.Tensor], None],
        *,
        model: torch.nn.Module | None = None,
        convert: bool = True,
    ) -> None:
        super().__init__(layers)
        self._receive = receive
        self._convert = convert
        self._model = model
        self._anchors: dict[torch.device, torch.Tensor] = {}

    def __enter__(self):
        super().__enter__()
        if self._model is not None and any(
            getattr(module, "gradient_checkpointing", False) for module in self._model.modules()
        ):
            targets = {id(layer.module) for layer in self.layers}
            for module in self._model.modules():
                if isinstance(module, torch.nn.Embedding) and id(module) not in targets:
                    self._handles.append(module.register_forward_hook(_join_graph))
        return self

    def _forward(self, layer: TargetLayer) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            self.called.add(layer.name)
            if not torch.is_grad_enabled() or layer.name in self.finished:
                return None  # evaluation, or the first run of a reentrant checkpoint
            if not isinstance(output, torch.Tensor):
                raise ValueError(
                    f"layer {layer.name!r}: expected a tensor as its output, got "
                    f"{type(output).__name__}"
                )
            x = _first_tensor(layer, args, kwargs).detach()
            return _Tap.apply(output, x, self._anchor(output.device), layer, self._deliver)

        return hook

    def _anchor(self, device: torch.device) -> torch.Tensor:
        """An input that requires a gradient, so that autograd calls the tap."""
        anchor = self._anchors.get(device)
        if anchor is None:
            anchor = self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return anchor

    def _product(self, product: Product, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        layers = product.experts.values()
        if product.hidden:
            name = next(iter(layers)).name
            raise ValueError(
                f"layer {name!r}: expected its products where gradients are on, got one inside a "
                "function that computes its own gradient (or no_grad); leave it out of the targets"
            )
        if not torch.is_grad_enabled() or all(layer.name in self.finished for layer in layers):
            return output
        anchor = self._anchor(output.device)
        return _Tap.apply(output, x.detach(), anchor, product, self._deliver_product)

    def _deliver_product(self, product: Product, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if not self._active:
            return
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            dtype = sum_dtype(gradient.dtype)
            matrix, g = product.rows(x), product.rows(gradient)
            for layer, index in self._parts(product, matrix):
                if layer.name not in self.finished:
                    part = g[index].to(dtype) if self._convert else g[index]
                    self._receive(layer, self._inputs(layer, matrix[index], None, dtype), part)

    def _deliver(self, layer: TargetLayer, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if not self._active:
            return
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            dtype = sum_dtype(gradient.dtype)
            if layer.kind == "conv2d":
                gradient = gradient if gradient.ndim == 4 else gradient[None]
                g = gradient.flatten(2).transpose(1, 2).reshape(-1, gradient.shape[1])
                rows = None
            else:
                g = gradient.reshape(-1, gradient.shape[-1])
                rows = self._kept(layer, len(g), g.device)
                padding = getattr(layer.module, "padding_idx", None)
                if layer.kind == "embedding" and padding is not None:
                    ids = x.reshape(-1)
                    kept = torch.arange(len(ids), device=ids.device) if rows is None else rows
                    rows = kept[ids[kept] != padding]  # that row of the table is not trained
                g = g if rows is None else g[rows]
            g = g.to(dtype) if self._convert else g
            self._receive(layer, self._inputs(layer, x, rows, dtype), g)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled models run as they are written: their graphs leave out hooks, or keep them."""
    stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    return contextlib.nullcontext() if stance is None else stance("force_eager")


class _Tap(torch.autograd.Function):
    """The identity, in place; its backward pass hands over the saved input and the gradient.

    In place, because a view would forbid what models do next, such as ReLU(inplace=True).
    """

    @staticmethod
    def forward(ctx: Any, output: Any, x: Any, anchor: Any, where: Any, deliver: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.where, ctx.deliver = where, deliver
        ctx.mark_dirty(output)
        return output

    # One output, so one gradient; torch declares any number of them.
    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        ctx.deliver(ctx.where, x, gradient)
        return gradient if ctx.needs_input_grad[0] else None, None, None, None, None


def _join_graph(module: torch.nn.Module, args: Any, output: Any) -> Any:
    if torch.is_grad_enabled() and isinstance(output, torch.Tensor) and not output.requires_grad:
        # A copy, because a leaf that requires a gradient cannot be changed in place.
        return output.detach().requires_grad_().clone()
    return None


def _first_tensor(layer: TargetLayer, args: Any, kwargs: Any) -> torch.Tensor:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"layer {layer.name!r}: expected a tensor as its input, got {type(x).__name__}"
        )
    return x
