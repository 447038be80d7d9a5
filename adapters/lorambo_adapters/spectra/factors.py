"""Sums over tokens from which Kronecker factors of the curvature are made.

A layer's input x and output gradient g have a row for each token (position, patch) of each sample;
g is the gradient of the *sum* of the loss's N terms. With T tokens and the weight shared over the
tokens of a sample, the factors treat tokens as if they were samples ("KFAC-expand"):

    N F = sum over samples of E[(sum_t x_t kron g_t)(sum_t x_t kron g_t)^T]
        ~ sum_t E[x_t x_t^T kron g_t g_t^T]                        (tokens uncorrelated)
        ~ N A kron B,   A = (1/T) sum x x^T,   B = (1/N) sum g g^T    (x and g uncorrelated)

References:
    Martens, Grosse: Optimizing neural networks with Kronecker-factored approximate curvature. ICML
    2015. Eschenhagen, Immer, Turner, Schneider, Hennig: Kronecker-factored approximate curvature
    for modern neural network architectures. NeurIPS 2023, section 3 (expand and reduce).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.factors needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.spectra.inputs import DenseInputs, Inputs, TokenInputs, sum_dtype
from lorambo_adapters.spectra.whitening import Factors, SymmetricFactor

Kind: TypeAlias = Literal["none", "input", "kfac", "ekfac", "diagonal"]


class MomentSums:
    """sum x x^T and sum g g^T of every layer, in float32 (float64 where the weights are).

    The input of an embedding table is a row of the identity, so its A is diagonal and summed as
    such. Layers with one input share the product x^T x, and their sums are equal to the bit.

    Args:
        layers: which.
        outputs: whether gradients are summed, or inputs only.
    """

    def __init__(self, layers: Iterable[TargetLayer], *, outputs: bool) -> None:
        self.layers = list(layers)
        self.terms = torch.zeros(1, dtype=torch.float64)
        self.tokens = torch.zeros(len(self.layers), dtype=torch.float64)
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}
        self.right: dict[str, torch.Tensor] = {}
        self.left: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            device, dtype = place(layer)
            d, k = layer.shape
            shape = (k,) if layer.kind == "embedding" else (k, k)
            self.right[layer.name] = torch.zeros(shape, device=device, dtype=dtype)
            if outputs:
                self.left[layer.name] = torch.zeros(d, d, device=device, dtype=dtype)
        self._last: tuple[Inputs, torch.Tensor] | None = None
        self.counts_inputs = True

    def receive(
        self, layer: TargetLayer, inputs: Inputs, gradient: torch.Tensor | None = None
    ) -> None:
        """Add a layer's tokens; its inputs once a batch, however many backward passes there are."""
        if gradient is not None:
            self.left[layer.name].addmm_(gradient.T, gradient)
        if not self.counts_inputs:
            return
        if self._last is None or self._last[0] is not inputs:
            self._last = inputs, _second_moment(inputs, layer.shape[1], self.right[layer.name])
        self.right[layer.name] += self._last[1]
        self.tokens[self._index[layer.name]] += rows(inputs)

    def accumulators(self) -> list[torch.Tensor]:
        """All sums, in an order that depends on the layers alone, for an all-reduce in place."""
        self._last = None
        return [self.terms, self.tokens, *self.right.values(), *self.left.values()]

    def factors(self, damping: float) -> dict[str, Factors]:
        """A and B of every layer; the sums are let go of one by one.

        Raises:
            ValueError: a sum is not finite; the message names the layer.
        """
        self._last = None
        found: dict[str, Factors] = {}
        shared: dict[int, tuple[torch.Tensor, float, SymmetricFactor]] = {}
        for layer, tokens in zip(self.layers, self.tokens.tolist(), strict=True):
            total = self.right.pop(layer.name)
            rounding = torch.finfo(total.dtype).eps
            check_finite(layer.name, total, "inputs")
            before = shared.get(len(total))
            if before is None or before[1] != tokens or not _equal(before[0], total):
                factor = SymmetricFactor.of(total / max(tokens, 1.0), damping, rounding)
                before = shared[len(total)] = total, tokens, factor
            left = None
            if layer.name in self.left:
                outer = self.left.pop(layer.name)
                check_finite(layer.name, outer, "gradients")
                outer = outer / max(float(self.terms), 1.0)
                left = SymmetricFactor.of(outer, damping, rounding)
            found[layer.name] = Factors(layer.name, layer.shape, before[2], left)
        return found


