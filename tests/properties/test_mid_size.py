"""Mid-size problems against HiGHS and against a full dynamic program."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import Bounds, LinearConstraint, milp

from lorambo_alloc import GainCurves, Problem, log, solve
from lorambo_alloc.testing import dynamic_program
from tests.checks import check_answer, check_optimum
from tests.strategies import examples, seeds

FAMILIES = ("power law", "ties", "non-concave", "non-monotone", "correlated", "log")
LIMITS = ("none", "multiples", "fixed costs", "tied", "lists", "ranges")


def mid_size(seed: int, family: str, limits: str, layers: int = 12, ranks: int = 10) -> Problem:
    """A problem too large to enumerate, with gains of about 1 and small costs."""
    rng = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(layers)]
    costs = rng.integers(1, 30, layers)
    keywords: dict[str, Any] = {"costs": costs.tolist()}
    shape = (layers, ranks)
    spectra: Any
    if family in ("power law", "log"):
        values = np.arange(1, ranks + 1) ** -rng.uniform(0.3, 1.2, (layers, 1))
        spectra = -np.sort(-values * rng.uniform(0.8, 1.2, shape), axis=1)
        keywords["objective"] = log(0.3) if family == "log" else "frobenius"
    elif family == "ties":
        spectra = -np.sort(-rng.integers(1, 4, shape).astype(float), axis=1)
    elif family == "correlated":
        spectra = GainCurves.from_increments(np.repeat((costs[:, None] + 3) / 32.0, ranks, axis=1))
    else:
        low = 0.0 if family == "non-concave" else -0.7
        spectra = GainCurves.from_increments(rng.uniform(low, 1.0, shape))
    if not isinstance(spectra, GainCurves):
        spectra = dict(zip(names, spectra, strict=True))
    else:
        names = list(spectra)
    if limits == "multiples":
        keywords["multiple_of"] = 3
    elif limits == "fixed costs":
        keywords["fixed_costs"] = rng.integers(0, 40, layers).tolist()
    elif limits == "tied":
        keywords["tied"] = [names[:3], names[3:5], names[7:9]]
    elif limits == "lists":
        keywords["allowed_ranks"] = {name: [0, 1, 2, 4, 8] for name in names[::2]}
    elif limits == "ranges":
        keywords["min_rank"] = {names[0]: 2, names[1]: 1}
        keywords["max_rank"] = 7
    least = Problem(spectra, 10**9, **keywords)
    budget = least.cost_of(least.lower) + int(rng.uniform(0.05, 0.7) * int(costs.sum()) * ranks)
    return Problem(spectra, budget, **keywords)


def highs(problem: Problem) -> float:
    """The optimum by one binary a variable and rank, written down without the library's help."""
    gains, costs, owners = [], [], []
    for v, layers in enumerate(problem.variables):
        for rank in problem.allowed_ranks(layers[0]).tolist():
            gains.append(sum(float(problem.curve(i)[rank]) for i in layers))
            costs.append(
                sum(
                    int(problem.costs[i]) * rank + int(problem.fixed_costs[i]) * (rank > 0)
                    for i in layers
                )
            )
            owners.append(v)
    one_each = (np.arange(len(problem.variables))[:, None] == np.array(owners)).astype(float)
    result = milp(
        -np.array(gains),
        integrality=np.ones(len(gains), dtype=int),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array([costs], dtype=float), -np.inf, problem.budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.status == 0
    return -float(result.fun)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
@given(seed=seeds())
@settings(max_examples=examples(0.02))
def test_against_a_full_dynamic_program(family: str, limits: str, seed: int):
    problem = mid_size(seed, family, limits)
    optimum = dynamic_program(problem)
    allocation = solve(problem)
    check_optimum(allocation, optimum)
    assert allocation.certificate.relative_gap < 1e-9
    check_optimum(solve(problem, "water_filling"), optimum)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "correlated"])
def test_against_highs(family: str, limits: str):
    problem = mid_size(1, family, limits, layers=15, ranks=12)
    allocation = solve(problem)
    value = check_answer(allocation)
    expected = highs(problem)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert float(problem.value_of(solve(problem, "milp").ranks)) == pytest.approx(
        expected, rel=1e-6
    )
