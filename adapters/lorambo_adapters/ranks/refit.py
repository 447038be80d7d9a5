"""The singular values of a cut, fitted anew to what the tuned model predicts.

A cut loses what all layers do together: layers' differences add up coherently, and each layer cut
alone knows nothing of it. With c_n the derivatives of sample n's loss along the kept directions of
all layers (labels drawn from the cut model's predictions), C = sum c_n c_n^T is their exact Fisher
information, across layers too, in expectation over the labels. With b the slopes of
KL(tuned || cut) a Newton step is -(C + rho diag C)^-1 b, of which so much is taken as lowers KL on
these samples most. It moves singular values only: no parameter is added, and neither labels nor a
learning rate are needed.

References:
    Amari: Natural gradient works efficiently in learning. Neural Computation 10, 1998 (C is the
    Hessian of the KL divergence where the two models agree). Levenberg 1944, Marquardt 1963 (rho,
    relative to the diagonal).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.refit needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.progress import Advance
from lorambo_adapters.ranks.predictions import LogProbabilities
from lorambo_adapters.spectra.directions import first_dimension
from lorambo_adapters.spectra.hooks import GradientHooks
from lorambo_adapters.spectra.inputs import DenseInputs, Inputs, TokenInputs
from lorambo_adapters.spectra.sample_derivatives import SampleDerivatives

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer to (U, V), d x r and k x r: the cut is U V^T."""

_SHARES = (1.0, 0.5, 0.25, 0.1)
"""Of a Newton step: those that are tried."""


