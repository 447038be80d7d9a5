"""A budget that changes while a model is trained: from one level to another, by AdaLoRA's cubic."""

from __future__ import annotations

from dataclasses import dataclass

from lorambo_alloc.costs import UniformRank, whole_number
from lorambo_alloc.objectives import IntArray


@dataclass(frozen=True)
class BudgetSchedule:
    """A budget by step: `start` until step `begin`, `final` from step `end` on. See `cubic_budget`.

    Attributes:
        start: the budget up to `begin`, a whole number >= 0 (or `uniform_rank(r)`, before costs
            are known).
        final: the budget from `end` on, likewise.
        begin: the last step with the budget `start`.
        end: the first step with the budget `final`, above `begin`.

    Raises:
        ValueError: one of them is not of this form.
    """

    start: int | UniformRank
    final: int | UniformRank
    begin: int
    end: int

    def __post_init__(self) -> None:
        # Ints of Python's own: the cube of a long schedule overflows int64.
        for what in ("start", "final", "begin", "end"):
            value = getattr(self, what)
            if what in ("begin", "end") or not isinstance(value, UniformRank):
                object.__setattr__(self, what, whole_number(value, what, least=0))
        if self.end <= self.begin:
            raise ValueError(f"end: expected a step above begin = {self.begin}, got {self.end}")

    def with_costs(self, costs: IntArray, fixed_costs: IntArray) -> BudgetSchedule:
        """The same schedule with both budgets as numbers."""
        start, final = (
            budget.cost(costs, fixed_costs) if isinstance(budget, UniformRank) else budget
            for budget in (self.start, self.final)
        )
        return BudgetSchedule(start, final, self.begin, self.end)

    def at(self, step: int) -> int:
        """The budget of a step, rounded down; in whole numbers throughout.

        Raises:
            ValueError: the step is not a whole number >= 0, or a budget is a `uniform_rank`, whose
                costs are not known here.
        """
        step = whole_number(step, "step", least=0)
        start, final = self.start, self.final
        if isinstance(start, UniformRank) or isinstance(final, UniformRank):
            raise ValueError("expected budgets as numbers, got uniform_rank: with_costs() first")
        if step <= self.begin:
            return start
        if step >= self.end:
            return final
        left, whole = (self.end - step) ** 3, (self.end - self.begin) ** 3
        return final + (start - final) * left // whole

    def least(self, first: int, last: int | None) -> int:
        """The least budget of steps `first` to `last` (None: and ever after).

        The cubic goes one way, so it is that of one end.
        """
        return min(self.at(first), self.at(self.end if last is None else last))


def cubic_budget(
    start: int | UniformRank, final: int | UniformRank, *, begin: int, end: int
) -> BudgetSchedule:
    """A budget that goes from one level to another as AdaLoRA's does, counted in any units.

        budget(t) = final + (start - final) (1 - (t - begin) / (end - begin))^3

    between `begin` and `end`, rounded down. AdaLoRA has `tinit` for `begin` and `total_step -
    tfinal` for `end`; its budget counts ranks.

    Args:
        start: the budget until step `begin`, a whole number >= 0 or `uniform_rank(r)`.
        final: the budget from step `end` on, likewise; less or more than `start`.
        begin: a step >= 0.
        end: a step above `begin`.

    Raises:
        ValueError: an argument is not of this form.

    References:
        Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023,
        eq. (12).

    Example:
        >>> schedule = cubic_budget(800, 100, begin=0, end=10)
        >>> [schedule.at(step) for step in (0, 5, 10, 99)]
        [800, 187, 100, 100]
    """
    return BudgetSchedule(start, final, begin, end)
