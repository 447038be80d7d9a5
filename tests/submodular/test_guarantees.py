"""The table of guarantees."""

import math
from itertools import product

import pytest

from lorambo_alloc.submodular import GUARANTEES, Guarantee, guarantee
from lorambo_alloc.submodular.guarantees import LOCAL_SEARCH_EPSILON

E = 1 - 1 / math.e
RATIOS = {
    ("cardinality", "greedy"): (1.0, E, 0.0),
    ("matroid", "greedy"): (1.0, 0.5, 0.0),
    ("matroid", "local search"): (E - 0.001, E - 0.001, 0.0),
    ("knapsack", "density greedy"): (0.0, 0.0, 0.0),
    ("knapsack", "density greedy or best single"): (0.5, 0.405, 0.0),
    ("knapsack", "one guess"): (0.6174, 0.6174, 0.0),
    ("knapsack", "two guesses"): (2 / 3, E, 0.0),
}
KINDS = ("modular", "submodular", "weakly submodular")


def test_the_whole_table():
    expected = {
        (*key, kind): r for key, rs in RATIOS.items() for kind, r in zip(KINDS, rs, strict=True)
    }
    assert len(GUARANTEES) == len(expected)
    for key, ratio in expected.items():
        row = guarantee(*key)
        assert (row.constraint, row.algorithm, row.objective) == key
        assert row.ratio == pytest.approx(ratio, rel=1e-12)
        assert row.ratio <= ratio
        assert (row.source == "none") == (ratio == 0 and key[:2] != ("cardinality", "greedy"))


def test_each_row_names_its_source():
    sources = {
        ("cardinality", "greedy", "submodular"): "Nemhauser, Wolsey, Fisher",
        ("cardinality", "greedy", "weakly submodular"): "Das, Kempe",
        ("matroid", "greedy", "modular"): "Rado",
        ("matroid", "greedy", "submodular"): "Fisher, Nemhauser, Wolsey",
        ("matroid", "local search", "submodular"): "Filmus, Ward",
        ("knapsack", "density greedy or best single", "submodular"): "Tang",
        ("knapsack", "one guess", "submodular"): "Feldman, Nutov, Shoham",
        ("knapsack", "two guesses", "submodular"): "Feldman, Nutov, Shoham",
        ("knapsack", "two guesses", "modular"): "Sahni",
    }
    for key, source in sources.items():
        assert guarantee(*key).source.startswith(source)


@pytest.mark.parametrize(
    "key",
    [
        ("cardinality", "one guess", "submodular"),
        ("knapsack", "greedy", "modular"),
        ("budget", "greedy", "modular"),
    ],
)
def test_no_such_row(key):
    with pytest.raises(ValueError, match=r"^no guarantee is known for '.*'; the table") as error:
        guarantee(*key)
    for row in GUARANTEES:
        assert f"\n  {row.constraint}, {row.algorithm}, {row.objective}" in str(error.value)


def test_curvature_sharpens_greedy():
    matroid = guarantee("matroid", "greedy", "submodular")
    assert matroid.with_curvature(0.25).ratio == 0.8
    assert matroid.with_curvature(0.0).ratio == 1.0
    assert matroid.with_curvature(1.0) is matroid
    cardinality = guarantee("cardinality", "greedy", "submodular")
    half = cardinality.with_curvature(0.5)
    assert half.ratio == pytest.approx((1 - math.exp(-0.5)) / 0.5, rel=1e-14)
    assert half.ratio < -math.expm1(-0.5) / 0.5
    assert half.source.startswith("Conforti")
    assert half.note == "total curvature 0.5"
    assert cardinality.with_curvature(0.0).ratio == 1.0
    assert cardinality.with_curvature(1.0).ratio == cardinality.ratio


def test_curvature_says_nothing_of_other_rows():
    for row in GUARANTEES:
        if (row.algorithm, row.objective) != ("greedy", "submodular"):
            assert row.with_curvature(0.1) is row


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_what_is_no_share(bad):
    row = guarantee("cardinality", "greedy", "submodular")
    with pytest.raises(ValueError, match=r"^curvature: expected a number in \[0, 1\], got "):
        row.with_curvature(bad)
    with pytest.raises(ValueError, match=r"^submodularity ratio: expected a number in \[0, 1\]"):
        row.with_submodularity_ratio(bad)


def test_a_submodularity_ratio_is_used_under_cardinality_alone():
    row = guarantee("cardinality", "greedy", "weakly submodular")
    assert row.ratio == 0.0
    known = row.with_submodularity_ratio(0.5)
    assert known.ratio == pytest.approx(1 - math.exp(-0.5), rel=1e-14)
    assert known.ratio < -math.expm1(-0.5)
    assert known.note == "submodularity ratio at least 0.5"
    assert row.with_submodularity_ratio(0.0).ratio == 0.0
    assert row.with_submodularity_ratio(1.0).ratio == pytest.approx(E, rel=1e-14)
    for other in GUARANTEES:
        if other is not row:
            assert other.with_submodularity_ratio(0.5) is other


def test_as_text():
    assert str(guarantee("matroid", "greedy", "modular")) == (
        "exact (greedy, matroid, modular): Rado (1957); Edmonds, Mathematical Programming 1 (1971)"
    )
    assert str(guarantee("matroid", "greedy", "submodular")) == (
        "at least 0.5000 of the optimum (greedy, matroid, submodular): Fisher, Nemhauser, "
        "Wolsey, Mathematical Programming Study 8 (1978), theorem 2.1"
    )
    assert str(Guarantee("c", "a", "o", 0.0, "s", "n")) == (
        "no constant guaranteed (a, c, o): s; n"
    )
    assert LOCAL_SEARCH_EPSILON == 0.001
    # Rounded down, all of them.
    assert str(guarantee("knapsack", "two guesses", "modular")).startswith("at least 0.6666 of")
    for ratio, text in [(0.405, "0.4050"), (0.6174, "0.6174"), (0.99999, "0.9999")]:
        assert str(Guarantee("c", "a", "o", ratio, "s")).startswith(f"at least {text} of")
    weak = guarantee("cardinality", "greedy", "weakly submodular")
    for ratio, text in [(0.7499999, "0.749"), (0.5, "0.5"), (1.2399e-9, "1.23e-09"), (1.0, "1")]:
        assert weak.with_submodularity_ratio(ratio).note == f"submodularity ratio at least {text}"


def test_nothing_is_claimed_of_a_knapsack_but_by_name():
    for kind, algorithm in product(KINDS, ["density greedy"]):
        assert guarantee("knapsack", algorithm, kind).ratio == 0.0
