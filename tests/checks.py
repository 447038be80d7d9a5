"""What every answer must satisfy, whichever solver gave it."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import numpy as np

from lorambo_alloc import Allocation, Problem
from lorambo_alloc.objectives import IntArray


def check_answer(allocation: Allocation) -> Fraction:
    """Assert what can be asserted without knowing the optimum; return the exact value."""
    problem, certificate = allocation.problem, allocation.certificate
    problem.check(allocation.ranks)
    assert allocation.cost == problem.cost_of(allocation.ranks) <= allocation.budget
    value = problem.value_of(allocation.ranks)
    assert Fraction(certificate.value) <= value <= Fraction(certificate.upper_bound)
    assert value + Fraction(certificate.gap) >= Fraction(certificate.upper_bound) or (
        certificate.status == "optimal_exact" and certificate.gap == 0
    )
    assert certificate.verify(problem, allocation.ranks).value == value
    return value


def check_optimum(allocation: Allocation, optimum: Fraction) -> None:
    """Assert that an answer and its certificate agree with the known optimum."""
    value = check_answer(allocation)
    certificate = allocation.certificate
    assert value <= optimum <= Fraction(certificate.upper_bound)
    assert optimum <= value + Fraction(certificate.gap)
    if certificate.status == "optimal_exact":
        assert value == optimum


def all_feasible(problem: Problem) -> Iterator[IntArray]:
    """Every rank vector that obeys the limits, the budget and the caps."""
    groups = problem.variables
    for choice in product(*(problem.allowed_ranks(group[0]).tolist() for group in groups)):
        ranks = np.zeros(len(problem.names), dtype=np.int64)
        for group, rank in zip(groups, choice, strict=True):
            ranks[list(group)] = rank
        if problem.fits(ranks):
            yield ranks


def neighbours(problem: Problem, ranks: IntArray) -> Iterator[IntArray]:
    """Feasible rank vectors one allowed step away in one variable, or up in one and down in one."""
    steps: list[tuple[tuple[int, ...], int]] = []
    for group in problem.variables:
        allowed = problem.allowed_ranks(group[0]).tolist()
        at = allowed.index(int(ranks[group[0]]))
        steps += [
            (group, rank) for rank in [*allowed[max(at - 1, 0) : at], *allowed[at + 1 : at + 2]]
        ]
    moves = [[step] for step in steps] + [
        [a, b] for n, a in enumerate(steps) for b in steps[n + 1 :] if a[0] != b[0]
    ]
    for move in moves:
        other = ranks.copy()
        for group, rank in move:
            other[list(group)] = rank
        if problem.fits(other):
            yield other
