"""Derivatives of each sample's loss along directions of rank 1.

The derivative of sample n's loss along u v^T in a layer is u^T G_n v = sum_t (g_t . u)(x_t . v)
over the sample's tokens, so it takes two thin products and no gradient of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.sample_derivatives needs torch: pip install "
        "'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.factors import place, rows
from lorambo_adapters.spectra.hooks import Mask
from lorambo_adapters.spectra.inputs import Inputs
from lorambo_alloc.costs import whole_number

Directions: TypeAlias = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer to (U, V), d x m and k x m: the candidates u_j v_j^T, one a column."""


class SampleDerivatives:
    """Derivatives of each sample's loss along all directions, from one backward pass.

    `receive` is what `GradientHooks` calls, without a mask of its own: that would drop rows, and
    with them which sample they are of.

    Args:
        layers: where the directions are.
        directions: layer to (U, V).
        lenient: pass over a layer whose tokens cannot be told apart by sample, and note why in
            `refused`, instead of raising.

    Raises:
        ValueError: directions do not fit their layer, or it is a table with `padding_idx`.

    Attributes:
        layers: where the directions are.
        names: the layer of each direction: those of one layer stand together.
        directions: layer to (U, V), on the layer's device, in the precision of its sums.
        reached: the layers that a gradient has reached.
        refused: layer to why its tokens' samples are not known.
        size: how many directions there are.
        device: of `take`'s result.
    """

    def __init__(
        self, layers: Sequence[TargetLayer], directions: Directions, *, lenient: bool = False
    ) -> None:
        self.layers: list[TargetLayer] = []
        self.names: list[str] = []
        self.directions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reached: set[str] = set()
        self.refused: dict[str, str] = {}
        self._lenient = lenient
        self._columns: dict[str, slice] = {}
        self.size = 0
        for layer in layers:
            if getattr(layer.module, "padding_idx", None) is not None:
                raise ValueError(
                    f"layer {layer.name!r}: expected a layer with a row for every token, got an "
                    "embedding table with padding_idx; leave it out"
                )
            u, v = directions[layer.name]
            d, k = layer.shape
            if u.ndim != 2 or tuple(u.shape) != (d, u.shape[1]) or v.shape != (k, u.shape[1]):
                raise ValueError(
                    f"directions: layer {layer.name!r}: expected U of shape ({d}, m) and V of "
                    f"({k}, m), got {tuple(u.shape)} and {tuple(v.shape)}"
                )
            if not bool(torch.isfinite(u).all() and torch.isfinite(v).all()):
                raise ValueError(f"directions: layer {layer.name!r}: got NaN or infinity")
            device, dtype = place(layer)
            u, v = u.detach().to(device, dtype), v.detach().to(device, dtype)
            self.layers.append(layer)
            self.directions[layer.name] = u, v
            self._columns[layer.name] = slice(self.size, self.size + u.shape[1])
            self.names += [layer.name] * u.shape[1]
            self.size += u.shape[1]
        where = place(self.layers[0])[0]
        self.device = torch.device("cpu") if where.type == "mps" else where  # it has no float64
        self._samples = 0
        self._mask: Mask = None
        self._sums: dict[str, torch.Tensor] = {}

    def share(self, workers: Workers) -> None:
        """Take worker 0's directions."""
        workers.agree("layers and numbers of directions", repr(self.names))
        if workers.count > 1:
            copies = {name: (u.clone(), v.clone()) for name, (u, v) in self.directions.items()}
            workers.broadcast(side for pair in copies.values() for side in pair)
            self.directions = copies

    def begin(self, samples: int, mask: Mask) -> None:
        """Say how many samples the next batch has, and which of its tokens count."""
        self._samples = whole_number(samples, "samples", 1)
        self._mask = mask
        self._sums = {}

    def receive(self, layer: TargetLayer, inputs: Inputs, gradient: torch.Tensor) -> None:
        """Add (g_t . u)(x_t . v) to the sample of each token."""
        self.reached.add(layer.name)
        tokens = rows(inputs)
        if tokens % self._samples:
            problem = (
                f"expected a multiple of {self._samples} samples as its tokens, got {tokens}; pass "
                "samples="
            )
            if not self._lenient:
                raise ValueError(f"layer {layer.name!r}: {problem}")
            self.refused[layer.name] = problem
            return
        u, v = (each.to(gradient) for each in self.directions[layer.name])
        products = (gradient @ u) * inputs.times(v)
        mask = self._mask.get(layer.name) if isinstance(self._mask, Mapping) else self._mask
        if mask is not None and mask.numel() == tokens:
            products *= (mask.reshape(-1, 1) != 0).to(products)
        added = products.view(self._samples, -1, products.shape[1]).sum(1)
        before = self._sums.get(layer.name)
        self._sums[layer.name] = added if before is None else before + added

    def by_layer(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the last backward pass has summed, samples x m in float64, layer by layer."""
        sums, self._sums = self._sums, {}
        for name, each in sums.items():
            yield name, (each.cpu() if each.device.type == "mps" else each).double()

    def take(self) -> torch.Tensor:
        """What the last backward pass has summed: samples x `size`, in float64."""
        c = torch.zeros(self._samples, self.size, device=self.device, dtype=torch.float64)
        for name, sums in self._sums.items():
            c[:, self._columns[name]] = sums.to(device=self.device).double()
        self._sums = {}
        return c
