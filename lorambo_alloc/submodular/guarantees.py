"""What is guaranteed: one table, by constraint, algorithm and class of objective.

Every row speaks of a monotone set function with f(empty) = 0 and of an algorithm that evaluates
it without error. A row says: value of the answer >= ratio x value of the best feasible set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Context, Decimal

CARDINALITY = "cardinality"
MATROID = "matroid"
KNAPSACK = "knapsack"

MODULAR = "modular"
SUBMODULAR = "submodular"
WEAKLY_SUBMODULAR = "weakly submodular"

LOCAL_SEARCH_EPSILON = 1e-3
"""What non-oblivious local search gives up to stop after polynomially many exchanges."""

_ONE_MINUS_1_E = 1 - math.exp(-1) - 2.0**-53  # below 1 - 1/e, not beside it

_NWF = "Nemhauser, Wolsey, Fisher, Mathematical Programming 14 (1978), section 4"
_FNW = "Fisher, Nemhauser, Wolsey, Mathematical Programming Study 8 (1978), theorem 2.1"
_CURVATURE = "Conforti, Cornuejols, Discrete Applied Mathematics 7 (1984)"
_RADO = "Rado (1957); Edmonds, Mathematical Programming 1 (1971)"
_FILMUS_WARD = "Filmus, Ward, SIAM Journal on Computing 43 (2014)"
_TANG = "Tang et al., Proc. ACM on Measurement and Analysis of Computing Systems 5 (2021)"
_GUESSES = "Feldman, Nutov, Shoham, Algorithmica 85 (2023), arXiv 2007.04937"
_DAS_KEMPE = "Das, Kempe, ICML 2011, theorem 3.2"


@dataclass(frozen=True)
class Guarantee:
    """One row of the table.

    Attributes:
        constraint: "cardinality", "matroid" or "knapsack".
        algorithm: "greedy", "density greedy", "density greedy or best single", "one guess",
            "two guesses" or "local search".
        objective: "modular", "submodular" or "weakly submodular"; always monotone.
        ratio: the share of the optimum that the answer has at least; 1.0 where the algorithm is
            exact, 0.0 where nothing is guaranteed.
        source: who proved it.
        note: on what else it depends.
    """

    constraint: str
    algorithm: str
    objective: str
    ratio: float
    source: str
    note: str = ""

    def with_curvature(self, curvature: float) -> Guarantee:
        """The row for an objective whose total curvature is known.

        The total curvature is k = 1 - min_j (f(V) - f(V - j)) / f({j}); 0 means modular. Greedy
        has the ratio (1 - e^-k) / k under a cardinality constraint and 1 / (1 + k) under a
        matroid (Conforti and Cornuejols 1984). Other rows are returned unchanged, and so is this
        one where it says more.

        Args:
            curvature: k, or an upper bound on it, in [0, 1].

        Raises:
            ValueError: the curvature is not in [0, 1].

        Example:
            >>> row = guarantee("matroid", "greedy", "submodular")
            >>> row.with_curvature(0.25).ratio
            0.8
        """
        if not 0 <= curvature <= 1:
            raise ValueError(f"curvature: expected a number in [0, 1], got {curvature!r}")
        if self.algorithm != "greedy" or self.objective != SUBMODULAR:
            return self
        if self.constraint == MATROID:
            ratio = 1 / (1 + curvature)
        else:
            # -expm1(-k) / k is 1 at k = 0; the last bit goes to the safe side.
            ratio = -math.expm1(-curvature) / curvature if curvature else 1.0
            ratio *= 1 - 2.0**-51 if curvature else 1.0
        if ratio <= self.ratio:
            return self
        return replace(self, ratio=ratio, source=_CURVATURE, note=f"total curvature {curvature:g}")

    def with_submodularity_ratio(self, ratio: float) -> Guarantee:
        """The row for a weakly submodular objective whose submodularity ratio g is known.

        Greedy under a cardinality constraint has 1 - e^-g (Das and Kempe 2011, theorem 3.2). No
        other row of a weakly submodular objective claims anything, so those, and the rows of
        other objectives, are returned unchanged.

        Args:
            ratio: a proved lower bound on g, in [0, 1]. An estimate from samples is an *upper*
                bound on g, and proves nothing here.

        Raises:
            ValueError: the ratio is not in [0, 1].

        Example:
            >>> row = guarantee("cardinality", "greedy", "weakly submodular")
            >>> row.ratio, round(row.with_submodularity_ratio(0.5).ratio, 4)
            (0.0, 0.3935)
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"submodularity ratio: expected a number in [0, 1], got {ratio!r}")
        if (self.constraint, self.algorithm, self.objective) != (
            CARDINALITY,
            "greedy",
            WEAKLY_SUBMODULAR,
        ):
            return self
        share = -math.expm1(-ratio) * (1 - 2.0**-51)
        down = Context(prec=3, rounding=ROUND_FLOOR).create_decimal_from_float(ratio)
        return replace(self, ratio=share, note=f"submodularity ratio at least {float(down):g}")

    def __str__(self) -> str:
        down = Decimal(repr(self.ratio)).quantize(Decimal("0.0001"), ROUND_FLOOR)
        share = "exact" if self.ratio == 1 else f"at least {down} of the optimum"
        if self.ratio == 0:
            share = "no constant guaranteed"
        text = f"{share} ({self.algorithm}, {self.constraint}, {self.objective}): {self.source}"
        return f"{text}; {self.note}" if self.note else text


