"""Slow answers that are right: enumeration and a full dynamic program, in exact arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np

from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem


@dataclass(frozen=True)
class _Group:
    """Layers that share one rank (often a single layer): its options with exact gains.

    Each option has one cost for every budget: the problem's own, then the caps.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    costs: tuple[tuple[int, ...], ...]
    gains: tuple[Fraction, ...]


def _groups(problem: Problem, *, gains: bool = True) -> list[_Group]:
    index = {name: i for i, name in enumerate(problem.names)}
    members = [tuple(index[name] for name in group) for group in problem.tied]
    tied = {i for group in members for i in group}
    members += [(i,) for i in range(len(problem.names)) if i not in tied]
    groups: list[_Group] = []
    for group in members:
        shared = set[int].intersection(*({int(r) for r in problem.allowed_ranks(i)} for i in group))
        ranks = tuple(sorted(shared))
        costs: list[tuple[int, ...]] = []
        values: list[Fraction] = []
        for r in ranks:
            vector = np.zeros(len(problem.names), dtype=np.int64)
            vector[list(group)] = r
            costs.append(
                tuple(
                    sum(
                        int(row.costs[i]) * r + (int(row.fixed_costs[i]) if r else 0) for i in group
                    )
                    for row in problem.rows
                )
            )
            values.append(problem.value_of(vector) if gains else Fraction(0))
        groups.append(_Group(group, ranks, tuple(costs), tuple(values)))
    return groups


def _count(groups: list[_Group], most: int) -> int:
    combinations = math.prod(len(group.ranks) for group in groups)
    if combinations > most:
        raise ValueError(
            f"expected at most {most:,} combinations of ranks to enumerate, got {combinations:,}"
        )
    return combinations


def _ranks(groups: list[_Group], choice: tuple[int, ...], layers: int) -> IntArray:
    ranks = np.zeros(layers, dtype=np.int64)
    for group, k in zip(groups, choice, strict=True):
        ranks[list(group.layers)] = group.ranks[k]
    return ranks


def _fits(problem: Problem, groups: list[_Group], choice: tuple[int, ...]) -> bool:
    """Whether a choice of one option a group is within the budget and every cap."""
    return all(
        sum(group.costs[k][n] for group, k in zip(groups, choice, strict=True)) <= row.budget
        for n, row in enumerate(problem.rows)
    )


def _tails(problem: Problem, i: int) -> list[float]:
    """w_i sigma_{i, r + 1} for r = 0 .. R_i."""
    weight = 1.0 if problem.weights is None else float(problem.weights[i])
    return [weight * sigma for sigma in problem.curves[problem.names[i]].tolist()] + [0.0]


def brute_force(problem: Problem, *, most: int = 1_000_000) -> tuple[Fraction, IntArray]:
    """The optimum by enumeration of all rank vectors, in exact arithmetic.

    Args:
        problem: any problem but one with the objective "operator" (see `brute_force_bottleneck`).
        most: the largest number of combinations to try.

    Returns:
        The exact optimal value, and one rank vector (in layer order) that attains it.

    Raises:
        ValueError: there are more than `most` combinations, or no combination is feasible.

    Example:
        >>> problem = Problem({"a": [3.0, 1.0], "b": [2.0]}, 2)
        >>> value, ranks = brute_force(problem)
        >>> value, ranks.tolist()
        (Fraction(13, 1), [1, 1])
    """
    groups = _groups(problem)
    _count(groups, most)
    best: tuple[Fraction, tuple[int, ...]] | None = None
    # One common denominator turns the sums of fractions into sums of ints.
    scale = math.lcm(*(gain.denominator for group in groups for gain in group.gains))
    gains = [[int(gain * scale) for gain in group.gains] for group in groups]
    for choice in product(*(range(len(group.ranks)) for group in groups)):
        if not _fits(problem, groups, choice):
            continue
        value = Fraction(sum(gain[k] for gain, k in zip(gains, choice, strict=True)))
        if best is None or value > best[0]:
            best = value, choice
    if best is None:
        raise ValueError(f"no combination of ranks fits in the budget of {problem.budget}")
    return best[0] / scale, _ranks(groups, best[1], len(problem.names))


