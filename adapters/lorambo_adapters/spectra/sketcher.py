"""The context manager that sketches all layers' gradients during backward passes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.sketcher needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import LayerTargets, TargetLayer, find_layers
from lorambo_adapters.spectra.batches import warn_unreached
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.gaussians import Gaussians
from lorambo_adapters.spectra.hooks import GradientHooks, Mask
from lorambo_adapters.spectra.inputs import Inputs, may_round, sum_dtype
from lorambo_adapters.spectra.kronecker import Curvature
from lorambo_adapters.spectra.sketch import (
    ExactSum,
    Sketch,
    SubspaceSketch,
    Triplets,
    TwoSidedSketch,
    Whitening,
)
from lorambo_adapters.spectra.sketch_sizes import gaussian_columns, is_summed_exactly
from lorambo_alloc import Spectra
from lorambo_alloc.costs import whole_number

_VERSION = 1
_Found = TypeVar("_Found")


class GradientSketcher:
    """Sketches the gradients of frozen layers during backward passes. A context manager.

    For every layer of shape (d, k) it sums a sketch of G = sum of g x^T, the gradient with respect
    to the weight, without forming it. Where d k numbers are no more than the sketch's, G itself is
    summed. Sketches of several batches and of several workers add up (`merge`, `reduce`).

    Sums are float32, or float64 where the weights are. Products are too, but for sketches of layers
    with bfloat16 weights (or quantised ones), where tokens and gradients that come in bfloat16 are
    multiplied as they are with test matrices that are rounded to it, if the device has arithmetic
    for it: that is faster, and values are off by 0.1 to 0.3 % more, up or down (`sketch`). Not with
    a whitening, and never where G itself is summed.

    Memory: (d + k) s numbers a layer with one pass and 2 (d + k) s with more (s is the width; plus
    8 vectors in the last of several passes, the bases of the pass before, and with a whitening the
    test matrices); Gaussian test matrices, at most 5 s / 2 or 2 s + 16 columns, of the longest side
    on the CPU, and for each length of a side that differs, which layers share. Beyond that each
    layer's input is kept until its backward pass, as training a LoRA keeps it, and one input's
    product with a test matrix.

    Args:
        model: runs the forward passes. No parameter needs `requires_grad`; those that have it
            get their gradients as ever (`gradient_spectra` turns it off meanwhile).
        rank: at most this many values a layer.
        targets: which layers, as PEFT's `target_modules`, or from `find_layers`.
        curvature: layer to (A^-1/2, B^-1/2), symmetric matrices k x k and d x d, or 1-D diagonals,
            or None for the identity; or a `Curvature`: the spectra are those of B^-1/2 G A^-1/2.
            Test matrices and sums are multiplied by them, never the tokens. None: of G.
        width: s, by default the rank but at least 16.
        passes: how often all batches will be run through. One pass gives 3 s / 4 values from a
            two-sided sketch, which are coarse where the spectrum is flat (see `gradient_spectra`);
            more passes give accurate ones.
        seed: of the test matrices; workers must use the same one.

    Raises:
        ValueError: an argument is out of range, no layer is a target, or a layer of `curvature` is
            missing or has another shape.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).requires_grad_(False)
        >>> with GradientSketcher(model, rank=2, targets=["0"]) as sketcher:
        ...     for x in (torch.eye(3), torch.ones(1, 3)):
        ...         sketcher.begin()
        ...         model(x).sum().backward()
        >>> sketcher.spectra()["0"].round(6)
        array([2.44949, 0.     ])
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        rank: int = 64,
        targets: LayerTargets = "all-linear",
        curvature: Mapping[str, Whitening] | Curvature | None = None,
        width: int | None = None,
        passes: int = 1,
        seed: int = 0,
    ) -> None:
        rank = whole_number(rank, "rank", 1)
        width = max(rank, 16) if width is None else whole_number(width, "width", 4)
        passes = whole_number(passes, "passes", 1)
        if isinstance(curvature, Curvature):
            curvature = curvature.whitenings()
        self.layers = find_layers(model, targets)
        self.rank, self.width, self.passes, self.seed = rank, width, passes, seed
        self.batches = 0
        self.number = 1
        self._whitened = curvature is not None
        self._scale = 1.0
        right, left = gaussian_columns(width, passes)
        sides = [max(layer.shape) for layer in self.layers if not self._exact(layer.shape)]
        self._gaussians = Gaussians(max(sides, default=1), right, left, seed)
        self._sketches = {
            layer.name: self._sketch(layer, _whitening(layer, curvature)) for layer in self.layers
        }
        self._hooks = GradientHooks(self.layers, self._receive, model=model, convert=False)
        self._reached: set[str] = set()

    def _exact(self, shape: tuple[int, int]) -> bool:
        return is_summed_exactly(shape, self.width, self.passes)

    def _sketch(self, layer: TargetLayer, whitening: Whitening) -> Sketch:
        weight = getattr(layer.module, layer.parameter)
        device = torch.device("cpu") if weight.is_meta else weight.device
        dtype = sum_dtype(weight.dtype)
        if self._exact(layer.shape):
            return ExactSum(layer.shape, whitening, device, dtype)
        rounded = may_round(weight.dtype)
        if self.passes == 1:
            return TwoSidedSketch(
                layer.shape, self.width, self._gaussians, whitening, device, dtype, rounded
            )
        return SubspaceSketch(
            layer.shape, self.width, self.passes, self._gaussians, whitening, device, dtype, rounded
        )

    def __enter__(self) -> GradientSketcher:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def begin(self, mask: Mask = None, loss_scale: Any = 1.0) -> None:
        """Say that the next batch begins; call it before its forward pass.

        Args:
            mask: which tokens count, such as the batch's attention mask (`GradientHooks.begin`).
            loss_scale: what the loss is multiplied by before `backward`, to be divided out: a
                number, or a `torch.amp.GradScaler`.

        Raises:
            ValueError: the scale is not a positive number, or the mask is not a tensor.
        """
        scale = positive_scale(loss_scale)
        self._hooks.begin(mask)
        self._scale = 1 / scale
        self.batches += 1

    def _receive(self, layer: TargetLayer, inputs: Inputs, gradient: torch.Tensor) -> None:
        self._reached.add(layer.name)
        self._sketches[layer.name].update(inputs, gradient, self._scale)

    @property
    def complete(self) -> bool:
        """Whether no further pass over the batches would change anything."""
        exact = all(isinstance(sketch, ExactSum) for sketch in self._sketches.values())
        return exact or self.number == self.passes

    def reduce(self, workers: Workers) -> None:
        """Add this pass's sums up over workers; all have the result. To be called once a pass.

        Raises:
            ValueError: the workers' layers, settings or passes differ.
            WorkerLost: another worker has stopped.
        """
        workers.agree("layers, settings and pass of a sketch", json.dumps(self._settings()))
        workers.sum(self.accumulators())
        self.batches = workers.count_all(self.batches)
        self._reached = workers.united([layer.name for layer in self.layers], self._reached)

    def next_pass(self, workers: Workers | None = None) -> None:
        """Turn this pass's sums into the next one's test matrices.

        Sums that are exact already stop growing.

        Args:
            workers: all of them take worker 0's matrices, after `reduce`.

        Raises:
            ValueError: all passes are done, or a sum is not finite (the layer is named).
        """
        if self.number >= self.passes:
            raise ValueError(f"all {self.passes} passes are done")
        for name, sketch in self._sketches.items():
            self._check_finite(name)
            sketch.next_pass(float(max(self.batches, 1)))
            if workers is not None and sketch.accumulators:
                # Other hardware may choose other vectors where the sums have no direction.
                workers.broadcast(sketch.carried)
                sketch.restore(self.number + 1, sketch.carried)
            if not sketch.accumulators:
                self._hooks.finished.add(name)
        self.number += 1
        self.batches = 0

    def accumulators(self) -> list[torch.Tensor]:
        """This pass's sums, contiguous, in an order of the layers alone.

        To add them up in another way than `reduce`, do so in place, and set `batches` to the sum of
        the workers' counts.
        """
        sums = [a for sketch in self._sketches.values() for a in sketch.accumulators]
        return [a if a.is_contiguous() else a.T for a in sums]

    def merge(self, other: GradientSketcher) -> None:
        """Add the sums of another sketcher of the same layers, settings and pass.

        Raises:
            ValueError: it differs in one of these.
        """
        self._check_settings(other._settings(), "merge")
        for name, sketch in self._sketches.items():
            theirs = other._sketches[name]
            for mine, same in zip(sketch.carried, theirs.carried, strict=True):
                if not torch.equal(mine, same.to(mine.device)):
                    raise ValueError(
                        f"merge: layer {name!r}: the sketches come from different passes before"
                    )
            for mine, added in zip(sketch.accumulators, theirs.accumulators, strict=True):
                mine.add_(added.to(mine.device))
        self.batches += other.batches
        self._reached |= other._reached

    def state_dict(self) -> dict[str, Any]:
        """Sums, bases and counts: tensors, numbers and strings (`weights_only` loads them).

        The tensors are those in use, as in a module's state dict. A whitening is not part of it.
        """
        return {
            "version": _VERSION,
            "settings": self._settings(),
            "batches": self.batches,
            "reached": sorted(self._reached),
            "sums": {name: list(s.accumulators) for name, s in self._sketches.items()},
            "carried": {name: list(s.carried) for name, s in self._sketches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another sketcher of the same layers and settings stood.

        Raises:
            ValueError: the state is of another version, or of other layers or settings.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"load_state_dict: expected version {_VERSION}, got {state.get('version')!r}"
            )
        theirs = dict(state["settings"])
        number = theirs["number"]
        self._check_settings({**theirs, "number": self.number}, "load_state_dict")
        self._hooks.finished.clear()
        for name, sketch in self._sketches.items():
            where = sketch.accumulators[0] if sketch.accumulators else sketch.carried[0]
            sketch.restore(number, [t.to(where, copy=True) for t in state["carried"][name]])
            if not sketch.accumulators:
                self._hooks.finished.add(name)
            for mine, loaded in zip(sketch.accumulators, state["sums"][name], strict=True):
                mine.copy_(loaded)
        self.number, self.batches = number, int(state["batches"])
        self._reached = set(state["reached"])

    def spectra(self, source: str | None = None) -> Spectra:
        """The spectra of the mean gradient over the batches begun (of the sum where none was).

        Args:
            source: what to record as their origin, put before how they were computed.

        Returns:
            At most `rank` values a layer, and an estimate of the energy outside them.

        Raises:
            ValueError: a sum is not finite, or passes are missing; the message names the layer.

        Warns:
            UserWarning: no gradient reached some layers, whose spectra are therefore zero.
        """
        values: dict[str, np.ndarray] = {}
        unresolved: dict[str, float] = {}
        for name in self._sketches:
            found, missed = self._decomposed(name, lambda sketch, count: sketch.spectrum(count))
            values[name] = found[: self.rank]
            unresolved[name] = missed + float(np.square(found[self.rank :]).sum())
        silent = [layer.name for layer in self.layers if layer.name not in self._reached]
        warn_unreached(silent, "gradient")
        exact = sum(isinstance(sketch, ExactSum) for sketch in self._sketches.values())
        what = "whitened gradient" if self._whitened else "gradient"
        method = (
            f"{what} of the mean loss of {max(self.batches, 1)} batches; {exact} layers summed "
            f"exactly, {len(values) - exact} sketched with width {self.width} in {self.number} "
            f"pass{'es' if self.number > 1 else ''}, seed {self.seed}"
        )
        return Spectra(
            values,
            shapes={layer.name: layer.shape for layer in self.layers},
            source=f"{source}; {method}" if source else method,
            unresolved=unresolved,
        )

    def singular_pairs(self) -> dict[str, Triplets]:
        """Singular vectors and values of the mean gradient, whitened if there is a curvature.

        Of several passes, the values are those of `spectra`; of one, of the approximation that a
        two-sided sketch gives, larger than the values of `spectra` by the noise that those have
        taken off.

        Returns:
            Layer to (P, sigma, Q), d x n, n and k x n, in float64: G is close to
            P diag(sigma) Q^T, and P and Q have orthonormal columns. n is at most `rank`; what is 0
            up to the rounding of the sums (2^-8 of the largest value for bfloat16 products) is
            left out.

        Raises:
            ValueError: as `spectra`.
        """
        found: dict[str, Triplets] = {}
        for name in self._sketches:
            left, values, right = self._decomposed(name, lambda sketch, count: sketch.pairs(count))
            found[name] = left[:, : self.rank], values[: self.rank], right[:, : self.rank]
        return found

    def _decomposed(self, name: str, decompose: Callable[[Sketch, float], _Found]) -> _Found:
        self._check_finite(name)
        try:
            return decompose(self._sketches[name], float(max(self.batches, 1)))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    def _settings(self) -> dict[str, Any]:
        return {
            "layers": {layer.name: list(layer.shape) for layer in self.layers},
            "rank": self.rank,
            "width": self.width,
            "passes": self.passes,
            "seed": self.seed,
            "number": self.number,
            "drawn": self._gaussians.fingerprint(),
            "rounded": [name for name, s in self._sketches.items() if s.rounded],
        }

    def _check_settings(self, theirs: Mapping[str, Any], what: str) -> None:
        for name, mine in self._settings().items():
            if theirs.get(name) != mine:
                label = "pass" if name == "number" else name
                long = name in ("layers", "drawn", "rounded")
                shown, given = ("the same", "others") if long else (mine, theirs.get(name))
                raise ValueError(f"{what}: {label}: expected {shown}, got {given}")

    def _check_finite(self, name: str) -> None:
        for accumulator in self._sketches[name].accumulators:
            if not bool(torch.isfinite(accumulator).all()):
                raise ValueError(
                    f"layer {name!r}: expected finite gradients, got NaN or infinity (with "
                    "float16, lower the loss scale)"
                )


def _whitening(layer: TargetLayer, curvature: Mapping[str, Whitening] | None) -> Whitening:
    if curvature is None:
        return None, None
    if layer.name not in curvature:
        raise ValueError(f"curvature: layer {layer.name!r} is missing")
    right, left = curvature[layer.name]
    d, k = layer.shape
    for side, factor, size in (("A^-1/2", right, k), ("B^-1/2", left, d)):
        if factor is not None and tuple(factor.shape) not in ((size, size), (size,)):
            raise ValueError(
                f"curvature: layer {layer.name!r}: expected {side} of shape ({size}, {size}) or "
                f"({size},), got {tuple(factor.shape)}"
            )
    return right, left


def positive_scale(loss_scale: Any) -> float:
    """A loss scale as a number: itself, or a GradScaler's at this moment."""
    read = getattr(loss_scale, "get_scale", None)
    scale = float(loss_scale if read is None else read())
    if not 0 < scale < float("inf"):
        raise ValueError(f"loss_scale: expected a positive number, got {loss_scale!r}")
    return scale
