"""What each rank of each adapted layer is worth, measured on a few batches while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.probe needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.sharded import peeled
from lorambo_adapters.spectra.batches import (
    MaskOf,
    as_it_was,
    attention_masks,
    same_random_numbers,
)
from lorambo_adapters.spectra.derivative_sums import DerivativeSums
from lorambo_adapters.spectra.directions import first_dimension
from lorambo_adapters.spectra.distributed import WorkerLost, Workers
from lorambo_adapters.spectra.fisher import Fisher, FisherLoss, LossFn, Terms, same_number
from lorambo_adapters.spectra.hooks import GradientHooks
from lorambo_adapters.spectra.sample_derivatives import SampleDerivatives
from lorambo_adapters.spectra.sketcher import GradientSketcher, positive_scale
from lorambo_adapters.training.curves import kept_gains, new_gains, outside
from lorambo_adapters.training.probe_layers import Place, find_places
from lorambo_adapters.training.probe_passes import Once, fisher_passes, one_graph_goes_once
from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import real_number

_T = TypeVar("_T")


class ProbeFailed(RuntimeError):
    """A probe came to no result, in all workers alike; the cause is chained where it occurred."""


@dataclass(frozen=True)
class Measurement:
    """What a probe found.

    Attributes:
        curves: layer to F(0) = 0, ..., F(now), ..., F(now + found).
        directions: layer to new directions (U, V), d x m and k x m with orthonormal columns, best
            first, as `resize(gradients=...)` takes them.
        skipped: layer to why it cannot be measured.
        seconds: how long it took.
    """

    curves: dict[str, npt.NDArray[np.float64]]
    directions: dict[str, tuple[torch.Tensor, torch.Tensor]]
    skipped: dict[str, str]
    seconds: float


class RankProbe:
    """What each rank of each adapted layer is worth, in units of the loss, on a few batches.

    With s B A = sum_j sigma_j u_j v_j^T in a layer, b the mean loss's slopes along directions
    u_j v_j^T of that layer, and C its Fisher information along them:

    - Below the present rank, taking the tail T = {r + 1, ..., now} away changes the loss by
      E(r) = -b_T . sigma_T + 1/2 sigma_T^T C_TT sigma_T, and F(r) = E(0) - E(r). So F(now) is what
      the layer's adapter saves; the tail is not refitted.
    - Above it come the singular pairs of (I - U U^T) G (I - V V^T), where G is the gradient of
      other batches (a sketch, one pass): F(now + m) = F(now) + 1/2 (b_m^T (C_mm + rho I)^-1 b_m -
      tr((C_mm + rho I)^-1 V_mm)) for the first m of them, with V the covariance of b's estimate.
      As other samples measure them than have found them, and V is taken off, neither chance adds to
      the gain in expectation (given C). Single measurements may be negative.
    - A rank that has learnt nothing yet (B or A is zero, or its singular value is, to a millionth
      of both factors' norms) is no direction of s B A; it is worth what a new one is. So at the
      start of training, F(r) is what the r best directions save. If fewer directions are found than
      there are such ranks, the last value is repeated.
    - A rank that has learnt a little is worth the little that it saves by now, not what it will: a
      few steps after the start, curves are far below those of the start (in a tiny classifier 0.13
      before the first step, 0.0005 after it, 0.11 after 100). So probe before, or after a warmup.

    Curves need be neither monotone nor concave. Layers are looked at one by one: what several
    changes together do is not part of it.

    The unit is the loss's with the true Fisher, as far as a quadratic model reaches. With the
    empirical one, C is the second moment of what b is the mean of, so gains above the present rank
    order directions but predict no fall of the loss. A small pretrained encoder (6 layers, 384
    wide, 20 classes) after 40 steps, 32 samples a step, on the 13 layers that were looked at: what
    removing whole adapters really lost, and F(now) of 16 samples that measured, had a rank
    correlation of 0.65 with the true Fisher (sums 0.87 times what was lost) and 0.55 with the
    empirical one (0.37 times); with 256 samples 0.995 (0.94) and 0.87 (0.78). Gains of 4 new
    directions against those of the best step along the gradient: 16 samples, 0.27 and 0.21 in one
    measurement, 0.42 for the mean of 6; 128 samples, 0.85 and 0.87. So single probes of few
    samples say little of new directions: average them (`OnlineAllocator`), or take more batches.

    The passes are made as the model stands (its modes, dropout), with all parameters frozen.
    Afterwards, and also after an exception, it is as it was to the bit: parameters, `grad`,
    `requires_grad`, buffers, modes and random generators. On that encoder (CPU, 36 layers of rank
    8) a probe on 2 batches of half a training batch took 1.2 training steps with the empirical
    Fisher, and with the true one 1.5 to 1.6 (the latter while others used the machine).

    What is not measured is in `Measurement.skipped`, with the reason: embeddings, convolutions,
    wrapped parameters (experts), layers whose tokens are not a multiple of the samples or that no
    gradient reached, aLoRA, and DoRA with dropout in training. Of a DoRA the norms of W + s B A
    are held constant, as PEFT holds them in its gradients.

    Args:
        model: a `PeftModel`, or what it is wrapped in. The passes call the model inside
            `DistributedDataParallel` and torch.compile.
        adapter: its name; it must be active.
        loss_fn: `loss_fn(model, batch)` gives the loss of each term, or their mean. None: a
            transformers model's own loss, the cross entropy of its logits and the batch's labels.
        ahead: how many ranks above the present one are measured, if there are so many directions.
        width: of the gradient's sketch, which finds up to 3/4 as many directions. By default three
            times `ahead`, and enough for ranks that have learnt nothing yet.
        fisher: as in `curvature_factors`. By default "true" where loss_fn is None, else
            "empirical"; `TrueFisher(predict)` has the outputs that a loss_fn compares with labels.
        terms: as in `curvature_factors`; by default the mean of a loss_fn is over the samples.
        samples: batch to how many samples it has; by default the first dimension of the first
            tensor in it. Samples must not interact, and be the first dimension of each layer's
            input.
        mask: batch to the mask of its tokens, by default its `attention_mask`.
        damping: rho, relative to the mean curvature of the layer's first `ahead` new directions.
            More of it makes gains smaller, and less noisy.
        loss_scale: a number or a `torch.amp.GradScaler`: multiplies the loss, and is divided out.
        workers: data-parallel processes, each with batches of its own: sums are added up, and all
            have the same result to the bit. Entered, if there are several. With `fully_shard`, each
            has as many batches, and an error in one of them can end the others at the time limit
            of their collective calls only; every backward pass has a forward pass of its own.
        seed: of test matrices and random numbers (worker i: seed + i), the same in each probe.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> probe = RankProbe(model, loss_fn=lambda m, x: m(x).square().sum(1), ahead=2)
        >>> measured = probe.measure([torch.randn(8, 6), torch.randn(8, 6)])
        >>> {name: len(curve) for name, curve in measured.curves.items()}
        {'0': 5, '1': 5}
    """

    def __init__(
        self,
        model: torch.nn.Module,
        adapter: str = "default",
        *,
        loss_fn: LossFn | None = None,
        ahead: int = 8,
        width: int | None = None,
        fisher: Fisher | None = None,
        terms: Terms = None,
        samples: Callable[[Any], int] | None = None,
        mask: MaskOf | None = None,
        damping: float = 1.0,
        loss_scale: Any = 1.0,
        workers: Workers | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < real_number(damping) < math.inf:
            raise ValueError(f"damping: expected a finite number > 0, got {damping!r}")
        positive_scale(loss_scale)
        self._model = model
        self._adapter = adapter
        self._ahead = whole_number(ahead, "ahead", 1)
        self._width = None if width is None else whole_number(width, "width", 4)
        self._samples = first_dimension if samples is None else samples
        if fisher is None:
            fisher = "true" if loss_fn is None else "empirical"
        self._losses = FisherLoss(_by_sample(loss_fn, self._samples, terms), fisher, terms)
        # Then the loss and the outputs that labels are drawn from come from one forward pass.
        self._own = loss_fn is None and not getattr(fisher, "predict", None)
        self._mask, self._damping, self._loss_scale = mask, float(damping), loss_scale
        self._workers = Workers.alone() if workers is None else workers
        self._seed = seed

    def measure(self, batches: Sequence[Any]) -> Measurement:
        """Measure what ranks are worth at the model as it is.

        Args:
            batches: at least 2: the first half finds directions, the others measure. Each worker
                has its own.

        Raises:
            ValueError: there are fewer than 2 batches, there is no such adapter or it is not
                active, or no layer can be measured. (Other workers raise `ProbeFailed`.)
            ProbeFailed: in all workers, if in any of them a pass raised an exception (out of
                memory, a loss that is not finite, a batch without labels), which is chained there.
            WorkerLost: another worker has stopped.
        """
        started = time.perf_counter()
        model = peeled(self._model)[0]
        batches = self._together(lambda: _several(batches), None)
        places, skipped = self._together(lambda: find_places(model, self._adapter), None)
        half = len(batches) // 2
        with same_random_numbers(model, self._seed + self._workers.index), as_it_was(model):
            sketcher = self._together(
                lambda: self._sketched(model, places, batches[:half]), "finding directions"
            )
            sketcher.reduce(self._workers)
            derivatives = self._together(
                lambda: self._directions(places, sketcher), "finding directions"
            )
            derivatives.share(self._workers)
            sums = self._together(
                lambda: self._measured(model, derivatives, batches[half:]), "measuring directions"
            )
        self._workers.sum(sums.tensors)
        names = list(places)
        reached = self._workers.united(names, derivatives.reached)
        refused = self._workers.united(names, derivatives.refused)
        for name in names:
            if name in refused:
                skipped[name] = derivatives.refused.get(
                    name, "expected a multiple of the samples as its tokens, got others"
                )
            elif name not in reached:
                skipped[name] = "no gradient reached it in these batches"
        curves, directions = self._together(
            lambda: self._solved(places, derivatives, sums, skipped), "solving"
        )
        self._workers.broadcast(torch.from_numpy(curve) for curve in curves.values())
        return Measurement(curves, directions, skipped, time.perf_counter() - started)

    def _together(self, work: Callable[[], _T], what: str | None) -> _T:
        """Do this worker's part; raise in all workers if it failed in any of them."""
        error: Exception | None = None
        result: _T | None = None
        try:
            result = work()
        except WorkerLost:
            raise
        except Exception as caught:
            error = caught
        failed = self._workers.count_all(error is not None)
        if error is not None:
            if what is None and isinstance(error, ValueError):
                raise error
            raise ProbeFailed(
                f"{what or 'reading batches and adapter'}: {type(error).__name__}: {error}"
            ) from error
        if failed:
            raise ProbeFailed(
                f"{what or 'reading batches and adapter'}: {failed} of {self._workers.count} "
                "workers failed, this one did not"
            )
        return result  # pyright: ignore[reportReturnType]  (work has returned it)

    def _sketched(
        self, model: torch.nn.Module, places: Mapping[str, Place], batches: Sequence[Any]
    ) -> GradientSketcher:
        """The gradient's sketch; enough of it that each layer finds its directions."""
        layers = [place.layer for place in places.values()]
        cold = max(place.present - len(place.pairs[1]) for place in places.values())
        width = self._width
        if width is None:
            # 3/4 of it are directions, some of which lie inside what the adapter has.
            width = max(16, 3 * self._ahead, -(-4 * (self._ahead + cold) // 3))
        sketcher = GradientSketcher(
            model, rank=width, targets=layers, width=width, passes=1, seed=self._seed
        )
        mask = attention_masks(model, layers) if self._mask is None else self._mask
        scale = positive_scale(self._loss_scale)
        with sketcher, torch.enable_grad():
            for batch in batches:
                sketcher.begin(mask(batch), scale)
                total, number = self._losses.total(model, batch)
                (total / number * scale).backward()
        return sketcher

    def _directions(
        self, places: Mapping[str, Place], sketcher: GradientSketcher
    ) -> SampleDerivatives:
        """Per layer, the directions that are there and then the new ones."""
        pairs = sketcher.singular_pairs()
        directions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, place in places.items():
            u, sigma, v = place.pairs
            p, _, q = outside(pairs[name], u.to(pairs[name][0]), v.to(pairs[name][2]))
            new = place.present - len(sigma) + self._ahead
            directions[name] = (
                torch.cat([u.to(p), p[:, :new]], 1),
                torch.cat([v.to(q), q[:, :new]], 1),
            )
        layers = [place.layer for place in places.values()]
        return SampleDerivatives(layers, directions, lenient=True)

    def _measured(
        self, model: torch.nn.Module, derivatives: SampleDerivatives, batches: Sequence[Any]
    ) -> DerivativeSums:
        """Slopes and second moments of the samples' derivatives, summed."""
        sums = DerivativeSums(derivatives)
        mask = attention_masks(model, derivatives.layers) if self._mask is None else self._mask
        scale = positive_scale(self._loss_scale)
        hooks = GradientHooks(derivatives.layers, derivatives.receive, model=model)
        empirical = self._losses.empirical
        afresh = one_graph_goes_once(model)
        own = self._own and not afresh
        with hooks, torch.enable_grad():
            for batch in batches:
                samples = self._samples(batch)
                derivatives.begin(samples, mask(batch))
                hooks.begin()
                once: Any = Once(model) if own else model
                labelled, terms = None, 0
                if not empirical:
                    loss, labelled = self._losses.total(once, batch)
                    (loss / labelled * scale).backward(retain_graph=own)
                    sums.add(derivatives, labelled / scale, data=True)
                for terms, scalar, again in fisher_passes(self._losses, once, batch, afresh):
                    if labelled is not None:
                        same_number(terms, labelled)
                    (scalar / terms * scale).backward(retain_graph=again)
                    sums.add(derivatives, terms / scale, data=empirical)
                sums.count(terms, samples)
        sums.check()
        return sums

    def _solved(
        self,
        places: Mapping[str, Place],
        derivatives: SampleDerivatives,
        sums: DerivativeSums,
        skipped: Mapping[str, str],
    ) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        curves: dict[str, npt.NDArray[np.float64]] = {}
        directions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, place in places.items():
            if name in skipped:
                continue
            b, C, V = sums.moments(name, self._losses.empirical)
            n = len(place.pairs[1])
            old = kept_gains(place.pairs[1].cpu().numpy(), b[:n], C[:n, :n])
            # Of as many as a layer without cold ranks has, lest these change what ranks are worth.
            own = C.diagonal()[n : n + self._ahead]
            rho = self._damping * float(own.mean()) if len(own) else 0.0
            new = new_gains(b[n:], C[n:, n:], V[n:, n:], rho)
            curve = np.append(old, old[-1] + new[1:])
            curves[name] = np.pad(curve, (0, max(0, place.present + 1 - len(curve))), mode="edge")
            u, v = derivatives.directions[name]
            if u.shape[1] > n:
                directions[name] = u[:, n:].clone(), v[:, n:].clone()
        return curves, directions


def _by_sample(
    loss_fn: LossFn | None, samples: Callable[[Any], int], terms: Terms
) -> LossFn | None:
    """A loss that gives each sample a term where it is a mean of which nobody says of how many."""
    if loss_fn is None or terms is not None:
        return loss_fn

    def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss: Any = loss_fn(model, batch)
        scalar = isinstance(loss, torch.Tensor) and not loss.ndim
        return loss.expand(samples(batch)) if scalar else loss

    return losses


def _several(batches: Any) -> list[Any]:
    """The batches as a list, at least two."""
    if isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable):
        raise ValueError(f"batches: expected a list of batches, got {type(batches).__name__}")
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(
            "batches: expected at least 2, to find directions and to measure them, got "
            f"{len(batches)}"
        )
    return batches
