"""The ranks whose greatest regret over several samples is least, and a bound that proves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lorambo_alloc.objectives import FloatArray, IntArray
from lorambo_alloc.problem import InfeasibleError
from lorambo_alloc.regret import exact_regrets
from lorambo_alloc.sample_curves import MeanCurves, SampleCurves
from lorambo_alloc.solve import solve

# Each weighting is a mean of the best so far and the linear program's, which leaps about.
_SMOOTHING = 0.7
_CLOSE = 16  # rank vectors whose regrets are compared exactly
_NOISE = 2.0**-40  # of the sum of a sample's gains, far more than rounding makes of its regrets


def minimize_worst_regret(
    curves: SampleCurves,
    optima: Sequence[tuple[Fraction, Fraction]],
    scales: Sequence[float],
    candidates: Sequence[IntArray],
    iterations: int,
    time_limit: float | None = None,
) -> tuple[IntArray, Fraction]:
    """Ranks of little worst regret over the samples, and a lower bound for any ranks'.

    The regret of ranks r in sample s is (OPT_s - F_s(r)) / scale_s. For any weights u >= 0 and
    any feasible r,

        max_s regret_s(r) >= (sum_s u_s OPT_s - max_r' sum_s u_s F_s(r')) / sum_s u_s scale_s

    (a maximum is no less than a mean), and the maximum on the right is an allocation of the
    weighted mean curve. Weights come from a cutting-plane program: the game of the rank vectors
    found so far against the samples. What it mixes, rounded, is a candidate too.

    Args:
        curves: of the samples.
        optima: lower and upper bounds on each sample's best value, exact.
        scales: what each sample's regret is divided by, > 0.
        candidates: feasible rank vectors to begin with; the first wins among equals.
        iterations: how many allocations of weighted means to make at most.
        time_limit: seconds for each of them; None: no limit.

    Returns:
        The best of all rank vectors seen (where rounding cannot tell the best apart, of the first
        of these by their exact regrets), and the bound, exact and >= 0.

    References:
        Kelley 1960, The cutting-plane method; Wentges 1997, Weighted Dantzig-Wolfe decomposition
        (smoothed prices); weak duality as in von Neumann's minimax theorem.
    """
    exponents = curves.exponents
    own = np.ldexp([float(high) for _, high in optima], -exponents)
    # Scales in each sample's own units, up to a factor; within bounds, as they guide the search
    # alone.
    fractions, powers = np.frexp(scales)
    powers = powers - exponents
    divisors = np.ldexp(fractions, np.minimum(powers - powers.min(), 100))
    given, pool = (_Candidates(curves, own, divisors) for _ in range(2))
    given.add(np.array(candidates))
    # The others are each far from good for most samples, and would only slow the game.
    pool.add(np.array(candidates[:1]))
    weights = center = np.full(len(own), 1 / len(own))
    highest, bound = -math.inf, Fraction(0)
    tolerance = 1e-12 * float(np.max(np.abs(own / divisors)))
    mixture: FloatArray | None = None
    smoothing = _SMOOTHING
    for _ in range(iterations):
        mean = curves.mean(weights / divisors)
        allocation = solve(curves.problem(mean.curves), time_limit=time_limit)
        above = allocation.certificate.upper_bound
        reached = float(weights / divisors @ own) - math.ldexp(above, mean.exponent)
        progress = pool.add(allocation.ranks[None])
        if reached > highest:
            most = Fraction(above) * Fraction(2) ** mean.exponent + mean.error
            exact = _exactly(weights / divisors, exponents)
            bound = max(bound, _weighted_bound(exact, optima, scales, most))
            center, highest, progress = weights, reached, True
        game = _game(np.array(pool.regrets))
        if game is None:
            break
        value, mixture, weights = game
        if value - highest <= tolerance + 1e-9 * value or not (progress or smoothing):
            break
        smoothing = _SMOOTHING if progress else 0.0
        weights = smoothing * center + (1 - smoothing) * weights
    if mixture is not None:
        mean = curves.mean(center / divisors)
        pool.add(round_mixture(mixture @ np.array(pool.ranks), mean, curves, time_limit))
    noise = _NOISE * float(np.max(curves.magnitudes / divisors))
    close = _indistinguishable([given, pool], noise)
    if len(close) > 1:
        close.sort(key=lambda ranks: max(exact_regrets(curves.problems, optima, scales, ranks)))
    return close[0], bound


class _Candidates:
    """Rank vectors with each sample's regret of them, in the search's units; none twice."""

    def __init__(self, curves: SampleCurves, own: FloatArray, divisors: FloatArray) -> None:
        self._curves, self._own, self._divisors = curves, own, divisors
        self._seen: set[bytes] = set()
        self.ranks: list[IntArray] = []
        self.regrets: list[FloatArray] = []

    def add(self, listed: IntArray) -> bool:
        """Take rank vectors (vectors x layers) in; whether any is new."""
        before = len(self.ranks)
        for ranks, values in zip(listed, self._curves.values(listed), strict=True):
            if ranks.tobytes() not in self._seen:
                self._seen.add(ranks.tobytes())
                self.ranks.append(ranks)
                self.regrets.append((self._own - values) / self._divisors)
        return len(self.ranks) > before


def _indistinguishable(candidates: Sequence[_Candidates], noise: float) -> list[IntArray]:
    """The rank vectors whose worst regret is the least or may be, for all that rounding says.

    At most `_CLOSE` of them, but always the first of all where it is one; in order, none twice.
    """
    ranks = [ranks for those in candidates for ranks in those.ranks]
    worst = [float(regrets.max()) for those in candidates for regrets in those.regrets]
    limit = min(worst) + noise
    best = sorted((value, k) for k, value in enumerate(worst) if value <= limit)[:_CLOSE]
    kept = {k for _, k in best} | {k for k in (0,) if worst[k] <= limit}
    return list({ranks[k].tobytes(): ranks[k] for k in sorted(kept)}.values())


def _exactly(weights: FloatArray, exponents: npt.NDArray[np.int32]) -> list[Fraction]:
    """Weights of the samples in units of 1, from those of the samples in their own units."""
    pairs = zip(weights.tolist(), exponents.tolist(), strict=True)
    return [Fraction(weight) / Fraction(2) ** exponent for weight, exponent in pairs]


def _weighted_bound(
    weights: Sequence[Fraction],
    optima: Sequence[tuple[Fraction, Fraction]],
    scales: Sequence[float],
    most: Fraction,
) -> Fraction:
    """The bound that weights prove, exactly; `most`: above any ranks' weighted value."""
    optimum = sum((u * low for u, (low, _) in zip(weights, optima, strict=True)), Fraction(0))
    return (optimum - most) / sum(
        (u * Fraction(scale) for u, scale in zip(weights, scales, strict=True)), Fraction(0)
    )


