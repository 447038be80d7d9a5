"""A fine-tuned difference D cut to low rank, and its ranks chosen, in a norm |B^1/2 D A^1/2|_F.

With A = B = I the cut is the plain truncated SVD, and the best ranks are those that keep the most
energy. With second moments of inputs and gradients (`moments`) the norm is about what the
difference does: A alone, how far the outputs move; A and B, how far the loss moves. The cut itself
is the library's (`WeightedCut`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.finetune.exact_budget import spend_exactly
from benchmarks.finetune.moments import Moments
from lorambo_adapters.ranks.weighted_cut import WeightedCut

_MOST = 128  # ranks that a layer may have


@dataclass(frozen=True)
class Norm:
    """Which norm.

    Attributes:
        right: the moment that is A, an attribute of `Moments`; None for the identity.
        left: the one that is B.
        damping: of either, relative to its mean eigenvalue.
    """

    right: str | None = None
    left: str | None = None
    damping: float = 0.1

    @property
    def centred(self) -> Norm:
        """The norm for a layer whose bias takes up what the mean input loses."""
        return replace(self, right="centred") if self.right == "inputs" else self


NORMS: dict[str, Norm] = {
    "plain": Norm(),
    "input": Norm("inputs"),
    "weighted": Norm("weighted"),
    "gradient": Norm(None, "gradients"),
    "kfac": Norm("inputs", "gradients"),
    "kfac_weighted": Norm("weighted", "gradients"),
    "shampoo": Norm("sample_inputs", "sample_gradients"),
}


class Factored(WeightedCut):
    """A layer's difference, with its singular values in a norm, at most 128.

    Args:
        difference: D, d x k.
        norm: which.
        moments: of the layer; not needed for the plain norm.
    """

    def __init__(
        self, difference: torch.Tensor, norm: Norm, moments: Moments | None = None
    ) -> None:
        left, right = (
            None if name is None else _moment(moments, name) for name in (norm.left, norm.right)
        )
        super().__init__(difference, left, right, damping=norm.damping, most=_MOST)


def best_ranks(
    factored: Mapping[str, Factored], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The ranks that keep the most of the squared norm, at exactly this many parameters.

    Args:
        factored: by layer.
        costs: of a rank.
        budget: in parameters.

    Raises:
        ValueError: no ranks cost exactly the budget.
    """
    curves = {n: np.concatenate([[0.0], np.cumsum(f.values**2)]) for n, f in factored.items()}
    return spend_exactly(curves, costs, budget)


def _moment(moments: Moments | None, name: str) -> torch.Tensor:
    if moments is None:
        raise ValueError(f"moments: expected some for the moment {name!r}, got none")
    moment = getattr(moments, name)
    if moment is None:
        raise ValueError(f"moments: expected all of them for {name!r}, got those of K-FAC")
    return moment
