"""The allocation problem: curves, costs, a budget and limits. All validation lives here."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lorambo_alloc.arithmetic import exact_sum
from lorambo_alloc.arrays import FlatLayers, first_ascent
from lorambo_alloc.caps import Caps, Row, parse_caps
from lorambo_alloc.costs import (
    PerLayer,
    UniformRank,
    per_layer,
    whole_number,
    whole_numbers,
)
from lorambo_alloc.curves import GainCurves, Spectra, check_finite, check_shapes
from lorambo_alloc.gains import GREATEST_SUM, Gains
from lorambo_alloc.limits import AllowedRanks, Limit, parse_limits
from lorambo_alloc.objectives import (
    FloatArray,
    IntArray,
    Objective,
    parse_objective,
    real_number,
    schatten,
)


class InfeasibleError(ValueError):
    """The minimum ranks cost more than the budget, or more than a cap.

    Attributes:
        minimum_budget: the smallest feasible budget, in the units of the costs.
    """

    def __init__(self, budget: int, minimum_budget: int, where: str = "budget") -> None:
        super().__init__(
            f"{where}: the minimum ranks cost {minimum_budget}, more than the budget {budget}; "
            f"the smallest feasible budget is {minimum_budget}"
        )
        self.minimum_budget = minimum_budget


class Problem:
    """Maximise sum_i F_i(r_i) subject to sum_i (c_i r_i + f_i [r_i > 0]) <= budget and limits.

    F_i(r) is the exact sum of the doubles that are layer i's gains of ranks 1 .. r.

    Args:
        spectra: name to a 1-D array of singular values, descending; or `Spectra`; or a sequence
            of arrays or a 2-D array, whose layers are named "0", "1", ...; or `GainCurves`.
            Anything with `__array__` or DLPack on the host is taken.
        budget: a whole number in the units of the costs, or `uniform_rank(r)`.
        shapes: name to (d, k); a rank then costs d + k parameters. `Spectra` carry their own.
        costs: the cost of one rank, whole numbers from 1 to 2^53; takes precedence over
            `shapes`. With neither, a rank costs 1 and the budget counts ranks.
        fixed_costs: charged once if the layer's rank is above 0, whole numbers from 0 to 2^53.
        objective: "frobenius", "nuclear", "operator", `schatten(p)` or `log(noise)`. Gain curves
            are gains already: leave it.
        weights: one factor >= 0 a layer on its gains (`operator`: on its singular values).
        min_rank: the least rank, for all layers or by name (layers left out: 0).
        max_rank: the greatest rank, for all layers or by name (layers left out: no limit).
        multiple_of: ranks are multiples of this.
        allowed_ranks: the ranks to choose from, for all layers or by name (layers left out:
            no limit). 0 is allowed only where it is listed; ranks beyond the layer's curve or
            the other limits are left out.
        tied: groups of layer names that share one rank.
        caps: name to `Cap`, or to (layer names, budget): side budgets on groups of layers.

    `costs`, `fixed_costs` and `weights` are mappings with every layer's name, or sequences in
    layer order.

    Raises:
        ValueError: an argument is not of this form; the message names the layer, what was
            expected and what came.
        InfeasibleError: the minimum ranks cost more than the budget or a cap.

    Attributes:
        names: the layers' names, in order.
        costs: cost of one rank, int64 by layer.
        fixed_costs: cost of a rank above 0, int64 by layer.
        budget: an int in the same units.
        spendable: the budget, or the cost of the greatest ranks if that is less.
        objective: the `Objective`.
        lower: the least allowed rank, int64 by layer.
        upper: the greatest allowed rank, int64 by layer.
        groups: the tied groups, as tuples of layer indices.
        limits: the allowed ranks of every layer.
        caps: the side budgets, each a `Row`.
        rows: all budgets: the problem's own, then the caps.
    """

    def __init__(
        self,
        spectra: object,
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
    ) -> None:
        self.objective = parse_objective(objective)
        self.curves = spectra if isinstance(spectra, (Spectra, GainCurves)) else Spectra(spectra)
        layers = self.curves.layers
        self.names = layers.names
        self.costs = self._parse_costs(shapes, costs)
        ones = np.ones(len(self.names), dtype=np.int64)
        self.fixed_costs = (
            0 * ones
            if fixed_costs is None
            else whole_numbers(fixed_costs, self.names, "fixed_costs", 0)
        )
        self.weights: FloatArray | None = (
            None
            if weights is None
            else np.array(per_layer(weights, self.names, "weights", _weight), dtype=np.float64)
        )
        self.gains, self.totals = self._parse_gains()
        self.max_lengths = layers.lengths - (1 if isinstance(self.curves, GainCurves) else 0)
        self.limits = parse_limits(
            self.names,
            self.max_lengths,
            min_rank,
            max_rank,
            multiple_of,
            allowed_ranks,
            tied,
        )
        self.lower, self.upper = self.limits.lower, self.limits.upper
        self.groups = self.limits.groups
        self.caps = parse_caps(caps, self.names, Row("", self.costs, self.fixed_costs, 0))
        self._set_budget(budget)

    def with_budget(self, budget: int | UniformRank) -> Problem:
        """The same problem at another budget; nothing is checked twice.

        Raises:
            ValueError: the budget is not of its form.
            InfeasibleError: the minimum ranks cost more than the budget.
        """
        other = copy.copy(self)
        other._set_budget(budget)
        return other

    def _set_budget(self, budget: int | UniformRank) -> None:
        if isinstance(budget, UniformRank):
            self.budget = budget.cost(self.costs, self.fixed_costs)
        else:
            self.budget = whole_number(budget, "budget", least=0)
        self.rows = (Row("", self.costs, self.fixed_costs, self.budget), *self.caps)
        self.spendable = min(self.budget, self.cost_of(self.upper))
        for row in self.rows:
            if min(row.budget, row.cost_of(self.upper)) >= 1 << 62:
                raise ValueError(
                    f"{row.where}: expected a budget, or a cost of the greatest ranks, below 2^62, "
                    f"got {row.budget}; divide costs and budget by a common factor"
                )
            minimum = row.cost_of(self.lower)
            if minimum > row.budget:
                raise InfeasibleError(row.budget, minimum, row.where)

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The tied groups, by name."""
        return tuple(tuple(self.names[i] for i in group) for group in self.groups)

    @property
    def concave_unit_steps(self) -> bool:
        """Whether every layer's choices are single ranks of descending gain, free of each other.

        Free but for the budget and the caps, that is. Then taking the best increments never
        breaks the order within a layer.
        """
        return (
            self.gains is not None
            and self.gains.sorted
            and self.limits.multiple_of == 1
            and not self.limits.lists
            and not self.groups
            and not any(row.fixed_costs.any() for row in self.rows)
        )

    def allowed_ranks(self, i: int) -> IntArray:
        """The ranks that layer i may take, ascending (ties with other layers included)."""
        return self.limits.allowed_ranks(i)

    @property
    def variables(self) -> list[tuple[int, ...]]:
        """The layers of each free choice: the tied groups, and every other layer alone."""
        return self.limits.variables

    def curve(self, i: int) -> FloatArray:
        """F_i(0), ..., F_i(R), to rounding; not for `operator`."""
        if self.gains is not None:
            return np.concatenate([[0.0], np.cumsum(self.gains.row(i))])
        assert self.totals is not None
        return self.totals.row(i)

    def cost_at(self, group: Iterable[int], rank: int) -> int:
        """What one rank costs in all layers of a group together."""
        return self.rows[0].cost_at(group, rank)

    def cost_of(self, ranks: IntArray) -> int:
        """The cost of a rank vector, exactly."""
        return self.rows[0].cost_of(ranks)

    def fits(self, ranks: IntArray) -> bool:
        """Whether a rank vector is within the budget and every cap."""
        return all(row.cost_of(ranks) <= row.budget for row in self.rows)

    def value_of(self, ranks: IntArray) -> Fraction:
        """sum_i F_i(r_i), exactly; for `operator`, minus the largest discarded value.

        Args:
            ranks: int64 by layer.
        """
        if self.objective.kind == "operator":
            tails = self.tails(ranks)
            return -Fraction(float(np.max(tails, initial=0.0)))
        if self.gains is not None:
            return exact_sum(self.gains.selected(0 * ranks, ranks)[2])
        assert self.totals is not None
        return exact_sum(self.totals.flat[self.totals.offsets[:-1] + ranks])

    def value_difference(self, ranks: IntArray, other: IntArray) -> Fraction:
        """value_of(ranks) - value_of(other), exactly; quick where few layers differ."""
        differ = np.flatnonzero(ranks != other)
        new, old = ranks[differ], other[differ]
        if self.gains is not None:
            rows, _, gains = self.gains.selected(np.minimum(new, old), np.maximum(new, old), differ)
            return exact_sum(np.where((ranks > other)[rows], gains, -gains))
        assert self.totals is not None
        starts, flat = self.totals.offsets[:-1][differ], self.totals.flat
        return exact_sum(np.concatenate([flat[starts + new], -flat[starts + old]]))

    def tails(self, ranks: IntArray) -> FloatArray:
        """Per layer the largest discarded w_i sigma_j, j = r_i + 1; 0 where none is left."""
        layers = self.curves.layers
        inside = ranks < layers.lengths
        positions = layers.offsets[:-1] + np.where(inside, ranks, 0)
        sigma = layers.flat[positions].astype(np.float64, copy=False)
        tails = np.where(inside, sigma, 0.0)
        return tails if self.weights is None else tails * self.weights

    def parse_ranks(self, ranks: object) -> IntArray:
        """A rank vector as int64; ValueError unless it is one whole number >= 0 a layer."""
        array = np.asarray(ranks)
        if array.shape != (len(self.names),) or (array.dtype.kind not in "iu" and array.size):
            raise ValueError(
                f"ranks: expected {len(self.names)} whole numbers, got {array.dtype} of shape "
                f"{array.shape}"
            )
        for i in np.flatnonzero((array < 0) | (array > self.max_lengths))[:1].tolist():
            raise ValueError(f"layer {self.names[i]!r}: rank {array[i]} is not allowed")
        return array.astype(np.int64)

    def check(self, ranks: IntArray) -> None:
        """Raise ValueError unless the rank vector obeys every limit, tie, the budget and caps."""
        ranks = self.parse_ranks(ranks)
        self.limits.check(ranks)
        for row in self.rows:
            cost = row.cost_of(ranks)
            if cost > row.budget:
                where = f"{row.where}: " if row.name else ""
                raise ValueError(f"{where}the ranks cost {cost}, more than the budget {row.budget}")

    # -- parsing ---------------------------------------------------------------------------------

    def _parse_costs(
        self, shapes: PerLayer[tuple[int, int]] | None, costs: PerLayer[int] | None
    ) -> IntArray:
        carried: Mapping[str, tuple[int, int]] | None = None
        if isinstance(self.curves, Spectra):
            carried = self.curves.shapes
        if shapes is not None:
            if not isinstance(shapes, Mapping):
                in_order = per_layer(shapes, self.names, "shapes", _same)
                shapes = dict(zip(self.names, in_order, strict=True))
            shapes = check_shapes(shapes, self.curves.layers)
        if costs is not None:
            return whole_numbers(costs, self.names, "costs", 1)
        named = shapes if shapes is not None else carried
        if named is None:
            return np.ones(len(self.names), dtype=np.int64)
        return np.array([d + k for d, k in named.values()], dtype=np.int64)

    def _parse_gains(self) -> tuple[Gains | None, FlatLayers | None]:
        if isinstance(self.curves, Spectra):
            layers = self.curves.layers
            if self.objective.kind == "operator":
                with np.errstate(over="ignore"):
                    first = self.tails(np.zeros(len(self.names), dtype=np.int64))
                for i in np.flatnonzero(~np.isfinite(first))[:1].tolist():
                    raise ValueError(
                        f"layer {self.names[i]!r}: weight times singular value overflows; "
                        "scale down"
                    )
                return None, None
            return Gains(layers, self.objective, self.weights, sorted=True), None
        if self.objective != schatten(2):
            raise ValueError(
                f"objective: gain curves are gains already, got objective {str(self.objective)!r}"
            )
        increments = self.curves.increments
        if increments is not None:
            descending = first_ascent(increments) is None
            return Gains(increments, schatten(1), self.weights, sorted=descending), None
        totals = self.curves.layers
        flat = totals.flat.astype(np.float64, copy=False)
        if self.weights is not None:
            with np.errstate(over="ignore"):
                flat = flat * np.repeat(self.weights, totals.lengths)
        weighted = FlatLayers(totals.names, flat, totals.offsets)
        check_finite(weighted, "weighted gain curve")
        largest = np.maximum.reduceat(np.abs(flat), totals.offsets[:-1])
        with np.errstate(over="ignore"):
            total = float(np.sum(largest))
        if total > GREATEST_SUM:
            i = int(np.argmax(largest))
            raise ValueError(
                f"layer {self.names[i]!r}: expected gains that sum to at most {GREATEST_SUM:.0e}, "
                f"got {largest[i]}; scale down"
            )
        return None, weighted


def _weight(value: Any, where: str) -> float:
    weight = real_number(value)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{where}: expected a finite weight >= 0, got {value!r}")
    return weight


def _same(value: Any, where: str) -> Any:
    return value
