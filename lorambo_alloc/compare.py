"""The optimum beside the rules that others use, at one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from types import NoneType
from typing import TypeAlias, cast

import numpy as np

from lorambo_alloc.allocation import Allocation
from lorambo_alloc.arithmetic import round_down
from lorambo_alloc.baselines import RULES
from lorambo_alloc.caps import Caps
from lorambo_alloc.comparison import Comparison, ComparisonRow, exact_value
from lorambo_alloc.costs import PerLayer, UniformRank
from lorambo_alloc.limits import AllowedRanks, Limit
from lorambo_alloc.objectives import Objective
from lorambo_alloc.problem import Problem
from lorambo_alloc.solve import solve

OPTIMUM = "allocate"
"""The name of the row of `allocate`'s own answer."""

Rules: TypeAlias = Iterable[str] | Mapping[str, Callable[[Problem], Allocation]]
"""Names of baselines, or names to functions from a problem to an allocation of it."""


def compare(
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
    method: str = "auto",
    time_limit: float | None = None,
    rules: Rules | None = None,
    fill: bool = False,
) -> Comparison:
    """The best allocation beside what other rules give, at the same budget and limits.

    Every allocation is within the budget, and all are valued by the same gains. What a rule
    loses here it loses on these gains; whether they foretell the quality of a fine-tuned model is
    another question. Convex constraints of the caller's own are not taken: no rule respects them.

    The rules that need a signal of their own (gradients, activations) run on a
    stand-in from the gains unless they are given it, as in
    `rules={"eva": functools.partial(eva, ratios=ratios)}`; see `lorambo_alloc.baselines`.

    Args:
        spectra: as in `allocate`, and so on up to `time_limit`.
        budget: as in `allocate`.
        shapes: as in `allocate`.
        costs: as in `allocate`.
        fixed_costs: as in `allocate`.
        objective: as in `allocate`.
        weights: as in `allocate`.
        min_rank: as in `allocate`.
        max_rank: as in `allocate`.
        multiple_of: as in `allocate`.
        allowed_ranks: as in `allocate`.
        tied: as in `allocate`.
        caps: as in `allocate`.
        method: as in `allocate`, for the first row.
        time_limit: as in `allocate`, for the first row.
        rules: names of baselines; or names to functions that make an `Allocation` of a `Problem`
            (`baselines.certified` makes one of any ranks). None: all baselines that apply.
        fill: whether baselines asked for by name spend what is left over; see
            `lorambo_alloc.baselines`.

    Returns:
        An iterable of rows whose repr is an aligned table.

    Raises:
        ValueError: an argument is not of its form; a rule is unknown, does not apply although it
            was asked for, or returned ranks that break a limit or the budget.
        InfeasibleError: the minimum ranks cost more than the budget or a cap.

    Example:
        >>> spectra = {"0.attn.q": [3.0, 2.0, 1.0], "0.mlp.up": [2.5, 0.5]}
        >>> comparison = compare(spectra, 44, costs=[16, 12], rules=["uniform", "mlp_only"])
        >>> comparison
        rule      value  of optimum  cost  of budget  ranks  status
        ------------------------------------------------------------------
        allocate  19.25     100.00%    44    100.00%   1..2  optimal exact
        uniform   15.25      79.22%    28     63.63%   1..1  gap certified
        mlp_only    6.5      33.76%    24     54.54%   0..2  gap certified
        ------------------------------------------------------------------
        2 layers, objective frobenius, budget 44
        >>> comparison["uniform"].share
        0.7922077922077921
    """
    problem = Problem(
        spectra,
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
    chosen = _chosen(rules, fill)
    answer = solve(problem, method, time_limit)
    skipped: dict[str, str] = {}
    others: list[tuple[str, Allocation]] = []
    for rule, function in chosen.items():
        try:
            allocation = function(problem)
        except ValueError as error:
            if rules is not None:
                raise
            skipped[rule] = str(error)
            continue
        others.append((rule, _checked(rule, allocation, problem)))
    others.sort(key=lambda other: exact_value(other[1]), reverse=True)
    proven = answer.certificate.status == "optimal_exact"
    most = exact_value(answer) if proven else Fraction(answer.certificate.upper_bound)
    start = _start(problem)
    rows: list[ComparisonRow] = []
    for rule, allocation in [(OPTIMUM, answer), *others]:
        value = exact_value(allocation)
        status = allocation.certificate.status
        if proven and value == most:
            status = answer.certificate.status
        rows.append(ComparisonRow(rule, allocation, _share(value - start, most - start), status))
    return Comparison(tuple(rows), proven, skipped)


def _chosen(rules: Rules | None, fill: bool) -> dict[str, Callable[[Problem], Allocation]]:
    """The functions of the rules, by name."""
    if isinstance(rules, Mapping):
        own = dict(cast(Mapping[str, Callable[[Problem], Allocation]], rules))
        for name, function in own.items():
            if not isinstance(name, str) or name == OPTIMUM or not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(
                    f"rules: expected names other than {OPTIMUM!r} to functions, got {name!r}: "
                    f"{function!r}"
                )
        return own
    if isinstance(rules, str):
        rules = [rules]
    known = ", ".join(map(repr, RULES))
    if not isinstance(rules, (Iterable, NoneType)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"rules: expected some of {known}, or names to functions, got {rules!r}")
    names = list(RULES if rules is None else rules)
    for name in names:
        if not isinstance(name, str) or name not in RULES:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"rules: expected some of {known}, got {name!r}")
    return {name: partial(RULES[name], fill=fill) for name in names}


def _checked(rule: str, allocation: object, problem: Problem) -> Allocation:
    if not isinstance(allocation, Allocation) or allocation.problem is not problem:
        raise ValueError(
            f"rules: {rule!r}: expected an Allocation of the problem that the rule was given"
        )
    try:
        problem.check(allocation.ranks)
    except ValueError as error:
        raise ValueError(f"rules: {rule!r}: {error}") from error
    return allocation


def _start(problem: Problem) -> Fraction:
    """The value of rank 0 everywhere, from which shares are counted."""
    return problem.value_of(np.zeros(len(problem.names), dtype=np.int64))


def _share(gained: Fraction, most: Fraction) -> float | None:
    """A share of what nothing exceeds, rounded down."""
    if gained < 0:
        return None
    return round_down(gained / most) if most else 1.0
