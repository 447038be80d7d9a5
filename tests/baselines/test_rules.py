"""What holds for all rules alike."""

import pytest

from lorambo_alloc import Problem
from lorambo_alloc.baselines import RULES, adalora, eva, gora, square_root

FLAT = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 8}


def test_the_rules_by_name():
    assert list(RULES) == ["uniform", "mlp_only", "eva", "adalora", "gora", "square_root"]
    for name, function in RULES.items():
        assert function.__name__ == name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("allocation_of", "expected"),
    [
        (lambda p: gora(p, importance=[1.0, -1.0, 1.0]), "^importance: layer 'b': expected a fin"),
        (lambda p: gora(p, importance=[1.0]), "^importance: expected 3 values, got 1"),
        (lambda p: square_root(p, sensitivity=[1.0]), "^sensitivity: expected 3 values, got 1"),
        (lambda p: eva(p, ratios=[[1.0]]), "^ratios: expected 3 sequences, got 1"),
        (lambda p: adalora(p, scores=[[1.0]]), "^scores: expected 3 sequences, got 1"),
    ],
)
def test_signals_are_named_where_they_are_wrong(allocation_of, expected):
    with pytest.raises(ValueError, match=expected):
        allocation_of(Problem(FLAT, 9))


@pytest.mark.parametrize("rule", RULES)
def test_what_is_left_over_is_spent_only_if_asked_for(rule):
    # Every rule gives all layers their ranks at the same moments, at 10 for a rank of each.
    spectra = {f"{n}.mlp": [1.0] * 4 for n in range(2)}
    problem = Problem(spectra, 29, costs=[5, 5])
    plain, filled = RULES[rule](problem), RULES[rule](problem, fill=True)
    assert filled.cost == 25
    expected = {"adalora": 0, "eva": 25}
    assert plain.cost == expected.get(rule, 20)


def test_ties_go_to_the_first_of_many_layers():
    # Two values in turn, so many that a sort which is not stable would mix them up.
    rows = [[0.9], [0.5]] * 40
    problem = Problem([[1.0]] * 80, 53)
    expected = [1, 1] * 13 + [1, 0] * 27
    assert eva(problem, ratios=rows).ranks.tolist() == expected
    assert adalora(problem, scores=rows).ranks.tolist() == [1, 0] * 40
    assert adalora(problem, scores=rows, fill=True).ranks.tolist() == expected


@pytest.mark.parametrize("rule", RULES)
def test_limits_come_first(rule):
    names = {f"{n}.mlp": [4.0, 3.0, 2.0, 1.0] for n in range(3)}
    problem = Problem(names, 7, min_rank={"1.mlp": 2}, max_rank={"0.mlp": 1})
    ranks = RULES[rule](problem, fill=True).ranks.tolist()
    assert ranks[0] <= 1
    assert ranks[1] >= 2
    assert sum(ranks) == 7
