"""What each arm looks at before the training, as a curve of values by rank for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.finetune.exact_budget import nearest_exact
from benchmarks.finetune.task import Batch, Task
from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.ranks.formats import to_peft
from lorambo_adapters.spectra.activations import activation_spectra
from lorambo_adapters.spectra.directions import coupled_directions
from lorambo_adapters.spectra.gradients import gradient_spectra
from lorambo_adapters.spectra.loss_units import curvature_spectra
from lorambo_adapters.spectra.probe import probe_spectra
from lorambo_adapters.training.probe import RankProbe
from lorambo_alloc import Problem, Spectra
from lorambo_alloc.baselines import eva, gora, mlp_only
from lorambo_alloc.submodular import CoupledQuadratic, select

Curves = dict[str, npt.NDArray[np.float64]]

DAMPING = 0.1  # of the Kronecker factors, relative to their mean eigenvalue


@dataclass(frozen=True)
class Measuring:
    """What a signal is measured on; the training has a model of its own.

    Attributes:
        task: what is trained.
        model: the base, as the training will start from it; perhaps with a head warmed up.
        layers: those that are adapted.
        batches: of the training, its first ones.
        rank: the uniform rank whose cost is the budget.
        rate: a learning rate, for signals that train.
        seed: of the run.
    """

    task: Task
    model: torch.nn.Module
    layers: Sequence[TargetLayer]
    batches: Sequence[Batch]
    rank: int
    rate: float
    seed: int

    @property
    def costs(self) -> dict[str, int]:
        """Parameters of a rank, by layer."""
        return {layer.name: sum(layer.shape) for layer in self.layers}

    @property
    def budget(self) -> int:
        """Parameters."""
        return self.rank * sum(self.costs.values())

    @property
    def most(self) -> int:
        """Ranks that a layer may have."""
        return most_ranks(self.rank)


def most_ranks(rank: int) -> int:
    """Ranks that a layer may have at the cost of this uniform rank."""
    return max(64, 4 * rank)


def gradient(measuring: Measuring, *, passes: int = 3) -> Curves:
    """Energy of the mean gradient: sigma^2 a rank."""
    return _sums(_gradient(measuring, passes), 2)


def gradient_nuclear(measuring: Measuring) -> Curves:
    """Singular values of the mean gradient: sigma a rank."""
    return _sums(_gradient(measuring), 1)


def first_step(measuring: Measuring) -> Curves:
    """What Adam's first step along a random row a of A saves, to first order: E |G a|_1.

    B starts at zero and its entries all move by the learning rate, along sign(G a); a has the
    variance 1 / (3 k) an entry. Each further rank saves as much, to first order: the curve is
    straight, and tells layers apart but not ranks.
    """
    curves: Curves = {}
    for name, gradient in _mean_gradients(measuring).items():
        one = (2 / np.pi / 3 / gradient.shape[1]) ** 0.5 * float(gradient.norm(dim=1).sum())
        curves[name] = one * np.arange(measuring.most + 1)
    return curves


def kfac(measuring: Measuring) -> Curves:
    """Energy of the gradient whitened by Kronecker factors (empirical Fisher)."""
    found = curvature_spectra(
        measuring.model,
        list(measuring.batches),
        damping=DAMPING,
        targets=list(measuring.layers),
        rank=measuring.most // 2,
        seed=measuring.seed,
    )
    return _sums(found, 2)


OF_THE_MODEL = (gradient, gradient_nuclear, first_step, kfac)
"""Signals that look at the model alone: budgets of one `most_ranks` share a measurement."""


def directions(measuring: Measuring) -> Curves:
    """What the best new directions save in the quadratic model, curvature measured along them."""
    import peft

    ranks = {layer.name: measuring.rank for layer in measuring.layers}
    config = peft.LoraConfig(**to_peft(ranks, modules=measuring.model))
    model: Any = peft.get_peft_model(measuring.model, config)  # pyright: ignore[reportArgumentType]
    ahead = max(16, 4 * measuring.rank)
    found = RankProbe(model, ahead=ahead, seed=measuring.seed).measure(list(measuring.batches))
    # The first ranks of a curve are the present ones, which are worth nothing yet.
    return {n: c[measuring.rank :] - c[measuring.rank] for n, c in found.curves.items()}


def coupled_ranks(measuring: Measuring) -> dict[str, int]:
    """Of the gradient's leading directions in all layers, those that save most *together*.

    Layers stand in for each other: where two of them would do the same to the loss, one is enough.
    Chosen by `select` from the slopes and the joint curvature of all candidates.
    """
    found = coupled_directions(
        measuring.model,
        list(measuring.batches),
        fisher="true",
        per_layer=4 * measuring.rank,
        targets=list(measuring.layers),
        seed=measuring.seed,
    )
    rho = DAMPING * float(found.C.diagonal().mean())
    objective = CoupledQuadratic(found.b, found.C, rho, layers=found.layers)
    chosen = select(objective, measuring.costs, measuring.budget, time_limit=60).ranks
    ranks = dict.fromkeys(measuring.costs, 0) | dict(chosen or {})
    return nearest_exact(ranks, measuring.costs, measuring.budget)


def short_run(measuring: Measuring) -> Curves:
    """Energy of what 50 steps at rank 8 or more learn, weighted by curvature.

    At four times the uniform rank: with no more than it, ranks that cost the budget are uniform.
    """
    task = measuring.task

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        return model(**batch).loss

    found = probe_spectra(
        measuring.model,
        loss,
        list(measuring.batches),
        rank=max(8, 4 * measuring.rank),
        steps=50,
        learning_rate=measuring.rate,
        targets=task.targets,
        seed=measuring.seed,
    )
    return _sums(found, 2)


def eva_ranks(measuring: Measuring) -> dict[str, int]:
    """EVA's: explained variance of each layer's inputs, the best L r of all layers."""
    found = activation_spectra(
        measuring.model,
        list(measuring.batches),
        rank=measuring.most,
        targets=list(measuring.layers),
    )
    return dict(eva(Problem(found, measuring.budget, costs=measuring.costs), fill=True))


def gora_ranks(measuring: Measuring) -> dict[str, int]:
    """GoRA's: a share of the budget in proportion to mean |W * G|, divided by the cost."""
    gradients = _mean_gradients(measuring)
    importance = {
        layer.name: float((layer.module.weight.detach() * gradients[layer.name]).abs().mean())
        for layer in measuring.layers
    }
    return dict(gora(_flat(measuring), importance=importance, fill=True))


