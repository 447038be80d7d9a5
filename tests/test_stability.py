"""Stability against enumeration in exact arithmetic, and its arguments."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorambo_alloc import (
    GainCurves,
    InfeasibleError,
    Problem,
    Spectra,
    allocate,
    schatten,
    uniform_rank,
)
from lorambo_alloc.arithmetic import round_up
from lorambo_alloc.stability import Stability, stability
from lorambo_alloc.testing import Instance, power_law
from tests.checks import all_feasible, check_optimum
from tests.strategies import examples, instances, seeds

CLOSE = Fraction(1, 1 << 40)


def variant(values: Any, rng: np.random.Generator) -> Any:
    """Another sample of an instance's spectra or curves: every layer scaled by itself."""
    if not isinstance(values, GainCurves):
        return {
            name: float(rng.choice([0.25, 0.5, 1.0])) * np.array(values[name]) for name in values
        }
    factors = rng.choice([0.25, 0.5, 1.0], len(values)).tolist()
    if values.increments is None:
        return GainCurves({n: f * values[n] for n, f in zip(values, factors, strict=True)})
    rows = [f * values.increments.row(i) for i, f in enumerate(factors)]
    return GainCurves.from_increments(dict(zip(values, rows, strict=True)))


def samples_of(instance: Instance, seed: int, count: int = 3) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [instance.spectra, *(variant(instance.spectra, rng) for _ in range(count - 1))]


def regrets_of(
    samples: list[Any], instance: Instance, *, relative: bool = False
) -> tuple[list[Fraction], list[list[Fraction]], list[Any]]:
    """Optima by enumeration, each feasible rank vector's regrets, and those rank vectors."""
    problems = [Problem(sample, instance.budget, **instance.keywords) for sample in samples]
    vectors = [ranks for ranks in all_feasible(problems[0]) if problems[0].fits(ranks)]
    values = [[problem.value_of(ranks) for problem in problems] for ranks in vectors]
    optima = [max(column) for column in zip(*values, strict=True)]
    scales = optima if relative else [Fraction(1)] * len(optima)
    return (
        optima,
        [[(o - v) / c for o, v, c in zip(optima, row, scales, strict=True)] for row in values],
        vectors,
    )


def check_against_enumeration(instance: Instance, samples: list[Any]) -> Stability:
    found = stability(samples, instance.budget, **instance.keywords, iterations=8)
    optima, regrets, vectors = regrets_of(samples, instance)
    index = {ranks.tobytes(): k for k, ranks in enumerate(vectors)}
    for own, certificate, optimum in zip(
        found.ranks, found.certificates, range(len(optima)), strict=True
    ):
        lost = regrets[index[own.tobytes()]][optimum]
        assert lost <= Fraction(certificate.gap)
        assert Fraction(certificate.value) <= optima[optimum] <= certificate.upper_bound
    least = min(max(row) for row in regrets)
    assert 0 <= Fraction(found.worst_regret_bound) <= least <= Fraction(found.worst_regret)
    assert found.worst_regret == max(found.regrets)
    assert found.worst_regret <= max(found.losses)
    for allocation, stated in ((found.average, found.losses), (found.robust, found.regrets)):
        exact = regrets[index[allocation.ranks.tobytes()]]
        for truth, figure, certificate in zip(exact, stated, found.certificates, strict=True):
            assert truth <= figure
            if certificate.status == "optimal_exact":
                assert figure == round_up(truth)
    means = [sum(row) for row in regrets]
    total = sum(map(abs, optima)) + sum(
        (
            Fraction(float(np.abs(np.diff(problem.curve(i))).sum()))
            for problem in (Problem(s, instance.budget, **instance.keywords) for s in samples)
            for i in range(len(problem.names))
        ),
        Fraction(0),
    )
    assert means[index[found.average.ranks.tobytes()]] - min(means) <= total * CLOSE
    check_optimum(found.average, max(map(found.average.problem.value_of, vectors)))
    certificate = found.robust.certificate
    assert certificate.verify(found.robust.problem, found.robust.ranks)
    assert certificate.price == found.average.certificate.price
    assert certificate.cut == found.average.certificate.cut
    return found


