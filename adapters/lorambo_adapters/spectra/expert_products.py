"""Products of tokens with slices of a parameter, recognised by what the slice's memory is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

try:
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.expert_products needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer

Experts = Mapping[int | None, TargetLayer]
"""The layers of one parameter by the index of the expert; None for one that is a matrix."""


class View(NamedTuple):
    """What a tensor is of a parameter.

    Attributes:
        parameter: its name in the module.
        what: "all" (of the parameter), "one" (expert), "gathered" (an expert an index) or "part".
        expert: the index of the one expert.
        ids: the experts of a gathered tensor.
        flipped: whether its last two dimensions are the parameter's, swapped.
    """

    parameter: str
    what: str
    expert: int | None = None
    ids: torch.Tensor | None = None
    flipped: bool = False


class Memory:
    """Where the numbers of parameters lie, and those of copies of them."""

    def __init__(self) -> None:
        self._places: dict[int, list[_Place]] = {}

    def add(self, tensor: torch.Tensor, view: View) -> None:
        """Note that this tensor, and so what views it, is this of a parameter."""
        storage = tensor.untyped_storage()
        if not tensor.is_meta and storage.data_ptr():
            place = _Place(tensor, view, StorageWeakRef(storage))
            here = self._places.setdefault(storage.data_ptr(), [])
            here[:] = [p for p in here if not p.storage.expired()] + [place]

    def find(self, tensor: torch.Tensor) -> View | None:
        """What a tensor is of a parameter, if it is any of it."""
        try:
            key = tensor.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):  # tensors without memory, such as sparse ones
            return None
        for place in self._places.get(key, ()):
            if not place.storage.expired() and place.holds(tensor):
                return place.of(tensor)
        return None


class _Place:
    """A tensor's region of memory."""

    def __init__(self, tensor: torch.Tensor, view: View, storage: StorageWeakRef) -> None:
        self._view, self.storage = view, storage
        self._shape, self._stride = tuple(tensor.shape), tensor.stride()
        self._start = int(tensor.storage_offset()) * tensor.element_size()
        last = sum((n - 1) * s for n, s in zip(self._shape, self._stride, strict=True))
        self._size = tensor.element_size()
        self._end = self._start + (last + 1) * self._size

    def holds(self, tensor: torch.Tensor) -> bool:
        offset = tensor.storage_offset() * tensor.element_size()
        return self._start <= offset < self._end

    def of(self, tensor: torch.Tensor) -> View:
        rest = int(tensor.storage_offset()) * tensor.element_size() - self._start
        view, shape, stride = self._view, self._shape, self._stride
        if self._view.what == "all" and len(shape) == 3 and tensor.ndim == 2 and stride[0]:
            apart = stride[0] * self._size
            view = view._replace(what="one", expert=rest // apart)
            rest %= apart
            shape, stride = shape[1:], stride[1:]
        if rest == 0 and tensor.element_size() == self._size and tensor.ndim == len(shape):
            if _equal(tensor, shape, stride):
                return view
            swapped = (*range(len(shape) - 2), -1, -2)
            if _equal(tensor, [shape[i] for i in swapped], [stride[i] for i in swapped]):
                return view._replace(flipped=not view.flipped)
        return View(view.parameter, "part")


def _equal(tensor: torch.Tensor, shape: Sequence[int], stride: Sequence[int]) -> bool:
    return tuple(tensor.shape) == tuple(shape) and all(
        a == b or n == 1 for a, b, n in zip(tensor.stride(), stride, shape, strict=True)
    )


@dataclass
class Product:
    """One product of tokens with the slices of a parameter, without its numbers.

    Attributes:
        experts: the layers of the parameter.
        which: the index of the one expert, or None for a parameter that is a matrix; or, a tensor,
            the expert of each product of a batch of them (`bounds` False) or where each expert's
            rows end (True).
        bounds: see `which`.
        every: whether the batch is of all experts in their order.
        lead: the output's shape without the dimension of its features.
        columns: whether tokens are the last dimension of input and output.
        inputs: how many tokens the module was given.
        tokens: which of them each row is of; None where that is not known.
        sent: which of them are not zero; None where nobody asked for `tokens`.
        hidden: whether gradients are off here, but were on where the module was called.
    """

    experts: Experts
    which: int | torch.Tensor | None
    bounds: bool
    every: bool
    lead: tuple[int, ...]
    columns: bool
    inputs: int = 0
    tokens: torch.Tensor | None = None
    sent: torch.Tensor | None = None
    hidden: bool = False

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Input or output (or its gradient) as a matrix, tokens in rows."""
        if self.columns:
            *batch, tokens = self.lead
            tensor = tensor.expand(*batch, tensor.shape[-2], tokens).transpose(-1, -2)
        else:
            tensor = tensor.expand(*self.lead, tensor.shape[-1])
        return tensor.reshape(-1, tensor.shape[-1])

    def like_output(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`, for the output."""
        if self.columns:
            *batch, tokens = self.lead
            return matrix.reshape(*batch, tokens, -1).transpose(-1, -2)
        return matrix.reshape(*self.lead, -1)

    def tokens_of(self, size: int) -> torch.Tensor | None:
        """Which of the model's `size` tokens each row is of; None where that is not known.

        A module that is given all tokens once for each expert (Llama 4) has them in their order
        where each token was sent, and is not zero, equally often. In a buffer of places that
        experts' tokens fill from the front (a capacity), the first places are taken more often,
        unless every expert in use got all tokens, which are in their order then.
        """
        if self.tokens is None or size == self.inputs:
            return self.tokens
        experts = len(self.which) if self.every and isinstance(self.which, torch.Tensor) else 0
        if self.sent is None or self.inputs != size * experts:
            return None
        often = self.sent.reshape(-1, size).sum(0)
        return self.tokens % size if bool((often == often[0]).all()) else None

    @property
    def each(self) -> int:
        """The rows of one product of a batch."""
        return self.lead[-1]

    def groups(self, x: torch.Tensor) -> Iterator[tuple[TargetLayer, slice | torch.Tensor]]:
        """Each layer that got tokens, and which rows of `x` they are; those of one layer once.

        Where all experts are multiplied at once, rows that are zero were not sent there (they give
        no gradient, and would count as tokens).

        Args:
            x: the input, from `rows`.
        """
        if not isinstance(self.which, torch.Tensor):
            if self.which in self.experts and len(x):
                yield self.experts[self.which], slice(None)
            return
        if self.bounds:
            start = 0
            for expert, end in enumerate(self.which.tolist()):
                if end > start and expert in self.experts:
                    yield self.experts[expert], slice(start, end)
                start = max(start, end)
            return
        order = torch.argsort(self.which, stable=True)
        counts = torch.bincount(self.which).tolist()
        within = torch.arange(self.each, device=order.device)
        for expert, batch in enumerate(order.split(counts)):
            index = (batch[:, None] * self.each + within).reshape(-1)
            if self.every:
                index = index[(x.detach()[index] != 0).any(1)]
            if len(index) and expert in self.experts:
                yield self.experts[expert], index


_OPERANDS: dict[str, tuple[int, int]] = {
    "linear": (0, 1), "matmul": (0, 1), "__matmul__": (0, 1), "__rmatmul__": (1, 0), "mm": (0, 1),
    "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "_grouped_mm": (0, 1), "grouped_mm": (0, 1),
    "grouped_mm_fallback": (0, 1),
}  # fmt: skip
_NAMED = ("input", "weight", "mat2", "other", "mat1", "batch1", "batch2", "mat_a", "mat_b")


def recognise(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, memory: Memory
) -> tuple[View, Product, torch.Tensor, bool] | None:
    """A call as a product of tokens with a parameter.

    Args:
        name: of the function.
        args: its arguments.
        kwargs: those by keyword.
        output: what came out.
        memory: of the parameters.

    Returns:
        What of which parameter was multiplied, the product (without layers), the tokens, and
        whether the parameter stores the transpose of the matrix that takes inputs to outputs; None
        where it is no such call.
    """
    if name not in _OPERANDS or not isinstance(output, torch.Tensor) or kwargs.get("alpha", 1) != 1:
        return None
    operands = [*args, *(kwargs[key] for key in _NAMED if key in kwargs)]
    first, second = _OPERANDS[name]
    if max(first, second) >= len(operands):
        return None
    left, right = operands[first], operands[second]
    views = [memory.find(t) if isinstance(t, torch.Tensor) else None for t in (left, right)]
    if (views[0] is None) == (views[1] is None):
        return None
    columns = views[1] is None
    x, weight = (right, left) if columns else (left, right)
    view = views[0] if columns else views[1]
    assert view is not None
    columns = columns and x.ndim > 1
    if x.ndim < weight.ndim - 1 or view.what == "part":
        return None
    shape = tuple(output.shape)
    lead = (*shape[:-2], shape[-1]) if columns else shape[:-1]
    product = Product({}, view.expert, False, False, lead, columns)
    # y = x @ W^T (linear) and y = W @ x have W as it is, y = x @ W has its transpose.
    transposed = view.flipped == (name == "linear" or view is views[0])
    if "grouped" in name:
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        if view.what != "all" or x.ndim != 2 or weight.ndim != 3 or columns or ends is None:
            return None
        product.which, product.bounds = ends.detach().clone(), True
    elif weight.ndim > 2:
        batch = tuple(weight.shape[:-2])
        if tuple(shape[:-2]) != batch or output.ndim != weight.ndim:
            return None
        product.every = view.ids is None
        ids = torch.arange(batch[0], device=x.device) if view.ids is None else view.ids
        product.which = ids.reshape(-1)
    return view, product, x, transposed
