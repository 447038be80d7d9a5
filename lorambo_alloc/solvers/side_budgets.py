"""Side budgets: prices for all of them, and a search within those that do not overlap.

1. Budgets that cannot bind are dropped. If only the problem's own is left, it is an ordinary one.
2. Equal costs and nested groups are a laminar matroid: greedy, exact.
3. Otherwise the linear relaxation (HiGHS) gives every budget a price. The Lagrangian at these
   prices, in exact arithmetic, bounds the optimum.
4. Caps that share no layer are searched rather than priced: at the prices of all other budgets,
   each is a knapsack of its own, which the exact solver solves. That bound loses nothing to whole
   ranks within the caps, only in the few budgets that lie across them (Geoffrion 1974, Lagrangean
   relaxation for integer programming: dualise some constraints, keep those that are easy).
5. The ranks found there are repaired to fit, filled up, and improved one part at a time by the
   exact solver. Small problems are then searched in integers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.caps import Row
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.laminar import binding_rows
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.solvers.dual_prices import dual_prices
from lorambo_alloc.solvers.exact import solve_exact
from lorambo_alloc.solvers.filling import Filling
from lorambo_alloc.solvers.integers import best_in_integers
from lorambo_alloc.solvers.laminar_greedy import solve_laminar
from lorambo_alloc.solvers.parts import Charge, best_part, within_range
from lorambo_alloc.verification import SCALE, Charges, integer, responses

_ROUNDS = 4  # of improvements part by part
_PRICE_STEPS = 12  # of the search for a better price of the budget


@dataclass(frozen=True)
class _Bound:
    """Prices, and what the parts within the searched caps are worth at most.

    Attributes:
        prices: one a row of the problem.
        parts: by searched cap, the greatest gain less the charges of all other rows.
        total: no feasible rank vector has a greater value.
    """

    prices: tuple[float, ...]
    parts: dict[str, Fraction]
    total: Fraction


def solve_side_budgets(problem: Problem, time_limit: float | None = None) -> Allocation:
    """Optimal or nearly optimal ranks under caps, with a certified gap.

    Args:
        problem: any problem with gains.
        time_limit: seconds after which to stop with the gap that is proved by then; None: it
            stops when it is done.
    """
    rows = binding_rows(problem)
    if not any(row.name for row in rows):
        return solve_exact(problem, time_limit)
    greedy = solve_laminar(problem)
    if greedy is not None:
        return greedy
    search = SideSearch(problem, time_limit)
    search.relax()
    search.search_parts()
    search.improve()
    search.settle_in_integers()
    return search.allocation("side budgets")


class SideSearch:
    """An incumbent under several budgets, and bounds on what a better one could gain.

    Attributes:
        ranks: the incumbent.
    """

    def __init__(self, problem: Problem, time_limit: float | None) -> None:
        self._problem = problem
        self._rows = binding_rows(problem)
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._groups = problem.variables
        self._bounds: list[_Bound] = []
        self._closed = False
        self._homes: dict[str, list[tuple[int, ...]]] = {}  # the variables of each searched cap
        self.ranks = problem.lower.copy()

    def relax(self) -> None:
        """Price all budgets; the relaxation's whole ranks, filled up, are the first incumbent."""
        relaxed = dual_prices(self._problem, self._rows, self._left())
        by_name = {row.name: p for row, p in zip(self._rows, relaxed.prices, strict=True)}
        prices = tuple(by_name.get(row.name, 0.0) for row in self._problem.rows)
        self._filling = Filling(self._problem, self._rows, relaxed.prices)
        self.offer(self._fitted(relaxed.ranks))
        self._bounds = [self._bound(prices, {})]

    def search_parts(self) -> None:
        """Search caps that share no layer, at the prices of all other budgets."""
        self._homes = self._disjoint_caps()
        if self._homes and not self._late():
            self._better_prices(self._bounds[0].prices)

    def improve(self) -> None:
        """Solve parts exactly with all else held fixed, as long as that helps."""
        for _ in range(_ROUNDS):
            if self._late() or not self._improve():
                break

    def settle_in_integers(self) -> None:
        """Search a small problem in integers."""
        value = self._problem.value_of(self.ranks)
        if self._late() or min(bound.total for bound in self._bounds) == value:
            return
        prices = self._bounds[0].prices
        binding = [k for k, row in enumerate(self._problem.rows) if row in self._rows]
        ranks = best_in_integers(
            self._problem, self._rows, [prices[k] for k in binding], self.ranks, self._deadline
        )
        if ranks is not None:
            self.ranks = ranks
            self._closed = True

    def allocation(self, method: str) -> Allocation:
        """The incumbent with its certificate, made out by the named method."""
        return Allocation(self._problem, self.ranks, self._certificate(method))

    def offer(self, ranks: IntArray) -> bool:
        """Take a rank vector as the incumbent if it fits and is better."""
        better = self._problem.fits(ranks) and self._problem.value_difference(ranks, self.ranks) > 0
        if better:
            self.ranks = ranks
        return better

    def _fitted(self, ranks: IntArray) -> IntArray:
        return self._filling.filled(self._filling.repaired(ranks))

    # -- bounds ----------------------------------------------------------------------------------

    def _disjoint_caps(self) -> dict[str, list[tuple[int, ...]]]:
        """Caps that share no variable, priced ones first, small ones before large ones."""
        price_of = dict(zip(self._problem.rows, self._bounds[0].prices, strict=True))
        caps = sorted(
            (row for row in self._rows if row.name),
            key=lambda row: (price_of[row] == 0, len(row.layers)),
        )
        disjoint: dict[str, list[tuple[int, ...]]] = {}
        taken: set[tuple[int, ...]] = set()
        for cap in caps:
            members = self._members(cap)
            if taken.isdisjoint(members) and within_range(members, cap):
                disjoint[cap.name] = members
                taken.update(members)
        return disjoint

    def _members(self, row: Row) -> list[tuple[int, ...]]:
        """The variables that a row charges."""
        charged = row.costs > 0
        return [group for group in self._groups if any(charged[i] for i in group)]

    def _bound(self, prices: tuple[float, ...], parts: dict[str, Fraction]) -> _Bound:
        """Add up the parts, the best responses outside them, and the priced budgets."""
        inside = {group for name in parts for group in self._homes[name]}
        charges = Charges.of(self._problem, prices)
        units = sum(
            response.best
            for response in responses(self._problem, self.ranks, charges)
            if response.group not in inside
        )
        for price, row in zip(prices, self._problem.rows, strict=True):
            if row.name not in parts:
                units += integer(price) * row.budget
        return _Bound(prices, parts, Fraction(units, SCALE) + sum(parts.values()))

    def _search_parts(self, prices: tuple[float, ...]) -> int:
        """Solve each searched cap alone at the prices of all other rows; what all spend."""
        problem = self._problem
        ranks = self.ranks
        parts: dict[str, Fraction] = {}
        for home in problem.rows:
            if home.name in self._homes:
                part = best_part(
                    problem,
                    self._homes[home.name],
                    home,
                    home.budget,
                    ranks,
                    self._charge(prices, home),
                    self._left(),
                )
                ranks = part.ranks
                parts[home.name] = part.bound
        self._bounds.append(self._bound(prices, parts))
        self.offer(self._fitted(ranks))
        return problem.cost_of(ranks)

    def _charge(self, prices: tuple[float, ...], home: Row) -> Charge | None:
        """What all rows but one charge; None if that is nothing."""
        own = [0.0 if row is home else p for row, p in zip(self._problem.rows, prices, strict=True)]
        return Charge.of(self._problem.rows, own) if any(own) else None

    def _better_prices(self, prices: tuple[float, ...]) -> None:
        """Move the price of the problem's own budget to where the parts together just spend it."""
        price, budget = prices[0], self._problem.budget
        low, high = 0.0, math.inf
        step = 2.0**-14
        for _ in range(_PRICE_STEPS):
            spent = self._search_parts((price, *prices[1:]))
            if not price or spent == budget or self._late():
                break
            if spent > budget:
                low = price
                price = price * (1 + step) if high == math.inf else (low + high) / 2
            else:
                high = price
                price = price * (1 - step) if low == 0.0 else (low + high) / 2
            step *= 4
            if not low < price < high:
                break

    def _certificate(self, method: str) -> Certificate:
        """What the least of the bounds proves for the incumbent."""
        return self._stated(min(self._bounds, key=lambda bound: bound.total), method)

    def _stated(self, bound: _Bound, method: str) -> Certificate:
        """The gap of the incumbent under a bound: complementary slackness, term by term."""
        problem = self._problem
        home_of = {group: name for name in bound.parts for group in self._homes[name]}
        units = [integer(price) for price in bound.prices]
        scores = dict.fromkeys(bound.parts, 0)
        outside = 0
        for response in responses(problem, self.ranks, Charges.of(problem, bound.prices)):
            if response.group in home_of:
                scores[home_of[response.group]] += response.score
            else:
                outside += response.best - response.score
        gap = Fraction(0)
        within: list[tuple[str, float]] = []
        for k, row in enumerate(problem.rows):
            spent = row.cost_of(self.ranks)
            if row.name not in bound.parts:
                outside += units[k] * (row.budget - spent)
                continue
            # The part's bound is without its own row's charge.
            own = Fraction(scores[row.name] + units[k] * spent, SCALE)
            slack = round_up(max(bound.parts[row.name] - own, Fraction(0)))
            within.append((row.name, slack))
            gap += Fraction(slack)
        gap += Fraction(outside, SCALE)
        return Certificate.of(
            problem.value_of(self.ranks),
            Fraction(0) if self._closed else gap,
            bound.prices[0],
            method,
            closed=not self._late(),
            cap_prices=bound.prices[1:],
            within=() if self._closed else within,
        )

    # -- incumbents ------------------------------------------------------------------------------

    def _improve(self) -> bool:
        """One round of improvements part by part; whether it helped."""
        problem = self._problem
        helped = False
        caps = [(self._members(row), row) for row in self._rows if row.name]
        full = {
            group
            for members, row in caps
            if row.name in self._homes and self._tight(row)
            for group in members
        }
        loose = [group for group in self._groups if group not in full]
        blocks = list(caps)
        if problem.rows[0] in self._rows:
            blocks.append((loose, problem.rows[0]))
        for members, row in blocks:
            if self._late() or not members or not within_range(members, row):
                continue
            part = best_part(
                problem,
                members,
                row,
                self._room(members, row),
                self.ranks,
                time_limit=self._left(),
            )
            helped |= self.offer(self._fitted(part.ranks))
        return helped

    def _tight(self, row: Row) -> bool:
        """Whether no layer of a row could take another rank for want of the row's budget."""
        charged = row.costs[row.layers]
        return row.budget - row.cost_of(self.ranks) < int(charged.max())

    def _room(self, members: list[tuple[int, ...]], row: Row) -> int:
        """What the others leave of a row for a part, and of all rows that charge it the same."""
        layers = [i for group in members for i in group]
        rest = self.ranks.copy()
        rest[layers] = 0
        room = row.budget - row.cost_of(rest)
        for other in self._rows:
            same = np.array_equal(other.costs[layers], row.costs[layers])
            if same and np.array_equal(other.fixed_costs[layers], row.fixed_costs[layers]):
                room = min(room, other.budget - other.cost_of(rest))
        return room

    # -- time ------------------------------------------------------------------------------------

    def _left(self) -> float | None:
        """Seconds that are left; None: no limit."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline
