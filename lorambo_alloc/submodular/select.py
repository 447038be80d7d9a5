"""`select`: choose elements under a constraint, and say how good the choice is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorambo_alloc.costs import PerLayer, whole_number
from lorambo_alloc.objectives import real_number
from lorambo_alloc.submodular.bounds import instance_bound
from lorambo_alloc.submodular.constraints import Cardinality, Constraint, Knapsack
from lorambo_alloc.submodular.coupled import CoupledQuadratic
from lorambo_alloc.submodular.greedy import (
    Run,
    density_greedy,
    density_greedy_or_best_single,
    greedy,
    lazy_greedy,
)
from lorambo_alloc.submodular.guarantees import (
    CARDINALITY,
    MATROID,
    MODULAR,
    SUBMODULAR,
    Guarantee,
    guarantee,
)
from lorambo_alloc.submodular.guesses import one_guess, two_guesses
from lorambo_alloc.submodular.local_search import local_search
from lorambo_alloc.submodular.objectives import SetFunction

TWO_GUESSES_UP_TO = 40
"""`auto` guesses two elements for at most so many (820 greedy runs)."""

ONE_GUESS_UP_TO = 200
"""`auto` guesses one element for at most so many."""

LOCAL_SEARCH_UP_TO = 100_000
"""`auto` searches locally where 2^rank x n gains are at most so many."""

_ROWS = 20


@dataclass(frozen=True)
class Selection:
    """A chosen set, with what is proved about it.

    Attributes:
        items: the chosen elements, in the order chosen.
        value: f of them, computed afresh.
        cost: the exact total cost, in the caller's units; their number where there are no costs.
        upper_bound: no feasible set has a value above this (for the class of objective claimed);
            rounded up. Infinite where nothing is known.
        guarantee: the row of the table that holds for this answer.
        prefix_values: f of the first 0, 1, 2, ... of the items.
        ranks: by layer, the number of its candidates chosen; None if the objective has no layers.
        status: always `ratio_certified`: value / upper_bound is proved, optimality is not.
    """

    items: tuple[int, ...]
    value: float
    cost: int
    upper_bound: float
    guarantee: Guarantee
    prefix_values: tuple[float, ...]
    ranks: dict[str, int] | None = None
    status: Literal["ratio_certified"] = "ratio_certified"

    @property
    def ratio(self) -> float:
        """The share of the optimum that the instance's own bound proves; in [0, 1]."""
        if math.isinf(self.upper_bound):
            return 0.0
        return self.value / self.upper_bound if self.upper_bound > 0 else 1.0

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        shown = ", ".join(str(item) for item in self.items[:_ROWS])
        if len(self.items) > _ROWS:
            shown += f", ... {len(self.items) - _ROWS} more"
        lines = [
            f"items       {len(self.items)}: {shown}" if self.items else "items       none",
            f"value       {self.value:.6g}",
            f"cost        {self.cost:,}",
            f"upper bound {self.upper_bound:.6g}",
            f"status      {self.status.replace('_', ' ')}: at least {_percent(self.ratio)} of the "
            "optimum by the instance's bound",
            f"guarantee   {self.guarantee}",
        ]
        if self.ranks is not None:
            names = list(self.ranks)
            width = max([5, *(len(name) for name in names[:_ROWS])])
            table = [f"{'layer'.ljust(width)}  rank"]
            table += [f"{name.ljust(width)}  {self.ranks[name]:>4}" for name in names[:_ROWS]]
            if len(names) > _ROWS:
                table.append(f"... {len(names) - _ROWS} more")
            lines = [*table, "-" * (width + 6), *lines]
        return "\n".join(lines)


