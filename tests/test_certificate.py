"""The certificate: rounded outwards, verified from the problem alone, not to be forged."""

import dataclasses
import math
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import Certificate, CertificateError, GainCurves, Problem, allocate, solve
from lorambo_alloc.arithmetic import round_down, round_up
from lorambo_alloc.caps import Cap
from lorambo_alloc.certificate import MEANING, Status
from lorambo_alloc.testing import Instance, brute_force, brute_force_bottleneck
from tests.checks import all_feasible
from tests.strategies import capped, examples, instances, seeds

THIRD = Fraction(1, 3)


def test_price_of_a_certificate_that_is_no_number():
    allocation = allocate({"a": [2.0]}, 1)
    for price in ("1", None, True, 1):
        forged = dataclasses.replace(allocation.certificate, price=price)
        with pytest.raises(CertificateError, match="finite prices"):
            forged.verify(allocation.problem, allocation.ranks)


def optimal_claim(problem: Problem, ranks: Any, price: float) -> Certificate:
    """A certificate that says these ranks are optimal, consistent in itself."""
    value = problem.value_of(ranks)
    return Certificate("optimal_exact", round_down(value), round_up(value), 0.0, price, "claim")


class TestOf:
    def test_no_gap_is_optimal(self):
        certificate = Certificate.of(THIRD, Fraction(0), 0.5, "name", closed=True)
        assert certificate.status == "optimal_exact"
        assert Fraction(certificate.value) < THIRD < Fraction(certificate.upper_bound)
        assert certificate.upper_bound == math.nextafter(certificate.value, 1.0)
        assert (certificate.gap, certificate.relative_gap) == (0.0, 0.0)
        assert (certificate.price, certificate.method, certificate.cut) == (0.5, "name", None)

    @given(st.fractions(), st.fractions(min_value=0), st.booleans())
    def test_figures_are_rounded_outwards(self, value, gap, closed):
        certificate = Certificate.of(value, gap, 1.0, "", closed=closed)
        assert Fraction(certificate.value) <= value
        assert Fraction(certificate.upper_bound) >= value + gap
        assert Fraction(certificate.gap) >= gap
        assert value + Fraction(certificate.gap) >= Fraction(certificate.upper_bound) or gap == 0
        assert (certificate.status == "optimal_exact") == (gap == 0) == (certificate.gap == 0)

    @pytest.mark.parametrize("value", [1.0, -3.0, 1e200])
    def test_a_closed_gap_is_rounding_only_if_it_is_tiny(self, value):
        share = Fraction(1, 2**40)
        edge = abs(Fraction(value)) * share
        for gap, closed, status in (
            (edge, True, "optimal_within_rounding"),
            (edge / 1000, True, "optimal_within_rounding"),
            (edge * Fraction(1001, 1000), True, "gap_certified"),
            (edge / 1000, False, "gap_certified"),
        ):
            certificate = Certificate.of(Fraction(value), gap, 1.0, "", closed=closed)
            assert certificate.status == status

    def test_relative_gap(self):
        certificate = Certificate("gap_certified", -4.0, -3.0, 1.0, 0.0, "")
        assert certificate.relative_gap == 0.25
        assert dataclasses.replace(certificate, value=0.0).relative_gap == math.inf
        assert dataclasses.replace(certificate, value=0.0, gap=0.0).relative_gap == 0.0

    def test_every_status_has_a_meaning(self):
        assert set(MEANING) == set(get_args(Status))


@given(instances(layers=3, ranks=4), st.floats(0.0, 3.0))
@settings(max_examples=examples(1))
def test_only_the_best_ranks_pass_as_optimal(instance: Instance, factor: float):
    """An inferior answer with a consistent certificate is refused, whatever its price says."""
    problem = instance.problem()
    optimum = brute_force(problem)[0]
    price = solve(problem).certificate.price * factor
    for ranks in all_feasible(problem):
        claim = optimal_claim(problem, ranks, price)
        if problem.value_of(ranks) == optimum:
            assert claim.verify(problem, ranks).proof in ("price", "exchange", "search")
        else:
            with pytest.raises(CertificateError, match="above the claimed bound"):
                claim.verify(problem, ranks)