def _game(regrets: FloatArray) -> tuple[float, FloatArray, FloatArray] | None:
    """The game of rank vectors against samples, solved as a linear program.

    Args:
        regrets: vectors x samples.

    Returns:
        The worst regret of the best mixture of the vectors, the mixture, and the weights of the
        samples against it; None if no vector is regretted, or the program fails.
    """
    from scipy.optimize import linprog

    count, samples = regrets.shape
    scale = float(regrets.max())
    if not scale > 0:
        return None
    ones = np.ones((samples, 1))
    result: Any = linprog(
        np.append(np.zeros(count), 1.0),
        A_ub=np.hstack([regrets.T / scale, -ones]),
        b_ub=np.zeros(samples),
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
        bounds=[*[(0.0, None)] * count, (None, None)],
        method="highs",
    )
    if result.status != 0:
        return None
    weights = np.maximum(-result.ineqlin.marginals, 0.0)
    return float(result.fun) * scale, result.x[:-1], weights / weights.sum()


def round_mixture(
    mixed: FloatArray, mean: MeanCurves, curves: SampleCurves, time_limit: float | None
) -> IntArray:
    """Whole ranks next to mixed ones, the best of these for the mean curves.

    On concave curves the mixed ranks themselves are worth as much as the mixture, or more.

    Args:
        mixed: a mean of feasible rank vectors, float64 by layer.
        mean: the curves that decide which way to round.
        curves: of the samples.
        time_limit: seconds for the allocation; None: no limit.

    Returns:
        Rank vectors x layers: one, or none if the nearest ranks below are over the budget.
    """
    first = curves.first
    low, high = first.lower.copy(), first.upper.copy()
    for layers in first.variables:
        allowed, at = first.allowed_ranks(layers[0]), float(mixed[layers[0]])
        members = list(layers)
        low[members] = allowed[max(np.searchsorted(allowed, at + 1e-9, side="right") - 1, 0)]
        high[members] = allowed[min(np.searchsorted(allowed, at - 1e-9), len(allowed) - 1)]
    names = first.names
    try:
        problem = curves.problem(
            mean.curves,
            min_rank=dict(zip(names, low.tolist(), strict=True)),
            max_rank=dict(zip(names, np.maximum(low, high).tolist(), strict=True)),
        )
    except InfeasibleError:  # a fixed cost that the mixture pays in part only
        return np.zeros((0, len(names)), dtype=np.int64)
    return solve(problem, time_limit=time_limit).ranks[None]
