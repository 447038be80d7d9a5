"""How sure the ranks are: the exact allocation of every sample, and ranks that suit them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import exact_sum, round_down, round_up
from lorambo_alloc.caps import Caps
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.costs import PerLayer, UniformRank, whole_number
from lorambo_alloc.limits import AllowedRanks, Limit
from lorambo_alloc.minimax_regret import minimize_worst_regret
from lorambo_alloc.objectives import FloatArray, IntArray, Objective, parse_objective, real_number
from lorambo_alloc.regret import exact_regrets, optimum_bounds, scales_of
from lorambo_alloc.sample_curves import SampleCurves
from lorambo_alloc.samples import sample_problems
from lorambo_alloc.solve import solve

_ROWS = 48  # layers that a table shows whole; longer ones show both ends


@dataclass(frozen=True, eq=False, repr=False)
class Stability:
    """What `stability` found.

    Attributes:
        names: the layers' names.
        ranks: each sample's own best ranks, int64, samples x layers.
        certificates: each sample's proof of them.
        quantiles: of the intervals.
        low: int64 by layer, the lower quantile of its ranks over the samples, rounded down to one
            that occurs.
        high: the upper quantile, rounded up to one that occurs.
        average: the allocation of the mean curve. A sum of gains is linear in the curves, so it
            has the best mean value over the samples, too. The certificate speaks of the mean as
            doubles hold it: of values that differ by its rounding alone, another may be the best.
        losses: per sample, what it loses with the ranks of `average` against its own optimum, in
            units of gain, rounded up. Where its own search did not close, the upper bound stands
            in for the optimum.
        robust: ranks of little worst regret over the samples. The certificate says what they give
            up of the mean value.
        regrets: per sample, what it loses with `robust`, like `losses`; with `relative`, as a
            share of its own value (in `values`).
        worst_regret: the greatest of these.
        worst_regret_bound: proved: whatever the ranks, some sample regrets as much. Rounded down.
        relative: whether regrets are shares.
    """

    names: tuple[str, ...]
    ranks: IntArray
    certificates: tuple[Certificate, ...]
    quantiles: tuple[float, float]
    low: IntArray
    high: IntArray
    average: Allocation
    losses: FloatArray
    robust: Allocation
    regrets: FloatArray
    worst_regret: float
    worst_regret_bound: float
    relative: bool

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def values(self) -> FloatArray:
        """The value of each sample's own best ranks, rounded down."""
        return np.array([certificate.value for certificate in self.certificates])

    @property
    def exact(self) -> bool:
        """Whether every sample's own ranks are proved optimal, to within rounding at least."""
        return all(c.status.startswith("optimal") for c in self.certificates)

    @property
    def intervals(self) -> dict[str, tuple[int, int]]:
        """By layer, from the lower to the upper quantile of its ranks over the samples."""
        ends = zip(self.low.tolist(), self.high.tolist(), strict=True)
        return dict(zip(self.names, ends, strict=True))

    @property
    def mean_rank(self) -> dict[str, float]:
        """By layer, the mean of its ranks over the samples."""
        means = self.ranks.sum(axis=0) / len(self.ranks)
        return dict(zip(self.names, means.tolist(), strict=True))

    @property
    def expected_loss(self) -> float:
        """The mean of `losses`, rounded up: what it costs that only the mean curve is known."""
        return round_up(exact_sum(self.losses) / len(self.losses))

    @property
    def expected_relative_loss(self) -> float:
        """The expected loss as a share of the mean of the samples' own values, rounded up."""
        lost, values = exact_sum(self.losses), exact_sum(self.values)
        if lost == 0:
            return 0.0
        return round_up(lost / values) if values > 0 else math.inf

    def __repr__(self) -> str:
        return _table(self)


