"""Bounds of one instance: what no feasible set exceeds, and how far from modular a function is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorambo_alloc.submodular.constraints import Constraint
from lorambo_alloc.submodular.objectives import ROUNDING, SetFunction

PREFIXES = 64
PREFIXES_OF_A_FUNCTION = 16


def instance_bound(
    objective: SetFunction,
    constraint: Constraint,
    items: Sequence[int] = (),
    *,
    prefixes: int | None = None,
) -> float:
    """A bound on the value of every feasible set, from the gains at prefixes of some items.

    For monotone submodular f and any set S, OPT <= f(S) + the greatest total gain at S of a
    feasible set (a fractional knapsack; the largest gains; a heaviest independent set). Here S
    runs through prefixes S_t of the items, the empty one included; the least bound is computed
    again from the objective alone, and rounded up. Weakly submodular objectives bring bounds of
    their own (`CoupledQuadratic.ceilings`).

    Args:
        objective: monotone; submodular unless it says otherwise.
        constraint: on the same elements.
        items: distinct elements; best in the order of a greedy algorithm.
        prefixes: look at about so many (64, or 16 of a caller's function, where None).

    Returns:
        The bound; infinite where none is known.

    Raises:
        ValueError: items or constraint do not fit the objective.

    References:
        Leskovec, Krause, Guestrin, Faloutsos, VanBriesen, Glance, Cost-effective outbreak
        detection in networks, KDD 2007, section 3.2; for cardinality already Nemhauser, Wolsey,
        Fisher (1978), proposition 2.1.

    Example:
        >>> from lorambo_alloc.submodular import Cardinality, Coverage
        >>> f = Coverage([{0, 1}, {1, 2}, {2}])
        >>> round(instance_bound(f, Cardinality(2), [0, 1]), 6)
        3.0
    """
    constraint.check(objective.n)
    chosen = objective.check_items(items)
    if prefixes is None:
        prefixes = PREFIXES if objective.incremental else PREFIXES_OF_A_FUNCTION
    wanted = np.unique(np.linspace(0, len(chosen), max(prefixes, 2)).astype(np.int64)).tolist()
    state = objective.start()
    best, at = np.inf, 0
    for size in range(len(chosen) + 1):
        if size in wanted:
            base, weights = objective.sketch(state)
            with np.errstate(over="ignore"):
                bound = base + constraint.heaviest(np.maximum(weights, 0.0))
            if bound < best:
                best, at = bound, size
        if size < len(chosen):
            state.add(chosen[size])
    with np.errstate(over="ignore"):
        return min(
            (
                (base + constraint.heaviest(weights)) * (1 + 4 * ROUNDING)
                for base, weights in objective.ceilings(chosen[:at], constraint)
            ),
            default=np.inf,
        )


def curvature(objective: SetFunction) -> float:
    """The total curvature k = 1 - min_j (f(V) - f(V - j)) / f({j}), in [0, 1], to rounding.

    0 for a modular function, 1 where some element adds nothing to all others. It sharpens the
    guarantees of greedy: see `Guarantee.with_curvature`. Takes 2 n + 1 values of f.

    Args:
        objective: monotone and submodular.

    References:
        Conforti, Cornuejols, Discrete Applied Mathematics 7 (1984).

    Example:
        >>> from lorambo_alloc.submodular import Coverage
        >>> curvature(Coverage([{0, 1, 2, 3}, {3, 4, 5, 6}]))
        0.25
    """
    everything = list(range(objective.n))
    whole = objective.value(everything)
    least = 1.0
    for j in everything:
        alone = objective.value([j])
        if alone > 0:
            last = whole - objective.value(everything[:j] + everything[j + 1 :])
            least = min(least, last / alone)
    return min(max(1.0 - least, 0.0), 1.0)
