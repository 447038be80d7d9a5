"""Nested caps and equal costs: the greedy algorithm is exact, as in every matroid."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.laminar import LaminarSet, laminar_family
from lorambo_alloc.problem import Problem


def solve_laminar(problem: Problem) -> Allocation | None:
    """Take gains from the largest down, as long as no set overflows; None if no laminar matroid.

    Each set, the inner ones first, keeps its largest gains and drops the rest: what an inner set
    drops the greedy algorithm would have refused too.

    References:
        Rado 1957; Edmonds 1971, Matroids and the greedy algorithm.
    """
    family = laminar_family(problem)
    if family is None:
        return None
    assert problem.gains is not None
    layers, _, gains = problem.gains.selected(problem.lower, problem.upper)
    kept = np.flatnonzero(gains > 0)
    kept = kept[np.argsort(-gains[kept], kind="stable")]
    # The largest gain that each set refuses, which is what one more rank in it would be worth.
    refused: list[float] = []
    for own in family:
        inside = np.zeros(len(problem.names), dtype=bool)
        inside[own.layers] = True
        members = np.flatnonzero(inside[layers[kept]])
        room = own.capacity - int(problem.lower[own.layers].sum())
        refused.append(float(np.max(gains[kept[members[room:]]], initial=0.0)))
        kept = np.delete(kept, members[room:])
    ranks = problem.lower + np.bincount(layers[kept], minlength=len(problem.names)).astype(np.int64)
    price, cap_prices = _prices(problem, family, refused)
    value = problem.value_of(ranks)
    certificate = Certificate.of(
        value, Fraction(0), price, "laminar greedy", closed=True, cap_prices=cap_prices
    )
    return Allocation(problem, ranks, certificate)


def _prices(
    problem: Problem, family: list[LaminarSet], refused: list[float]
) -> tuple[float, list[float]]:
    """Dual prices: a set charges what it refuses beyond what the sets round it charge already."""
    charged = np.zeros(len(problem.names))
    prices = {row.name: 0.0 for row in problem.rows}
    for own, gain in reversed(list(zip(family, refused, strict=True))):
        level = float(charged[own.layers[0]])
        if gain > level:
            prices[own.row.name] = (gain - level) / own.cost
            charged[own.layers] = gain
    return prices[""], [prices[row.name] for row in problem.caps]
