"""A layer's inputs as matrices, tokens in rows, and the products that sums over tokens need."""

from __future__ import annotations

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
        self._known: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._matrix)

    @property
    def matrix(self) -> torch.Tensor:
        """Tokens x k in the precision of the sums; converted at each use where it has another."""
        return self._matrix.to(self.dtype)

    def pieces(self, gradient: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Consecutive rows of input and gradient that fit into a processor's cache, converted."""
        rows = _piece(self._matrix)
        pairs = zip(self._matrix.split(rows), gradient.split(rows), strict=True)
        return ((x.to(self.dtype), g.to(self.dtype)) for x, g in pairs)

    def products(self, test: torch.Tensor) -> list[torch.Tensor]:
        """Where the products of the pieces with a test matrix are kept, for layers that share X.

        Empty for another test matrix than the last one.
        """
        if self._known is None or self._known[0] is not test:
            self._known = test, []
        return self._known[1]

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

    def pieces(self, gradient: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All indices, and the gradient, converted."""
        yield self.ids, gradient.to(self.dtype)

    def products(self, test: torch.Tensor) -> list[torch.Tensor]:
        """Nowhere: choosing rows takes no time."""
        return []

    def times(self, test: torch.Tensor) -> torch.Tensor:
        """The rows of `test` that the tokens choose."""
        return product(self.ids, test)

    def accumulate(self, out: torch.Tensor, left: torch.Tensor, scale: float) -> None:
        """Add scale * left^T X to `out`."""
        add_product(out, left, self.ids, scale)


def product(x: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """X @ test, for inputs or for indices."""
    return x @ test if x.is_floating_point() else test[x]


def add_product(out: torch.Tensor, left: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    """Add scale * left^T X to `out`, for inputs or for indices."""
    if x.is_floating_point():
        out.addmm_(left.T, x, alpha=scale)
    else:
        out.index_add_(1, x, left.T, alpha=scale)


Inputs: TypeAlias = DenseInputs | TokenInputs


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which sums over tokens are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    return 128 if matrix.device.type == "cpu" else 8192
