"""The curvature of all layers: Kronecker factors by name, with how they were made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Literal

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.kronecker needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.curvature_files import How, load_curvature, save_curvature
from lorambo_adapters.spectra.sketch import Whitening
from lorambo_adapters.spectra.whitening import Factors


class Curvature(Mapping[str, Factors]):
    """Layer name to its Kronecker factors, with how they were made.

    Attributes:
        kind: "none", "input", "kfac", "ekfac" or "diagonal".
        terms: how many terms of the loss they are means over (0 where no gradient was taken).
        damping: relative to the mean eigenvalue of each factor.
        source: how they were made, in words.
    """

    def __init__(
        self, factors: Mapping[str, Factors], *, kind: str, terms: int, damping: float, source: str
    ) -> None:
        self._factors = dict(factors)
        self.kind, self.terms, self.damping, self.source = kind, terms, damping, source

    def __getitem__(self, name: str) -> Factors:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def in_loss_units(self) -> bool:
        """Whether 1/2 sigma^2 of a whitened gradient is in units of the loss."""
        return self.kind in ("kfac", "ekfac", "diagonal")

    def whitenings(self) -> dict[str, Whitening]:
        """Layer to (A^-1/2, B^-1/2), for `gradient_spectra(curvature=...)`."""
        return self._pairs(-0.5)

    def matrices(self) -> dict[str, Whitening]:
        """Layer to (A, B), damped; None for the identity, 1-D for a diagonal."""
        return self._pairs(1.0)

    def _pairs(self, exponent: float) -> dict[str, Whitening]:
        pairs: dict[str, Whitening] = {}
        powers: dict[int, torch.Tensor] = {}
        for name, factors in self.items():
            sides: list[torch.Tensor | None] = []
            for side in (factors.right, factors.left):
                if side is not None and id(side) not in powers:
                    powers[id(side)] = side.power(exponent)
                sides.append(None if side is None else powers[id(side)])
            pairs[name] = sides[0], sides[1]
        return pairs

    def save(
        self, path: str | os.PathLike[str], *, dtype: Literal["float64", "float32"] = "float64"
    ) -> None:
        """Write the factors to a file, whole or not at all (`curvature_files.save_curvature`).

        Args:
            path: an older file there is replaced at the end.
            dtype: "float64" keeps every bit; "float32" takes half the space.

        Example:
            >>> import tempfile, torch
            >>> from lorambo_adapters.spectra.curvature import curvature_factors
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
            >>> found = curvature_factors(model, [torch.eye(2)], lambda m, x: m(x), targets=["0"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     found.save(f"{folder}/curvature.safetensors")
            ...     Curvature.load(f"{folder}/curvature.safetensors")
            Curvature(1 layers, curvature 'kfac', empirical Fisher of 2 terms, damping 0.001 of the mean eigenvalue)
        """  # noqa: E501  (the example's last line)
        how = How(self.kind, self.terms, self.damping, self.source)
        save_curvature(self, how, path, dtype=dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Curvature:
        """Read what `save` wrote (`curvature_files.load_curvature`).

        Args:
            path: the file.
            device: where the factors shall lie.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not one of these, newer, or damaged.
        """
        factors, how = load_curvature(path, device=device)
        return cls(factors, **how._asdict())

    def __repr__(self) -> str:
        return f"Curvature({len(self)} layers, {self.source})"
