"""What `compare` found: a row a rule, and their table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lorambo_alloc.allocation import Allocation


@dataclass(frozen=True, repr=False)
class ComparisonRow:
    """What one rule achieved.

    Attributes:
        rule: its name; "allocate" for the library's own answer.
        allocation: its ranks, with a certificate of their own.
        share: of the optimum's value, between 0 and 1, rounded down. Where the optimum is not
            proven: of the upper bound, so that the share of the optimum is no less. None for a
            value below 0, 1 where nothing can be gained.
            For `operator`: of the way from the largest value discarded at rank 0 to the least.
        status: `optimal_exact` where the value is that of the proven optimum; else the status of
            the allocation's own certificate.
    """

    rule: str
    allocation: Allocation
    share: float | None
    status: str

    @property
    def value(self) -> float:
        """The sum of the gains, rounded down (`operator`: minus the largest discarded value)."""
        return self.allocation.value

    @property
    def cost(self) -> int:
        """What the ranks cost, in the units of the budget."""
        return self.allocation.cost

    @property
    def spent(self) -> float:
        """The cost as a share of the budget; 1.0 of a budget of 0."""
        return self.cost / self.allocation.budget if self.allocation.budget else 1.0

    @property
    def least_rank(self) -> int:
        """The least rank of any layer; 0 without layers."""
        return int(np.min(self.allocation.ranks)) if len(self.allocation) else 0

    @property
    def greatest_rank(self) -> int:
        """The greatest rank of any layer; 0 without layers."""
        return int(np.max(self.allocation.ranks, initial=0))

    def __repr__(self) -> str:
        share = "-" if self.share is None else _percent(Fraction(self.share))
        return (
            f"ComparisonRow({self.rule}: value {self.value:.6g}, share {share}, "
            f"cost {self.cost:,}, ranks {self.least_rank}..{self.greatest_rank}, "
            f"{self.status.replace('_', ' ')})"
        )


@dataclass(frozen=True, repr=False)
class Comparison:
    """Rows of a comparison: the library's own answer first, then the rules, best value first.

    Attributes:
        rows: the rows.
        proven: whether the first row is optimal exactly, so that shares are of the optimum; else
            they are of its upper bound.
        skipped: rules that do not apply to the problem, with the reason.
    """

    rows: tuple[ComparisonRow, ...]
    proven: bool
    skipped: Mapping[str, str]

    @property
    def best(self) -> ComparisonRow:
        """The row of the greatest value; of equals the first."""
        return max(self.rows, key=lambda row: exact_value(row.allocation))

    def __iter__(self) -> Iterator[ComparisonRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rule: str) -> ComparisonRow:
        for row in self.rows:
            if row.rule == rule:
                return row
        raise KeyError(rule)

    def __repr__(self) -> str:
        problem = self.rows[0].allocation.problem
        share = "of optimum" if self.proven else "of bound"
        table = [("rule", "value", share, "cost", "of budget", "ranks", "status")]
        for row in self.rows:
            table.append(
                (
                    row.rule,
                    f"{row.value:.6g}",
                    "-" if row.share is None else _percent(Fraction(row.share)),
                    f"{row.cost:,}",
                    _percent(Fraction(row.cost, problem.budget)) if problem.budget else "all",
                    f"{row.least_rank}..{row.greatest_rank}",
                    row.status.replace("_", " "),
                )
            )
        widths = [max(len(line[n]) for line in table) for n in range(len(table[0]))]
        left = (0, len(widths) - 1)
        lines = [
            "  ".join(
                cell.ljust(width) if n in left else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        lines.append(lines[1])
        lines.append(
            f"{len(problem.names)} layers, objective {problem.objective}, budget {problem.budget:,}"
        )
        if not self.proven:
            lines.append("shares are of the upper bound: of the optimum they are no less")
        lines += [f"left out: {rule}: {reason}" for rule, reason in self.skipped.items()]
        return "\n".join(lines)


def exact_value(allocation: Allocation) -> Fraction:
    """The value, exactly, whatever a certificate says."""
    return allocation.problem.value_of(allocation.ranks)


def _percent(share: Fraction) -> str:
    """Rounded down, so that 100.00% means all."""
    hundredths = int(share * 10_000)
    return f"{hundredths // 100}.{hundredths % 100:02}%"