def brute_force_bottleneck(
    problem: Problem, *, most: int = 1_000_000
) -> tuple[tuple[float, ...], IntArray]:
    """The lexicographic optimum of the objective "operator", by enumeration.

    Layer i leaves the tail w_i sigma_{i, r_i + 1} (0 beyond its last rank). The best answer has the
    least largest tail; among those the least second largest; and so on.

    Args:
        problem: a problem with the objective "operator".
        most: the largest number of combinations to try.

    Returns:
        The tails of all layers in descending order, and one rank vector that leaves them.

    Raises:
        ValueError: there are more than `most` combinations, or no combination is feasible.

    Example:
        >>> problem = Problem({"a": [3.0, 1.0], "b": [2.0]}, 1, objective="operator")
        >>> tails, ranks = brute_force_bottleneck(problem)
        >>> tails, ranks.tolist()
        ((2.0, 1.0), [1, 0])
    """
    groups = _groups(problem, gains=False)
    _count(groups, most)
    tails = [_tails(problem, i) for i in range(len(problem.names))]
    left = [[[tails[i][r] for i in group.layers] for r in group.ranks] for group in groups]
    best: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    for choice in product(*(range(len(group.ranks)) for group in groups)):
        if not _fits(problem, groups, choice):
            continue
        chosen = (tail for rows, k in zip(left, choice, strict=True) for tail in rows[k])
        vector = tuple(sorted(chosen, reverse=True))
        if best is None or vector < best[0]:
            best = vector, choice
    if best is None:
        raise ValueError(f"no combination of ranks fits in the budget of {problem.budget}")
    return best[0], _ranks(groups, best[1], len(problem.names))


def dynamic_program(problem: Problem, *, most: int = 200_000_000) -> Fraction:
    """The exact optimal value by a full dynamic program over the budget.

    For problems too large to enumerate, with costs that are small or share a large divisor. Gains
    are integers over their common denominator: 64-bit ones where they fit, Python's otherwise.

    Args:
        problem: any problem but one with the objective "operator".
        most: the largest number of table updates (options times budget).

    Returns:
        The exact optimal value.

    Raises:
        ValueError: the table would take more than `most` updates, nothing is feasible, or there
            are caps.

    Example:
        >>> dynamic_program(Problem({"a": [3.0, 1.0], "b": [2.0]}, 2))
        Fraction(13, 1)
    """
    if problem.caps:
        raise ValueError("a dynamic program over one budget cannot hold caps; use brute_force")
    groups = _groups(problem)
    divisor = math.gcd(*(cost for group in groups for (cost,) in group.costs)) or 1
    capacity = min(problem.budget, sum(max(group.costs)[0] for group in groups)) // divisor
    updates = sum(len(group.ranks) for group in groups) * (capacity + 1)
    if updates > most:
        raise ValueError(f"expected at most {most:,} table updates, got {updates:,}")
    scale = math.lcm(*(gain.denominator for group in groups for gain in group.gains))
    gains = [[int(gain * scale) for gain in group.gains] for group in groups]
    total = sum(max(map(abs, gain)) for gain in gains)
    # Sums of gains stay within +-total, so what starts from `infeasible` stays below -total.
    infeasible = -3 * total - 1
    kind = np.int64 if 4 * total + 1 < 1 << 62 else object
    # best[w]: the largest gain of the groups so far at cost at most w.
    best = np.zeros(capacity + 1, dtype=kind)
    for group, gain in zip(groups, gains, strict=True):
        after = np.full(capacity + 1, infeasible, dtype=kind)
        for (cost,), value in zip(group.costs, gain, strict=True):
            shift = cost // divisor
            if shift <= capacity:
                np.maximum(after[shift:], best[: capacity + 1 - shift] + value, out=after[shift:])
        best = after
    if best[capacity] < -total:
        raise ValueError(f"no combination of ranks fits in the budget of {problem.budget}")
    return Fraction(int(best[capacity]), scale)