class Refitted(NamedTuple):
    """Factors whose columns are scaled anew.

    Attributes:
        factors: layer to (U, V); V as it was.
        divergences: KL(tuned || cut) in nats, mean over all predictions: before, and after each
            step that was taken, descending. They are of the very examples that it was fitted to.
        predictions: how many these are the mean of.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    divergences: list[float]
    predictions: int


class CutModel(NamedTuple):
    """A model whose layers can be cut, and what it is to predict.

    Attributes:
        model: in evaluation mode; no parameter requires a gradient.
        layers: those that are cut, and perhaps others.
        cut: sets the layers' updates to U V^T, and the biases to what goes with these.
        predict: a batch to the model's log-probabilities as it is cut now.
        wanted: a batch's number to the tuned model's log-probabilities.
        centres: layer to the mean input beside which its bias is kept (`Fold`): the derivative
            along u v^T is then that of U V^T (x - mean).
    """

    model: torch.nn.Module
    layers: Sequence[TargetLayer]
    cut: Callable[[Factors], None]
    predict: LogProbabilities
    wanted: Callable[[int], torch.Tensor]
    centres: Mapping[str, torch.Tensor]


def refitted(
    subject: CutModel,
    factors: Factors,
    batches: Sequence[Any],
    *,
    steps: int = 3,
    draws: int | None = None,
    damping: float = 1.0,
    largest_change: float | None = None,
    seed: int = 0,
    advance: Advance | None = None,
) -> Refitted:
    """Scale the columns such that the model predicts more as the tuned one does.

    The divergence on these batches never rises: of a step that lowers it in no part nothing is
    taken, and the refit ends.

    Memory: M^2 numbers in float64 for M columns in all, and M for each sample of a batch.

    Args:
        subject: the model; it is left cut by the result.
        factors: of a cut. A column that is zero stays so.
        batches: of examples; labels are not looked at, but by `predict`.
        steps: Newton steps, at most.
        draws: labels drawn for each prediction; by default so many that there are four times as
            many samples and draws as columns.
        damping: rho, relative to each column's own curvature.
        largest_change: of a column in one step, relative to it; None: any. A column that hardly
            matters to these predictions has next to no curvature, and its step may be many times
            its length, which the divergence here does not show.
        seed: of the draws.
        advance: called after each batch of each pass, `passes(steps)` at most.

    Raises:
        ValueError: a prediction is not finite, or a layer's tokens cannot be told apart by sample.
    """
    advance = advance or (lambda done, name: None)
    found = dict(factors)
    if draws is None:
        samples = sum(map(first_dimension, batches))
        draws = max(1, -(-4 * sum(u.shape[1] for u, _ in found.values()) // samples))
    drawn: dict[torch.device, torch.Generator] = {}
    subject.cut(found)
    first, count = _divergence(subject, batches, advance)
    reached = [first]
    if not math.isfinite(reached[0]):
        raise ValueError(f"expected finite predictions of both models, got KL {reached[0]}")
    for _ in range(steps):
        change = _step(subject, found, batches, draws, damping, drawn, seed, advance)
        if largest_change is not None:
            change = change.clamp(-largest_change, largest_change)
        least, taken = reached[-1], None
        for share in _SHARES:
            scaled = _scaled(found, share * change)
            subject.cut(scaled)
            now, _ = _divergence(subject, batches, advance)
            if now < least:
                least, taken = now, scaled
        if taken is None:
            break
        found = taken
        reached.append(least)
        subject.cut(found)
    subject.cut(found)
    return Refitted(found, reached, count)


def passes(steps: int) -> int:
    """How many passes over the batches so many steps take at most."""
    return 1 + steps * (1 + len(_SHARES))


def _scaled(factors: Factors, change: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    parts = change.split([u.shape[1] for u, _ in factors.values()])
    return {
        name: (u * (1 + part.to(u)), v)
        for (name, (u, v)), part in zip(factors.items(), parts, strict=True)
    }


@torch.no_grad()
def _divergence(subject: CutModel, batches: Sequence[Any], advance: Advance) -> tuple[float, int]:
    """KL(tuned || cut), mean over all predictions, and how many these are."""
    total, count = 0.0, 0
    for number, batch in enumerate(batches):
        now, target = subject.predict(batch), subject.wanted(number)
        target = target.to(now.device)
        # A class without any chance adds nothing: 0 (-inf + x) is 0 here.
        total += float(
            torch.where(target == -math.inf, 0.0, target.exp() * (target - now)).sum(
                dtype=torch.float32 if now.device.type == "mps" else torch.float64
            )
        )
        count += len(now)
        advance(1.0, "divergence")
    return total / max(count, 1), count


def _step(
    subject: CutModel,
    factors: Factors,
    batches: Sequence[Any],
    draws: int,
    damping: float,
    drawn: dict[torch.device, torch.Generator],
    seed: int,
    advance: Advance,
) -> torch.Tensor:
    """The relative change of each column, on the CPU."""
    layers = [layer for layer in subject.layers if layer.name in factors]
    derivatives = SampleDerivatives(layers, factors, lenient=True)
    size, device = derivatives.size, derivatives.device
    b = torch.zeros(size, dtype=torch.float64, device=device)
    fisher = torch.zeros(size, size, dtype=torch.float64, device=device)

    def receive(layer: TargetLayer, inputs: Inputs, gradient: torch.Tensor) -> None:
        centre = subject.centres.get(layer.name)
        if centre is not None:
            assert not isinstance(inputs, TokenInputs)
            matrix = inputs.matrix
            inputs = DenseInputs(matrix - centre.to(matrix))
        derivatives.receive(layer, inputs, gradient)

    hooks = GradientHooks(layers, receive, model=subject.model)
    with hooks, torch.enable_grad():
        for number, batch in enumerate(batches):
            # No mask: what a model makes of padding, if anything, is in the divergence too.
            derivatives.begin(first_dimension(batch), None)
            hooks.begin()
            now = subject.predict(batch)
            target = subject.wanted(number).to(now.device)
            likely = torch.where(target == -math.inf, 0.0, target.exp() * now)
            (-likely.sum()).backward(retain_graph=True)
            b += derivatives.take().sum(0)
            if now.device not in drawn:
                drawn[now.device] = torch.Generator(now.device).manual_seed(seed)
            for draw in range(draws):
                chances = now.detach().exp()
                labels = torch.multinomial(chances, 1, generator=drawn[now.device])
                (-now.gather(1, labels).sum()).backward(retain_graph=draw + 1 < draws)
                c = derivatives.take()
                fisher += c.T @ c / draws
            advance(1.0, "step")
    if derivatives.refused:
        name, problem = next(iter(derivatives.refused.items()))
        raise ValueError(
            f"layer {name!r}: {problem.partition(';')[0]}; leave it out of the targets, or pass "
            "refit=0"
        )
    own = fisher.diagonal()
    largest = float(own.max())
    if largest == 0:
        return torch.zeros(size, dtype=torch.float64)
    fisher = fisher + torch.diag(damping * own + 1e-12 * largest)
    columns = _columns(factors, layers)
    change = torch.linalg.solve(fisher, -b).cpu()
    return torch.cat([change[columns[name]] for name in factors])


def _columns(factors: Factors, layers: Sequence[TargetLayer]) -> dict[str, slice]:
    """Where the derivatives have each layer's columns: in the layers' order."""
    found: dict[str, slice] = {}
    start = 0
    for layer in layers:
        stop = start + factors[layer.name][0].shape[1]
        found[layer.name] = slice(start, stop)
        start = stop
    return found