def _none(constraint: str, algorithm: str, objective: str, note: str) -> Guarantee:
    return Guarantee(constraint, algorithm, objective, 0.0, "none", note)


_UNBOUNDED = "can be arbitrarily bad: a tiny dense element may shut out one large enough for all"
_NOT_SUBMODULAR = "no constant is claimed beyond a cardinality constraint; see the instance's bound"
_ADDITION = "with the best single addition at every step; false of density greedy alone"
_EPSILON = f"1 - 1/e - {LOCAL_SEARCH_EPSILON:g}; at an exchange-local optimum of the potential"

GUARANTEES: tuple[Guarantee, ...] = (
    Guarantee(CARDINALITY, "greedy", MODULAR, 1.0, _RADO, "the largest weights"),
    Guarantee(CARDINALITY, "greedy", SUBMODULAR, _ONE_MINUS_1_E, _NWF, "1 - 1/e"),
    Guarantee(
        CARDINALITY,
        "greedy",
        WEAKLY_SUBMODULAR,
        0.0,
        _DAS_KEMPE,
        "1 - e^-g with a proved submodularity ratio g; none is known here",
    ),
    Guarantee(MATROID, "greedy", MODULAR, 1.0, _RADO),
    Guarantee(MATROID, "greedy", SUBMODULAR, 0.5, _FNW),
    _none(MATROID, "greedy", WEAKLY_SUBMODULAR, _NOT_SUBMODULAR),
    Guarantee(
        MATROID,
        "local search",
        MODULAR,
        _ONE_MINUS_1_E - LOCAL_SEARCH_EPSILON,
        _FILMUS_WARD,
        _EPSILON,
    ),
    Guarantee(
        MATROID,
        "local search",
        SUBMODULAR,
        _ONE_MINUS_1_E - LOCAL_SEARCH_EPSILON,
        _FILMUS_WARD,
        _EPSILON,
    ),
    _none(MATROID, "local search", WEAKLY_SUBMODULAR, _NOT_SUBMODULAR),
    _none(KNAPSACK, "density greedy", MODULAR, _UNBOUNDED),
    _none(KNAPSACK, "density greedy", SUBMODULAR, _UNBOUNDED),
    _none(KNAPSACK, "density greedy", WEAKLY_SUBMODULAR, _NOT_SUBMODULAR),
    Guarantee(
        KNAPSACK,
        "density greedy or best single",
        MODULAR,
        0.5,
        "Dantzig, Operations Research 5 (1957)",
        "greedy and the element that breaks the budget together reach the relaxation's value",
    ),
    Guarantee(KNAPSACK, "density greedy or best single", SUBMODULAR, 0.405, _TANG),
    _none(KNAPSACK, "density greedy or best single", WEAKLY_SUBMODULAR, _NOT_SUBMODULAR),
    Guarantee(KNAPSACK, "one guess", MODULAR, 0.6174, _GUESSES, _ADDITION),
    Guarantee(KNAPSACK, "one guess", SUBMODULAR, 0.6174, _GUESSES, _ADDITION),
    _none(KNAPSACK, "one guess", WEAKLY_SUBMODULAR, _NOT_SUBMODULAR),
    Guarantee(
        KNAPSACK,
        "two guesses",
        MODULAR,
        2 / 3,
        "Sahni, Journal of the ACM 22 (1975)",
        "m guesses: m / (m + 1)",
    ),
    Guarantee(KNAPSACK, "two guesses", SUBMODULAR, _ONE_MINUS_1_E, _GUESSES, "1 - 1/e"),
    _none(KNAPSACK, "two guesses", WEAKLY_SUBMODULAR, _NOT_SUBMODULAR),
)

_BY_KEY = {(row.constraint, row.algorithm, row.objective): row for row in GUARANTEES}


def guarantee(constraint: str, algorithm: str, objective: str) -> Guarantee:
    """Look a row of the table up.

    Args:
        constraint: "cardinality", "matroid" or "knapsack".
        algorithm: "greedy", "density greedy", "density greedy or best single", "one guess",
            "two guesses" or "local search".
        objective: "modular", "submodular" or "weakly submodular"; always monotone.

    Raises:
        ValueError: there is no such row; the message lists those that there are.

    Example:
        >>> print(guarantee("knapsack", "one guess", "submodular"))  # doctest: +ELLIPSIS
        at least 0.6174 of the optimum (one guess, knapsack, submodular): Feldman, Nutov, ...
        >>> print(guarantee("knapsack", "density greedy", "modular"))  # doctest: +ELLIPSIS
        no constant guaranteed (density greedy, knapsack, modular): none; can be arbitrarily ...
    """
    row = _BY_KEY.get((constraint, algorithm, objective))
    if row is None:
        known = "\n".join(f"  {', '.join(key)}" for key in _BY_KEY)
        raise ValueError(
            f"no guarantee is known for {constraint!r}, {algorithm!r}, {objective!r}; the table "
            f"has (constraint, algorithm, objective):\n{known}"
        )
    return row
