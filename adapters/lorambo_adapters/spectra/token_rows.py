"""Which token each row of a tensor belongs to, followed through what a module does with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

try:
    import torch
    from torch.utils.weak import WeakTensorKeyDictionary
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.token_rows needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

_ARITHMETIC = "add sub mul div truediv pow neg"
# What works on each token for itself, or on numbers beside it in the same row.
_ROWWISE = frozenset(
    f"{_ARITHMETIC} true_divide square sqrt rsqrt exp expm1 log log1p abs sign reciprocal erf "
    "clamp clamp_min clamp_max clip minimum maximum where masked_fill nan_to_num sigmoid "
    "logsigmoid silu gelu relu relu6 tanh softplus softsign leaky_relu elu celu selu mish "
    "hardtanh hardswish hardsigmoid prelu glu dropout layer_norm rms_norm softmax mean sum var "
    "to type type_as float double half bfloat16 contiguous clone detach chunk split tensor_split "
    "narrow".split()
) | {f"__{side}{name}__" for name in _ARITHMETIC.split() for side in ("", "r", "i")}
_WRITES = frozenset(
    "__setitem__ copy_ index_copy_ index_add_ index_put_ scatter_ scatter_add_ masked_scatter_ "
    "index_reduce_ scatter_reduce_".split()
)
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")  # rows are those of the left factor


class TokenRows:
    """The tokens of a module's input, and which of them the rows of later tensors belong to.

    A tensor's tokens are kept as integers in its own shape, with 1 in the dimension of its
    features. What is not known to keep rows apart is not followed.

    Args:
        x: the module's input, tokens in all dimensions but the last.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._tokens = WeakTensorKeyDictionary()
        shape = *x.shape[:-1], 1
        self._tokens[x] = torch.arange(x[..., 0].numel(), device=x.device).reshape(shape)

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        """The tokens of a tensor's rows, if they are known."""
        return self._tokens.get(x)

    def put(self, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Say which tokens a tensor's rows belong to; nothing where their shapes don't agree."""
        if tokens is not None and _agree(tokens, x):
            self._tokens[x] = tokens
        else:
            self._tokens.pop(x, None)

    def follow(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Note the rows of what a call has returned.

        Args:
            name: of the function.
            args: its arguments.
            kwargs: those by keyword.
            result: what came out.
        """
        known = [self._tokens[t] for t in _tensors([*args, *kwargs.values()]) if t in self._tokens]
        if not known:
            return
        if name in _WRITES:
            self._forget(args[0])
            return
        if name in _ROWWISE or name.removesuffix("_") in _ROWWISE:
            tokens = known[0] if all(_same(known[0], other) for other in known[1:]) else None
        elif name in _PRODUCTS:
            tokens = self._tokens.get(args[0]) if args and len(known) == 1 else None
        else:
            tokens = self._moved(name, args, kwargs, result)
        for tensor in _tensors(result if isinstance(result, (list, tuple)) else [result]):
            self.put(tensor, tokens)

    def _forget(self, written: torch.Tensor) -> None:
        """Follow a tensor no more whose rows were written to, nor any that lies in its memory."""
        place = written.untyped_storage().data_ptr()
        for tensor in [t for t in self._tokens if t.untyped_storage().data_ptr() == place]:
            self._tokens.pop(tensor, None)

    def _moved(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> torch.Tensor | None:
        """The tokens after a call that moves rows: the same call on the tokens, where it is one."""
        if not args or not isinstance(args[0], torch.Tensor) or args[0] not in self._tokens:
            return None
        x, tokens = args[0], self._tokens[args[0]]
        given = [*args[1:], *kwargs.values()]
        match name:
            case "__getitem__":
                index = _of_rows(args[1], x.ndim)
                fits = tokens.shape[:-1] == x.shape[:-1]
                return tokens[index] if fits and index is not None else None
            case "unsqueeze" | "squeeze" if len(given) == 1 and isinstance(given[0], int):
                return getattr(tokens, name)(given[0])
            case "index_select" if _is_zero(args[1] if len(args) > 1 else kwargs.get("dim")):
                return tokens.index_select(0, args[2] if len(args) > 2 else kwargs["index"])
            case "repeat_interleave" if _is_zero(kwargs.get("dim")):
                return tokens.repeat_interleave(*args[1:], **kwargs)
            case "repeat":
                sizes = given[0] if isinstance(given[0], (tuple, list)) else given
                return tokens.repeat(*sizes[:-1], 1)
            case "expand":
                return tokens.expand(*result.shape[:-1], 1)
            case "reshape" | "view" | "flatten" | "unflatten":
                rows = tokens.numel() == x[..., 0].numel() == result[..., 0].numel()
                if rows and tokens.shape[-1] == 1 and result.shape[-1] == x.shape[-1]:
                    return tokens.reshape(*result.shape[:-1], 1)
            case _:
                pass
        return None


def _of_rows(index: Any, dimensions: int) -> Any:
    """An index as far as it chooses rows; None where it may do something else."""
    index = index if isinstance(index, tuple) else (index,)
    if index[0] is Ellipsis:
        if len(index) == 2 and isinstance(index[1], slice):
            return (...,)
        return index if len(index) == 2 and index[1] is None else None
    taken = sum(each is not None for each in index)
    if taken == dimensions and isinstance(index[-1], slice):
        index, taken = index[:-1], taken - 1
    for each in index:
        mask = isinstance(each, torch.Tensor) and each.dtype == torch.bool and each.ndim != 1
        if mask or not isinstance(each, (int, slice, torch.Tensor, type(None))):
            return None
    return index if taken < dimensions else None


def _is_zero(dimension: Any) -> bool:
    return isinstance(dimension, int) and dimension == 0


def _agree(tokens: torch.Tensor, x: torch.Tensor) -> bool:
    return tokens.ndim == x.ndim and all(
        mine in (1, theirs) for mine, theirs in zip(tokens.shape, x.shape, strict=True)
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    return (value for value in values if isinstance(value, torch.Tensor))
