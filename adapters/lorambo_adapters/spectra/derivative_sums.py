"""Sums over samples of their derivatives along directions, and what these say of the mean loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.derivative_sums needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.sample_derivatives import SampleDerivatives

FloatArray = npt.NDArray[np.float64]


class DerivativeSums:
    """Per layer, sums over samples of c, of c c^T with the data's labels, and with the Fisher's."""

    def __init__(self, derivatives: SampleDerivatives) -> None:
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._b: dict[str, torch.Tensor] = {}
        self._data: dict[str, torch.Tensor] = {}
        self._fisher: dict[str, torch.Tensor] = {}
        for name, (u, _) in derivatives.directions.items():
            m = u.shape[1]
            like = {"device": "cpu" if u.is_mps else u.device, "dtype": torch.float64}
            self._b[name] = torch.zeros(m, **like)
            self._data[name], self._fisher[name] = torch.zeros(2, m, m, **like)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them, in an order of the layers alone."""
        yield self._counts
        for sums in (self._b, self._data, self._fisher):
            yield from sums.values()

    def add(self, derivatives: SampleDerivatives, scale: float, *, data: bool) -> None:
        """Add what a backward pass has summed, times `scale`."""
        for name, c in derivatives.by_layer():
            c = c * scale
            if data:
                self._b[name] += c.sum(0)
            (self._data if data else self._fisher)[name].addmm_(c.T, c)

    def count(self, terms: int, samples: int) -> None:
        """Count a batch."""
        self._counts += torch.tensor([terms, samples], dtype=torch.float64)

    def check(self) -> None:
        """Refuse sums that are not finite."""
        for sums in (self._b, self._data, self._fisher):
            for name, each in sums.items():
                if not bool(torch.isfinite(each).all()):
                    raise ValueError(
                        f"layer {name!r}: expected finite gradients, got NaN or infinity (with "
                        "float16, lower the loss scale)"
                    )

    def moments(self, name: str, empirical: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The mean loss's slopes, its Fisher information, and the covariance of these slopes.

        Args:
            name: the layer's.
            empirical: whether the Fisher information is that of the data's labels.

        Raises:
            ValueError: there were fewer than 2 samples.
        """
        terms, samples = self._counts.tolist()
        if samples < 2:
            raise ValueError(
                f"batches: expected at least 2 samples to measure on, got {samples:g}; take more "
                "batches (batches_per_probe), or larger ones"
            )
        b, data, fisher = (sums[name].cpu().numpy() for sums in (self._b, self._data, self._fisher))
        spread = data - np.outer(b, b) / samples
        V = spread * samples / (samples - 1) / terms**2
        return b / terms, (data if empirical else fisher) / terms, V
