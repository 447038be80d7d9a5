"""Random test matrices that all layers of a model share."""

from __future__ import annotations

from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.gaussians needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing


class Gaussians:
    """Standard normal test matrices, shared by all layers: the first rows and columns of one.

    Args:
        rows: the longest side of any layer.
        right: columns for the side of the inputs.
        left: columns for the side of the outputs, independent of the former.
        seed: of the generator, which runs on the CPU, so that every device has the same matrices.
    """

    def __init__(self, rows: int, right: int, left: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._drawn = [torch.randn(rows, n, generator=generator) for n in (right, left)]
        self._parts: dict[tuple[Any, ...], torch.Tensor] = {}

    def right(
        self, rows: int, columns: slice, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows and columns for the inputs. Equal requests get the same tensor."""
        return self._part(0, rows, columns, device, dtype)

    def left(
        self, rows: int, columns: slice, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows and columns for the outputs."""
        return self._part(1, rows, columns, device, dtype)

    def _part(
        self, side: int, rows: int, columns: slice, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        key = (side, device, dtype, rows, columns.start, columns.stop)
        if key not in self._parts:
            part = self._drawn[side][:rows, columns].to(device=device, dtype=dtype)
            self._parts[key] = part.contiguous()  # products with it are faster
        return self._parts[key]

    def fingerprint(self) -> list[float]:
        """A few numbers by which two sets of test matrices can be told apart."""
        return [float(m.double().square().sum()) for m in self._drawn]
