"""Ranks that cost exactly the budget, so that arms differ in nothing but where the ranks are.

`allocate` may leave a little of a budget; in a comparison every parameter has to be spent. With
costs and budget in units of their greatest common divisor this is a dynamic program over a few
thousand units (Bellman 1957), exact for any curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from math import gcd

import numpy as np
import numpy.typing as npt


def spend_exactly(
    curves: Mapping[str, npt.ArrayLike], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The ranks of the greatest total value among those that cost exactly the budget.

    Args:
        curves: by layer, the value of rank 0, 1, ..., in any unit, concave or not.
        costs: of a rank, by layer.
        budget: in the same unit.

    Raises:
        ValueError: no ranks cost exactly the budget, a layer has no cost or one that is not
            positive, or a value is not finite.

    Example:
        >>> spend_exactly({"q": [0, 5, 6], "v": [0, 4, 7]}, {"q": 2, "v": 3}, 7)
        {'q': 2, 'v': 1}
    """
    missing = [name for name in curves if name not in costs]
    if missing:
        raise ValueError(f"costs: expected one of layer {missing[0]!r}, got none")
    for name, curve in curves.items():
        if costs[name] < 1:
            raise ValueError(f"costs: expected a positive one of {name!r}, got {costs[name]}")
        if not np.isfinite(np.asarray(curve, dtype=np.float64)).all():
            raise ValueError(f"curves: expected finite values of layer {name!r}, got others")
    unit = reduce(gcd, [costs[name] for name in curves], budget)
    size = budget // unit + 1
    best = np.full(size, -np.inf)
    best[0] = 0.0
    chosen: list[npt.NDArray[np.int16]] = []
    for name, curve in curves.items():
        values, cost = np.asarray(curve, dtype=np.float64), costs[name] // unit
        new = np.full(size, -np.inf)
        rank_of = np.zeros(size, dtype=np.int16)
        for rank in range(min(len(values) - 1, (size - 1) // cost) + 1):
            reached = best[: size - rank * cost] + values[rank]
            better = reached > new[rank * cost :]
            new[rank * cost :][better] = reached[better]
            rank_of[rank * cost :][better] = rank
        best = new
        chosen.append(rank_of)
    if not np.isfinite(best[-1]):
        raise ValueError(f"budget: expected one that ranks can cost exactly, got {budget:,}")
    left, ranks = size - 1, dict.fromkeys(curves, 0)
    for name, rank_of in zip(reversed(list(curves)), reversed(chosen), strict=True):
        ranks[name] = int(rank_of[left])
        left -= ranks[name] * costs[name] // unit
    return ranks


def nearest_exact(
    ranks: Mapping[str, int], costs: Mapping[str, int], budget: int, *, most: int = 64
) -> dict[str, int]:
    """The ranks nearest to the given ones that cost exactly the budget.

    Nearest: the least sum of cost x |change|; of equal ones, that whose changes are most even.

    Raises:
        ValueError: as `spend_exactly`.
    """
    reach = {name: max(most, rank + 8) for name, rank in ranks.items()}
    curves = {
        name: -costs[name] * (change + 1e-6 * change**2)
        for name, rank in ranks.items()
        for change in [np.abs(np.arange(reach[name] + 1) - rank)]
    }
    return spend_exactly(curves, costs, budget)
