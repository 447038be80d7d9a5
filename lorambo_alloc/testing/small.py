"""Small random instances of every family, under every limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from lorambo_alloc.curves import GainCurves
from lorambo_alloc.objectives import FloatArray, IntArray, log, schatten
from lorambo_alloc.testing.instances import Instance

#: The families that `small_instance` draws from.
SMALL_FAMILIES: tuple[str, ...] = (
    # spectra
    "power_law",
    "equal_costs",
    "ties",
    "zeros",
    "large_costs",
    "huge",
    "tiny",
    "mixed_scales",
    "nuclear",
    "schatten",
    "log",
    "operator",
    # gain curves from increments, concave
    "proportional",
    "near_proportional",
    "subset_sum",
    "parity",
    "parity_odd_layers",
    "weakly_correlated",
    "strongly_correlated",
    "inverse_strongly_correlated",
    # gain curves of any form
    "non_concave",
    "non_monotone",
    "small_integers",
)

_SPECTRA_FAMILIES = SMALL_FAMILIES[: SMALL_FAMILIES.index("proportional")]


def small_instance(
    rng: np.random.Generator,
    family: str | None = None,
    *,
    layers: int = 4,
    ranks: int = 5,
    limits: bool = True,
) -> Instance:
    """A small feasible instance, for comparison with an oracle.

    Args:
        rng: the source of all that is random.
        family: one of `SMALL_FAMILIES`; a random one by default.
        layers: at most so many layers, at least one.
        ranks: at most so many ranks a layer, at least one.
        limits: draw minimum, maximum, multiple, allowed ranks, tied groups, fixed costs and weights
            too, each with some probability.

    Returns:
        An instance with at least one feasible answer; the budget lies anywhere from the least
        feasible one to beyond everything.

    Raises:
        ValueError: an unknown family.

    Example:
        >>> from lorambo_alloc.testing import brute_force
        >>> instance = small_instance(np.random.default_rng(0), "non_monotone")
        >>> value, ranks = brute_force(instance.problem())
        >>> instance.problem().value_of(ranks) == value
        True
    """
    if family is None:
        family = SMALL_FAMILIES[rng.integers(len(SMALL_FAMILIES))]
    if family not in SMALL_FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(SMALL_FAMILIES)}, got {family!r}")
    count = int(rng.integers(1, layers + 1, 2).max())
    names = [f"layer{i}" for i in range(count)]
    lengths = {name: int(rng.integers(1, ranks + 1)) for name in names}
    costs = _small_costs(rng, family, names)
    keywords: dict[str, Any] = {"costs": costs}
    if family in _SPECTRA_FAMILIES:
        spectra: Any = {
            name: _small_spectrum(rng, family, length) for name, length in lengths.items()
        }
        if family == "tiny":
            # A problem whose gains are all subnormal is refused; one normal layer is enough.
            spectra[names[0]] = spectra[names[0]] * (1e-142 / spectra[names[0]][0])
        if family in ("nuclear", "operator"):
            keywords["objective"] = family
        elif family == "schatten":
            keywords["objective"] = schatten(float(rng.choice([0.5, 1.5, 3.0])))
        elif family == "log":
            keywords["objective"] = log(float(10.0 ** rng.uniform(-3, 3)))
    else:
        increments = {
            name: _small_increments(rng, family, costs[name], length)
            for name, length in lengths.items()
        }
        spectra = GainCurves.from_increments(increments)
    if limits:
        keywords |= _small_limits(rng, lengths)
    cheapest, dearest = _cost_range(lengths, costs, keywords)
    budget = int(rng.integers(cheapest, dearest + max(2, (dearest - cheapest) // 8)))
    if family.startswith("parity") and cheapest < budget and budget % 2 == 0:
        budget -= 1
    return Instance(f"small {family}", spectra, budget, keywords)


def _small_costs(rng: np.random.Generator, family: str, names: list[str]) -> dict[str, int]:
    count = len(names)
    if family == "equal_costs":
        values = np.full(count, rng.integers(1, 10))
    elif family == "large_costs":
        values = rng.integers(900_000_000, 1_100_000_000, count)
    elif family.startswith("parity"):
        values = 2 * rng.integers(1, 15, count)
        if family == "parity_odd_layers":
            values[0] += 1
    elif family == "inverse_strongly_correlated":
        values = rng.integers(3, 30, count)
    else:
        # Few distinct costs or many, with a common divisor or without.
        distinct: IntArray = rng.integers(1, 12, int(rng.choice([2, count + 1])))
        values = rng.choice(distinct, count) * rng.choice([1, 1, 6, 512])
    return dict(zip(names, values.tolist(), strict=True))


def _small_spectrum(rng: np.random.Generator, family: str, length: int) -> FloatArray:
    values = np.exp(rng.normal(0, 0.7)) * np.arange(1, length + 1) ** -rng.uniform(0.2, 1.5)
    values *= np.exp(0.2 * rng.standard_normal(length))
    if family == "ties":
        values = rng.integers(1, 4, length).astype(np.float64)
    elif family == "zeros":
        values[rng.random(length) < 0.5] = 0.0
    elif family == "huge":
        values *= 1e140
    elif family == "tiny":
        # Squares around the smallest normal doubles, subnormal ones and zero included.
        values *= 10.0 ** rng.uniform(-163, -150)
    elif family == "mixed_scales":
        values *= 10.0 ** rng.integers(-60, 61)
    elif family == "operator" and rng.random() < 0.5:
        values = rng.integers(0, 6, length).astype(np.float64)
    return -np.sort(-values)


def _small_increments(rng: np.random.Generator, family: str, cost: int, length: int) -> FloatArray:
    rank = np.arange(1, length + 1)
    if family == "proportional":
        values = float(cost) * (length // rank)
    elif family == "near_proportional":
        values = cost / rank * (1.0 + 1e-9 * rng.standard_normal(length))
    elif family in ("subset_sum", "parity", "parity_odd_layers"):
        # In the parity families only the layer with the odd cost has half the density.
        poor = family == "parity_odd_layers" and cost % 2
        values = np.full(length, cost / 2 if poor else float(cost))
    elif family == "weakly_correlated":
        values = cost + rng.uniform(-0.5, 0.5, length)
    elif family == "strongly_correlated":
        values = np.full(length, cost + 3.0)
    elif family == "inverse_strongly_correlated":
        values = np.full(length, cost - 2.0)
    elif family == "non_concave":
        return rng.uniform(0.0, 1.0, length)
    elif family == "non_monotone":
        return rng.normal(0.2, 1.0, length)
    else:
        return rng.integers(-2, 6, length).astype(np.float64)
    return -np.sort(-values)


def _small_limits(rng: np.random.Generator, lengths: dict[str, int]) -> dict[str, Any]:
    """Random limits under which every layer, and every tied group, is left with a rank to take."""
    names = list(lengths)
    longest = max(lengths.values())
    drawn: dict[str, Any] = {}
    if rng.random() < 0.25:
        drawn["multiple_of"] = int(rng.integers(1, 4))
    if rng.random() < 0.3:
        drawn["max_rank"] = int(rng.integers(1, longest + 1))
        if rng.random() < 0.5:
            some = rng.permutation(names)[: rng.integers(1, len(names) + 1)].tolist()
            drawn["max_rank"] = {name: int(rng.integers(0, lengths[name] + 1)) for name in some}
    if rng.random() < 0.3:
        drawn["min_rank"] = int(rng.integers(0, min(lengths.values()) + 1))
        if rng.random() < 0.5:
            some = rng.permutation(names)[: rng.integers(1, len(names) + 1)].tolist()
            drawn["min_rank"] = {name: int(rng.integers(0, lengths[name] + 1)) for name in some}
    if rng.random() < 0.25:
        drawn["allowed_ranks"] = _some_ranks(rng, longest)
        if rng.random() < 0.5:
            some = rng.permutation(names)[: rng.integers(1, len(names) + 1)].tolist()
            drawn["allowed_ranks"] = {name: _some_ranks(rng, lengths[name]) for name in some}
    if len(names) > 1 and rng.random() < 0.3:
        order = rng.permutation(names).tolist()
        cut = int(rng.integers(2, len(names) + 1))
        groups = [order[:cut]]
        if len(order) - cut >= 2:
            groups.append(order[cut:])
        drawn["tied"] = tuple(tuple(group) for group in groups)
    # Limits that leave nothing to choose are dropped, the narrowest first.
    for keyword in ("min_rank", "allowed_ranks", "max_rank"):
        if all(_rank_sets(lengths, drawn).values()):
            break
        drawn.pop(keyword, None)
    if rng.random() < 0.3:
        drawn["fixed_costs"] = {name: int(rng.integers(0, 8)) for name in names}
    if rng.random() < 0.3:
        drawn["weights"] = {name: float(rng.choice([0.5, 0.7, 1.0, 3.0])) for name in names}
    return drawn


def _some_ranks(rng: np.random.Generator, longest: int) -> list[int]:
    keep = rng.random(longest + 1) < 0.5
    keep[rng.integers(longest + 1)] = True
    return np.flatnonzero(keep).tolist()


def _rank_sets(lengths: dict[str, int], keywords: Mapping[str, Any]) -> dict[str, set[int]]:
    """The ranks each layer may take, straight from the definition of the limits."""

    def of(name: str, keyword: str, default: Any) -> Any:
        limit = keywords.get(keyword, default)
        return cast(dict[str, Any], limit).get(name, default) if isinstance(limit, dict) else limit

    sets: dict[str, set[int]] = {}
    for name, length in lengths.items():
        ranks = range(of(name, "min_rank", 0), min(length, of(name, "max_rank", length)) + 1)
        allowed = of(name, "allowed_ranks", range(length + 1))
        step = keywords.get("multiple_of", 1)
        sets[name] = {r for r in ranks if r in allowed and r % step == 0}
    for group in keywords.get("tied", ()):
        shared = set[int].intersection(*(sets[name] for name in group))
        sets.update(dict.fromkeys(group, shared))
    return sets


def _cost_range(
    lengths: dict[str, int], costs: dict[str, int], keywords: Mapping[str, Any]
) -> tuple[int, int]:
    fixed = keywords.get("fixed_costs", {})
    cheapest = dearest = 0
    for name, ranks in _rank_sets(lengths, keywords).items():
        prices = [costs[name] * r + (fixed.get(name, 0) if r else 0) for r in ranks]
        cheapest += min(prices)
        dearest += max(prices)
    return cheapest, dearest
