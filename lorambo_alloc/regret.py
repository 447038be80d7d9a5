"""What samples lose with a rank vector against their own best: exactly."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem


def optimum_bounds(allocation: Allocation) -> tuple[Fraction, Fraction]:
    """Exact bounds on the best value of an allocation's problem; equal where it is proved."""
    value = allocation.problem.value_of(allocation.ranks)
    if allocation.certificate.status == "optimal_exact":
        return value, value
    return value, Fraction(allocation.certificate.upper_bound)


def scales_of(own: Sequence[Allocation], *, relative: bool) -> list[float]:
    """What each sample's regret is divided by: its own value, or 1.

    Args:
        own: each sample's own allocation.
        relative: whether regrets are shares.

    Raises:
        ValueError: regrets are shares, and the value of a sample is not above 0.
    """
    if not relative:
        return [1.0] * len(own)
    for s, allocation in enumerate(own):
        if not allocation.value > 0:
            raise ValueError(
                f"relative: expected samples whose best value is above 0, got {allocation.value} "
                f"in samples[{s}]"
            )
    return [allocation.value for allocation in own]


def exact_regrets(
    problems: Sequence[Problem],
    optima: Sequence[tuple[Fraction, Fraction]],
    scales: Sequence[float],
    ranks: IntArray,
) -> list[Fraction]:
    """What each sample loses with the ranks at most, over its scale.

    Args:
        problems: one a sample.
        optima: lower and upper bounds on each sample's best value.
        scales: what each sample's loss is divided by, > 0.
        ranks: int64 by layer.
    """
    return [
        (most - problem.value_of(ranks)) / Fraction(scale)
        for problem, (_, most), scale in zip(problems, optima, scales, strict=True)
    ]
