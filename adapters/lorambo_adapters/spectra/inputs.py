"""A layer's inputs as matrices, tokens in rows, and the products that sums over tokens need."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.inputs needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing


class DenseInputs:
    """A layer's input, one row a token.

    Args:
        matrix: tokens x k, in the model's precision.
        dtype: the precision of the sums; by default that of the matrix.
    """

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self._matrix = matrix
        self.dtype = matrix.dtype if dtype is None else dtype
        self._known: tuple[torch.Tensor, torch.dtype | None, list[torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._matrix)

    @property
    def matrix(self) -> torch.Tensor:
        """Tokens x k in the precision of the sums; converted at each use where it has another."""
        return self._matrix.to(self.dtype)

    def pieces(
        self, gradient: torch.Tensor, low: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Consecutive rows of input and gradient that fit into a processor's cache, converted.

        Args:
            gradient: tokens x d.
            low: where both are bfloat16, and their device multiplies it, give all rows at once as
                they are.
        """
        if low and _stay_bfloat16(self._matrix, gradient):
            return iter([(self._matrix, gradient)])
        rows = _piece(self._matrix)
        pairs = zip(self._matrix.split(rows), gradient.split(rows), strict=True)
        return ((x.to(self.dtype), g.to(self.dtype)) for x, g in pairs)

    def products(self, test: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Where the products of the pieces with a test matrix are kept, for layers that share X.

        Empty for another test matrix, or pieces of another precision, than the last ones.
        """
        if self._known is None or self._known[0] is not test or self._known[1] != dtype:
            self._known = test, dtype, []
        return self._known[2]

    def times(self, test: torch.Tensor) -> torch.Tensor:
        """X @ test."""
        return self.matrix @ test

    def accumulate(self, out: torch.Tensor, left: torch.Tensor, scale: float) -> None:
        """Add scale * left^T X to `out`."""
        add_product(out, left, self.matrix, scale)


class TokenInputs:
    """The input of an embedding table: indices, that is rows of the identity.

    Args:
        ids: the index of each token, 1-D.
        dtype: the precision of the sums.
    """

    def __init__(self, ids: torch.Tensor, dtype: torch.dtype) -> None:
        self.ids = ids
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.ids)

    def pieces(
        self, gradient: torch.Tensor, low: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All indices, and the gradient, as it is or converted, as by `DenseInputs.pieces`."""
        yield self.ids, gradient if low and _stay_bfloat16(gradient) else gradient.to(self.dtype)

    def products(self, test: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Nowhere: choosing rows takes no time."""
        return []

    def times(self, test: torch.Tensor) -> torch.Tensor:
        """The rows of `test` that the tokens choose."""
        return product(self.ids, test)

    def accumulate(self, out: torch.Tensor, left: torch.Tensor, scale: float) -> None:
        """Add scale * left^T X to `out`."""
        add_product(out, left, self.ids, scale)


def product(x: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """X @ test in the precision of X, for inputs; the rows of `test`, for indices."""
    return x @ test.to(x.dtype) if x.is_floating_point() else test[x]


def add_product(out: torch.Tensor, left: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    """Add scale * left^T X to `out`, for inputs or for indices; in the precision of the inputs."""
    if not x.is_floating_point():
        out.index_add_(1, x, left.T.to(out.dtype), alpha=scale)
    elif x.dtype == out.dtype:
        out.addmm_(left.T.to(x.dtype), x, alpha=scale)
    elif x.device.type == "cuda" and _WIDE_SUMS:
        out.add_(torch.mm(left.T, x, out_dtype=out.dtype), alpha=scale)
    else:
        # oneDNN is slower with a transposed matrix than copying it takes.
        out.add_(left.T.contiguous() @ x, alpha=scale)


# Whether CUDA hands over the sums of a product in the precision in which it adds (torch 2.8).
_WIDE_SUMS = torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


Inputs: TypeAlias = DenseInputs | TokenInputs


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which sums over tokens are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def may_round(dtype: torch.dtype) -> bool:
    """Whether products with the tokens of a layer with such weights may be bfloat16's.

    Of bfloat16 and quantised weights they may; float16's have a finer precision.
    """
    return dtype not in (torch.float16, torch.float32, torch.float64)


@functools.cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether devices of this kind have arithmetic for bfloat16.

    Where a processor has none, torch's products of it take 15 to 35 times as long as float32's.
    """
    if device != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _stay_bfloat16(*factors: torch.Tensor) -> bool:
    alike = all(factor.dtype == torch.bfloat16 for factor in factors)
    return alike and multiplies_bfloat16(factors[0].device.type)


def patches(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The patches that a Conv2d multiplies, one row each."""
    x = x if x.ndim == 4 else x[None]
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = torch.nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    columns = torch.nn.functional.unfold(
        x, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride
    )
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _piece(matrix: torch.Tensor) -> int:
    """Rows that are worked on at once."""
    # Each side of the product is read twice, for its own test matrix and for the other side's; few
    # rows at a time, the second time comes from the processor's cache.
    if matrix.device.type != "cpu":
        return 8192
    return max(64, min(256, (1 << 16) // max(matrix.shape[1], 1)))
