"""The bound check: does an answer keep its guarantee, and is the objective what it claims to be?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import FloatArray, IntArray, real_number
from lorambo_alloc.submodular.bounds import instance_bound
from lorambo_alloc.submodular.constraints import Constraint, Knapsack
from lorambo_alloc.submodular.guarantees import CARDINALITY, WEAKLY_SUBMODULAR, Guarantee
from lorambo_alloc.submodular.objectives import SetFunction
from lorambo_alloc.submodular.select import Selection, select

EXHAUSTIVE_UP_TO = 10
"""All pairs of sets are looked at for at most so many elements; samples beyond."""

_LARGEST_SAMPLED_SET = 32
_SHOWN = 3


@dataclass(frozen=True)
class Violation:
    """A place where an objective is not what it claims.

    Attributes:
        law: "monotone" (the gain of `element` at `smaller` is below 0) or "submodular" (its gain
            at `larger` is above its gain at the subset `smaller`).
        smaller: A.
        larger: B, a superset of A; A itself for "monotone".
        element: e, in neither.
        gain_at_smaller: f(A + e) - f(A).
        gain_at_larger: f(B + e) - f(B).
    """

    law: Literal["monotone", "submodular"]
    smaller: frozenset[int]
    larger: frozenset[int]
    element: int
    gain_at_smaller: float
    gain_at_larger: float

    def __str__(self) -> str:
        a, e = sorted(self.smaller), self.element
        if self.law == "monotone":
            return f"not monotone: f({a} + {e}) - f({a}) = {self.gain_at_smaller:g} < 0"
        b = sorted(self.larger)
        return (
            f"not submodular: f({a} + {e}) - f({a}) = {self.gain_at_smaller:g} < "
            f"f({b} + {e}) - f({b}) = {self.gain_at_larger:g}"
        )


@dataclass(frozen=True)
class BoundCheck:
    """What `bound_check` found.

    Attributes:
        value: of the selection.
        instance_bound: an upper bound on the optimum, from *every* prefix of the selection; it is
            one only if the objective is monotone and of the class it claims.
        guarantee: the row that the selection cites.
        holds: value >= guarantee.ratio x instance_bound, to the tolerance.
        conclusive: whether a failure would prove something. The instance bound is above the
            optimum, so in general an answer may keep its guarantee and fail this. Under a
            cardinality constraint greedy cannot: Nemhauser, Wolsey and Fisher prove the
            ratio against this very bound, so a failure proves that the items are not
            greedy's (which they are not if lazy greedy trusted a function that is not submodular).
        violations: where the objective is not monotone or, if it claims to be, not submodular.
        submodularity_ratio: the least (sum of gains at L over S) / (joint gain of S at L) seen; an
            upper bound on the objective's ratio, and the ratio itself if `exhaustive`.
        exhaustive: whether all sets were looked at, not samples.
        tolerance: relative to the values compared, below which differences are rounding.
    """

    value: float
    instance_bound: float
    guarantee: Guarantee
    holds: bool
    conclusive: bool
    violations: tuple[Violation, ...]
    submodularity_ratio: float
    exhaustive: bool
    tolerance: float

    @property
    def passed(self) -> bool:
        """No violation, and no conclusive failure."""
        return not self.violations and (self.holds or not self.conclusive)

    def __repr__(self) -> str:
        if self.holds:
            verdict = "holds"
        elif self.conclusive:
            verdict = "fails: these are not the items of the greedy algorithm"
        else:
            verdict = "not shown: the bound may be above the optimum, so this proves no violation"
        looked = "all sets" if self.exhaustive else "samples"
        lines = [
            f"value {self.value:.6g} >= {self.guarantee.ratio:.4f} x {self.instance_bound:.6g}: "
            f"{verdict}",
            f"submodularity ratio {self.submodularity_ratio:.4g} ({looked})",
            f"violations {len(self.violations)} ({looked})",
        ]
        lines += [f"  {violation}" for violation in self.violations[:_SHOWN]]
        return "\n".join(lines)


def bound_check(
    objective: SetFunction,
    constraint: Constraint,
    selection: Selection | None = None,
    *,
    samples: int = 200,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> BoundCheck:
    """Check value >= guarantee x instance bound, and look for lies about the objective.

    For up to 10 elements all sets are looked at: f is monotone and submodular if and only if no
    gain is negative and none grows when one element joins. Beyond, random chains A in B are
    drawn, and finding nothing proves nothing.

    Args:
        objective: any.
        constraint: that of the selection.
        selection: an answer under this constraint; `select`'s own where None.
        samples: how many chains to draw, >= 1.
        seed: of `numpy.random.default_rng`.
        tolerance: in (0, 1); gains that differ by less than this share of the largest value of f
            involved, or by less than `objective.rounding`, are equal. The instance bound is
            rounded up, so 0 would fail by rounding.

    Raises:
        ValueError: the selection is not feasible, or an argument is out of range.

    References:
        Leskovec et al., KDD 2007 (the bound); Nemhauser, Wolsey, Fisher, Mathematical Programming
        14 (1978) (what it takes to be submodular, and the conclusive case); Das, Kempe, ICML
        2011, definition 2.3 (the submodularity ratio).

    Example:
        >>> from lorambo_alloc.submodular import Cardinality, Function
        >>> liar = Function(3, lambda s: len(s) ** 2)
        >>> print(bound_check(liar, Cardinality(2)).violations[0])
        not submodular: f([] + 0) - f([]) = 1 < f([1] + 0) - f([1]) = 3
    """
    whole_number(samples, "samples", least=1)
    if not 0 < real_number(tolerance) < 1:
        raise ValueError(f"tolerance: expected a number in (0, 1), got {tolerance!r}")
    if selection is None:
        selection = select(objective, constraint=constraint)
    items = objective.check_items(selection.items)
    constraint.check(objective.n)
    if not constraint.feasible(items, objective.n):
        raise ValueError(f"selection: {items} is not feasible")
    value = objective.value(items)
    row = selection.guarantee
    if isinstance(constraint, Knapsack) and row.constraint == CARDINALITY:
        constraint = constraint.as_cardinality()  # as `select` did before it cited that row
    bound = instance_bound(objective, constraint, items, prefixes=len(items) + 1)
    exhaustive = objective.n <= EXHAUSTIVE_UP_TO
    if exhaustive:
        violations, ratio = _look_everywhere(objective, tolerance)
    else:
        violations, ratio = _look_at_samples(objective, samples, seed, tolerance)
    if objective.kind == WEAKLY_SUBMODULAR:
        violations = [v for v in violations if v.law == "monotone"]
    return BoundCheck(
        value=value,
        instance_bound=bound,
        guarantee=row,
        # No claim, no failure: 0 x infinity is not a number.
        holds=row.ratio == 0 or value >= row.ratio * bound * (1 - tolerance),
        conclusive=constraint.kind == row.constraint == CARDINALITY
        and row.algorithm == "greedy"
        and objective.kind != WEAKLY_SUBMODULAR,
        violations=tuple(violations),
        submodularity_ratio=ratio,
        exhaustive=exhaustive,
        tolerance=tolerance,
    )


def submodularity_ratio(objective: SetFunction, *, samples: int = 200, seed: int = 0) -> float:
    """Estimate the submodularity ratio: the least seen of (sum of gains) / (joint gain).

    For up to 10 elements it is the ratio, to rounding. Beyond, it is an *upper* bound from
    samples, so no guarantee may rest on it: see `CoupledQuadratic.submodularity_ratio`.

    Args:
        objective: monotone.
        samples: how many chains to draw, >= 1.
        seed: of `numpy.random.default_rng`.

    Returns:
        A number in [0, 1]; 1 for a submodular function.

    Raises:
        ValueError: samples is out of range.

    References:
        Das, Kempe, Submodular meets Spectral, ICML 2011, definition 2.3.

    Example:
        >>> from lorambo_alloc.submodular import Function
        >>> submodularity_ratio(Function(2, lambda s: {0: 0, 1: 1, 2: 4}[len(s)]))
        0.5
    """
    whole_number(samples, "samples", least=1)
    if objective.n <= EXHAUSTIVE_UP_TO:
        return _look_everywhere(objective, 1e-9)[1]
    return _look_at_samples(objective, samples, seed, 1e-9)[1]


def _look_everywhere(objective: SetFunction, tolerance: float) -> tuple[list[Violation], float]:
    """All violations between sets that differ by one element, and the submodularity ratio."""
    n = objective.n
    masks: IntArray = np.arange(1 << n)
    members: list[list[int]] = [[e for e in range(n) if mask >> e & 1] for mask in range(1 << n)]
    values = np.array([objective.value(items) for items in members])
    largest = float(np.abs(values).max())
    slack = tolerance * largest + 4 * objective.rounding(n, largest)
    gains = np.stack([values[masks | 1 << e] - values for e in range(n)]) if n else values[:0]
    found: list[Violation] = []
    for e in range(n):
        outside = (masks >> e & 1) == 0
        falling: list[int] = masks[outside & (gains[e] < -slack)].tolist()
        for a in falling:
            gain = gains[e, a]
            found.append(_violation("monotone", members[a], members[a], e, gain, gain))
        for j in range(n):
            # Submodular if and only if no single element that joins raises a gain.
            apart = outside & ((masks >> j & 1) == 0) & (j != e)
            grown = gains[e][masks | 1 << j]
            rising: list[int] = masks[apart & (grown > gains[e] + slack)].tolist()
            for a in rising:
                larger = members[a | 1 << j]
                found.append(_violation("submodular", members[a], larger, e, gains[e, a], grown[a]))
    found.sort(key=lambda v: v.law)
    return found, _exact_ratio(values, gains, slack)


def _exact_ratio(values: FloatArray, gains: FloatArray, slack: float) -> float:
    """The least ratio over all disjoint L and S."""
    n, masks = len(gains), np.arange(len(values))
    least = 1.0
    for start in masks.tolist():
        sums = np.zeros(1)
        for e in range(n):  # sums over all subsets S, by doubling
            sums = np.concatenate([sums, sums + gains[e, start]])
        joint = values[masks | start] - values[start]
        counted = ((masks & start) == 0) & (joint > slack)
        if counted.any():
            least = min(least, float((sums[counted] / joint[counted]).min()))
    return max(least, 0.0)


def _look_at_samples(
    objective: SetFunction, samples: int, seed: int, tolerance: float
) -> tuple[list[Violation], float]:
    """Violations and the least ratio on random chains, one violation of each law a chain."""
    found: list[Violation] = []
    least = 1.0
    for a, b in _chains(objective.n, samples, np.random.default_rng(seed)):
        small = objective.start()
        for item in a.tolist():
            small.add(item)
        large = small.copy()
        for item in b.tolist():
            large.add(item)
        at_small, at_large = small.gains(), large.gains()
        largest = max(abs(small.value), abs(large.value), float(np.abs(at_small).max()))
        slack = tolerance * largest + 4 * objective.rounding(len(a) + len(b) + 1, largest)
        worst = int(at_small.argmin())  # elements of A have gain 0
        if at_small[worst] < -slack:
            found.append(_violation("monotone", a, a, worst, at_small[worst], at_small[worst]))
        joint = large.value - small.value
        if joint > slack:
            least = min(least, float(at_small[b].sum()) / joint)
        both = np.concatenate([a, b])
        if len(both) < objective.n:
            growth = at_large - at_small
            growth[both] = -math.inf
            e = int(growth.argmax())
            if growth[e] > slack:
                found.append(_violation("submodular", a, both, e, at_small[e], at_large[e]))
    found.sort(key=lambda v: v.law)
    return found, max(least, 0.0)


def _chains(n: int, samples: int, rng: np.random.Generator) -> Iterator[tuple[IntArray, IntArray]]:
    """Disjoint sets A, possibly empty, and B, not empty, of at most 32 elements together."""
    for _ in range(samples):
        size = int(rng.integers(1, min(n, _LARGEST_SAMPLED_SET) + 1))
        drawn = rng.permutation(n)[:size]
        cut = int(rng.integers(0, size))
        yield drawn[:cut], drawn[cut:]


def _violation(
    law: Literal["monotone", "submodular"],
    smaller: list[int] | IntArray,
    larger: list[int] | IntArray,
    element: int,
    at_smaller: float,
    at_larger: float,
) -> Violation:
    a, b = frozenset(int(x) for x in smaller), frozenset(int(x) for x in larger)
    return Violation(law, a, b, element, float(at_smaller), float(at_larger))