def select(
    objective: SetFunction,
    costs: PerLayer[int] | None = None,
    budget: int | None = None,
    *,
    constraint: Constraint | None = None,
    algorithm: str = "auto",
    time_limit: float | None = None,
) -> Selection:
    """Choose elements of large joint value within a budget or another constraint.

    | constraint | objective | `algorithm="auto"` |
    |---|---|---|
    | cardinality, or a knapsack of equal costs | any | greedy (lazy where that saves work) |
    | matroid | modular | greedy: exact |
    | matroid | submodular, 2^rank x n up to 100,000 | local search |
    | matroid | otherwise | greedy |
    | knapsack | (weakly) submodular or modular, n up to 40 | two guesses |
    | knapsack | the same, n up to 200 | one guess |
    | knapsack | the same, more elements | density greedy or best single |

    Args:
        objective: `Modular`, `LogDet`, `Coverage`, `CoupledQuadratic`, or a `Function`.
        costs: a whole number from 1 to 2^53, one an element, or by layer name if the objective
            has layers; without them every element costs 1.
        budget: a whole number >= 0, in the units of the costs.
        constraint: instead of costs and budget.
        algorithm: "auto", or a name of the table of guarantees.
        time_limit: seconds for guesses and local search. If they are over, the answer cites what
            greedy guarantees.

    Raises:
        ValueError: costs, budget, constraint or algorithm do not fit each other or the objective.

    References:
        `lorambo_alloc.submodular.guarantees` names each row's; the upper bound is that of
        Leskovec et al. (2007).

    Example:
        >>> f = CoupledQuadratic([2.0, 1.0, 1.0], [[2, 1, 0], [1, 2, 0], [0, 0, 1]], 1.0,
        ...                      layers=["q", "q", "v"])
        >>> selection = select(f, {"q": 3, "v": 2}, budget=5)
        >>> selection.items, selection.cost, selection.ranks
        ((0, 2), 5, {'q': 1, 'v': 1})
    """
    if not isinstance(objective, SetFunction):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"objective: expected a set function, got {objective!r}")
    constraint, charged = _constraint(objective, costs, budget, constraint)
    constraint.check(objective.n)
    if time_limit is not None and not real_number(time_limit) >= 0:
        raise ValueError(f"time_limit: expected seconds >= 0, got {time_limit!r}")
    if isinstance(constraint, Knapsack) and algorithm in ("auto", "greedy"):
        constraint = constraint.as_cardinality()
    name = _automatic(objective, constraint) if algorithm == "auto" else algorithm
    row = guarantee(constraint.kind, name, objective.kind)
    run = _run(objective, constraint, name, time_limit)
    if not run.complete:
        fallback = "greedy" if constraint.kind == MATROID else "density greedy or best single"
        row = guarantee(constraint.kind, fallback, objective.kind)
    if isinstance(objective, CoupledQuadratic) and row.constraint == CARDINALITY:
        row = row.with_submodularity_ratio(objective.submodularity_ratio())
    value = objective.value(run.items)
    bound = instance_bound(objective, constraint, run.trace)
    return Selection(
        items=run.items,
        value=value,
        cost=charged.cost(run.items),
        upper_bound=max(bound, value),
        guarantee=row,
        prefix_values=_prefix_values(objective, run.items),
        ranks=_ranks(objective, run.items),
    )


def _constraint(
    objective: SetFunction,
    costs: PerLayer[int] | None,
    budget: int | None,
    constraint: Constraint | None,
) -> tuple[Constraint, Constraint]:
    """The constraint, and the one that knows what sets cost."""
    if constraint is not None:
        if costs is not None or budget is not None:
            raise ValueError("constraint: expected either a constraint or costs and a budget")
        if not isinstance(constraint, Constraint):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"constraint: expected a constraint, got {constraint!r}")
        return constraint, constraint
    if budget is None:
        raise ValueError("budget: expected a whole number >= 0, or a constraint; got neither")
    if costs is None:
        limit = Cardinality(whole_number(budget, "budget", least=0))
        return limit, limit
    knapsack = Knapsack(_costs(objective, costs), budget)
    return knapsack, knapsack


def _costs(objective: SetFunction, costs: PerLayer[int]) -> Sequence[int]:
    """One cost an element."""
    if not isinstance(costs, Mapping):
        return costs
    if objective.layers is None:
        raise ValueError("costs: expected one an element; by name they need objective.layers")
    for name in dict.fromkeys(objective.layers):
        if name not in costs:
            raise ValueError(f"costs: layer {name!r} is missing")
    for name in costs:
        if name not in objective.layers:
            raise ValueError(f"costs: layer {name!r} is not among the objective's layers")
    return [costs[name] for name in objective.layers]


def _automatic(objective: SetFunction, constraint: Constraint) -> str:
    if constraint.kind == CARDINALITY:
        return "greedy"
    if constraint.kind == MATROID:
        if objective.kind != SUBMODULAR:
            return "greedy"
        room, rank = constraint.room(objective.n), 0
        while room.open.any() and (objective.n << rank) <= LOCAL_SEARCH_UP_TO:
            room.add(int(room.open.argmax()))
            rank += 1
        return "local search" if (objective.n << rank) <= LOCAL_SEARCH_UP_TO else "greedy"
    if objective.n <= TWO_GUESSES_UP_TO:
        return "two guesses"
    return "one guess" if objective.n <= ONE_GUESS_UP_TO else "density greedy or best single"


def _run(
    objective: SetFunction, constraint: Constraint, name: str, time_limit: float | None
) -> Run:
    if isinstance(constraint, Knapsack):
        plain: dict[str, Callable[[SetFunction, Knapsack], Run]] = {
            "density greedy": density_greedy,
            "density greedy or best single": density_greedy_or_best_single,
        }
        if name in plain:
            return plain[name](objective, constraint)
        guess: Any = {"one guess": one_guess, "two guesses": two_guesses}[name]
        return guess(objective, constraint, time_limit=time_limit)
    if name == "local search":
        return local_search(objective, constraint, time_limit=time_limit)
    # Weakly submodular: gains may grow, so earlier ones are no bounds, and laziness errs.
    lazy = not objective.incremental and objective.kind in (MODULAR, SUBMODULAR)
    return lazy_greedy(objective, constraint) if lazy else greedy(objective, constraint)


def _prefix_values(objective: SetFunction, items: Sequence[int]) -> tuple[float, ...]:
    state = objective.start()
    values = [state.value]
    for item in items:
        state.add(item)
        values.append(state.value)
    return tuple(values)


def _ranks(objective: SetFunction, items: Sequence[int]) -> dict[str, int] | None:
    if objective.layers is None:
        return None
    ranks = dict.fromkeys(objective.layers, 0)
    for item in items:
        ranks[objective.layers[item]] += 1
    return ranks


def _percent(share: float) -> str:
    return f"{math.floor(share * 10_000) / 100:.2f}%"
