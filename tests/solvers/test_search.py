"""The search: an incumbent and a proved gap, narrowed run by run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, solve
from lorambo_alloc.solvers import search
from lorambo_alloc.solvers.concave import ConcaveForm
from lorambo_alloc.solvers.exact import form_of
from lorambo_alloc.solvers.multiple_choice import MultipleChoiceForm
from lorambo_alloc.solvers.search import Search
from lorambo_alloc.testing import HARD_FAMILIES, brute_force, dynamic_program
from tests.checks import check_optimum
from tests.strategies import examples, instances


def test_forms():
    spectra = {"a": [2.0, 1.0]}
    assert isinstance(form_of(Problem(spectra, 3)), ConcaveForm)
    assert isinstance(form_of(Problem(spectra, 3, multiple_of=2)), MultipleChoiceForm)


@pytest.mark.parametrize("general", [False, True])
def test_a_stopped_search_narrows_its_gap(general):
    instance = HARD_FAMILIES["weakly_correlated"](30, 20)
    keywords = {**instance.keywords, "multiple_of": 2 if general else 1}
    problem = Problem(instance.spectra, instance.budget, **keywords)
    search = Search(form_of(problem))
    optimum = solve(problem)
    assert optimum.certificate.status == "optimal_exact"
    gaps = [search.gap]
    while not search.finished and search.advance():
        gaps.append(search.gap)
        # At every point the answer is certified, and the optimum lies within the gap.
        check_optimum(search.allocation("so far"), problem.value_of(optimum.ranks))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0 < gaps[0]


def test_offers_are_taken_only_if_better_and_affordable():
    problem = HARD_FAMILIES["weakly_correlated"](10, 8).problem()
    search = Search(form_of(problem))
    gap, ranks = search.gap, search.ranks
    value = problem.value_of(ranks)
    search.offer(problem.upper)  # over the budget
    search.offer(ranks)
    search.offer(problem.lower)
    assert search.ranks is ranks
    assert search.gap == gap
    best = solve(problem).ranks
    search.offer(best)
    gained = problem.value_of(best) - value
    assert gained > 0
    assert search.gap == gap - gained


def test_a_deviation_outside_the_nearest_ones_is_no_proof():
    """The incumbent holds an increment of finer bits than the 64 nearest deviations.

    Values then do not differ from it by whole steps of those deviations.
    """
    for fillers in (60, 61, 62, 63, 64):
        gains = {"Z": [1e6], "Y": [40.0], "X": [130.0]}
        costs = {"Z": 7, "Y": 3, "X": 13}
        for i in range(fillers):
            gains[f"F{i}"], costs[f"F{i}"] = [120.0], 13
        gains["A"], costs["A"] = [89.5], 10
        problem = Problem(GainCurves.from_increments(gains), 20, costs=costs)
        optimum = dynamic_program(problem)
        assert optimum == 1_000_130
        search = Search(form_of(problem))
        while not search.finished and search.advance():
            check_optimum(search.allocation("so far"), optimum)
        check_optimum(search.allocation("in the end"), optimum)


@given(instances())
@settings(max_examples=examples(1))
def test_the_gap_of_a_price_holds_without_a_core(instance):
    problem = instance.problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "fit", lambda *_: None)
        stopped = Search(form_of(problem))
        assert not stopped.advance() or stopped.ranks is not None
        best = brute_force(problem)[0]
        value = problem.value_of(stopped.ranks)
        assert value <= best <= value + stopped.gap


@given(instances(concave=True, layers=5), st.integers(1, 3))
@settings(max_examples=examples(1))
def test_a_price_on_ranks_never_understates_the_gap(instance, states):
    """Few states, so that exchanges and the price on ranks have something to do."""
    problem = instance.problem()
    stage = search._Stage(states, exchanges=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_STAGES", (stage, stage))
        running = Search(form_of(problem))
        best = brute_force(problem)[0]
        while not running.finished and running.advance():
            value = problem.value_of(running.ranks)
            assert value <= best <= value + running.gap


def test_a_core_of_few_classes_is_proven_without_exchanges(monkeypatch):
    monkeypatch.setattr(Search, "_exchange", lambda *_: pytest.fail("states alone are faster"))
    instance = HARD_FAMILIES["proportional_large_costs"](12, 16, 0)
    assert instance.allocate().certificate.status == "optimal_exact"
