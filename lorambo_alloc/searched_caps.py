"""What a certificate that was searched cap by cap proves, checked by searching again."""

from __future__ import annotations

from fractions import Fraction

from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.objectives import IntArray
from lorambo_alloc.problem import Problem
from lorambo_alloc.verification import (
    SCALE,
    CertificateError,
    Response,
    better_exists,
    integer,
    lefts_and_prices,
)


def better_within(
    problem: Problem,
    ranks: IntArray,
    prices: tuple[float, ...],
    searched: list[tuple[int, float]],
    answers: list[Response],
    gap: Fraction,
    effort: int,
) -> bool | None:
    """Whether a search within caps refutes that nothing gains more than the gap.

    By complementary slackness the gap is at most the sum of what is lost outside the searched
    caps, of the priced budgets that are left over, and of what each search leaves open.

    Args:
        problem: that the ranks are for.
        ranks: int64 by layer.
        prices: of the problem's rows (budget and caps), in gain for each unit.
        searched: rows that were searched, with what each search leaves open.
        answers: what each free choice does best at these prices.
        gap: that is claimed.
        effort: nodes that each search may take.

    Returns:
        None where a search was cut short.

    Raises:
        CertificateError: searched caps share layers, or that sum is more than the gap.
    """
    units = list(map(integer, prices))
    inside: set[tuple[int, ...]] = set()
    finished = True
    for k, slack in searched:
        row = problem.rows[k]
        own = [r for r in answers if row.cost_at(r.group, 1)]
        if inside & {r.group for r in own}:
            raise CertificateError(f"{row.where}: searched caps share layers")
        inside |= {r.group for r in own}
        loss = sum(r.best - r.score for r in own)
        loss += units[k] * (row.budget - row.cost_of(ranks))
        window = Fraction(loss, SCALE) - Fraction(slack)
        found = better_exists(
            [moves for r in own if (moves := r.moves([row], window))],
            *lefts_and_prices([row], prices[k : k + 1], own),
            int(window * SCALE),
            effort,
        )
        if found:
            return True
        finished = finished and found is False
    rest = sum(r.best - r.score for r in answers if r.group not in inside)
    priced = {*range(len(units))} - {k for k, _ in searched}
    for k in priced:
        rest += units[k] * (problem.rows[k].budget - problem.rows[k].cost_of(ranks))
    proved = Fraction(rest, SCALE) + sum((Fraction(slack) for _, slack in searched), Fraction(0))
    if proved > gap:
        raise CertificateError(
            f"prices and searched caps prove a gap of {round_up(proved)!r}, more than the "
            f"certificate claims"
        )
    return False if finished else None