@given(instances(layers=3, ranks=4), st.floats(0.0, 3.0), st.floats(-0.1, 0.1), st.data())
@settings(max_examples=examples(1))
def test_a_bound_passes_only_if_it_holds(instance: Instance, factor, shift, data):
    problem = instance.problem()
    optimum = brute_force(problem)[0]
    price = solve(problem).certificate.price * factor
    feasible = list(all_feasible(problem))
    ranks = feasible[data.draw(st.integers(0, len(feasible) - 1))]
    value = problem.value_of(ranks)
    # On both sides of the optimum, one ulp away at the nearest.
    bound = max(round_up(value), round_up(optimum * (1 + Fraction(shift) ** 9)))
    gap = round_up(Fraction(bound) - value)
    claim = Certificate("gap_certified", round_down(value), bound, gap, price, "claim")
    if Fraction(bound) >= optimum:
        verification = claim.verify(problem, ranks)
        assert verification.value == value
        assert verification.price_bound >= optimum
        if Fraction(bound) >= verification.price_bound:
            assert verification.proof == "price"
        else:
            assert verification.proof in ("exchange", "search")
    else:
        with pytest.raises(CertificateError, match="above the claimed bound"):
            claim.verify(problem, ranks)


@given(
    instances(concave=True, layers=3, ranks=4),
    st.floats(0.0, 2.0),
    st.floats(-2.0, 2.0),
    st.sampled_from([1.0, 2.0**-12, 2.0**12]),
    st.data(),
)
@settings(max_examples=examples(2))
def test_no_two_prices_prove_a_bound_that_does_not_hold(instance, factor, rank_factor, scale, data):
    original = instance.problem()
    assert original.gains is not None
    rows = [original.gains.row(i) * scale for i in range(len(original.names))]
    if any(np.any((0 < row) & (row < 2.0**-900)) or np.any(row > 2.0**900) for row in rows):
        return
    keywords = {**instance.keywords, "objective": "frobenius", "weights": None}
    problem = Problem(GainCurves.from_increments(rows), instance.budget, **by_order(keywords))
    optimum = brute_force(problem)[0]
    price = solve(problem).certificate.price or 1.0 * scale
    gain = max((float(np.max(row)) for row in rows), default=1.0)
    feasible = list(all_feasible(problem))
    ranks = feasible[data.draw(st.integers(0, len(feasible) - 1))]
    value = problem.value_of(ranks)
    if value == optimum:
        return
    # A bound that is too low, were it by the least amount.
    bound = max(round_up(value), math.nextafter(round_down(optimum), -math.inf))
    if Fraction(bound) >= optimum:
        return
    gap = round_up(Fraction(bound) - value)
    cut = (price * factor, gain * rank_factor)
    claim = Certificate("gap_certified", round_down(value), bound, gap, price, "claim", cut)
    with pytest.raises(CertificateError, match="above the claimed bound"):
        claim.verify(problem, ranks)


