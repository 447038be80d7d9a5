"""Parts of a problem: what they are worth at most, never too little by a rounding."""

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.caps import Cap, Row
from lorambo_alloc.solvers.parts import Charge, best_part, within_range
from lorambo_alloc.testing import Instance
from tests.strategies import capped, examples, instances

prices = st.one_of(
    st.just(0.0),
    st.floats(1e-6, 1e3),
    st.floats(1e-300, 1e-200),
    st.just(5e-324),
    st.just(2.0**900),
)


def members_of(problem: Problem, row: Row) -> list[tuple[int, ...]]:
    return [group for group in problem.variables if any(row.costs[i] for i in group)]


def exact_charge(problem: Problem, own_prices: list[float], ranks: Any) -> Fraction:
    rows = zip(problem.rows, own_prices, strict=True)
    return sum((Fraction(price) * row.cost_of(ranks) for row, price in rows), Fraction(0))


def best_by_hand(problem: Problem, members, row: Row, budget: int, own_prices) -> Fraction:
    """The greatest value less charges of the members within the row, by enumeration."""
    best: Fraction | None = None
    choices = (problem.allowed_ranks(group[0]).tolist() for group in members)
    for choice in product(*choices):
        ranks = np.zeros(len(problem.names), dtype=np.int64)
        for group, rank in zip(members, choice, strict=True):
            ranks[list(group)] = rank
        if row.cost_of(ranks) <= budget:
            value = problem.value_of(ranks) - exact_charge(problem, own_prices, ranks)
            best = value if best is None else max(best, value)
    assert best is not None
    return best


class TestCharge:
    @given(capped(instances(layers=3, ranks=3)), st.data())
    @settings(max_examples=examples(0.5))
    def test_it_is_never_more_than_what_is_due(self, instance: Instance, data):
        problem = instance.problem()
        drawn = data.draw(st.lists(prices, min_size=len(problem.rows), max_size=len(problem.rows)))
        charge = Charge.of(problem.rows, drawn)
        rows = list(zip(problem.rows, drawn, strict=True))
        for i in range(len(problem.names)):
            due = sum((Fraction(p) * int(row.costs[i]) for row, p in rows), Fraction(0))
            once = sum((Fraction(p) * int(row.fixed_costs[i]) for row, p in rows), Fraction(0))
            for taken, owed in ((charge.per_rank[i], due), (charge.fixed[i], once)):
                assert Fraction(float(taken)) <= owed
                assert Fraction(float(taken)) >= owed * (1 - Fraction(1, 2**45)) - Fraction(5e-324)

    def test_rows_without_a_price_charge_nothing(self):
        row = Row("", np.array([3, 0]), np.array([2, 0]), 9)
        other = Row("x", np.array([0, 5]), np.array([0, 7]), 9)
        charge = Charge.of([row, other], [0.0, 2.0])
        assert charge.per_rank == pytest.approx([0.0, 10.0], rel=1e-12)
        assert charge.fixed == pytest.approx([0.0, 14.0], rel=1e-12)
        assert charge.per_rank[1] < 10.0


@given(capped(instances(layers=4, ranks=3)), st.data())
@settings(max_examples=examples(2))
def test_the_bound_holds_for_every_choice(instance: Instance, data):
    problem = instance.problem()
    row = data.draw(st.sampled_from(problem.rows))
    members = members_of(problem, row)
    drawn = [0.0 if own is row else data.draw(prices) for own in problem.rows]
    charge = Charge.of(problem.rows, drawn) if any(drawn) else None
    if not within_range(members, row):
        return
    before = problem.upper.copy()
    part = best_part(problem, members, row, row.budget, before, charge)
    optimum = best_by_hand(problem, members, row, row.budget, drawn)
    assert part.bound >= optimum
    layers = [i for group in members for i in group]
    others = [i for i in range(len(problem.names)) if i not in layers]
    assert part.ranks[others].tolist() == before[others].tolist()
    inside = np.zeros_like(part.ranks)
    inside[layers] = part.ranks[layers]
    assert row.cost_of(inside) <= row.budget
    problem.limits.check(np.where(inside > 0, inside, problem.lower))
    value = problem.value_of(inside) - exact_charge(problem, drawn, inside)
    assert value <= optimum
    if charge is None and all(row.costs[i] for i in layers):
        assert value == optimum == part.bound
    else:
        # Rounding alone lies between them.
        magnitude = max(
            (
                float(np.abs(np.diff(problem.curve(i))).sum()) + c * float(problem.upper[i]) + f
                for i, c, f in zip(
                    layers,
                    charge.per_rank[layers] if charge else np.zeros(len(layers)),
                    charge.fixed[layers] if charge else np.zeros(len(layers)),
                    strict=True,
                )
            ),
            default=0.0,
        )
        slack = Fraction(magnitude * len(layers)) * Fraction(1, 2**38) + Fraction(2.0**-1000)
        assert part.bound <= optimum + slack
        assert value >= optimum - slack
    assert before.tolist() == problem.upper.tolist()