@given(instances(layers=3, ranks=4), seeds())
@settings(max_examples=examples(0.5))
def test_drawn_problems_against_enumeration(instance: Instance, seed: int):
    check_against_enumeration(instance, samples_of(instance, seed))


def small_samples(rng: np.random.Generator, kind: str) -> tuple[Instance, list[Any]]:
    """Samples of increments that differ in shape, not in scale alone."""
    layers, ranks, count = 3, 3, int(rng.integers(2, 5))
    rows = rng.integers(0, 9, (count, layers, ranks)).astype(np.float64)
    if kind == "concave":
        rows = -np.sort(-rows, axis=2)
    elif kind == "falling":
        rows -= 3.0
    costs = rng.integers(1, 5, layers).tolist()
    keywords: dict[str, Any] = {"costs": costs}
    if kind == "fixed costs":
        keywords["fixed_costs"] = rng.integers(0, 6, layers).tolist()
    budget = int(rng.integers(2, ranks * sum(costs)))
    samples: list[Any] = [GainCurves.from_increments(list(row)) for row in rows]
    return Instance(kind, samples[0], budget, keywords), samples


@pytest.mark.parametrize("kind", ["concave", "any", "falling", "fixed costs"])
@given(seed=seeds())
@settings(max_examples=examples(0.2))
def test_the_bound_is_the_value_of_the_game(kind: str, seed: int):
    """With enough iterations the bound reaches what mixtures of all rank vectors can do."""
    from scipy.optimize import linprog

    instance, samples = small_samples(np.random.default_rng(seed), kind)
    check_against_enumeration(instance, samples)
    found = stability(samples, instance.budget, **instance.keywords, iterations=200)
    _, regrets, _ = regrets_of(samples, instance)
    table = np.array(regrets, dtype=np.float64)
    count, columns = table.shape
    game = linprog(
        np.append(np.zeros(count), 1.0),
        A_ub=np.hstack([table.T, -np.ones((columns, 1))]),
        b_ub=np.zeros(columns),
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
    )
    assert found.worst_regret_bound == pytest.approx(game.fun, rel=1e-6, abs=1e-6)


@given(seeds())
@settings(max_examples=examples(0.4))
def test_relative_regret(seed: int):
    instance, samples = small_samples(np.random.default_rng(seed), "concave")
    optima, _, _ = regrets_of(samples, instance)
    if min(optima) > 0:
        found = stability(
            samples, instance.budget, **instance.keywords, relative=True, iterations=20
        )
        _, shares, vectors = regrets_of(samples, instance, relative=True)
        index = {ranks.tobytes(): k for k, ranks in enumerate(vectors)}
        least = min(max(row) for row in shares)
        assert Fraction(found.worst_regret_bound) <= least <= Fraction(found.worst_regret)
        exact = shares[index[found.robust.ranks.tobytes()]]
        assert found.regrets == pytest.approx([float(r) for r in exact], rel=1e-12, abs=1e-12)


