"""Hypothesis strategies for allocation problems. Constructive: they filter nothing.

A problem is built round a witness, a rank vector that obeys every limit drawn; so every problem is
feasible, and the budget lies anywhere from what the witness costs to a little more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from lorambo_alloc import GainCurves, Problem, log, schatten
from lorambo_alloc.caps import Cap
from lorambo_alloc.testing import Instance

SPECTRA = ("integers", "floats", "mixed scales", "huge", "tiny", "near ties")
CURVES = ("integer increments", "descending increments", "float increments", "totals")
GROUPS = ("nested", "crossing", "disjoint", "equal", "all")
COSTS = ("equal", "few", "any", "common divisor", "around 1e9", "up to 2^53")


def examples(share: float) -> int:
    """`max_examples` for a property that is to run a share of the profile's number."""
    return max(1, int(share * settings().max_examples))


def seeds() -> st.SearchStrategy[int]:
    """Seeds for `np.random.default_rng`."""
    return st.integers(0, 2**32 - 1)


def _values(kind: str) -> st.SearchStrategy[float]:
    """One singular value."""
    if kind == "integers":
        return st.integers(0, 6).map(float)
    if kind == "floats":
        # Spectra whose gains all underflow are refused; the "tiny" ones come close to that.
        return st.floats(0.0, 1000.0).map(lambda x: x if x > 1e-100 else 0.0)
    if kind == "near ties":
        return st.integers(-3, 3).map(lambda n: 1.0 + n * 2.0**-52)
    # Below 2^476 a weighted sum of squares stays within what is taken.
    exponents = {"mixed scales": (-200, 200), "huge": (440, 455), "tiny": (-545, -475)}[kind]
    return st.builds(
        lambda m, e: float(m) * 2.0**e, st.integers(0, 1 << 20), st.integers(*exponents)
    )


def _descending(values: Sequence[float]) -> list[float]:
    return sorted(values, reverse=True)


@st.composite
def spectra(draw: st.DrawFn, lengths: Sequence[int]) -> dict[str, list[float]]:
    """Singular values of layers of the given lengths."""
    kind = draw(st.sampled_from(SPECTRA))
    values = {
        f"layer{i}": _descending(draw(st.lists(_values(kind), min_size=n, max_size=n)))
        for i, n in enumerate(lengths)
    }
    if kind == "tiny":
        # Gains that are subnormal through and through are refused; one normal value is enough.
        values["layer0"][0] = 2.0**-450
    return values


@st.composite
def gain_curves(draw: st.DrawFn, lengths: Sequence[int]) -> GainCurves:
    """Gain curves of layers of the given lengths, concave and monotone or not."""
    kind = draw(st.sampled_from(CURVES))
    entry = st.integers(-3, 6).map(float)
    if kind != "integer increments":
        entry = st.floats(-10, 100).map(lambda x: x if abs(x) > 1e-250 else 0.0)
    rows = [draw(st.lists(entry, min_size=n, max_size=n)) for n in lengths]
    if kind == "totals":
        # Differences of such doubles need not be doubles.
        return GainCurves({f"layer{i}": [0.0, *row] for i, row in enumerate(rows)})
    if kind == "descending increments":
        rows = [_descending(row) for row in rows]
    return GainCurves.from_increments({f"layer{i}": row for i, row in enumerate(rows)})


def costs(layers: int) -> st.SearchStrategy[list[int]]:
    """Costs of one rank."""

    def of(kind: str) -> st.SearchStrategy[list[int]]:
        size: dict[str, Any] = {"min_size": layers, "max_size": layers}
        if kind == "equal":
            return st.integers(1, 9).map(lambda c: [c] * layers)
        if kind == "few":
            return st.lists(st.sampled_from([2, 3]), **size)
        if kind == "any":
            return st.lists(st.integers(1, 40), **size)
        if kind == "common divisor":
            return st.lists(st.integers(1, 6).map(lambda c: 512 * c), **size)
        if kind == "around 1e9":
            return st.lists(st.integers(900_000_000, 1_100_000_000), **size)
        return st.lists(st.integers(2**53 - 9, 2**53), **size)

    return st.sampled_from(COSTS).flatmap(of)


