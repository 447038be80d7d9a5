"""Families of instances that are known to be hard for knapsack solvers.

Most are the multiple-choice forms of the families in Pisinger, "Where are the hard knapsack
problems?", Computers & Operations Research 32, 2005: the gains follow the costs so closely that
bounds say little.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from lorambo_alloc.curves import GainCurves
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.testing.instances import Instance


def _from_increments(
    name: str, increments: npt.NDArray[np.float64 | np.int64], costs: IntArray, budget: int
) -> Instance:
    layers, ranks = increments.shape
    names = [f"layers.{i}" for i in range(layers)]
    descending = -np.sort(-increments.astype(np.float64), axis=1)
    return Instance(
        f"{name} ({layers:,} x {ranks})",
        GainCurves.from_increments(dict(zip(names, descending, strict=True))),
        budget,
        {"costs": dict(zip(names, costs.tolist(), strict=True))},
    )


def _between_levels(costs: IntArray, ranks: int) -> int:
    """What rank r + 1/2 everywhere would cost: in the middle of a level of equal densities."""
    total = int(costs.sum())
    return min(8, ranks // 2) * total + total // 2


def proportional(
    layers: int = 500,
    ranks: int = 64,
    seed: int = 0,
    *,
    lowest_cost: int = 1000,
    highest_cost: int = 60_000,
    name: str = "proportional with ties",
) -> Instance:
    """Every layer has the same density curve floor(R / j): each level is one great tie.

    The budget ends in the middle of a level, so that the question left over is a subset sum.

    Example:
        >>> proportional(20, 8).spectra["layers.0"].shape
        (9,)
    """
    rng = np.random.default_rng(seed)
    costs = rng.integers(lowest_cost, highest_cost + 1, layers)
    density = ranks // np.arange(1, ranks + 1)
    return _from_increments(name, costs[:, None] * density, costs, _between_levels(costs, ranks))


#: `proportional` with costs around 1e9, so that no table over the budget fits in memory.
proportional_large_costs = partial(
    proportional,
    lowest_cost=900_000_000,
    highest_cost=1_100_000_000,
    name="proportional, costs around 1e9",
)


def near_proportional(layers: int = 500, ranks: int = 64, seed: int = 0) -> Instance:
    """Density 1 / j in every layer, up to a relative noise of 1e-9: ties in all but name.

    Example:
        >>> near_proportional(20, 8).name
        'near-proportional (20 x 8)'
    """
    rng = np.random.default_rng(seed)
    costs = rng.integers(1000, 60_001, layers)
    gains = costs[:, None] / np.arange(1, ranks + 1)
    gains *= 1.0 + 1e-9 * rng.standard_normal(gains.shape)
    return _from_increments("near-proportional", gains, costs, _between_levels(costs, ranks))


def subset_sum(layers: int = 500, ranks: int = 64, seed: int = 0) -> Instance:
    """The gain of a rank is its cost: every density is 1, and any full budget is optimal.

    Example:
        >>> subset_sum(20, 8).allocate().certificate.relative_gap < 0.01
        True
    """
    costs = np.random.default_rng(seed).integers(1000, 60_001, layers)
    gains = np.repeat(costs[:, None], ranks, axis=1)
    return _from_increments("subset sum", gains, costs, int(gains.sum()) // 2 + 1)


def parity(layers: int = 500, ranks: int = 64, seed: int = 0, odd_layers: int = 0) -> Instance:
    """Subset sum with even costs and an odd budget: the bound can never be met.

    Args:
        layers: how many.
        ranks: of each layer.
        seed: of the costs.
        odd_layers: so many of the layers get an odd cost and half the density. Then the costs have
            no common divisor any more, and only reduced costs show that the odd layers are no help.

    Example:
        >>> instance = parity(20, 8)
        >>> instance.budget % 2, {c % 2 for c in instance.keywords["costs"].values()}
        (1, {0})
    """
    costs = 2 * np.random.default_rng(seed).integers(500, 30_001, layers)
    gains = np.repeat(costs[:, None].astype(np.float64), ranks, axis=1)
    budget = int(gains.sum()) // 4 * 2 + 1
    name = "parity"
    if odd_layers:
        costs[-odd_layers:] += 1
        gains[-odd_layers:] = costs[-odd_layers:, None] / 2
        name = "parity, some odd costs"
    return _from_increments(name, gains, costs, budget)


def weakly_correlated(layers: int = 500, ranks: int = 64, seed: int = 0) -> Instance:
    """Whole gains within 1,000 of the cost.

    Example:
        >>> weakly_correlated(20, 8).name
        'weakly correlated (20 x 8)'
    """
    rng = np.random.default_rng(seed)
    costs = rng.integers(2000, 10_001, layers)
    gains = costs[:, None] + rng.integers(-1000, 1001, (layers, ranks))
    return _from_increments("weakly correlated", gains, costs, int(costs.sum()) * ranks // 2)


def strongly_correlated_linear(layers: int = 500, ranks: int = 64, seed: int = 0) -> Instance:
    """Every rank of layer i gains c_i + 1,000: linear curves.

    The bounded form of the strongly correlated knapsack (Pisinger, "Where are the hard knapsack
    problems?", Computers & Operations Research 32, 2005).

    Example:
        >>> strongly_correlated_linear(20, 8).name
        'strongly correlated, linear (20 x 8)'
    """
    costs = np.random.default_rng(seed).integers(1000, 10_001, layers)
    gains = np.repeat(costs[:, None] + 1000, ranks, axis=1)
    budget = int(costs.sum()) * ranks // 2
    return _from_increments("strongly correlated, linear", gains, costs, budget)


def strongly_correlated_concave(layers: int = 500, ranks: int = 64, seed: int = 0) -> Instance:
    """Rank j of layer i gains c_i + floor(1,000 (R - j) / R): strongly correlated at each level.

    Example:
        >>> strongly_correlated_concave(20, 8).name
        'strongly correlated, concave (20 x 8)'
    """
    costs = np.random.default_rng(seed).integers(1000, 10_001, layers)
    gains = costs[:, None] + 1000 * np.arange(ranks - 1, -1, -1) // ranks
    budget = int(costs.sum()) * ranks // 2
    return _from_increments("strongly correlated, concave", gains, costs, budget)


def inverse_strongly_correlated(layers: int = 500, ranks: int = 64, seed: int = 0) -> Instance:
    """Every rank of layer i gains c_i - 1,000.

    Example:
        >>> inverse_strongly_correlated(20, 8).name
        'inverse strongly correlated (20 x 8)'
    """
    costs = np.random.default_rng(seed).integers(2000, 11_001, layers)
    gains = np.repeat(costs[:, None] - 1000, ranks, axis=1)
    budget = int(costs.sum()) * ranks // 2
    return _from_increments("inverse strongly correlated", gains, costs, budget)


#: Families on which knapsack solvers fail, by name; each takes (layers, ranks, seed).
HARD_FAMILIES: dict[str, Callable[..., Instance]] = {
    "proportional": proportional,
    "proportional_large_costs": proportional_large_costs,
    "near_proportional": near_proportional,
    "subset_sum": subset_sum,
    "parity": parity,
    "parity_odd_layers": partial(parity, odd_layers=5),
    "weakly_correlated": weakly_correlated,
    "strongly_correlated_linear": strongly_correlated_linear,
    "strongly_correlated_concave": strongly_correlated_concave,
    "inverse_strongly_correlated": inverse_strongly_correlated,
}