def by_order(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords whose layers are named "0", "1", ... instead of "layer0", "layer1", ..."""
    return {
        key: {name.removeprefix("layer"): v for name, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in keywords.items()
    }


@given(instances(objective="operator", layers=3, ranks=4))
@settings(max_examples=examples(0.5))
def test_only_the_best_bottleneck_passes(instance: Instance):
    problem = instance.problem()
    best = brute_force_bottleneck(problem)[0][0]
    for ranks in all_feasible(problem):
        claim = optimal_claim(problem, ranks, 0.0)
        if -problem.value_of(ranks) == best:
            assert claim.verify(problem, ranks).value == -Fraction(best)
        else:
            with pytest.raises(CertificateError, match="discard nothing as large as"):
                claim.verify(problem, ranks)


def test_what_a_better_bottleneck_costs_is_counted_to_the_unit():
    # Lowering both layers below 3 costs exactly 2 * 4 + 5.
    spectra = {"a": [3.0, 3.0, 1.0], "b": [3.0, 2.0]}
    for budget, refused in ((12, False), (13, True), (14, True)):
        problem = Problem(spectra, budget, costs=[4, 5], objective="operator")
        ranks = np.array([0, 0])
        claim = optimal_claim(problem, ranks, 0.0)
        if refused:
            with pytest.raises(CertificateError, match="ranks of cost 13 discard nothing as large"):
                claim.verify(problem, ranks)
        else:
            verification = claim.verify(problem, ranks)
            assert verification.proof == "search"
            assert verification.value == verification.price_bound == -3
    # A layer whose maximum keeps it at 3 proves it, at any budget.
    problem = Problem(spectra, 99, max_rank={"a": 1}, objective="operator")
    verification = optimal_claim(problem, np.array([0, 1]), 0.0).verify(problem, np.array([0, 1]))
    assert (verification.proof, verification.price_bound) == ("search", -3)


@given(instances(), st.data())
@settings(max_examples=examples(1))
def test_tampering_is_refused(instance: Instance, data):
    problem = instance.problem()
    allocation = solve(problem, data.draw(st.sampled_from(["auto", "water_filling"])))
    certificate = allocation.certificate
    value = problem.value_of(allocation.ranks)

    def refused(**change: Any) -> None:
        with pytest.raises(CertificateError):
            dataclasses.replace(certificate, **change).verify(problem, allocation.ranks)

    refused(value=math.nextafter(certificate.value, math.inf))
    refused(value=math.nextafter(certificate.value, -math.inf))
    refused(upper_bound=math.nextafter(round_down(value), -math.inf))
    if certificate.status == "optimal_exact":
        refused(upper_bound=math.nextafter(certificate.upper_bound, math.inf))
        refused(upper_bound=math.nextafter(certificate.upper_bound, -math.inf))
        refused(gap=5e-324)
        refused(gap=-5e-324)
    else:
        refused(gap=math.nextafter(certificate.gap, -math.inf))
        refused(gap=0.0)
        refused(upper_bound=math.inf)
        refused(status="optimal_exact")
    refused(upper_bound=math.nan)
    refused(gap=math.nan)
    refused(value=math.nan)
    for price in (-5e-324, -1.0, math.nan, math.inf, -math.inf):
        refused(price=price)
    refused(status="optimal")
    # A rank moved within the limits: unless its gain is 0, the value is another.
    other = data.draw(st.sampled_from(list(all_feasible(problem))))
    if round_down(problem.value_of(other)) != certificate.value:
        with pytest.raises(CertificateError, match="the ranks have value"):
            certificate.verify(problem, other)


SPECTRA = {"a": [3.0, 2.0, 1.0], "b": [2.5, 0.5]}


class TestRanks:
    """Ranks that break a limit, a tie or the budget, or are no ranks at all."""

    @pytest.mark.parametrize(
        ("ranks", "limits", "expected"),
        [
            ([3, 2], {}, "the ranks cost 5, more than the budget 4"),
            ([4, 0], {}, "layer 'a': rank 4 is not allowed"),
            ([-1, 0], {}, "layer 'a': rank -1 is not allowed"),
            ([2, 1], {"multiple_of": 2}, "layer 'b': rank 1 is not allowed"),
            ([2, 1], {"tied": [["a", "b"]]}, "tied layers 'a', ... differ"),
            ([2], {}, "expected 2 whole numbers"),
            ([1.0, 1.0], {}, "expected 2 whole numbers"),
        ],
    )
    @pytest.mark.parametrize("objective", ["frobenius", "operator"])
    def test_refused(self, ranks, limits, expected, objective):
        problem = Problem(SPECTRA, 4, objective=objective, **limits)
        certificate = solve(problem).certificate
        with pytest.raises(CertificateError, match=expected):
            certificate.verify(problem, np.array(ranks))

    def test_a_list_of_ranks_will_do(self):
        allocation = allocate(SPECTRA, 4)
        ranks = allocation.ranks.tolist()
        certificate = allocation.certificate
        assert certificate.verify(allocation.problem, ranks).value == certificate.value  # pyright: ignore[reportArgumentType]

    def test_a_rank_moved(self):
        allocation = allocate(SPECTRA, 4, costs=[1, 2])
        for ranks in ([3, 0], [1, 1], [2, 0], [0, 1]):
            with pytest.raises(CertificateError, match="the ranks have value"):
                allocation.certificate.verify(allocation.problem, np.array(ranks))

    def test_another_problem(self):
        allocation = allocate(SPECTRA, 4, costs=[1, 2])
        richer = Problem(SPECTRA, 5, costs=[1, 2])
        with pytest.raises(CertificateError, match="above the claimed bound"):
            allocation.certificate.verify(richer, allocation.ranks)


# Gains that follow the costs: the price's bound is not the optimum, so that a search decides.
GAPPED = GainCurves({"a": [0.0, 6.0], "b": [0.0, 5.0], "c": [0.0, 5.5]})
GAPPED_KEYWORDS = {"costs": [6, 5, 5], "multiple_of": 1}


class TestProof:
    def test_the_price_alone(self):
        allocation = allocate({"a": [2.0], "b": [1.0]}, 1)
        verification = allocation.certificate.verify(allocation.problem, allocation.ranks)
        assert (verification.proof, verification.value) == ("price", 4)
        assert verification.price_bound == 4

    def test_a_search(self):
        problem = Problem(GAPPED, 9, **GAPPED_KEYWORDS)
        claim = optimal_claim(problem, np.array([1, 0, 0]), 1.0)
        verification = claim.verify(problem, np.array([1, 0, 0]))
        assert (verification.proof, verification.price_bound) == ("search", 9.5)
        with pytest.raises(CertificateError, match=r"above the claimed bound 5.5"):
            optimal_claim(problem, np.array([0, 0, 1]), 1.0).verify(problem, np.array([0, 0, 1]))

    def test_a_search_that_is_cut_short_says_so(self):
        problem = Problem(GAPPED, 9, **GAPPED_KEYWORDS)
        claim = optimal_claim(problem, np.array([1, 0, 0]), 1.0)
        assert claim.verify(problem, np.array([1, 0, 0]), effort=0).proof == "unfinished"

    def test_a_gap_relabelled_is_refused(self):
        problem = Problem(GAPPED, 9, **GAPPED_KEYWORDS)
        ranks = np.array([0, 0, 1])
        honest = Certificate("gap_certified", 5.5, 9.5, 4.0, 1.0, "by hand")
        assert honest.verify(problem, ranks).proof == "price"
        relabelled = dataclasses.replace(honest, status="optimal_within_rounding")
        with pytest.raises(CertificateError, match=r"a gap of 4.0 is more than rounding"):
            relabelled.verify(problem, ranks)
        with pytest.raises(CertificateError, match=r"needs the bound 5.5 and gap 0"):
            dataclasses.replace(honest, status="optimal_exact").verify(problem, ranks)

    def test_how_much_is_rounding(self):
        problem = Problem({"a": [1.0], "b": [0.5]}, 1)
        ranks = np.array([1, 0])
        for gap, fine in ((2.0**-41, True), (2.0**-39, True), (2.0**-38, False)):
            claim = Certificate("optimal_within_rounding", 1.0, 1.0 + gap, gap, 1.0, "")
            if fine:
                assert claim.verify(problem, ranks).proof == "price"
            else:
                with pytest.raises(CertificateError, match="more than rounding"):
                    claim.verify(problem, ranks)

    def test_an_optimum_is_exact_and_not_only_to_the_last_bit(self):
        # Both values are 1 in doubles, rounded down, and both have the bound 1 + 2^-52.
        curves = GainCurves.from_increments({"a": [1.0, 2.0**-60, 2.0**-60]})
        problem = Problem(curves, 3)
        worse, best = optimal_claim(problem, np.array([2]), 0.0), np.array([3])
        assert worse == optimal_claim(problem, best, 0.0)
        assert worse.verify(problem, best).proof == "price"
        with pytest.raises(CertificateError, match="above the claimed bound"):
            worse.verify(problem, np.array([2]))

    def test_a_price_of_0_where_the_budget_does_not_bind(self):
        allocation = allocate({"a": [2.0, 1.0]}, 2)
        certificate = dataclasses.replace(allocation.certificate, price=0.0)
        assert certificate.verify(allocation.problem, allocation.ranks).proof == "price"

    def test_the_bound_counts_budget_that_nothing_is_left_to_spend_on(self):
        allocation = allocate({"a": [2.0]}, 10)
        wasteful = dataclasses.replace(allocation.certificate, price=1.0)
        verification = wasteful.verify(allocation.problem, allocation.ranks)
        assert verification.price_bound == 4 - 1 + 10
        assert verification.proof == "exchange"


class TestCut:
    def certificate(self) -> tuple[Problem, Any, Certificate]:
        """Every rank gains its cost plus 3: priced at 1 per unit and 3 per rank, all are equal."""
        costs = [7, 11, 13, 17, 19, 23]
        curves = GainCurves.from_increments({f"{c}": [c + 3.0] * 6 for c in costs})
        problem = Problem(curves, 210, costs=costs)
        optimum, ranks = brute_force(problem)
        price = 1.0 + 3 / 13
        certificate = Certificate.of(optimum, Fraction(0), price, "", closed=True)
        return problem, ranks, certificate

    def test_two_prices_prove_what_one_does_not(self):
        problem, ranks, certificate = self.certificate()
        plain = certificate.verify(problem, ranks)
        assert plain.proof in ("search", "unfinished")
        two = dataclasses.replace(certificate, cut=(1.0, 3.0)).verify(problem, ranks, effort=0)
        assert two.proof == "two prices"

    def test_prices_that_prove_nothing_are_no_harm(self):
        problem, ranks, certificate = self.certificate()
        for cut in ((1.0, 0.0), (0.0, 0.0), (2.0, 3.0), (1.0, -3.0)):
            weak = dataclasses.replace(certificate, cut=cut)
            assert weak.verify(problem, ranks).proof in ("search", "unfinished")

    @pytest.mark.parametrize(
        "cut", [(-1.0, 3.0), (math.nan, 3.0), (1.0, math.nan), (1.0, math.inf)]
    )
    def test_prices_that_are_none_are_refused(self, cut):
        problem, ranks, certificate = self.certificate()
        with pytest.raises(CertificateError, match="expected finite prices"):
            dataclasses.replace(certificate, cut=cut).verify(problem, ranks)

    def test_a_bound_one_step_too_low_is_not_proven(self):
        problem, ranks, certificate = self.certificate()
        optimum = int(problem.value_of(ranks))
        worse = ranks.copy()
        worse[int(np.argmax(worse))] -= 1
        value = int(problem.value_of(worse))
        for bound, holds in ((optimum, True), (optimum - 1, False)):
            claim = Certificate(
                "gap_certified", value, bound, bound - value, certificate.price, "", (1.0, 3.0)
            )
            if holds:
                assert claim.verify(problem, worse, effort=0).proof == "two prices"
            else:
                with pytest.raises(CertificateError, match="above the claimed bound"):
                    claim.verify(problem, worse)

    def test_a_cut_does_not_help_an_inferior_answer(self):
        problem, ranks, certificate = self.certificate()
        optimum = problem.value_of(ranks)
        for count in range(6):
            worse = ranks.copy()
            worse[count] -= 1
            if worse[count] < 0:
                continue
            claim = dataclasses.replace(
                optimal_claim(problem, worse, certificate.price), cut=(1.0, 3.0)
            )
            assert problem.value_of(worse) < optimum
            with pytest.raises(CertificateError, match="above the claimed bound"):
                claim.verify(problem, worse)


@given(capped(instances(layers=3, ranks=3)), st.data())
@settings(max_examples=examples(1))
def test_only_the_best_ranks_pass_as_optimal_under_caps(instance: Instance, data):
    problem = instance.problem()
    optimum = brute_force(problem)[0]
    own = solve(problem).certificate
    factors = st.lists(st.floats(0.0, 3.0), min_size=len(problem.rows), max_size=len(problem.rows))
    prices = [
        p * f
        for p, f in zip(
            (own.price, *(own.cap_prices or (0.0,) * len(problem.caps))),
            data.draw(factors),
            strict=True,
        )
    ]
    for ranks in all_feasible(problem):
        claim = dataclasses.replace(
            optimal_claim(problem, ranks, prices[0]), cap_prices=tuple(prices[1:])
        )
        if problem.value_of(ranks) == optimum:
            assert claim.verify(problem, ranks).proof in ("price", "exchange", "search")
        else:
            with pytest.raises(CertificateError, match="above the claimed bound"):
                claim.verify(problem, ranks)


@given(capped(instances(layers=4, ranks=3), "disjoint"), seeds())
@settings(max_examples=examples(3))
def test_no_search_within_caps_proves_a_bound_that_does_not_hold(instance: Instance, seed: int):
    problem = instance.problem()
    rng = np.random.default_rng(seed)
    feasible = list(all_feasible(problem))
    ranks = feasible[rng.integers(len(feasible))]
    value, optimum = problem.value_of(ranks), brute_force(problem)[0]
    own = solve(problem).certificate
    prices = np.array([own.price, *(own.cap_prices or (0.0,) * len(problem.caps))])
    prices *= rng.choice([0.0, 0.5, 1.0, 1.0, 1.5], len(prices))
    scale = max(float(optimum - value), 1e-300)
    within = tuple(
        (row.name, float(rng.choice([0.0, 0.5, 1.0]) * scale))
        for row in problem.caps
        if rng.random() < 0.8
    )
    bound = max(round_up(value), round_up(optimum - Fraction(scale * rng.choice([0.0, 1e-9, 0.5]))))
    claim = Certificate(
        "gap_certified",
        round_down(value),
        bound,
        round_up(Fraction(bound) - value),
        float(prices[0]),
        "claim",
        cap_prices=tuple(prices[1:].tolist()),
        within=within,
    )
    if Fraction(bound) < optimum:
        with pytest.raises(CertificateError):
            claim.verify(problem, ranks)
        return
    if not within:
        assert claim.verify(problem, ranks).complete


# One cap has room for two ranks of a, or of b, or one of each; the other for c or d.
CAPPED = GainCurves.from_increments({"a": [6.0, 6.0], "b": [5.0, 5.0], "c": [4.0], "d": [3.5]})


def capped_problem(budget: int = 99) -> Problem:
    caps = {"ab": Cap(["a", "b"], 14, [6, 5]), "cd": Cap(["c", "d"], 7, [4, 5])}
    return Problem(CAPPED, budget, caps=caps)


class TestWithin:
    ranks = np.array([2, 0, 1, 0])

    def claim(self, upper=16.0, within=(("ab", 0.0), ("cd", 0.0)), **change: Any) -> Certificate:
        return Certificate(
            "optimal_exact" if upper == 16.0 else "gap_certified",
            16.0,
            upper,
            upper - 16.0,
            change.pop("price", 0.0),
            "by hand",
            cap_prices=change.pop("cap_prices", (1.0, 1.0)),
            within=within,
            **change,
        )

    def test_searches_prove_what_prices_do_not(self):
        problem = capped_problem()
        assert brute_force(problem)[0] == 16
        verification = self.claim().verify(problem, self.ranks)
        assert (verification.proof, verification.value) == ("search", 16)
        assert verification.price_bound == 14 + 7
        # Without a search nothing at all is cut off at a price of 1 in both caps.
        assert self.claim(upper=21.0, within=()).verify(problem, self.ranks).proof == "price"

    def test_what_searches_leave_open_is_part_of_the_gap(self):
        problem = capped_problem()
        for slack, fine in ((0.0, True), (0.5, True), (np.nextafter(0.5, 1.0), False)):
            claim = self.claim(upper=16.5, within=(("ab", float(slack)), ("cd", 0.0)))
            if fine:
                assert claim.verify(problem, self.ranks).proof == "search"
            else:
                with pytest.raises(CertificateError, match=r"prove a gap of 0\.5.*, more than the"):
                    claim.verify(problem, self.ranks)

    def test_a_search_finds_what_a_slack_does_not_cover(self):
        # One of each gains 11 in the cap, two of a 12.
        problem = capped_problem()
        ranks = np.array([1, 1, 1, 0])
        for slack, fine in ((1.0, True), (np.nextafter(1.0, 0.0), False)):
            claim = Certificate(
                "gap_certified",
                15.0,
                16.0,
                1.0,
                0.0,
                "",
                cap_prices=(1.0, 1.0),
                within=(("ab", float(slack)), ("cd", 0.0)),
            )
            if fine:
                assert claim.verify(problem, ranks).proof == "search"
            else:
                with pytest.raises(CertificateError, match=r"above the claimed bound 16\.0"):
                    claim.verify(problem, ranks)

    def test_what_is_outside_is_priced(self):
        # At a price of 1 a rank of the budget, a unit that is left over costs 1.
        problem = capped_problem(4)
        claim = self.claim(price=1.0)
        with pytest.raises(
            CertificateError, match=r"prove a gap of 1\.0, more than the certificate"
        ):
            claim.verify(problem, self.ranks)
        claim = self.claim(price=1.0, upper=17.0)
        assert claim.verify(problem, self.ranks).proof == "search"
        # Not searched, the other cap leaves 3 units at 0.5, and d at 3.5 - 2.5 out.
        for gap, fine in ((2.5, True), (2.25, False)):
            claim = self.claim(cap_prices=(1.0, 0.5), upper=16.0 + gap, within=(("ab", 0.0),))
            if fine:
                assert claim.verify(problem, self.ranks).proof == "search"
            else:
                with pytest.raises(CertificateError, match=r"prove a gap of 2\.5, more than the"):
                    claim.verify(problem, self.ranks)

    def test_a_search_that_is_cut_short_says_so(self):
        verification = self.claim().verify(capped_problem(), self.ranks, effort=0)
        assert (verification.proof, verification.complete) == ("unfinished", False)

    @pytest.mark.parametrize(
        "within",
        [
            (("zz", 0.0),),
            (("", 0.0),),
            (("ab", 0.0), ("ab", 0.0)),
            (("ab", -1.0),),
            (("ab", math.nan),),
            (("ab", math.inf),),
            (("ab", 0),),
            (("ab", "0"),),
            (("ab",),),
            (("ab", 0.0, 0.0),),
            ((3, 0.0),),
            ("ab",),
            (7,),
        ],
    )
    def test_searches_that_are_none_are_refused(self, within):
        message = "expected a search within different caps, got "
        with pytest.raises(CertificateError, match=message):
            self.claim(within=within).verify(capped_problem(), self.ranks)
        # Whether or not they are needed.
        with pytest.raises(CertificateError, match=message):
            self.claim(upper=99.0, within=within).verify(capped_problem(), self.ranks)

    @pytest.mark.parametrize("within", [None, 3, "ab", [("ab", 0.0)]])
    def test_no_list_of_searches(self, within):
        with pytest.raises(CertificateError, match="expected names of searched caps, got"):
            self.claim(within=within).verify(capped_problem(), self.ranks)

    def test_caps_that_share_layers_are_not_searched_together(self):
        caps = {"ab": Cap(["a", "b"], 14, [6, 5]), "bc": Cap(["b", "c"], 5, [4, 5])}
        problem = Problem(CAPPED, 3, caps=caps)
        within = (("ab", 0.0), ("bc", 0.0))
        with pytest.raises(CertificateError, match=r"^cap 'bc': searched caps share layers$"):
            self.claim(within=within).verify(problem, self.ranks)

    def test_tied_layers_join_caps(self):
        caps = {"ab": Cap(["a", "b"], 14, [6, 5]), "cd": Cap(["c", "d"], 7, [4, 5])}
        curves = GainCurves.from_increments({"a": [6.0], "b": [5.0], "c": [4.0], "d": [3.5]})
        problem = Problem(curves, 3, caps=caps, tied=[["b", "c"]])
        claim = Certificate(
            "gap_certified",
            15.0,
            15.5,
            0.5,
            0.0,
            "",
            cap_prices=(0.5, 0.5),
            within=(("ab", 0.0), ("cd", 0.0)),
        )
        with pytest.raises(CertificateError, match="share layers"):
            claim.verify(problem, np.array([1, 1, 1, 0]))


class TestCapPrices:
    @pytest.mark.parametrize(
        "prices",
        [(1.0,), (1.0, 1.0, 1.0), (1.0, -5e-324), (1.0, math.nan), (math.inf, 1.0), (1.0, "1"), 7],
    )
    def test_prices_that_are_none_are_refused(self, prices):
        claim = dataclasses.replace(TestWithin().claim(), cap_prices=prices)
        with pytest.raises(CertificateError, match="expected finite prices >= 0"):
            claim.verify(capped_problem(), TestWithin.ranks)

    def test_prices_of_caps_that_the_problem_does_not_have(self):
        allocation = allocate({"a": [2.0]}, 1)
        forged = dataclasses.replace(allocation.certificate, cap_prices=(0.0,))
        with pytest.raises(CertificateError, match="expected finite prices"):
            forged.verify(allocation.problem, allocation.ranks)

    def test_without_any_they_are_0(self):
        problem = capped_problem(3)
        claim = TestWithin().claim(upper=30.0, cap_prices=(), within=())
        verification = claim.verify(problem, TestWithin.ranks)
        assert (verification.proof, verification.price_bound) == ("price", 6 + 6 + 5 + 5 + 4 + 3.5)

    def test_every_row_is_charged(self):
        problem = capped_problem(3)
        claim = TestWithin().claim(upper=60.0, cap_prices=(0.5, 0.25), price=0.125, within=())
        gains = 2 * (6 - 3 - 0.125) + 2 * (5 - 2.5 - 0.125) + 4 - 1 - 0.125 + 3.5 - 1.25 - 0.125
        bound = gains + 0.5 * 14 + 0.25 * 7 + 0.125 * 3
        assert claim.verify(problem, TestWithin.ranks).price_bound == bound

    def test_another_budget_of_a_cap(self):
        problem = capped_problem()
        wider = Problem(
            CAPPED, 4, caps={"ab": Cap(["a", "b"], 18, [6, 5]), "cd": Cap(["c", "d"], 9, [4, 5])}
        )
        with pytest.raises(CertificateError, match="above the claimed bound"):
            TestWithin().claim().verify(wider, TestWithin.ranks)
        with pytest.raises(CertificateError, match=r"^cap 'cd': the ranks cost 9, more than the"):
            TestWithin().claim().verify(problem, np.array([1, 0, 1, 1]))


class TestSide:
    problem = Problem({"a": [3.0, 2.0], "b": [2.0]}, 2)

    def claim(self, side: Any, **change: Any) -> Certificate:
        claim = Certificate("gap_certified", 9.0, 30.0, 21.0, 1.0, "", side=side)
        return dataclasses.replace(claim, **change)

    def test_charges_enter_the_bound(self):
        side = ((1.0, -2.0), 3.0)
        verification = self.claim(side).verify(self.problem, np.array([1, 0]))
        assert verification.price_bound == (9 - 2) + (4 - 2) + (4 + 1) + 2 * 1 + 3
        assert verification.proof == "price"

    def test_what_rests_on_constraints_is_not_complete(self):
        """The problem does not know them: forged charges prove any bound, and are seen as such."""
        forged = Certificate("optimal_exact", 4.0, 4.0, 0.0, 0.0, "", side=((100.0, 100.0), 0.0))
        verification = forged.verify(self.problem, np.array([0, 1]))
        assert verification.given_constraints
        assert not verification.complete
        # A search with the charges rests on them too.
        claim = self.claim(((0.0, 0.0), 0.0), upper_bound=13.0, gap=4.0)
        searched = claim.verify(self.problem, np.array([1, 0]))
        assert (searched.proof, searched.complete) == ("search", False)
        loose = self.claim(((0.0, 0.0), 5.0), upper_bound=13.0, gap=4.0)
        with pytest.raises(CertificateError, match=r"charges do not prove the claimed bound 13\.0"):
            loose.verify(self.problem, np.array([1, 0]))
        # No exchange improves on the best ranks, with constraints or without.
        best = Certificate("optimal_exact", 13.0, 13.0, 0.0, 0.0, "", side=((0.0, 0.0), 5.0))
        verification = best.verify(self.problem, np.array([2, 0]))
        assert (verification.proof, verification.complete) == ("exchange", True)

    @pytest.mark.parametrize(
        "side",
        [
            ((1.0,), 3.0),
            ((1.0, 2.0, 3.0), 3.0),
            ((1.0, math.nan), 3.0),
            ((1.0, math.inf), 3.0),
            ((1.0, "2"), 3.0),
            ((1.0, 2.0), math.nan),
            ((1.0, 2.0), "3"),
            ((1.0, 2.0),),
            (1.0, 2.0),
            7,
        ],
    )
    def test_charges_that_are_none_are_refused(self, side):
        with pytest.raises(CertificateError, match="expected finite charges from constraints"):
            self.claim(side).verify(self.problem, np.array([1, 0]))

    def test_not_together_with_searches(self):
        problem = capped_problem()
        claim = TestWithin().claim(side=((0.0,) * 4, 0.0))
        with pytest.raises(CertificateError, match="do not go together"):
            claim.verify(problem, TestWithin.ranks)


class TestRatio:
    @pytest.mark.parametrize(
        ("ratio", "fine"),
        [
            (0.5, True),
            (0.75, True),
            *((r, False) for r in (np.nextafter(0.75, 1.0), math.nan, -1.0, math.inf, "0.5", None)),
        ],
    )
    def test_a_share_that_is_not_proved_is_refused(self, ratio, fine):
        problem = Problem(GainCurves.from_increments({"a": [9.0], "b": [3.0]}), 2)
        claim = Certificate("ratio_certified", 9.0, 12.0, 3.0, 0.0, "greedy", ratio=ratio)
        if fine:
            assert claim.verify(problem, np.array([1, 0])).proof == "price"
        else:
            with pytest.raises(CertificateError, match="is not proved to be"):
                claim.verify(problem, np.array([1, 0]))