def mlp_ranks(measuring: Measuring) -> dict[str, int]:
    """One rank in every layer of the MLPs, and none elsewhere."""
    return dict(mlp_only(_flat(measuring), fill=True))


def _mean_gradients(measuring: Measuring) -> dict[str, torch.Tensor]:
    """Of the weights, in full: these models are small."""
    for parameter in measuring.model.parameters():
        parameter.requires_grad_(False)
    weights = {layer.name: layer.module.weight for layer in measuring.layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    model: Any = measuring.model
    for batch in measuring.batches:
        model(**batch).loss.backward()
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        found[name] = weight.grad / len(measuring.batches)
        weight.grad = None
        weight.requires_grad_(False)
    return found


def _gradient(measuring: Measuring, passes: int = 3) -> Spectra:
    return gradient_spectra(
        measuring.model,
        list(measuring.batches),
        targets=list(measuring.layers),
        rank=measuring.most // 2,
        passes=passes,
        seed=measuring.seed,
    )


def _sums(spectra: Spectra, power: int) -> Curves:
    """Values of rank 0, 1, ... of each layer."""
    return {
        name: np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64) ** power)])
        for name, values in spectra.items()
    }


def _flat(measuring: Measuring) -> Problem:
    """A problem with gains that tell nothing, for rules that do not look at them."""
    gains: Mapping[str, Any] = {layer.name: np.ones(measuring.most) for layer in measuring.layers}
    return Problem(gains, measuring.budget, costs=measuring.costs)
