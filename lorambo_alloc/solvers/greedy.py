"""Density greedy, or the best single rank: the textbook answer, with its textbook guarantee."""

from __future__ import annotations

import dataclasses
import heapq
import math
from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.laminar_greedy import solve_laminar
from lorambo_alloc.submodular.guarantees import Guarantee, guarantee
from lorambo_alloc.verification import SCALE, Charges, integer, responses


def solve_greedy(problem: Problem, time_limit: float | None = None) -> Allocation:
    """The greedy algorithm, and the theorem that says how good it is here.

    Single ranks of descending gain are elements of a modular function. Under budgets that are
    nested groups of equal costs, greedy is exact (Rado 1957, Edmonds 1971). Under one budget with
    unequal costs, the better of greedy by gain per cost and the best single rank has at least half
    of the optimum (Dantzig 1957). The certificate states that ratio, and beside it the gap to the
    bound of the price, which is far smaller as a rule.

    Args:
        problem: single ranks of descending gain; caps only if they nest and costs are equal.
        time_limit: not needed.

    Raises:
        ValueError: the problem is not of this form.
    """
    if not problem.concave_unit_steps:
        raise ValueError(
            "method 'greedy' needs single ranks of descending gain: no multiples, lists, ties or "
            "fixed costs, and concave curves; use 'exact'"
        )
    exact = solve_laminar(problem)
    if exact is not None:
        constraint = "matroid" if problem.caps else "cardinality"
        row = guarantee(constraint, "greedy", "modular")
        stated = dataclasses.replace(
            exact.certificate, ratio=row.ratio, theorem=row.source, method="greedy"
        )
        return Allocation(problem, exact.ranks, stated)
    if problem.caps:
        raise ValueError(
            "method 'greedy' takes caps only if they nest and costs are equal within each; use "
            "'exact'"
        )
    form = ConcaveForm(problem)
    relaxed = form.relax()
    ranks = _filled(problem, relaxed.ranks)
    single = _best_single(problem)
    if problem.value_difference(single, ranks) > 0:
        ranks = single
    row = guarantee("knapsack", "density greedy or best single", "modular")
    return Allocation(problem, ranks, _certificate(problem, ranks, relaxed.price / form.unit, row))


def _filled(problem: Problem, ranks: IntArray) -> IntArray:
    """Go on from the break solution: the next densest rank that fits, until none does.

    All ranks above the break price fit together, so greedy has taken just those by then.
    """
    assert problem.gains is not None
    ranks = ranks.copy()
    left = problem.budget - problem.cost_of(ranks)
    costs: list[int] = problem.costs.tolist()
    layers = np.flatnonzero(ranks < problem.upper)
    gains = problem.gains.at(layers, ranks[layers] + 1)
    # Costs are below 2^53, and sums of gains below 2^960: no density underflows, none overflows.
    densities = np.ldexp(gains, 53) / problem.costs[layers]
    heap = list(zip((-densities).tolist(), layers.tolist(), strict=True))
    heapq.heapify(heap)
    while heap:
        density, i = heapq.heappop(heap)
        if density >= 0 or costs[i] > left:
            continue  # a layer's further ranks cost as much and gain less
        ranks[i] += 1
        left -= costs[i]
        if ranks[i] < problem.upper[i]:
            layer = np.array([i], dtype=np.int64)
            gain = float(problem.gains.at(layer, ranks[layer] + 1)[0])
            heapq.heappush(heap, (-math.ldexp(gain, 53) / costs[i], i))
    return ranks


def _best_single(problem: Problem) -> IntArray:
    """The least ranks and the one further rank of the largest gain that fits."""
    assert problem.gains is not None
    ranks = problem.lower.copy()
    left = problem.budget - problem.cost_of(ranks)
    layers = np.flatnonzero((ranks < problem.upper) & (problem.costs <= left))
    if len(layers):
        gains = problem.gains.at(layers, ranks[layers] + 1)
        best = int(np.argmax(gains))
        ranks[layers[best]] += 1 if gains[best] > 0 else 0
    return ranks


def _certificate(problem: Problem, ranks: IntArray, price: float, row: Guarantee) -> Certificate:
    """The ratio where the price proves it, and the gap anyway."""
    charges = Charges.of(problem, [price])
    units = sum(response.best for response in responses(problem, ranks, charges))
    bound = Fraction(units + integer(price) * problem.budget, SCALE)
    value = problem.value_of(ranks)
    stated = Certificate.of(value, max(bound - value, Fraction(0)), price, "greedy", closed=False)
    # Minimum ranks that lose are no part of the theorem.
    if stated.gap and value < Fraction(row.ratio) * bound:
        return stated
    status = stated.status if not stated.gap else "ratio_certified"
    return dataclasses.replace(stated, status=status, ratio=row.ratio, theorem=row.source)