def stability(
    samples: object,
    budget: int | UniformRank,
    *,
    shapes: PerLayer[tuple[int, int]] | None = None,
    costs: PerLayer[int] | None = None,
    fixed_costs: PerLayer[int] | None = None,
    objective: str | Objective = "frobenius",
    weights: PerLayer[float] | None = None,
    min_rank: Limit = 0,
    max_rank: Limit = None,
    multiple_of: int = 1,
    allowed_ranks: AllowedRanks = None,
    tied: Iterable[Sequence[str]] = (),
    caps: Caps | None = None,
    quantiles: tuple[float, float] = (0.05, 0.95),
    relative: bool = False,
    iterations: int = 100,
    time_limit: float | None = None,
) -> Stability:
    """How far the best ranks depend on the sample that the curves were estimated from.

    Every sample (a batch, a seed, a bootstrap draw) is an estimate of all layers' curves. Each gets
    its own exact allocation; the spread of its ranks over the samples says how sure they are.
    Two allocations suit the samples together: the one of the best mean value, and one of little
    worst regret with a proved bound on how small that could be.

    The bound is on what any single rank vector can do; it is reached by mixtures of rank vectors,
    so a small gap remains even when the search has converged.

    Memory: 8 bytes for each rank of each sample, once more than the samples themselves.

    Args:
        samples: at least two, with the same layers and numbers of ranks: a sequence of what
            `allocate` takes as spectra (`GainCurves` too), a mapping of layer name to 2-D array
            (samples x ranks), or a 3-D array (samples x layers x ranks).
        budget: a whole number in the units of the costs, or `uniform_rank(r)`.
        shapes: name to (d, k); a rank costs d + k parameters.
        costs: name to the cost of one rank, whole numbers >= 1; takes precedence over `shapes`.
            With neither, a rank costs 1 and the budget counts ranks.
        fixed_costs: name to a cost charged once if the layer's rank is above 0.
        objective: "frobenius", "nuclear", `schatten(p)` or `log(noise)`; not "operator".
        weights: name to a factor >= 0 on the layer's gains.
        min_rank: the least rank, for all layers or by name.
        max_rank: the greatest rank, for all layers or by name.
        multiple_of: ranks are multiples of this.
        allowed_ranks: the ranks to choose from, for all layers or by name.
        tied: groups of layer names that share one rank.
        caps: name to `Cap`, or to (layer names, budget): side budgets on groups of layers.
        quantiles: of the ranks over the samples, for the intervals.
        relative: regrets are shares of each sample's own value, which must be above 0, instead
            of gain.
        iterations: how many allocations of weighted means the search for `robust` makes at most;
            it stops before where the bound is met.
        time_limit: seconds for each allocation, after which it stops with a certified gap; None:
            no limit. There are one a sample, one for the average, and up to `iterations` + 1 for
            `robust`; the rest takes little. Bounds stay true whatever was stopped.

    Returns:
        A `Stability`.

    Raises:
        ValueError: an argument is not of this form, or the samples differ in more than their
            gains; the message names the sample, counted from 0, and the layer.
        InfeasibleError: the minimum ranks cost more than the budget or a cap.

    References:
        Kouvelis and Yu 1997, Robust Discrete Optimization (minimax regret); `minimize_worst_regret`
        has the search and its bound.

    Example:
        >>> samples = [{"q": [3.0, 2.0], "v": [1.0, 0.5]}, {"q": [2.0, 1.0], "v": [4.0, 3.0]}]
        >>> found = stability(samples, 2)
        >>> found.ranks.tolist(), found.intervals["q"], dict(found.average)
        ([[2, 0], [0, 2]], (0, 2), {'q': 1, 'v': 1})
        >>> found.losses, found.worst_regret, round(found.worst_regret_bound, 6)
        (array([3., 5.]), 5.0, 4.272727)
    """
    low, high = _parse_quantiles(quantiles)
    iterations = whole_number(iterations, "iterations", least=1)
    if parse_objective(objective).kind == "operator":
        raise ValueError(
            "objective: a mean over samples needs gains that add up; 'operator' has none"
        )
    problems, keywords = sample_problems(
        samples,
        budget,
        shapes=shapes,
        costs=costs,
        fixed_costs=fixed_costs,
        objective=objective,
        weights=weights,
        min_rank=min_rank,
        max_rank=max_rank,
        multiple_of=multiple_of,
        allowed_ranks=allowed_ranks,
        tied=tied,
        caps=caps,
    )
    own = [solve(problem, time_limit=time_limit) for problem in problems]
    optima = [optimum_bounds(allocation) for allocation in own]
    scales = scales_of(own, relative=relative)
    curves = SampleCurves(problems, keywords)
    mean = curves.mean(np.ldexp(1 / len(own), curves.exponents), exponent=0)
    average = solve(curves.problem(mean.curves), time_limit=time_limit)
    candidates = [average.ranks, *(allocation.ranks for allocation in own)]
    robust, bound = minimize_worst_regret(
        curves, optima, scales, candidates, iterations, time_limit
    )
    losses = _rounded_up(exact_regrets(problems, optima, [1.0] * len(own), average.ranks))
    regrets = _rounded_up(exact_regrets(problems, optima, scales, robust))
    ranks = np.array([allocation.ranks for allocation in own])
    return Stability(
        names=problems[0].names,
        ranks=ranks,
        certificates=tuple(allocation.certificate for allocation in own),
        quantiles=(low, high),
        low=np.quantile(ranks, low, axis=0, method="lower").astype(np.int64),
        high=np.quantile(ranks, high, axis=0, method="higher").astype(np.int64),
        average=average,
        losses=losses,
        robust=_as_allocation(robust, average),
        regrets=regrets,
        worst_regret=float(regrets.max()),
        worst_regret_bound=round_down(bound),
        relative=relative,
    )