class MarginalSums:
    """Row and column sums of the gradient's second moments S_ij in given eigenbases.

    S_ij = (1/N) sum_t E[(U_B^T g_t)_i^2 (U_A^T x_t)_j^2] is what the tokens' Fisher has on its
    diagonal in the basis U_A kron U_B. A product b_i a_j with S's row and column sums is the
    nearest one of rank 1 to S in the generalised Kullback-Leibler divergence, so S itself (d x k)
    is not needed: two vectors, summed in float64. U_A = U_B = I gives a diagonal curvature.

    Args:
        layers: which.
        bases: layer to factors with the eigenvectors; none for the identity.

    References:
        George, Laurent, Bouthillier, Ballas, Vincent: Fast approximate natural gradient descent in
        a Kronecker-factored eigenbasis. NeurIPS 2018 (S). Shazeer, Stern: Adafactor. ICML 2018,
        lemma 1 (the nearest product).
    """

    def __init__(
        self, layers: Iterable[TargetLayer], bases: dict[str, Factors] | None = None
    ) -> None:
        self.layers = list(layers)
        self.terms = torch.zeros(1, dtype=torch.float64)
        # A layer's tokens, sum |x|^2 and sum |x|^2 |g|^2.
        self.totals: dict[str, torch.Tensor] = {}
        self._vectors: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self.right: dict[str, torch.Tensor] = {}
        self.left: dict[str, torch.Tensor] = {}
        self._rounding: dict[str, float] = {}
        for layer in self.layers:
            device, dtype = place(layer)
            self._rounding[layer.name] = torch.finfo(dtype).eps
            d, k = layer.shape
            for side, n in ((self.totals, 3), (self.right, k), (self.left, d)):
                wide = torch.float32 if device.type == "mps" else torch.float64
                side[layer.name] = torch.zeros(n, device=device, dtype=wide)
            sides = (None, None)
            if bases is not None:
                sides = bases[layer.name].right, bases[layer.name].left
            self._vectors[layer.name] = (
                None if sides[0] is None else sides[0].vectors,
                None if sides[1] is None else sides[1].vectors,
            )
        self.counts_inputs = True

    def receive(self, layer: TargetLayer, inputs: Inputs, gradient: torch.Tensor) -> None:
        """Add a layer's tokens."""
        right, left = self._vectors[layer.name]
        columns, across = self.right[layer.name], self.left[layer.name]
        size = gradient.to(columns).square().sum(1)
        if isinstance(inputs, TokenInputs):
            columns.index_add_(0, inputs.ids, size)
            length = torch.ones_like(size)
        else:
            x = inputs.matrix if right is None else inputs.times(_like(right, inputs.matrix))
            squares = x.square().to(columns)
            columns += size @ squares
            length = squares.sum(1)
        g = gradient if left is None else gradient @ _like(left, gradient)
        across += length @ g.square().to(across)
        totals = self.totals[layer.name]
        if self.counts_inputs:
            totals[0] += len(size)
            totals[1] += length.sum()
        totals[2] += length @ size

    def accumulators(self) -> list[torch.Tensor]:
        """All sums, in an order that depends on the layers alone, for an all-reduce in place."""
        sums = (self.totals, self.right, self.left)
        return [self.terms, *(total for each in sums for total in each.values())]

    def factors(self, damping: float) -> dict[str, Factors]:
        """A with the trace of E[x x^T], and B, such that A kron B has S's row and column sums.

        Raises:
            ValueError: a sum is not finite; the message names the layer.
        """
        found: dict[str, Factors] = {}
        for layer in self.layers:
            tokens, length, total = self.totals[layer.name].tolist()
            columns, across = self.right[layer.name].double(), self.left[layer.name].double()
            check_finite(layer.name, columns, "gradients")
            check_finite(layer.name, across, "gradients")
            trace = length / max(tokens, 1.0)
            right = columns * (trace / total if total else 0.0)
            left = across / (max(float(self.terms), 1.0) * trace) if trace else across * 0.0
            rounding = self._rounding[layer.name]
            vectors = self._vectors[layer.name]
            found[layer.name] = Factors(
                layer.name,
                layer.shape,
                SymmetricFactor(right, vectors[0], damping, rounding),
                SymmetricFactor(left, vectors[1], damping, rounding),
            )
        return found


def place(layer: TargetLayer) -> tuple[torch.device, torch.dtype]:
    """Where a layer's sums lie, and their precision."""
    weight = next((p for p in layer.module.parameters(recurse=False)), None)
    if weight is None or weight.is_meta:
        return torch.device("cpu"), torch.float32
    return weight.device, sum_dtype(weight.dtype)


def rows(inputs: Inputs) -> int:
    """How many tokens an input has."""
    return len(inputs.ids if isinstance(inputs, TokenInputs) else inputs.matrix)


def check_finite(name: str, total: torch.Tensor, what: str) -> None:
    """Refuse a sum that is not finite, by the layer's name."""
    if not bool(torch.isfinite(total).all()):
        raise ValueError(f"layer {name!r}: expected finite {what}, got NaN or infinity")


def warn_silent(names: Sequence[str], what: str, then: str) -> None:
    """Warn the caller's caller that these layers got nothing."""
    if names:
        more = ", ..." if len(names) > 3 else ""
        warnings.warn(
            f"no {what} reached {len(names)} layers, {then}: "
            f"{', '.join(map(repr, names[:3]))}{more}",
            stacklevel=3,
        )


def _second_moment(inputs: Inputs, size: int, like: torch.Tensor) -> torch.Tensor:
    if isinstance(inputs, TokenInputs):
        return torch.bincount(inputs.ids, minlength=size).to(like)
    assert isinstance(inputs, DenseInputs)
    return (inputs.matrix.T @ inputs.matrix).to(like)


def _like(vectors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return vectors.to(device=tokens.device, dtype=tokens.dtype)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