@st.composite
def limits(
    draw: st.DrawFn, lengths: Sequence[int], unit_steps: bool = False
) -> tuple[dict[str, Any], list[int]]:
    """Keyword arguments of `Problem` that limit the ranks, and a witness that obeys them."""
    names = [f"layer{i}" for i in range(len(lengths))]
    keywords: dict[str, Any] = {}
    step = 1 if unit_steps else draw(st.sampled_from([1, 1, 1, 2, 3]))
    if step > 1:
        keywords["multiple_of"] = step
    groups = [[i] for i in range(len(lengths))]
    if not unit_steps and len(lengths) > 1 and draw(st.integers(0, 2)) == 0:
        order = draw(st.permutations(range(len(lengths))))
        cut = draw(st.integers(2, len(lengths)))
        groups = [list(order[:cut]), *([list(order[cut:])] if cut < len(lengths) else [])]
        keywords["tied"] = [[names[i] for i in group] for group in groups]
    witness = [0] * len(lengths)
    for group in groups:
        rank = step * draw(st.integers(0, min(lengths[i] for i in group) // step))
        for i in group:
            witness[i] = rank
    how = st.sampled_from(["none", "none", "global", "by name"])
    some = st.sets(st.sampled_from(names))
    if (drawn := draw(how)) == "global":
        keywords["min_rank"] = draw(st.integers(0, min(witness)))
    elif drawn == "by name":
        keywords["min_rank"] = {
            name: draw(st.integers(0, witness[names.index(name)])) for name in sorted(draw(some))
        }
    if (drawn := draw(how)) == "global":
        keywords["max_rank"] = draw(st.integers(max(witness), max(lengths) + 2))
    elif drawn == "by name":
        keywords["max_rank"] = {
            name: draw(st.integers(witness[names.index(name)], max(lengths) + 2))
            for name in sorted(draw(some))
        }
    if not unit_steps:
        ranks = st.sets(st.integers(0, max(lengths) + 1))
        if (drawn := draw(how)) == "global":
            keywords["allowed_ranks"] = sorted({*witness, *draw(ranks)})
        elif drawn == "by name":
            # With the witness of every layer in every list, tied lists have a rank in common.
            keywords["allowed_ranks"] = {
                name: sorted({witness[names.index(name)], *draw(ranks)})
                for name in sorted(draw(some))
            }
    return keywords, witness


@st.composite
def instances(
    draw: st.DrawFn,
    *,
    layers: int = 4,
    ranks: int = 5,
    concave: bool = False,
    objective: str | None = None,
) -> Instance:
    """A feasible problem, small enough for brute force.

    Args:
        draw: Hypothesis's.
        layers: at most so many layers.
        ranks: at most so many ranks a layer.
        concave: only single ranks of descending gain, no ties, lists, multiples or fixed costs.
        objective: "operator", or None for any other.
    """
    lengths = draw(st.lists(st.integers(1, ranks), min_size=1, max_size=layers))
    unit_costs = draw(costs(len(lengths)))
    keywords, witness = draw(limits(lengths, unit_steps=concave))
    keywords["costs"] = unit_costs
    fixed = [0] * len(lengths)
    if not concave and draw(st.integers(0, 2)) == 0:
        fixed = draw(st.lists(st.integers(0, 20), min_size=len(lengths), max_size=len(lengths)))
        keywords["fixed_costs"] = fixed
    if draw(st.integers(0, 2)) == 0:
        weight = st.sampled_from([0.0, 0.5, 0.7, 1.0, 3.0])
        keywords["weights"] = draw(st.lists(weight, min_size=len(lengths), max_size=len(lengths)))
        keywords["weights"][0] = 1.0  # keeps the one normal gain of the tiny spectra
    values: Any
    if objective is not None:
        values = draw(spectra(lengths))
        keywords["objective"] = objective
    elif not concave and draw(st.booleans()):
        values = draw(gain_curves(lengths))
    else:
        values = draw(spectra(lengths))
        keywords["objective"] = draw(
            st.sampled_from(["frobenius", "frobenius", "nuclear", schatten(1.5), log(0.3)])
        )
    spent = sum(c * r + (f if r else 0) for c, r, f in zip(unit_costs, witness, fixed, strict=True))
    budget = spent + draw(st.integers(0, max(unit_costs) + max(fixed)))
    return Instance("drawn", values, budget, keywords)


@st.composite
def groups(draw: st.DrawFn, names: Sequence[str], kind: str | None = None) -> list[list[str]]:
    """Groups of layers, nested or not; each has one layer or more."""
    kind = kind or draw(st.sampled_from(GROUPS))
    order = draw(st.permutations(names))
    if kind == "all":
        return [list(order)]
    if kind == "equal":
        return [list(order[: draw(st.integers(1, len(order)))])] * 2
    if kind == "crossing":
        some = st.lists(st.sampled_from(order), min_size=1, unique=True)
        return draw(st.lists(some, min_size=1, max_size=4))
    sizes = draw(st.lists(st.integers(1, len(order)), min_size=1, max_size=3))
    if kind == "nested":
        return [list(order[:size]) for size in sizes]
    ends = sorted({min(sum(sizes[: n + 1]), len(order)) for n in range(len(sizes))})
    return [list(order[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


@st.composite
def caps(
    draw: st.DrawFn, problem: Problem, kind: str | None = None, own_units: bool = True
) -> dict[str, Cap]:
    """Caps that the least ranks of a problem without caps satisfy.

    Args:
        draw: Hypothesis's.
        problem: whose least ranks fit.
        kind: one of `GROUPS`; None: any.
        own_units: whether some caps have costs of their own.
    """
    own = problem.rows[0]
    index = {name: i for i, name in enumerate(problem.names)}
    drawn: dict[str, Cap] = {}
    for n, members in enumerate(draw(groups(problem.names, kind))):
        at = [index[name] for name in members]
        unit, fixed = own.costs[at].tolist(), own.fixed_costs[at].tolist()
        its_own = own_units and draw(st.booleans())
        if its_own:
            unit = draw(costs(len(at)))
            once = st.lists(st.integers(0, 20), min_size=len(at), max_size=len(at))
            fixed = draw(st.one_of(st.just([0] * len(at)), once))
        least, most = (
            sum(
                c * r + (f if r else 0)
                for c, r, f in zip(unit, ranks[at].tolist(), fixed, strict=True)
            )
            for ranks in (problem.lower, problem.upper)
        )
        budget = draw(st.integers(least, most))
        drawn[f"cap{n}"] = Cap(members, budget, *((unit, fixed) if its_own else ()))
    return drawn


@st.composite
def capped(
    draw: st.DrawFn,
    instance: st.SearchStrategy[Instance],
    kind: str | None = None,
    own_units: bool = True,
) -> Instance:
    """An instance with caps added."""
    drawn = draw(instance)
    keywords = {**drawn.keywords, "caps": draw(caps(drawn.problem(), kind, own_units))}
    return Instance("drawn, with caps", drawn.spectra, drawn.budget, keywords)


@st.composite
def laminar(draw: st.DrawFn, layers: int = 5, ranks: int = 4) -> Instance:
    """Nested or disjoint caps, equal costs within each, and single ranks of descending gain."""
    drawn = draw(instances(concave=True, layers=layers, ranks=ranks))
    names = drawn.problem().names
    unit = draw(st.integers(1, 9))
    keywords = {**drawn.keywords, "costs": [unit] * len(names)}
    plain = Problem(drawn.spectra, 1 << 60, **keywords)
    least, most = plain.cost_of(plain.lower), plain.cost_of(plain.upper)
    budget = draw(st.integers(least, most + 1))
    drawn_caps: dict[str, Cap] = {}
    for n, members in enumerate(draw(groups(names, draw(st.sampled_from(["nested", "disjoint"]))))):
        its_unit = draw(st.sampled_from([unit, 1, 7]))
        at = [names.index(name) for name in members]
        low, high = (its_unit * int(r[at].sum()) for r in (plain.lower, plain.upper))
        drawn_caps[f"cap{n}"] = Cap(members, draw(st.integers(low, high + 1)), [its_unit] * len(at))
    return Instance("laminar", drawn.spectra, budget, {**keywords, "caps": drawn_caps})


@st.composite
def core_classes(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Moves and penalties of the options of each class of a core program."""
    moves = st.integers(1, 12).flatmap(lambda m: st.sampled_from([m, -m]))
    option = st.tuples(moves, st.integers(0, 30))
    drawn = draw(st.lists(st.lists(option, min_size=1, max_size=4), max_size=5))
    return [([m for m, _ in options], [p for _, p in options]) for options in drawn]


def random_ranks(problem: Any, rng: np.random.Generator) -> Any:
    """A rank vector that obeys every limit but, perhaps, the budget."""
    ranks = np.zeros(len(problem.names), dtype=np.int64)
    for group in problem.variables:
        ranks[list(group)] = rng.choice(problem.allowed_ranks(group[0]))
    return ranks


def finer_than_fixed_point(seed: int) -> Instance:
    """A small problem of gains that differ in bits which a fixed point over all of them loses."""
    rng = np.random.default_rng(seed)
    layers, ranks = int(rng.integers(3, 7)), 3
    small = 2.0 ** -int(rng.integers(0, 14))
    rows: list[Any] = []
    for _ in range(layers):
        if seed % 2:
            row = rng.choice([1.0, small * (1 + 2.0**-52), small, small * (1 - 2.0**-53), 0], ranks)
        elif rng.random() < 0.4:
            row = rng.integers(1, 3, ranks) + 0.0
        else:
            row = (1 + rng.integers(0, 16, ranks) * 2.0**-52) * 2.0**-9
        rows.append(row)
    if rng.random() < 0.5:
        rows = [-np.sort(-row) for row in rows]
    costs = rng.integers(1, [4, 30, 1000][int(rng.integers(3))], layers).tolist()
    budget = int(rng.uniform(0.1, 0.9) * ranks * sum(costs))
    return Instance("fine gains", GainCurves.from_increments(rows), budget, {"costs": costs})