def _parse_quantiles(quantiles: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = map(real_number, quantiles)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"quantiles: expected (low, high) with 0 <= low <= high <= 1, got {quantiles!r}"
        )
    return low, high


def _rounded_up(values: Sequence[Fraction]) -> FloatArray:
    return np.array([round_up(value) for value in values])


def _as_allocation(ranks: IntArray, average: Allocation) -> Allocation:
    """The ranks as an allocation of the mean curve, with the gap that its optimum proves."""
    problem, best = average.problem, average.certificate
    value, most = problem.value_of(ranks), optimum_bounds(average)[1]
    certificate = Certificate.of(
        value,
        most - value,
        best.price,
        "minimax regret",
        closed=False,
        cut=best.cut,
        cap_prices=best.cap_prices,
    )
    return Allocation(problem, ranks, certificate)


def _table(found: Stability) -> str:
    """Layers with their intervals in aligned columns, then what the uncertainty costs."""
    shown = list(range(len(found.names)))
    if len(shown) > _ROWS:
        shown = [*shown[: _ROWS // 2], -1, *shown[-(_ROWS // 2) :]]
    low, high = (f"{100 * quantile:g}%" for quantile in found.quantiles)
    rows = [("layer", low, "mean", high, "average", "robust")]
    means = list(found.mean_rank.values())
    for i in shown:
        if i < 0:
            rows.append((f"... {len(found.names) - _ROWS} more", "", "", "", "", ""))
            continue
        spread = f"{found.low[i]}", f"{means[i]:.1f}", f"{found.high[i]}"
        both = f"{found.average.ranks[i]}", f"{found.robust.ranks[i]}"
        rows.append((found.names[i], *spread, *both))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(lines[1])
    closed = sum(c.status.startswith("optimal") for c in found.certificates)
    unit = " of a sample's value" if found.relative else ""
    lines += [
        f"samples        {len(found)}, {closed} of them solved to proved optimality",
        f"expected loss  {found.expected_loss:.4g}, {found.expected_relative_loss:.2%} of the mean "
        "value, with the average's ranks",
        f"worst regret   {found.worst_regret:.4g}{unit} with the robust ranks; at least "
        f"{found.worst_regret_bound:.4g} with any",
    ]
    return "\n".join(lines)
