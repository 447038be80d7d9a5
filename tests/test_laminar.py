"""Laminar matroids: which problems are one, and what no single exchange improves."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings

from lorambo_alloc import GainCurves, Problem
from lorambo_alloc.caps import Cap
from lorambo_alloc.laminar import binding_rows, exchange_optimal, laminar_family
from lorambo_alloc.testing import Instance, brute_force
from tests.checks import all_feasible
from tests.strategies import capped, examples, instances, laminar

SPECTRA = {"a": [3.0, 2.0], "b": [2.5, 1.0], "c": [2.0, 0.5], "d": [1.5]}


def sets(problem: Problem) -> list[tuple[str, list[int], int, int]] | None:
    family = laminar_family(problem)
    if family is None:
        return None
    return [(own.row.name, own.layers.tolist(), own.cost, own.capacity) for own in family]


class TestBindingRows:
    def names(self, budget, caps, **keywords) -> list[str]:
        return [row.name for row in binding_rows(Problem(SPECTRA, budget, caps=caps, **keywords))]

    def test_only_what_some_ranks_would_break(self):
        caps = {"tight": (["a"], 3), "loose": (["a"], 4), "wide": (["a", "b"], 6)}
        assert self.names(14, caps, costs=[2, 2, 2, 2]) == ["tight", "wide"]
        assert self.names(8, caps, costs=[2, 2, 2, 2], max_rank=1) == []
        assert self.names(7, caps, costs=[2, 2, 2, 2], max_rank=1) == [""]
        assert self.names(7, {}) == []
        assert self.names(6, {}) == [""]

    def test_a_budget_that_others_imply_does_not_bind(self):
        # a at most 1, b and c at most 2, d at most 1 by its length: 4 in all.
        caps = {"a": (["a"], 1), "bc": (["b", "c"], 2)}
        assert self.names(4, caps) == ["a", "bc"]
        assert self.names(3, caps) == ["", "a", "bc"]
        assert self.names(9, {**caps, "abc": (["a", "b", "c"], 3)}) == ["a", "bc"]
        assert self.names(9, {**caps, "abc": (["a", "b", "c"], 2)}) == ["a", "bc", "abc"]

    def test_groups_that_overlap_imply_nothing_together(self):
        caps = {"ab": (["a", "b"], 2), "bc": (["b", "c"], 2), "abc": (["a", "b", "c"], 4)}
        # a and c alone are 4; with b they are more.
        assert self.names(9, caps) == ["ab", "bc"]
        assert self.names(9, {**caps, "abc": (["a", "b", "c"], 3)}) == ["ab", "bc", "abc"]

    def test_small_groups_or_large_ones(self):
        caps = {
            "a": (["a"], 0),
            "ab": (["a", "b"], 1),
            "abc": (["a", "b", "c"], 4),
        }
        # a at most 0 and b, c at most 2 each by their length; or ab at most 1, and c 2.
        assert self.names(9, caps) == ["a", "ab"]
        assert self.names(9, {**caps, "abc": (["a", "b", "c"], 3)}) == ["a", "ab"]
        assert self.names(9, {**caps, "abc": (["a", "b", "c"], 2)}) == ["a", "ab", "abc"]

    def test_other_units_imply_nothing(self):
        for cap in (Cap(["a"], 1, [2]), Cap(["a"], 2, [1], [1])):
            assert self.names(9, {"x": cap, "wide": (["a", "b"], 3)}) == ["x", "wide"]
        assert self.names(9, {"x": Cap(["a"], 1, [1]), "wide": (["a", "b"], 3)}) == ["x"]

    def test_of_equal_ones_the_tighter_is_kept(self):
        assert self.names(9, {"x": (["a", "b"], 3), "y": (["b", "a"], 2)}) == ["y"]
        assert self.names(9, {"x": (["a", "b"], 2), "y": (["b", "a"], 3)}) == ["x"]
        assert len(self.names(9, {"x": (["a", "b"], 2), "y": (["b", "a"], 2)})) == 1

    @given(capped(instances(layers=4, ranks=2)))
    @settings(max_examples=examples(1))
    def test_what_is_left_out_is_never_broken(self, instance: Instance):
        problem = instance.problem()
        kept = binding_rows(problem)
        for ranks in product(*(problem.allowed_ranks(i) for i in range(len(problem.names)))):
            vector = np.array(ranks)
            if all(row.cost_of(vector) <= row.budget for row in kept):
                assert problem.fits(vector)


class TestFamily:
    def test_inner_sets_come_first(self):
        caps = {"outer": (["a", "b", "c"], 11), "inner": (["b", "a"], 7), "apart": (["d"], 2)}
        problem = Problem(SPECTRA, 12, costs=[3, 3, 3, 3], caps=caps)
        assert sets(problem) == [
            ("apart", [3], 3, 0),
            ("inner", [0, 1], 3, 2),
            ("outer", [0, 1, 2], 3, 3),
            ("", [0, 1, 2, 3], 3, 4),
        ]

    def test_units_may_differ_between_sets(self):
        caps = {"bytes": Cap(["a", "b"], 25, [10, 10])}
        problem = Problem(SPECTRA, 3, caps=caps)
        assert sets(problem) == [("bytes", [0, 1], 10, 2), ("", [0, 1, 2, 3], 1, 3)]

    def test_nothing_binds(self):
        assert sets(Problem(SPECTRA, 7)) == []
        assert sets(Problem({}, 0)) == []

    @pytest.mark.parametrize(
        ("caps", "keywords"),
        [
            ({"x": (["a", "b"], 2), "y": (["b", "c"], 2)}, {}),
            ({"x": (["a", "b"], 2), "y": (["b", "c", "d"], 2)}, {}),
            ({"x": Cap(["a", "b"], 4, [2, 3])}, {}),
            ({"x": Cap(["a", "b"], 3, [1, 1], [1, 0])}, {}),
            ({}, {"costs": [1, 1, 1, 2]}),
            ({}, {"fixed_costs": [0, 0, 0, 1]}),
            ({}, {"multiple_of": 2, "max_rank": {"d": 0}}),
            ({}, {"allowed_ranks": {"a": [0, 2]}}),
            ({}, {"tied": [["a", "b"]]}),
        ],
    )
    def test_what_is_none(self, caps, keywords):
        problem = Problem(SPECTRA, 3, caps=caps, **keywords)
        assert sets(problem) is None
        assert not exchange_optimal(problem, problem.lower)

    def test_gains_that_do_not_descend(self):
        curves = GainCurves.from_increments({"a": [1.0, 2.0], "b": [1.0]})
        assert sets(Problem(curves, 2)) is None

    def test_loose_caps_do_not_matter(self):
        caps = {"x": (["a", "b"], 4), "y": (["b", "c"], 4), "z": Cap(["a", "d"], 99, [5, 9])}
        assert sets(Problem(SPECTRA, 3, caps=caps)) == [("", [0, 1, 2, 3], 1, 3)]

    def test_disjoint_within_one(self):
        caps = {"x": (["a", "b"], 2), "y": (["c", "d"], 2), "all": (["a", "b", "c", "d"], 3)}
        problem = Problem(SPECTRA, 9, caps=caps)
        family = sets(problem)
        assert family is not None
        assert [name for name, *_ in family] == ["x", "y", "all"]


class TestExchange:
    problem = Problem(SPECTRA, 4, caps={"ab": (["a", "b"], 2)})

    @pytest.mark.parametrize(
        ("ranks", "optimal"),
        [
            ([1, 1, 1, 1], True),
            ([2, 0, 1, 1], False),  # b's first is worth more than a's second
            ([1, 1, 2, 0], False),
            ([1, 1, 1, 0], False),  # room is left
            ([0, 2, 1, 1], False),
        ],
    )
    def test_single_exchanges(self, ranks, optimal):
        assert exchange_optimal(self.problem, np.array(ranks)) == optimal

    def test_ties_are_no_improvement(self):
        problem = Problem({"a": [2.0, 2.0], "b": [2.0]}, 2)
        for ranks in ([2, 0], [1, 1]):
            assert exchange_optimal(problem, np.array(ranks))

    def test_what_is_worth_nothing_is_not_missed(self):
        problem = Problem({"a": [1.0, 0.0], "b": [0.0]}, 9, min_rank=0)
        assert exchange_optimal(problem, np.array([1, 0]))
        assert exchange_optimal(problem, np.array([2, 1]))
        assert not exchange_optimal(problem, np.array([0, 1]))

    def test_losses_are_given_back_unless_forced(self):
        curves = GainCurves.from_increments({"a": [1.0, -1.0], "b": [-2.0]})
        problem = Problem(curves, 9)
        assert exchange_optimal(problem, np.array([1, 0]))
        assert not exchange_optimal(problem, np.array([2, 0]))
        assert not exchange_optimal(problem, np.array([1, 1]))
        assert exchange_optimal(Problem(curves, 9, min_rank={"b": 1}), np.array([1, 1]))

    def test_forced_ranks_are_not_exchanged(self):
        problem = Problem({"a": [2.0, 1.0], "b": [3.0, 2.5]}, 2, min_rank={"a": 1})
        assert exchange_optimal(problem, np.array([1, 1]))
        assert not exchange_optimal(problem, np.array([2, 0]))

    def test_the_next_ulp_counts(self):
        for second, optimal in ((1.0, True), (np.nextafter(1.0, 2.0), False)):
            curves = GainCurves.from_increments({"a": [1.0], "b": [second]})
            assert exchange_optimal(Problem(curves, 1), np.array([1, 0])) == optimal

    def test_a_full_inner_set_protects_what_is_outside(self):
        # a is worth more than c, but the set of a and b is full.
        curves = GainCurves.from_increments({"a": [5.0, 4.0], "b": [6.0], "c": [1.0]})
        problem = Problem(curves, 3, caps={"ab": (["a", "b"], 2)})
        assert exchange_optimal(problem, np.array([1, 1, 1]))

    def test_a_full_outer_set_exchanges_across_inner_sets(self):
        curves = GainCurves.from_increments({"a": [5.0, 4.0], "b": [6.0], "c": [1.0], "d": [2.0]})
        problem = Problem(curves, 2, caps={"ab": (["a", "b"], 2)})
        assert exchange_optimal(problem, np.array([1, 1, 0, 0]))
        assert not exchange_optimal(problem, np.array([0, 1, 0, 1]))

    def test_no_layers(self):
        assert exchange_optimal(Problem({}, 0), np.zeros(0, dtype=np.int64))

    def test_no_layer_is_asked_for_ranks_that_it_does_not_have(self):
        problem = Problem({"a": [2.0], "b": [1.0]}, 1, max_rank={"b": 0})
        assert exchange_optimal(problem, np.array([1, 0]))


@given(laminar(layers=4, ranks=3))
@settings(max_examples=examples(1))
def test_exchanges_decide_optimality(instance: Instance):
    problem = instance.problem()
    assert laminar_family(problem) is not None
    optimum = brute_force(problem)[0]
    for ranks in all_feasible(problem):
        assert exchange_optimal(problem, ranks) == (problem.value_of(ranks) == optimum)


@given(capped(instances(layers=3, ranks=3)))
@settings(max_examples=examples(1))
def test_no_inferior_ranks_pass_in_any_problem(instance: Instance):
    problem = instance.problem()
    optimum = brute_force(problem)[0]
    for ranks in all_feasible(problem):
        if problem.value_of(ranks) < optimum:
            assert not exchange_optimal(problem, ranks)