def part_of(problem: Problem, row: Row, own_prices: list[float] | None = None, budget=None):
    charge = None if own_prices is None else Charge.of(problem.rows, own_prices)
    budget = row.budget if budget is None else budget
    return best_part(problem, members_of(problem, row), row, budget, problem.lower, charge)


class TestExamples:
    def test_without_a_charge_it_is_exact(self):
        problem = Problem(
            {"a": [3.0, 2.0], "b": [2.5], "c": [9.0]}, 99, caps={"x": (["b", "a"], 2)}
        )
        part = part_of(problem, problem.caps[0])
        assert part.ranks.tolist() == [1, 1, 0]
        assert part.bound == 9 + Fraction(2.5) ** 2

    def test_a_charge_keeps_what_is_worth_less_out(self):
        problem = Problem(
            {"a": [3.0, 2.0], "b": [2.5], "c": [9.0]}, 99, caps={"x": (["b", "a"], 3)}
        )
        part = part_of(problem, problem.caps[0], [5.0, 0.0])
        assert part.ranks.tolist() == [1, 1, 0]
        assert float(part.bound) == pytest.approx(4 + 1.25, rel=1e-12)
        assert part.bound >= 4 + Fraction(2.5) ** 2 - 5

    def test_a_smaller_budget(self):
        problem = Problem({"a": [3.0, 2.0], "b": [2.5]}, 99, caps={"x": (["b", "a"], 3)})
        part = part_of(problem, problem.caps[0], budget=1)
        assert part.ranks.tolist() == [1, 0]
        assert part.bound == 9

    def test_fixed_costs_of_the_row(self):
        caps = {"x": Cap(["a", "b"], 10, [3, 3], [4, 0])}
        problem = Problem({"a": [3.0, 2.0], "b": [2.5, 2.0]}, 99, caps=caps)
        part = part_of(problem, problem.caps[0])
        assert part.ranks.tolist() in ([1, 1], [2, 0])
        assert part.ranks.tolist() == [1, 1]
        assert part.bound == 9 + Fraction(2.5) ** 2
        part = part_of(problem, problem.caps[0], [1.0, 0.0])
        assert part.ranks.tolist() == [1, 1]
        assert float(part.bound) == pytest.approx(9 + 6.25 - 2, rel=1e-12)

    def test_fixed_costs_are_charged_once(self):
        problem = Problem(
            {"a": [3.0, 2.0]}, 99, costs=[2], fixed_costs=[7], caps={"x": Cap(["a"], 2, [1])}
        )
        part = part_of(problem, problem.caps[0], [0.5, 0.0])
        assert part.ranks.tolist() == [2]
        assert float(part.bound) == pytest.approx(13 - 0.5 * (2 * 2 + 7), rel=1e-12)
        part = part_of(problem, problem.caps[0], [1.25, 0.0])
        assert (part.ranks.tolist(), part.bound) == ([0], 0)

    @pytest.mark.parametrize("charged", [False, True])
    def test_limits_hold_in_parts(self, charged):
        spectra = {"a": [5.0, 4.0, 3.0], "b": [4.0, 3.0, 2.0], "c": [9.0, 8.0]}
        own_prices = [0.125, 0.0] if charged else None
        cases: list[tuple[dict[str, Any], list[int]]] = [
            ({"max_rank": {"a": 1}, "min_rank": {"b": 2}}, [1, 3, 0]),
            ({"allowed_ranks": {"a": [0, 2], "b": [1, 2]}}, [2, 2, 0]),
            ({"multiple_of": 2}, [2, 2, 0]),
            ({"tied": [["b", "a"]]}, [2, 2, 0]),
            ({"min_rank": {"b": 3}}, [1, 3, 0]),
        ]
        for limits, ranks in cases:
            problem = Problem(spectra, 99, caps={"x": (["a", "b"], 4)}, **limits)
            part = part_of(problem, problem.caps[0], own_prices)
            assert part.ranks.tolist() == ranks, limits

    def test_tied_layers_across_the_edge_of_a_cap(self):
        spectra = {"a": [3.0, 2.0], "b": [2.5, 1.0], "c": [9.0, 1.0]}
        problem = Problem(spectra, 99, caps={"x": (["b", "a"], 2)}, tied=[["a", "c"]])
        part = part_of(problem, problem.caps[0])
        # c comes with a, without a cost in the cap.
        assert part.ranks.tolist() == [1, 1, 1]
        assert float(part.bound) == pytest.approx(9 + 81 + 6.25, rel=1e-12)
        assert part.bound >= 9 + 81 + Fraction(2.5) ** 2

    def test_totals_whose_increments_are_no_doubles(self):
        curves = GainCurves({"a": [0.0, 2.0**-60, 1.0], "b": [0.0, 0.5]})
        problem = Problem(curves, 99, caps={"x": (["a", "b"], 2)})
        part = part_of(problem, problem.caps[0])
        assert (part.ranks.tolist(), part.bound) == ([2, 0], 1)
        part = part_of(problem, problem.caps[0], [0.25, 0.0])
        assert part.ranks.tolist() == [2, 0]
        assert 0.5 <= part.bound <= Fraction(0.5 + 1e-12)

    def test_an_answer_that_ran_out_of_time_is_still_bounded(self):
        rng = np.random.default_rng(0)
        costs = rng.integers(1000, 60_000, 60)
        curves = GainCurves.from_increments([[float(c)] * 9 for c in costs])
        problem = Problem(
            curves, 1 << 50, costs=costs.tolist(), caps={"x": (list(curves), 10**6 + 1)}
        )
        row = problem.caps[0]
        members = members_of(problem, row)
        quick = best_part(problem, members, row, row.budget, problem.lower, None, 0.0)
        assert quick.bound >= problem.value_of(quick.ranks)
        assert quick.bound <= 10**6 + 1

    @pytest.mark.parametrize("exponent", [-950, -905, -899, 899, 905, 948])
    @pytest.mark.parametrize("kind", ["increments", "totals", "tied"])
    def test_gains_of_any_scale(self, exponent, kind):
        """Parts of a problem may have gains that a problem of its own is refused for."""
        unit = 2.0**exponent
        rows = [[5.0, 3.0], [4.0, 1.0], [2.0**-880 / unit if exponent < 0 else 1.0]]
        rows = [[gain * unit for gain in row] for row in rows]
        if kind == "totals":
            curves = GainCurves([np.concatenate([[0.0], np.cumsum(row)]) for row in rows])
        else:
            curves = GainCurves.from_increments(rows)
        tied = [["1", "2"]] if kind == "tied" else []
        problem = Problem(curves, 99, caps={"x": Cap(["0", "1"], 2, [1, 1])}, tied=tied)
        row = problem.caps[0]
        for own_prices in (None, [unit / 2, 0.0]):
            part = part_of(problem, row, own_prices)
            best = best_by_hand(problem, members_of(problem, row), row, 2, own_prices or [0.0, 0.0])
            assert best <= part.bound <= best * (1 + Fraction(1, 2**40))
            assert part.ranks[:2].tolist() == [1, 1]

    def test_charges_far_beyond_the_gains(self):
        # A charge of 2^1000 on a rank whose gain is 2^900 or so.
        curves = GainCurves.from_increments([[2.0**940, 3 * 2.0**738], [2.0**730]])
        caps = {"x": Cap(["0", "1"], 2, [1, 1])}
        problem = Problem(curves, 1 << 53, costs=[1, 1 << 53], caps=caps)
        part = part_of(problem, problem.caps[0], [2.0**745, 0.0])
        assert part.ranks.tolist() == [1, 0]
        exact = Fraction(2.0**940) - Fraction(2.0**745)
        assert exact <= part.bound <= exact * (1 + Fraction(1, 2**50))

    @pytest.mark.parametrize("kind", ["increments", "tied"])
    def test_what_scaling_down_loses_is_rounded_up(self, kind):
        # 2^-960 of the third gain is lost where 2^948 must be scaled down by 2^200.
        tiny = 2.0**-880 * (1 + 2.0**-40)
        curves = GainCurves.from_increments([[2.0**948], [tiny], [tiny]])
        tied = [["1", "2"]] if kind == "tied" else []
        problem = Problem(curves, 99, caps={"x": Cap(["0", "1"], 2, [1, 1])}, tied=tied)
        part = part_of(problem, problem.caps[0])
        exact = Fraction(2.0**948) + Fraction(tiny) * (2 if tied else 1)
        assert part.bound >= exact
        assert float(part.bound) == 2.0**948 or tied


class TestRange:
    def test_costs_of_tied_layers_together(self):
        row = Row("x", np.array([1 << 52, 1 << 52, 1]), np.array([0, 0, 0]), 9)
        assert within_range([(0, 1), (2,)], row)
        assert not within_range([(0, 1, 2)], row)
        assert not within_range([(2,), (0, 1, 2)], row)
        assert within_range([], row)

    def test_fixed_costs_too(self):
        row = Row("x", np.array([1, 1]), np.array([1 << 53, 1]), 9)
        assert within_range([(0,), (1,)], row)
        assert not within_range([(0, 1)], row)

    def test_its_edge_is_that_of_problems(self):
        edge = 1 << 53
        row = Row("x", np.array([edge]), np.array([0]), 9)
        assert within_range([(0,)], row)
        Problem({"a": [1.0]}, 1, costs=[edge])
        with pytest.raises(ValueError, match=r"at most 2\^53"):
            Problem({"a": [1.0]}, 1, costs=[edge + 1])