def test_relative_regret_of_unlike_samples():
    # Of sample 1, a thousand times smaller, only the share matters.
    samples = [[[1000.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]]
    absolute = stability(samples, 1, objective="nuclear")
    assert absolute.robust.ranks.tolist() == [1, 0]
    assert absolute.worst_regret == 1.0
    assert absolute.worst_regret_bound == pytest.approx(1000 / 1001)
    relative = stability(samples, 1, objective="nuclear", relative=True)
    assert (absolute.relative, relative.relative) == (False, True)
    assert relative.worst_regret == 1.0
    assert relative.worst_regret_bound == pytest.approx(0.5)
    assert relative.losses.tolist() == absolute.losses.tolist() == [0.0, 1.0]


def test_relative_regret_needs_values_above_nought():
    with pytest.raises(
        ValueError, match=r"relative: .* value is above 0, got 0\.0 in samples\[1\]$"
    ):
        stability([[[1.0]], [[0.0]]], 1, relative=True)


def two() -> list[dict[str, list[float]]]:
    return [{"q": [3.0, 2.0], "v": [1.0, 0.5]}, {"q": [2.0, 1.0], "v": [4.0, 3.0]}]


def test_by_hand():
    found = stability(two(), 2)
    assert found.names == ("q", "v")
    assert len(found) == 2
    assert found.ranks.tolist() == [[2, 0], [0, 2]]
    assert found.values.tolist() == [13.0, 25.0]
    assert found.exact
    assert found.quantiles == (0.05, 0.95)
    assert found.intervals == {"q": (0, 2), "v": (0, 2)}
    assert found.mean_rank == {"q": 1.0, "v": 1.0}
    # The means of the gains: q 6.5, 2.5; v 8.5, 4.625.
    assert found.average.ranks.tolist() == [1, 1]
    assert found.average.value == 15.0
    assert found.losses.tolist() == [3.0, 5.0]
    assert found.expected_loss == 4.0
    assert found.expected_relative_loss == round_up(Fraction(4, 19))
    assert found.robust.ranks.tolist() == [1, 1]
    assert found.robust.certificate.status == "optimal_exact"
    assert found.robust.certificate.method == "minimax regret"
    assert found.regrets.tolist() == [3.0, 5.0]
    assert found.worst_regret == 5.0
    # Mixed with (0, 2), of regrets 11.75 and 0: 3 p + 11.75 (1 - p) = 5 p.
    assert found.worst_regret_bound == pytest.approx(5 * 11.75 / 13.75, rel=1e-8)
    assert not found.relative


def test_the_robust_ranks_may_differ_from_the_average():
    # The average serves samples 0 to 2; sample 3 loses 9 with it.
    like = [[9.0, 0.0], [5.0, 0.0]]
    found = stability([like, like, like, [[0.0, 0.0], [8.0, 0.0]]], 1, objective="nuclear")
    assert found.average.ranks.tolist() == [1, 0]
    assert found.losses.tolist() == [0.0, 0.0, 0.0, 8.0]
    assert found.robust.ranks.tolist() == [0, 1]
    assert found.regrets.tolist() == [4.0, 4.0, 4.0, 0.0]
    certificate = found.robust.certificate
    # Means of the first gains: 6.75 and 5.75.
    assert (certificate.value, certificate.upper_bound, certificate.gap) == (5.75, 6.75, 1.0)
    assert certificate.status == "gap_certified"
    assert certificate.price == found.average.certificate.price
    certificate.verify(found.robust.problem, found.robust.ranks)


def test_equal_samples_lose_nothing():
    instance = power_law("a")
    found = stability([instance.spectra] * 3, instance.budget, **instance.keywords)
    own = instance.allocate().ranks
    assert np.array_equal(found.ranks, [own] * 3)
    assert found.intervals == {name: (r, r) for name, r in zip(found.names, own, strict=True)}
    assert found.losses == pytest.approx(np.zeros(3), abs=1e-9)
    assert found.worst_regret == 0.0
    assert found.worst_regret_bound == 0.0


def test_samples_of_nothing():
    found = stability([[[0.0]], [[0.0]]], 1)
    assert found.expected_loss == found.expected_relative_loss == 0.0
    assert found.worst_regret == found.worst_regret_bound == 0.0
    empty = stability([{}, {}], 0)
    assert (empty.ranks.shape, empty.intervals, empty.worst_regret) == ((2, 0), {}, 0.0)


def test_relative_loss_of_values_that_are_not_above_nought():
    curves = [GainCurves([[0.0, -2.0, -3.0], [0.0, -3.0]]), GainCurves([[0.0, -5.0], [0.0, -1.0]])]
    curves[1] = GainCurves([[0.0, -5.0, -9.0], [0.0, -1.0]])
    found = stability(curves, 1, allowed_ranks={"0": [0, 1], "1": [0, 1]})
    assert found.expected_relative_loss == 0.0
    forced = [GainCurves([[0.0, -2.0, -2.0]]), GainCurves([[0.0, -9.0, 0.0]])]
    found = stability(forced, 2, min_rank=1)
    assert found.average.ranks.tolist() == [2]
    assert found.values.tolist() == [-2.0, 0.0]
    assert found.expected_loss == 0.0
    worse = [GainCurves([[0.0, -2.0, -3.0]]), GainCurves([[0.0, -9.0, 0.0]])]
    found = stability(worse, 2, min_rank=1)
    assert found.losses.tolist() == [1.0, 0.0]
    assert found.expected_relative_loss == math.inf


def test_three_forms_of_samples_agree():
    rng = np.random.default_rng(0)
    array = -np.sort(-rng.random((5, 4, 6)), axis=2)
    keywords: dict[str, Any] = {"costs": [1, 2, 3, 4], "objective": schatten(1.5)}
    stacked = stability(array, 15, **keywords)
    by_layer = stability({str(i): array[:, i] for i in range(4)}, 15, **keywords)
    listed = stability([Spectra(sample) for sample in array], 15, **keywords)
    nested = stability(array.tolist(), 15, **keywords)
    for other in (by_layer, listed, nested):
        assert np.array_equal(other.ranks, stacked.ranks)
        assert np.array_equal(other.losses, stacked.losses)
        assert np.array_equal(other.robust.ranks, stacked.robust.ranks)
        assert other.worst_regret_bound == stacked.worst_regret_bound
    for s, sample in enumerate(array):
        own = allocate(sample, 15, **keywords)
        assert stacked.certificates[s] == own.certificate


def test_layers_in_another_order():
    samples = two()
    turned = [samples[0], dict(reversed(samples[1].items()))]
    assert list(turned[1]) == ["v", "q"]
    assert stability(turned, 2).ranks.tolist() == [[2, 0], [0, 2]]
    shapes = {"q": (4, 4), "v": (4, 8)}
    spectra = [Spectra(s, shapes={n: shapes[n] for n in s}) for s in turned]
    found = stability(spectra, 20)
    assert found.average.problem.costs.tolist() == [8, 12]
    assert found.ranks.tolist() == stability(samples, 20, shapes=shapes).ranks.tolist()
    big = [0.0, 1.0, 1.0 + 1e-17, 2.0**60]
    for rows in ({"q": [0.0, 5.0, 6.0], "v": [0.0, 7.0]}, {"q": big, "v": [0.0, 1e-3, 1e9]}):
        same = [GainCurves(rows), GainCurves(dict(reversed(rows.items())))]
        found = stability(same, 2)
        assert found.ranks[0].tolist() == found.ranks[1].tolist()
        assert found.values[0] == found.values[1]
    # The curve of q cannot hold what its second rank gains.
    steps = {"q": [2.0**60, 1.0], "v": [0.5]}
    same = [GainCurves.from_increments(rows) for rows in (steps, dict(reversed(steps.items())))]
    assert stability(same, 2).ranks.tolist() == [[2, 0], [2, 0]]


def test_curves_without_ranks_and_curves_that_are_no_sums():
    none = [GainCurves({"a": [0.0], "b": [0.0, 2.0]}), GainCurves({"a": [0.0], "b": [0.0, 1.0]})]
    assert stability(none, 3).ranks.tolist() == [[0, 1], [0, 1]]
    assert stability(none, 3).average.value == 1.5
    turned = [none[0], GainCurves({"b": [0.0, 1.0], "a": [0.0]})]
    assert stability(turned, 3).average.value == 1.5
    mixed = [
        GainCurves({"a": [0.0, 1.0, 1e-17], "b": [0.0, 0.5, 1.0]}),
        GainCurves({"a": [0.0, 1.0, 5.0], "b": [0.0, 0.5, 1.0]}),
    ]
    assert [curves.increments is None for curves in mixed] == [True, False]
    found = stability(mixed, 2)
    assert found.average.ranks.tolist() == [2, 0]
    assert found.losses.tolist() == [1.5, 0.0]
    assert found.robust.ranks.tolist() == [2, 0]


def test_every_limit_reaches_every_problem():
    rng = np.random.default_rng(1)
    array = -np.sort(-rng.random((4, 4, 8)), axis=2)
    keywords: dict[str, Any] = {
        "costs": [1, 2, 3, 4],
        "fixed_costs": [1, 0, 2, 0],
        "weights": [1.0, 2.0, 0.5, 3.0],
        "min_rank": {"0": 2},
        "max_rank": 6,
        "multiple_of": 2,
        "allowed_ranks": {"3": [0, 4]},
        "caps": {"side": (["0", "1"], 14)},
    }
    found = stability(array, 40, tied=iter([("1", "2")]), iterations=10, **keywords)
    for s, sample in enumerate(array):
        problem = Problem(sample, 40, tied=[("1", "2")], **keywords)
        problem.check(found.ranks[s])
        problem.check(found.average.ranks)
        problem.check(found.robust.ranks)
    problem = found.average.problem
    assert (problem.budget, problem.tied) == (40, (("1", "2"),))
    assert problem.costs.tolist() == [1, 2, 3, 4]
    assert problem.weights is None
    assert stability(array, uniform_rank(2)).average.budget == 8


def test_caps_against_enumeration():
    rng = np.random.default_rng(2)
    for _ in range(4):
        instance, samples = small_samples(rng, "concave")
        capped = Instance(
            "capped",
            instance.spectra,
            instance.budget,
            {**instance.keywords, "caps": {"first": (["0", "1"], 4)}},
        )
        optima, regrets, vectors = regrets_of(samples, capped)
        found = stability(samples, capped.budget, **capped.keywords, iterations=10)
        index = {ranks.tobytes(): k for k, ranks in enumerate(vectors)}
        least = min(max(row) for row in regrets)
        assert Fraction(found.worst_regret_bound) <= least <= Fraction(found.worst_regret)
        assert found.robust.ranks.tobytes() in index
        prices = found.average.certificate.cap_prices
        assert found.robust.certificate.cap_prices == prices
        assert all(v <= o for v, o in zip(found.values, optima, strict=True))


def test_quantiles_round_outwards_to_ranks_that_occur():
    samples = [[[float(s >= k) for k in range(10)]] for s in range(10)]
    found = stability(samples, 10, quantiles=(0.25, 0.7))
    assert sorted(found.ranks[:, 0]) == list(range(1, 11))
    assert found.intervals == {"0": (3, 8)}
    assert found.low.dtype == found.high.dtype == np.int64
    assert stability(samples, 10, quantiles=(0, 1)).intervals == {"0": (1, 10)}
    assert stability(samples, 10, quantiles=(0.5, 0.5)).intervals == {"0": (5, 6)}


def test_searches_that_do_not_close_are_not_called_exact():
    instance = power_law("a")
    rng = np.random.default_rng(0)
    samples = [
        {name: -np.sort(-row * rng.uniform(0.8, 1.2, len(row))) for name, row in spectra.items()}
        for spectra in [instance.spectra] * 2
    ]
    found = stability(
        samples, instance.budget, **instance.keywords, multiple_of=3, time_limit=0.0, iterations=1
    )
    assert {c.status for c in found.certificates} == {"gap_certified"}
    assert not found.exact
    closed = stability(samples, instance.budget, **instance.keywords, multiple_of=3, iterations=1)
    assert closed.exact
    assert np.all(found.losses >= [c.upper_bound - c.value for c in closed.certificates])
    assert 0 <= found.worst_regret_bound <= closed.worst_regret
    assert found.worst_regret >= closed.worst_regret_bound
    assert "2, 0 of them solved to proved optimality" in repr(found)


def test_huge_and_tiny_samples():
    for scale in (2.0**450, 2.0**-440):
        found = stability([{n: scale * np.array(v) for n, v in s.items()} for s in two()], 2)
        assert found.worst_regret == 5.0 * scale**2
        assert found.worst_regret_bound == pytest.approx(5 * 11.75 / 13.75 * scale**2, rel=1e-8)
    far = [{"q": [2.0**-470], "v": [2.0**-475]}, {"q": [0.0], "v": [2.0**400]}]
    found = stability(far, 1)
    assert found.ranks.tolist() == [[1, 0], [0, 1]]
    assert found.robust.ranks.tolist() == [0, 1]
    assert found.worst_regret == 2.0**-940 - 2.0**-950
    assert 0 <= found.worst_regret_bound <= found.worst_regret
    shares = stability(far, 1, relative=True)
    assert shares.worst_regret_bound == pytest.approx((1 - 2**-10) / (2 - 2**-10))


def test_more_iterations_never_worsen_the_answer():
    instance = power_law("a")
    rng = np.random.default_rng(3)
    base = np.array(list(instance.spectra.values()))
    array = -np.sort(-base * np.exp(0.4 * rng.standard_normal((12, *base.shape))), axis=2)
    costs = [sum(shape) for shape in instance.keywords["shapes"].values()]
    few = stability(array, instance.budget, costs=costs, iterations=1)
    many = stability(array, instance.budget, costs=costs, iterations=40)
    assert few.worst_regret_bound < many.worst_regret_bound <= many.worst_regret
    assert many.worst_regret < few.worst_regret
    assert many.worst_regret < 1.1 * many.worst_regret_bound
    assert many.worst_regret < max(many.losses)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], r"^samples: expected at least 2, got 0$"),
        (two()[:1], r"^samples: expected at least 2, got 1$"),
        ({}, r"^samples: expected at least 2, got 0$"),
        ({"q": [[1.0]]}, r"^samples: expected at least 2, got 1$"),
        (Spectra(two()[0]), r"^samples: expected a sequence .*, got one Spectra$"),
        (GainCurves([[0.0, 1.0]]), r"^samples: expected a sequence .*, got one GainCurves$"),
        (np.ones((2, 3)), r"3-D array .*, got an array of shape \(2, 3\)$"),
        ([[[1.0]], [[1.0], [2.0]]], r"^samples\[1\]: layer '1' is not in samples\[0\]$"),
        ("ab", r"3-D array .*, got str$"),
        (b"ab", r"3-D array .*, got bytes$"),
        (None, r"3-D array .*, got NoneType$"),
        ({"q": [1.0, 2.0]}, r"^samples: layer 'q': expected a 2-D .*, got one of shape \(2,\)$"),
        ({"q": [[1.0], [1.0, 2.0]]}, r"^samples: layer 'q': expected a 2-D array \(samples x ran"),
        (
            {"q": [[1.0], [1.0]], "v": [[1.0]]},
            r"^samples: layer 'v': expected 2 samples, as of the first layer, got 1$",
        ),
        ([*two(), {"q": [1.0, 1.0]}], r"^samples\[2\]: layer 'v' of samples\[0\] is missing$"),
        ([{"q": [1.0]}, {"q": [1.0], "x": [1.0]}], r"^samples\[1\]: layer 'x' is not in sam"),
        (
            [*two(), {"q": [1.0, 1.0], "v": [1.0]}],
            r"^samples\[2\]: layer 'v': expected 2 ranks, as in samples\[0\], got 1$",
        ),
        ([*two(), {"q": [1.0, 2.0]}], r"^samples\[2\]: layer 'q': expected singular values in d"),
        ([{"q": [-1.0]}, {"q": [1.0]}], r"^samples\[0\]: layer 'q': expected singular values >"),
        (
            [Spectra({"q": [1.0]}, shapes={"q": (4, d)}) for d in (4, 5)],
            r"^samples\[1\]: layer 'q': expected the cost 8 a rank, as in samples\[0\], got 9$",
        ),
    ],
)
def test_samples_that_are_refused(samples: Any, message: str):
    with pytest.raises(ValueError, match=message):
        stability(samples, 2)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"objective": "operator"}, r"objective: a mean over samples needs gains that add up; 'op"),
        ({"objective": "best"}, r"^objective: expected one of"),
        ({"quantiles": (0.9, 0.1)}, r"quantiles: expected \(low, high\) .*, got \(0\.9, 0\.1\)$"),
        ({"quantiles": (-0.1, 0.5)}, "quantiles: expected"),
        ({"quantiles": (0.5, 1.1)}, "quantiles: expected"),
        ({"quantiles": 0.5}, r"quantiles: expected .*, got 0\.5$"),
        ({"quantiles": (0.1, 0.2, 0.3)}, "quantiles: expected"),
        ({"quantiles": ("a", 0.5)}, "quantiles: expected"),
        ({"iterations": 0}, r"iterations: expected a whole number >= 1, got 0"),
        ({"time_limit": -1.0}, "time_limit: expected seconds"),
        ({"costs": [1]}, r"samples\[0\]: costs: expected 2 values, got 1"),
    ],
)
def test_arguments_that_are_refused(keywords: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        stability(two(), 2, **keywords)


class Foreign:
    """An array of another library that numpy cannot read."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("on a device")


def test_arrays_that_cannot_be_read():
    expected = (
        r"^samples: layer 'q': expected a 2-D array \(samples x ranks\), got Foreign: on a dev"
    )
    with pytest.raises(ValueError, match=expected):
        stability({"q": Foreign()}, 2)
    with pytest.raises(ValueError, match=r"3-D array .*, got Foreign: on a device$"):
        stability(Foreign(), 2)


def test_the_expected_loss_is_rounded_up():
    # A third has no double.
    samples = [GainCurves.from_increments([[gain], [1.0]]) for gain in (0.0, 1.5, 2.0)]
    found = stability(samples, 1)
    assert found.losses.tolist() == [1.0, 0.0, 0.0]
    assert float(Fraction(1, 3)) < Fraction(1, 3) <= Fraction(found.expected_loss)
    assert found.expected_loss == round_up(Fraction(1, 3))
    assert found.expected_relative_loss == round_up(Fraction(1) / Fraction(4.5))


def test_a_budget_that_is_too_small():
    with pytest.raises(InfeasibleError, match=r"^budget: the minimum ranks cost 4") as caught:
        stability(two(), 3, min_rank=2)
    assert caught.value.minimum_budget == 4


def test_repr():
    assert repr(stability(two(), 2)).splitlines() == [
        "layer  5%  mean  95%  average  robust",
        "-------------------------------------",
        "q       0   1.0    2        1       1",
        "v       0   1.0    2        1       1",
        "-------------------------------------",
        "samples        2, 2 of them solved to proved optimality",
        "expected loss  4, 21.05% of the mean value, with the average's ranks",
        "worst regret   5 with the robust ranks; at least 4.273 with any",
    ]
    found = stability(two(), 2, relative=True, quantiles=(0.025, 1))
    assert repr(found).startswith("layer  2.5%  mean  100%  average  robust\n")
    assert repr(found).endswith(
        f"worst regret   {found.worst_regret:.4g} of a sample's value with the robust ranks; at "
        f"least {found.worst_regret_bound:.4g} with any"
    )


def test_repr_of_many_layers():
    lines = repr(stability(np.ones((2, 49, 1)), 3)).splitlines()
    assert len(lines) == 3 + 49 + 3
    assert lines[2 + 24].split() == ["...", "1", "more"]
    assert len(lines[2 + 24]) == len(lines[0])
    assert lines[2 + 23].split()[0] == "23"
    assert lines[2 + 25].split()[0] == "25"
    assert "more" not in repr(stability(np.ones((2, 48, 1)), 3))


@given(st.integers(1, 4))
@settings(max_examples=2)
def test_fixed_costs_that_a_mixture_pays_in_part(budget: int):
    # Each sample wants another layer, and each layer's fixed cost takes the whole budget.
    gains = np.eye(3)[:, :, None] * np.array([8.0, 8.0, 8.0])
    keywords: dict[str, Any] = {"fixed_costs": [5, 5, 5], "objective": "nuclear"}
    found = stability(gains, 8, **keywords)
    assert found.worst_regret == 24.0
    assert found.worst_regret_bound == pytest.approx(16.0)
