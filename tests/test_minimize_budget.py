"""The cheapest ranks that suffice, against brute force in exact arithmetic."""

import dataclasses
import math
import re
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorambo_alloc import (
    CertificateError,
    GainCurves,
    InfeasibleError,
    Problem,
    minimize_budget,
    solve,
)
from lorambo_alloc.budget_certificate import BudgetCertificate
from lorambo_alloc.minimize_budget import CheapestRanks
from lorambo_alloc.testing import (
    Instance,
    brute_force,
    non_concave,
    power_law,
    strongly_correlated_linear,
)
from tests.checks import all_feasible
from tests.strategies import capped, instances

SPECTRA = {"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}
COSTS = {"q": 16, "v": 12}
NO_BUDGET = (1 << 62) - 1
SHARES = st.one_of(
    st.sampled_from([0.0, 2.0**-1074, 0.5, 0.95, 1 - 2.0**-53, 1.0]), st.floats(0.0, 1.0)
)


def _every(problem: Problem) -> list[tuple[int, Fraction]]:
    """Cost and value of all rank vectors within limits and caps."""
    return [(problem.cost_of(r), problem.value_of(r)) for r in all_feasible(problem)]


def _check(answer: CheapestRanks, every: list[tuple[int, Fraction]], target: Fraction) -> None:
    """Assert what the answer and its certificate claim."""
    certificate, problem = answer.certificate, answer.allocation.problem
    least = min(cost for cost, value in every if value >= target)
    assert certificate.target == target
    assert certificate.lower_bound <= least <= certificate.cost
    assert (certificate.status == "optimal_exact") == (certificate.lower_bound == certificate.cost)
    if certificate.status == "optimal_exact":
        assert answer.cost == least
    assert answer.cost == certificate.cost == problem.cost_of(answer.ranks) == problem.budget
    assert problem.value_of(answer.ranks) == certificate.value >= target
    verification = answer.verify()
    assert verification.value == certificate.value
    assert verification.complete
    # The allocation is one of its own: nothing better costs no more.
    own = answer.allocation.certificate
    best = max(value for cost, value in every if cost <= answer.cost)
    assert certificate.value <= best <= Fraction(own.upper_bound)
    assert own.verify(problem, answer.ranks).value == certificate.value


@given(instances(layers=3, ranks=4), SHARES)
def test_a_share(instance: Instance, share: float):
    every = _every(Problem(instance.spectra, NO_BUDGET, **instance.keywords))
    attainable = max(value for _, value in every)
    if attainable < 0:
        with pytest.raises(ValueError, match="a share of a loss has no meaning"):
            minimize_budget(instance.spectra, share, **instance.keywords)
        return
    answer = minimize_budget(instance.spectra, share, **instance.keywords)
    _check(answer, every, Fraction(share) * attainable)
    assert answer.certificate.status == "optimal_exact"


@given(instances(layers=3, ranks=4), st.data())
def test_a_value(instance: Instance, data: st.DataObject):
    every = _every(Problem(instance.spectra, NO_BUDGET, **instance.keywords))
    wanted = float(data.draw(st.sampled_from([value for _, value in every])))
    if Fraction(wanted) > max(value for _, value in every):  # rounded up
        wanted = math.nextafter(wanted, -math.inf)
    answer = minimize_budget(instance.spectra, value=wanted, **instance.keywords)
    _check(answer, every, Fraction(wanted))
    assert answer.certificate.status == "optimal_exact"


@given(capped(instances(layers=3, ranks=3)), SHARES, st.sampled_from([None, 0]))
def test_caps_and_time_limits(instance: Instance, share: float, time_limit: float | None):
    every = _every(Problem(instance.spectra, NO_BUDGET, **instance.keywords))
    attainable = max(value for _, value in every)
    if attainable < 0:
        return
    answer = minimize_budget(instance.spectra, share, time_limit=time_limit, **instance.keywords)
    target = answer.certificate.target
    if time_limit is None:
        assert target == Fraction(share) * attainable
        assert answer.certificate.status == "optimal_exact"
    assert target <= Fraction(share) * attainable
    _check(answer, every, target)


@given(instances(layers=3, ranks=4), SHARES)
def test_a_time_limit_of_0(instance: Instance, share: float):
    every = _every(Problem(instance.spectra, NO_BUDGET, **instance.keywords))
    attainable = max(value for _, value in every)
    if attainable >= 0:
        answer = minimize_budget(instance.spectra, share, time_limit=0, **instance.keywords)
        _check(answer, every, Fraction(share) * attainable)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("scale", [2.0**-900, 1.0, 2.0**900])
@pytest.mark.parametrize("unit", [1, 2**53 // 7])
def test_scales_change_nothing(share: float, scale: float, unit: int):
    increments = np.random.default_rng(0).uniform(-0.2, 1.0, (5, 4))
    costs = [unit * c for c in (3, 5, 7, 6, 4)]
    plain = minimize_budget(GainCurves.from_increments(increments), share, costs=[3, 5, 7, 6, 4])
    answer = minimize_budget(GainCurves.from_increments(increments * scale), share, costs=costs)
    assert answer.certificate.status == "optimal_exact"
    assert answer.cost == plain.cost * unit
    answer.verify()


@pytest.mark.parametrize("time_limit", [None, 0, 30, math.inf])
def test_a_target_met_exactly_and_one_just_above(time_limit: float | None):
    answer = minimize_budget(SPECTRA, value=9.0, costs=COSTS, time_limit=time_limit)
    assert (dict(answer), answer.cost, answer.value) == ({"q": 1, "v": 0}, 16, 9.0)
    above = math.nextafter(9.0, 10.0)
    answer = minimize_budget(SPECTRA, value=above, costs=COSTS, time_limit=time_limit)
    assert (dict(answer), answer.cost, answer.value) == ({"q": 1, "v": 1}, 28, 15.25)
    assert answer.certificate.target == Fraction(above)


def test_the_least_ranks_may_do():
    answer = minimize_budget(SPECTRA, 0.3, costs=COSTS, min_rank={"q": 1})
    assert (dict(answer), answer.cost) == ({"q": 1, "v": 0}, 16)
    certificate = answer.certificate
    assert (certificate.lower_bound, certificate.price, certificate.status) == (
        16,
        0.0,
        "optimal_exact",
    )
    assert answer.verify().proof == "price"


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spectra", [{}, {"a": [0.0, 0.0]}])
def test_nothing_to_gain(spectra, target):
    answer = minimize_budget(spectra, target)
    assert (answer.cost, answer.value, answer.certificate.target) == (0, 0.0, 0)
    assert answer.certificate.status == "optimal_exact"
    answer.verify()


def test_gains_that_vanish_in_sums_of_doubles():
    # The least ranks have 1; what is missing to 1 + 1e-17 is no step of any hull in doubles.
    curves = GainCurves.from_increments({"a": [1.0, 1e-17]})
    answer = minimize_budget(curves, 1.0, allowed_ranks=[1, 2])
    assert (answer["a"], answer.certificate.status) == (2, "optimal_exact")
    assert answer.certificate.value == 1 + Fraction(1e-17)
    answer.verify()


def test_densities_that_underflow():
    # The last gain per unit of cost is less than any double.
    curves = GainCurves.from_increments({"a": [1.0], "b": [2.0**-1074]})
    answer = minimize_budget(curves, 1.0, costs=[1, 2**53])
    assert (dict(answer), answer.certificate.status) == ({"a": 1, "b": 1}, "optimal_exact")
    assert answer.certificate.target == 1 + Fraction(2.0**-1074)
    assert answer.verify().complete


def test_losses_on_the_way():
    # Rank 1 loses 5, which rank 2 more than makes up for.
    curves = GainCurves({"a": [0.0, -5.0, 4.0], "b": [0.0, 1.0, 1.5]})
    answer = minimize_budget(curves, value=4.0, costs=[3, 5])
    assert (dict(answer), answer.cost) == ({"a": 2, "b": 0}, 6)
    answer = minimize_budget(GainCurves({"a": [0.0, -5.0]}), value=-5.0, min_rank=1)
    assert (answer.cost, answer.value) == (1, -5.0)
    assert answer.certificate.status == "optimal_exact"


def test_keywords_reach_the_problem():
    keywords: dict[str, Any] = {
        "shapes": {"q": (3, 9), "v": (5, 6)},
        "costs": {"q": 2, "v": 3},
        "fixed_costs": {"q": 1, "v": 0},
        "objective": "nuclear",
        "weights": {"q": 2.0, "v": 1.0},
        "min_rank": {"q": 1},
        "max_rank": {"v": 1},
        "multiple_of": 1,
        "allowed_ranks": {"q": [1, 2, 3]},
        "tied": [["q", "v"]],
        "caps": {"x": (["q"], 5)},
    }
    problem = minimize_budget(SPECTRA, 0.5, **keywords).allocation.problem
    expected = Problem(SPECTRA, 99, **keywords)
    assert problem.costs.tolist() == expected.costs.tolist()
    assert problem.fixed_costs.tolist() == [1, 0]
    assert problem.objective == expected.objective
    assert problem.tied == (("q", "v"),)
    assert [problem.allowed_ranks(i).tolist() for i in range(2)] == [[1], [1]]
    assert [row.budget for row in problem.caps] == [5]
    assert problem.value_of(np.array([1, 1])) == 2 * 3 + Fraction("2.5")
    shaped = minimize_budget(SPECTRA, shapes=keywords["shapes"])
    assert shaped.allocation.problem.costs.tolist() == [12, 11]
    halves = minimize_budget(SPECTRA, multiple_of=2)
    assert halves.ranks.tolist() == [2, 2]


def test_the_default_share():
    assert minimize_budget(SPECTRA).certificate.target == Fraction(0.95) * Fraction("20.5")


@pytest.mark.parametrize("shape", ["a", "b"])
def test_a_real_model(shape: str):
    instance = power_law(shape)
    answer = minimize_budget(instance.spectra, 0.9, **instance.keywords)
    assert answer.certificate.status == "optimal_exact"
    assert answer.verify().complete
    problem = answer.allocation.problem
    cheaper = problem.with_budget(answer.cost - 1)
    assert answer.allocation.captured >= 0.9
    # What the price proves, another way: nothing of the target's value fits in less.
    assert Fraction(solve(cheaper).certificate.upper_bound) < answer.certificate.target


class TestTimeLimits:
    def test_stopped_early(self):
        instance = strongly_correlated_linear(20, 40)
        keywords: dict[str, Any] = {"costs": instance.keywords["costs"], "time_limit": 0}
        answer = minimize_budget(instance.spectra, 0.5, **keywords)
        certificate = answer.certificate
        assert certificate.status == "gap_certified"
        assert certificate.lower_bound < certificate.cost < certificate.lower_bound * 1.001
        assert answer.verify().proof == "price"
        own = answer.allocation.certificate
        assert own.verify(answer.allocation.problem, answer.ranks).value == certificate.value
        # More time can only help, and refutes nothing.
        keywords["time_limit"] = 0.3
        later = minimize_budget(instance.spectra, 0.5, **keywords).certificate
        assert certificate.lower_bound <= later.lower_bound <= later.cost <= certificate.cost

    def test_of_curves_of_any_form(self):
        instance = non_concave(56, 16)
        answer = minimize_budget(instance.spectra, 0.9, time_limit=0, **instance.keywords)
        own = answer.allocation.certificate
        assert own.verify(answer.allocation.problem, answer.ranks).value == answer.certificate.value
        exact = minimize_budget(instance.spectra, 0.9, **instance.keywords)
        assert exact.certificate.status == "optimal_exact"
        assert answer.certificate.lower_bound <= exact.cost <= answer.cost

    def test_ranks_that_a_cut_short_search_does_not_find_again(self, monkeypatch):
        """Whatever the solver says when asked again, the statement is about the ranks in hand."""
        module = sys.modules["lorambo_alloc.minimize_budget"]
        limits: list[float | None] = []

        def lazy(problem: Problem, solver: str = "auto", time_limit: float | None = None):
            limits.append(time_limit)
            if problem.budget == NO_BUDGET:
                return true_solve(problem)
            # Nothing but the least ranks, with the true price and bound.
            best = true_solve(problem)
            ranks = problem.lower.copy()
            gap = problem.value_of(best.ranks) - problem.value_of(ranks)
            stated = type(best.certificate).of(
                problem.value_of(ranks), gap, best.certificate.price, "lazy", closed=False
            )
            return type(best)(problem, ranks, stated)

        true_solve = module.solve
        monkeypatch.setattr(module, "solve", lazy)
        answer = minimize_budget(SPECTRA, 0.9, costs=COSTS, time_limit=0)
        assert len(limits) > 1
        assert set(limits) == {0}
        monkeypatch.undo()
        certificate = answer.certificate
        assert certificate.value >= certificate.target
        own = answer.allocation.certificate
        assert own.method == "lazy"
        assert certificate.value <= Fraction(own.upper_bound) <= certificate.value + 1
        assert own.verify(answer.allocation.problem, answer.ranks).proof == "price"
        assert brute_force(answer.allocation.problem)[0] <= Fraction(own.upper_bound)
        assert answer.verify().complete

    @pytest.mark.parametrize("bad", [-1, math.nan, "1", True])
    def test_what_is_none(self, bad):
        with pytest.raises(ValueError, match=r"^time_limit: expected seconds >= 0 or None, got "):
            minimize_budget(SPECTRA, time_limit=bad)


class TestRefuses:
    @pytest.mark.parametrize("bad", [-0.1, 1.0000001, math.nan, math.inf, "0.9", True, None])
    def test_targets(self, bad):
        expected = f"target: expected a share from 0 to 1, got {bad!r}"
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(SPECTRA, bad)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1", True, [1.0]])
    def test_values(self, bad):
        expected = f"value: expected a finite number, got {bad!r}"
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(SPECTRA, value=bad)

    def test_values_out_of_reach(self):
        assert minimize_budget(SPECTRA, value=20.5).cost == 5
        expected = "value: expected at most 20.5, what the limits allow, got 20.500000000000004"
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(SPECTRA, value=math.nextafter(20.5, 21.0))
        # 1 + 2^-60 is attainable and no double; the next double is not.
        curves = GainCurves.from_increments({"a": [1.0, 2.0**-60]})
        with pytest.raises(ValueError, match=re.escape("value: expected at most 1.0, what the")):
            minimize_budget(curves, value=1 + 2.0**-52)

    def test_values_that_were_not_found(self, monkeypatch):
        """Caps and no time: what was found is not what the limits allow."""
        module = sys.modules["lorambo_alloc.minimize_budget"]
        true_solve = module.solve

        def hasty(problem: Problem, **options: Any):
            best = true_solve(problem)
            ranks = problem.lower.copy()
            stated = type(best.certificate).of(
                Fraction(0), Fraction(30), best.certificate.price, "hasty", closed=False
            )
            return type(best)(problem, ranks, stated)

        monkeypatch.setattr(module, "solve", hasty)
        expected = (
            "value: no ranks of 20.0 were found; the best that were have 0.0, and the limits allow "
            "30.0 at most"
        )
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(SPECTRA, value=20.0)
        with pytest.raises(ValueError, match=re.escape("no ranks of 30.0 were found")):
            minimize_budget(SPECTRA, value=30.0)
        expected = "value: expected at most 30.0, what the limits allow, got 31.0"
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(SPECTRA, value=31.0)

    def test_a_share_of_a_loss(self):
        expected = (
            "target: the limits allow -5.0 at most; a share of a loss has no meaning; give `value`"
        )
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(GainCurves({"a": [0.0, -5.0]}), min_rank=1)

    def test_operator(self):
        expected = "objective: minimize_budget needs gains that add up; 'operator' has none"
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(SPECTRA, objective="operator")

    def test_costs_that_no_budget_holds(self):
        ones = np.ones((512, 1))
        assert minimize_budget(ones[:511], 1.0, costs=[2**53] * 511).cost == 511 * 2**53
        expected = (
            "costs: expected greatest ranks that cost less than 2^62 together, got "
            "4611686018427387904; divide by a common factor or limit the ranks"
        )
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            minimize_budget(ones, 1.0, costs=[2**53] * 512)

    def test_caps_that_the_least_ranks_break(self):
        with pytest.raises(InfeasibleError, match="cap 'x': the minimum ranks cost 2"):
            minimize_budget(SPECTRA, min_rank=1, caps={"x": (["q", "v"], 1)})


class TestMapping:
    def test_like_a_dict(self):
        answer = minimize_budget(SPECTRA, 0.9, costs=COSTS)
        assert (len(answer), list(answer), answer["q"], answer["v"]) == (2, ["q", "v"], 2, 1)
        assert answer.value == 19.25
        assert answer.ranks.tolist() == [2, 1]
        assert answer.allocation.cost == answer.allocation.budget == 44
        with pytest.raises(KeyError):
            answer["o"]

    def test_repr(self):
        answer = minimize_budget(SPECTRA, 0.9, costs={"q": 16000, "v": 12000})
        table, last = repr(answer).rsplit("\n", 1)
        assert table == repr(answer.allocation)
        assert last == "target    18.45 reached; no ranks that cost less than 44,000 reach it"


class TestVerify:
    @pytest.fixture
    def answer(self) -> CheapestRanks:
        return minimize_budget(SPECTRA, 0.9, costs=COSTS)

    def refuse(self, answer: CheapestRanks, expected: str, **changes: Any) -> None:
        tampered = dataclasses.replace(answer.certificate, **changes)
        with pytest.raises(CertificateError, match=expected):
            tampered.verify(answer.allocation.problem, answer.ranks)

    def test_at_any_budget_of_the_problem(self, answer):
        for budget in (0, 44, 10**9):
            problem = answer.allocation.problem.with_budget(budget)
            assert answer.certificate.verify(problem, answer.ranks).value == Fraction("19.25")

    def test_figures(self, answer):
        claims = "the ranks cost 44 and have value 19.25; the certificate claims "
        self.refuse(answer, "the ranks cost 44, more than the budget 43", cost=43, lower_bound=43)
        self.refuse(answer, claims + "45 and 19.25, for a target of 18.45", cost=45, lower_bound=45)
        self.refuse(answer, claims + "44 and 19.0", value=Fraction(19))
        self.refuse(answer, "for a target of 19.5", target=Fraction("19.5"))

    def test_statuses(self, answer):
        self.refuse(answer, "unknown status 'optimal'", status="optimal")
        self.refuse(answer, "a lower bound up to the cost 44.* got 43", lower_bound=43)
        self.refuse(answer, "a lower bound up to the cost 44.* got 45", lower_bound=45)
        self.refuse(answer, "got 45", lower_bound=45, status="gap_certified")
        stated = dataclasses.replace(answer.certificate, lower_bound=40, status="gap_certified")
        assert stated.verify(answer.allocation.problem, answer.ranks).complete

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_prices(self, answer, bad):
        self.refuse(answer, "expected finite prices >= 0, one a budget, got ", price=bad)
        self.refuse(answer, "expected finite prices >= 0, one a budget, got ", cap_prices=(bad,))
        self.refuse(answer, "expected finite prices >= 0, one a budget, got ", cap_prices=(0.0,))

    @pytest.mark.parametrize("price", [0.0, 0.01, 0.3, 1.0, 100.0])
    def test_no_price_proves_what_is_not_so(self, answer, price):
        certificate = dataclasses.replace(
            answer.certificate, target=Fraction("15.25"), price=price
        )  # which costs 28
        with pytest.raises(CertificateError, match="that cost less than 44 reach the target too"):
            certificate.verify(answer.allocation.problem, answer.ranks)
        for lower_bound in (29, 40):
            other = dataclasses.replace(
                certificate, lower_bound=lower_bound, status="gap_certified"
            )
            with pytest.raises(CertificateError, match=f"less than {lower_bound} reach"):
                other.verify(answer.allocation.problem, answer.ranks)
        true = dataclasses.replace(certificate, lower_bound=28, status="gap_certified")
        assert true.verify(answer.allocation.problem, answer.ranks).complete

    def test_limits(self, answer):
        problem = answer.allocation.problem
        with pytest.raises(CertificateError, match="layer 'v': rank 3 is not allowed"):
            answer.certificate.verify(problem, np.array([1, 3]))
        with pytest.raises(CertificateError, match="expected 2 whole numbers"):
            answer.certificate.verify(problem, np.array([1]))

    def test_a_bound_at_the_least_cost_needs_no_proof(self, answer):
        trivial = dataclasses.replace(
            answer.certificate, lower_bound=0, status="gap_certified", price=-1.0
        )
        verification = trivial.verify(answer.allocation.problem, answer.ranks)
        assert (verification.proof, verification.value) == ("price", Fraction("19.25"))

    def test_effort(self):
        instance = strongly_correlated_linear(8, 10)
        answer = minimize_budget(instance.spectra, 0.5, costs=instance.keywords["costs"])
        problem = answer.allocation.problem
        assert answer.verify().proof in ("search", "price")
        loose = dataclasses.replace(answer.certificate, price=0.0)
        assert loose.verify(problem, answer.ranks, effort=1).proof == "unfinished"

    def test_the_bound_at_the_price(self):
        # At price 1/2, for a budget of 27: 9 - 8 + 6.25 - 6 + 27 / 2
        certificate = BudgetCertificate(
            "optimal_exact", Fraction(15), Fraction("15.25"), 28, 28, 0.5
        )
        problem = Problem(SPECTRA, 99, costs=COSTS)
        verification = certificate.verify(problem, np.array([1, 1]))
        assert verification.price_bound == Fraction("14.75")
        assert verification.proof == "price"

    @pytest.mark.parametrize("target", ["14.75", "14.7500001"])
    def test_where_the_price_just_proves_it(self, target):
        certificate = BudgetCertificate(
            "optimal_exact", Fraction(target), Fraction("15.25"), 28, 28, 0.5
        )
        problem = Problem(SPECTRA, 99, costs=COSTS)
        proof = certificate.verify(problem, np.array([1, 1])).proof
        # A value of exactly the price's bound is not excluded by it.
        assert proof == ("search" if target == "14.75" else "price")

    def test_prices_of_caps(self):
        answer = minimize_budget(SPECTRA, 1.0, costs=COSTS, caps={"x": (["q"], 2 * 16)})
        certificate = answer.certificate
        assert len(certificate.cap_prices) == 1
        assert answer.verify().complete
        without = dataclasses.replace(certificate, cap_prices=())
        assert without.verify(answer.allocation.problem, answer.ranks).complete


# The relaxation's bound is too low here, and the least cost is the very next one.
@pytest.mark.parametrize(
    ("rows", "costs", "value", "least"),
    [
        ([[7.0, 2.0], [7.0, 1.0], [5.0, 1.0]], [2, 3, 4], 9.0, 4),
        ([[6.0, 5.0], [3.0, 3.0], [6.0, 5.0]], [5, 4, 6], 9.0, 9),
        ([[7.0, 2.0], [6.0, 4.0], [8.0, 8.0]], [5, 5, 6], 12.0, 10),
    ],
)
def test_no_cost_is_passed_over(rows, costs, value, least):
    cheapest = minimize_budget(GainCurves.from_increments(rows), value=value, costs=costs)
    assert (cheapest.cost, cheapest.certificate.lower_bound) == (least, least)
    assert cheapest.verify().complete
