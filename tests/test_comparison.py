"""Rows of a comparison, and the table that they make."""

from fractions import Fraction

import numpy as np
import pytest

from lorambo_alloc import Allocation, GainCurves, Problem, compare, uniform_rank
from lorambo_alloc.baselines import certified
from lorambo_alloc.comparison import ComparisonRow

SPECTRA = {"0.attn.q": [3.0, 2.0, 1.0], "0.mlp.up": [2.5, 0.5]}


def test_rows():
    comparison = compare(SPECTRA, 44, costs=[16, 12])
    assert isinstance(comparison.rows, tuple)
    assert list(comparison) == list(comparison.rows)
    assert len(comparison) == len(comparison.rows) == 7
    assert comparison.skipped == {}
    row = comparison["uniform"]
    assert (row.rule, row.value, row.cost, row.least_rank, row.greatest_rank) == (
        *("uniform", 15.25),
        *(28, 1, 1),
    )
    assert row.spent == 28 / 44
    assert row.status == "gap_certified"
    assert row.share is not None
    assert row.share <= Fraction(61, 77) < np.nextafter(row.share, 1)
    best = comparison.best
    assert (best.rule, best.value, best.share, best.status) == (
        *("allocate", 19.25),
        *(1.0, "optimal_exact"),
    )
    assert (best.least_rank, best.greatest_rank) == (1, 2)
    with pytest.raises(KeyError, match="nothing"):
        comparison["nothing"]


def test_the_best_row_need_not_be_the_first():
    spectra = GainCurves.from_increments({"a": [12.0], "b": [9.0], "c": [9.0]})

    def both(problem: Problem) -> Allocation:
        return certified(problem, np.array([0, 1, 1]), "both")

    def least(problem: Problem) -> Allocation:
        return certified(problem, problem.lower, "least")

    comparison = compare(
        spectra,
        10,
        costs=[6, 5, 5],
        method="water_filling",
        rules={"least": least, "both": both},
    )
    assert [row.rule for row in comparison] == ["allocate", "both", "least"]
    assert comparison.rows[0].value == 12.0
    assert comparison.best.rule == "both"
    assert comparison["least"].share == 0.0


def test_the_table():
    comparison = compare(
        SPECTRA, uniform_rank(1), costs=[1600, 1200], rules=["uniform", "mlp_only"]
    )
    assert repr(comparison).splitlines() == [
        "rule      value  of optimum   cost  of budget  ranks  status",
        "-------------------------------------------------------------------",
        "allocate  15.25     100.00%  2,800    100.00%   1..1  optimal exact",
        "uniform   15.25     100.00%  2,800    100.00%   1..1  optimal exact",
        "mlp_only    6.5      42.62%  2,400     85.71%   0..2  gap certified",
        "-------------------------------------------------------------------",
        "2 layers, objective frobenius, budget 2,800",
    ]


def test_the_table_rounds_shares_down():
    curves = GainCurves.from_increments({"a": [1.0], "b": [0.99999], "c": [0.00999]})

    def second(problem: Problem) -> Allocation:
        return certified(problem, np.array([0, 1, 0]), "second")

    def third(problem: Problem) -> Allocation:
        return certified(problem, np.array([0, 0, 1]), "third")

    lines = repr(compare(curves, 1, rules={"second": second, "third": third})).splitlines()
    assert lines[2].split()[2] == "100.00%"
    assert lines[3].split()[2] == "99.99%"
    assert lines[4].split()[2] == "0.99%"


def test_the_table_without_a_budget_or_a_share():
    curves = GainCurves({"a": [0.0, -2.0]})
    lines = repr(compare(curves, 5, min_rank=1, rules=["uniform"])).splitlines()
    assert lines[2].split() == ["allocate", "-2", "-", "1", "20.00%", "1..1", "optimal", "exact"]
    lines = repr(compare({"a": [1.0]}, 0, rules=["uniform"])).splitlines()
    assert lines[3].split() == ["uniform", "0", "100.00%", "0", "all", "0..0", "optimal", "exact"]


def test_no_layers():
    comparison = compare({}, 3)
    row = comparison.rows[0]
    assert (row.least_rank, row.greatest_rank, row.cost, row.spent, row.share) == (
        0,
        0,
        0,
        0.0,
        1.0,
    )
    assert compare({}, 0).rows[0].spent == 1.0
    assert "0 layers" in repr(comparison)
    assert "0 layers" in repr(compare({}, 3, rules=[]))


def test_a_row_reads_well():
    comparison = compare(SPECTRA, 4400, costs=[1600, 1200])
    assert isinstance(comparison["uniform"], ComparisonRow)
    assert repr(comparison["uniform"]) == (
        "ComparisonRow(uniform: value 15.25, share 79.22%, cost 2,800, ranks 1..1, gap certified)"
    )
    loss = compare(GainCurves({"a": [0.0, -2.0]}), 5, min_rank=1, rules=[]).rows[0]
    assert repr(loss) == (
        "ComparisonRow(allocate: value -2, share -, cost 1, ranks 1..1, optimal exact)"
    )
