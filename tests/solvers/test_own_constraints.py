"""The caller's constraints: what follows from them, and what whole ranks they accept."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from lorambo_alloc import Problem
from lorambo_alloc.objectives import IntArray
from tests.strategies import seeds

cp = pytest.importorskip("cvxpy", reason="the convex relaxation needs the extra `convex`")

from lorambo_alloc.solvers.own_constraints import OwnConstraints  # noqa: E402

PROBLEM = Problem({"q": [3.0, 2.0, 1.0], "v": [2.5, 2.0, 0.5]}, 6)
FOUR = Problem(np.tile([3.0, 2.0, 1.5, 1.0, 0.5], (4, 1)), 20)
SQUARE = np.arange(8.0).reshape(2, 4) - 3

# Convex functions of four ranks, of every kind that cvxpy has a gradient of.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "norm 1": lambda r: cp.norm1(r - 2),
    "norm 2": lambda r: cp.norm(r, 2),
    "norm 3": lambda r: cp.pnorm(r, 3),
    "norm 1.5": lambda r: cp.pnorm(r, 1.5),
    "norm by row": lambda r: cp.norm(cp.reshape(r, (2, 2), order="C"), 2, axis=1),
    "mixed norm": lambda r: cp.mixed_norm(cp.reshape(r, (2, 2), order="C"), 2, 1),
    "sum of squares": lambda r: cp.sum_squares(r - 1),
    "square of a sum": lambda r: cp.square(cp.sum(r)),
    "quadratic over linear": lambda r: cp.quad_over_lin(r[:2], r[2] + 1),
    "quadratic form": lambda r: cp.quad_form(r, np.eye(4) + np.ones((4, 4))),
    "squares": lambda r: cp.square(r - 1),
    "powers": lambda r: cp.sum(cp.power(r, 1.5)) + cp.sum(cp.power(r + 1, -2)),
    "max": cp.max,
    "max of abs": lambda r: cp.max(cp.abs(r - 2)),
    "max by column": lambda r: cp.max(cp.reshape(r, (2, 2), order="F"), axis=0),
    "maximum": lambda r: cp.maximum(r[0] - r[1], 2 * r[2], r[3] - 3),
    "min": lambda r: -cp.min(r),
    "sum of the largest": lambda r: cp.sum_largest(r, 2),
    "huber": lambda r: cp.sum(cp.huber(r - 2, 1)),
    "total variation": cp.tv,
    "exp": lambda r: cp.sum(cp.exp(r / 2)),
    "log": lambda r: -cp.sum(cp.log(r + 1)),
    "log of 0": lambda r: -cp.log(r[0]) + r[1],
    "log sum exp": cp.log_sum_exp,
    "logistic": lambda r: cp.sum(cp.logistic(r)),
    "entropy": lambda r: -cp.sum(cp.entr(r + 1)),
    "roots": lambda r: -cp.sum(cp.sqrt(r)),
    "geometric mean": lambda r: -cp.geo_mean(r + 1),
    "kl": lambda r: cp.kl_div(r[0] + 1, r[1] + 1),
    "linear": lambda r: SQUARE @ r,
    "one entry and many": lambda r: r[0] + np.array([1.0, 2.0, 3.0]),
    "a matrix": lambda r: cp.reshape(r, (2, 2), order="C") + np.array([[1.0, 2.0], [3.0, 4.0]]),
    "squares in a matrix": lambda r: cp.square(cp.reshape(r, (2, 2), order="F")) @ np.diag([1, 2]),
}


def _own(problem: Problem, constraints: Any) -> OwnConstraints:
    return OwnConstraints(cp, problem, constraints)


def _vector(rank: Any) -> Any:
    return cp.hstack(list(rank.values()))


def _set(constraint: Any, dual: Any) -> None:
    constraint.dual_variables[0].save_value(np.reshape(dual, constraint.shape, order="F"))


def _charge(own: OwnConstraints, ranks: IntArray, scale: float = 1.0) -> float:
    """By how much ranks are charged less than the limit."""
    weights, limit = own.consequence(scale)
    return limit - float(np.dot(weights, ranks))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_ranks_that_satisfy_a_constraint_are_charged_more_than_the_limit(name: str):
    rng = np.random.default_rng(sum(map(ord, name)))
    for _ in range(8):
        witness = rng.integers(1, 6, 4)
        probe = cp.Variable(4)
        probe.value = witness.astype(float)
        value = np.asarray(FUNCTIONS[name](probe).value)
        bound = value.reshape(FUNCTIONS[name](probe).shape) + rng.choice([0.0, 0.5])
        own = _own(FOUR, lambda rank, b=bound: [FUNCTIONS[name](_vector(rank)) <= b])
        constraint = own.conditions[0]
        _set(constraint, rng.uniform(0, 3, constraint.size))
        # Anywhere at all: at whole ranks, at the edge of the domain, in between.
        own.rank.value = rng.choice([rng.uniform(0, 5, 4), rng.integers(0, 3, 4).astype(float)])
        weights, limit = own.consequence(2.0)
        checked = 0
        for ranks in [*rng.integers(0, 6, (30, 4)).tolist(), witness.tolist()]:
            if own.accepts(np.array(ranks)):
                checked += 1
                assert float(np.dot(weights, ranks)) <= limit
        assert checked


@given(seeds())
def test_linear_rows(seed: int):
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-40, 41)
    matrix, ranks = rng.integers(-4, 5, (3, 2)), rng.integers(0, 4, 2)
    bound = matrix @ ranks + rng.integers(0, 2, 3)
    equal = bool(rng.integers(2))

    def constraints(rank: Any) -> list[Any]:
        sides = scale * matrix @ _vector(rank), scale * bound
        return [sides[0] == sides[1]] if equal else [sides[0] <= sides[1]]

    own = _own(PROBLEM, constraints)
    assert len(own) == 3
    _set(own.conditions[0], rng.uniform(0, 2, 3))
    for other in np.ndindex(4, 4):
        x = np.array(other)
        holds = np.all(matrix @ x == bound) if equal else np.all(matrix @ x <= bound)
        assert own.accepts(x) == holds
        if holds:
            assert _charge(own, x) >= 0


def test_the_limit_of_linear_rows_by_hand():
    # Scaled by powers of two, 6 q - 3 v <= 9 becomes 3/4 q - 3/8 v <= 9/8, and q = v stays.
    own = _own(PROBLEM, lambda r: [6 * r["q"] - 3 * r["v"] <= 9, 0.5 * r["q"] == 0.5 * r["v"]])
    at_most, equal = own.conditions
    _set(at_most, [2.0])
    _set(equal, [-1.0])
    own.rank.value = None
    weights, limit = own.consequence(4.0)
    assert weights == (8 * 0.75 - 4 * 0.5, -8 * 0.375 + 4 * 0.5)
    slack = limit - 8 * 9 / 8
    assert 12 * 1e-9 < slack < 12 * 1e-9 + 2.0**-40 * (9 + 3 * (6 + 3 + 2 + 2)) * 1.01


def test_the_limit_of_a_tangent_by_hand():
    # (q - 1)^2 + v <= 5 at (2, 1): 2 q + v <= 2 * 2 + 1 - (1 + 1 - 5) = 8
    own = _own(PROBLEM, lambda r: [cp.square(r["q"] - 1) + r["v"] <= 5])
    _set(own.conditions[0], 3.0)
    own.rank.value = np.array([2.0, 1.0])
    weights, limit = own.consequence(0.5)
    assert weights == (3.0, 1.5)
    assert 12 + 1.5e-9 < limit < 12 + 1.5e-9 + 2.0**-40 * (7.5 + 1.5 * 7 + 13.5) * 1.01


def test_margins_grow_with_the_number_of_terms():
    def slack(copies: int) -> float:
        own = _own(PROBLEM, lambda r: [np.tile([1.0, 0.0], (copies, 1)) @ _vector(r) <= 2])
        _set(own.conditions[0], np.ones(copies))
        weights, limit = own.consequence(1.0)
        assert weights == (copies / 2, 0.0)
        return limit - copies * (1.0 + 1e-9)

    few, many = slack(2000), slack(8190)
    assert few == pytest.approx(2000 * 2.5 * 2.0**-40, rel=0.01)
    assert many == pytest.approx(8190 * 2.5 * 2.0**-40 * 4, rel=0.01)


def test_duals_of_the_wrong_sign_or_none_charge_nothing():
    own = _own(PROBLEM, lambda r: [r["q"] <= 1, cp.square(r["v"]) <= 4])
    own.rank.value = np.array([1.0, 2.0])
    assert own.consequence(3.0) == ((0.0, 0.0), 0.0)  # the solver found none
    for constraint, dual in zip(own.conditions, ([-1.0], -2.0), strict=True):
        _set(constraint, dual)
    assert own.consequence(3.0) == ((0.0, 0.0), 0.0)
    for constraint, dual in zip(own.conditions, ([np.nan], np.inf), strict=True):
        _set(constraint, dual)
    assert own.consequence(3.0) == ((0.0, 0.0), 0.0)


def test_solutions_a_little_outside_the_limits_and_the_domain():
    own = _own(PROBLEM, lambda r: [cp.power(r["q"], 1.5) - cp.sqrt(r["v"]) <= 1])
    _set(own.conditions[0], 1.0)
    for point in ([-1e-9, -1e-9], [0.0, 0.0], [0.0, 4.0]):
        own.rank.value = np.array(point)
        weights, limit = own.consequence(1.0)
        assert np.all(np.isfinite(weights))
        assert np.isfinite(limit)
        for x in np.ndindex(4, 4):
            if own.accepts(np.array(x)):
                assert _charge(own, np.array(x)) >= 0


@pytest.mark.parametrize(
    ("function", "rank"),
    [
        (lambda r: cp.norm_inf(cp.hstack([r["q"], r["v"]])) <= 1, [1.0, 1.0]),
        (lambda r: cp.cummax(cp.hstack([r["q"], r["v"]])) <= 1, [1.0, 1.0]),
        (lambda r: cp.log(r["q"] - 1) + r["v"] >= 0, [0.5, 1.0]),
        (lambda r: cp.sqrt(r["q"] - 1) >= 0, [0.5, 1.0]),
    ],
)
def test_no_gradient(function, rank):
    own = _own(PROBLEM, lambda r: [function(r)])
    _set(own.conditions[0], np.ones(own.conditions[0].shape))
    own.rank.value = np.array(rank)
    expected = r"^constraints: .* cvxpy has no gradient of it at the solution; write it in other"
    with pytest.raises(ValueError, match=expected):
        own.consequence(1.0)


class TestOneLayer:
    @pytest.mark.parametrize("many", [1, 2])
    @pytest.mark.parametrize("curved", [False, True])
    def test_gradients_that_cvxpy_makes_numbers_of(self, many: int, curved: bool):
        problem = Problem({"q": [3.0, 2.0, 1.0]}, 3)

        def constraints(rank: Any) -> list[Any]:
            side = cp.hstack([rank["q"]] * many) if many > 1 else rank["q"]
            return [(cp.square(side) if curved else 2 * side) <= 4]

        own = _own(problem, constraints)
        _set(own.conditions[0], np.ones(own.conditions[0].shape))
        own.rank.value = np.array([2.0])
        weights, limit = own.consequence(1.0)
        assert weights == (many * (4.0 if curved else 0.5),)
        assert limit == pytest.approx(many * (8.0 if curved else 1.0), rel=1e-8)
        assert [own.accepts(np.array([n])) for n in range(4)] == [True, True, True, False]


class TestAccepts:
    def test_nothing_without_constraints(self):
        for constraints in (None, lambda rank: [], lambda rank: ()):
            own = _own(PROBLEM, constraints)
            assert (len(own), own.conditions) == (0, [])
            assert own.accepts(np.array([3, 3]))

    @pytest.mark.parametrize("scale", [2.0**-60, 1e-12, 1.0, 1e15, 2.0**60])
    def test_linear_ones_of_any_scale(self, scale: float):
        own = _own(PROBLEM, lambda r: [scale * r["q"] <= scale, scale * r["v"] == scale])
        accepted = [x for x in np.ndindex(4, 4) if own.accepts(np.array(x))]
        assert accepted == [(0, 1), (1, 1)]

    def test_sums_that_rounding_makes_a_little_too_great(self):
        assert 0.1 + 0.2 > 0.3
        for function in (lambda q: q, cp.square):
            own = _own(PROBLEM, lambda r, f=function: [0.1 * f(r["q"]) + 0.2 * r["v"] <= 0.3])
            assert own.accepts(np.array([1, 1]))

    @pytest.mark.parametrize(
        ("function", "more", "accepted"),
        [
            (lambda q: q, 1.9e-9, True),  # half of that in the scaled row
            (lambda q: q, 2.1e-9, False),
            (cp.square, 0.9e-9, True),
            (cp.square, 1.1e-9, False),
        ],
    )
    def test_the_tolerance(self, function, more, accepted):
        own = _own(PROBLEM, lambda r: [function(r["q"]) <= 1 - more])
        assert own.accepts(np.array([1, 0])) == accepted

    def test_how_much_is_broken(self):
        own = _own(
            PROBLEM,
            lambda r: [
                r["q"] <= 1,
                r["v"] == 2,
                cp.square(cp.hstack([r["q"], r["v"]])) <= np.array([1, 4]),
            ],
        )
        # Rows are halved by their scale.
        assert own.violation(np.array([1, 2])) == 0
        assert own.violation(np.array([3, 1])) == 2 / 2 + 1 / 2 + 8
        assert own.violation(np.array([0, 3])) == 1 / 2 + 5

    @pytest.mark.parametrize(
        "function",
        [
            lambda q: cp.sqrt(q - 1) >= 0,  # not a number at 0
            lambda q: cp.log(q) >= 0,  # infinite at 0
            lambda q: cp.quad_over_lin(1, q) <= 1,
        ],
    )
    def test_where_a_constraint_is_not_defined_it_does_not_hold(self, function):
        own = _own(PROBLEM, lambda r: [function(r["q"])])
        assert [own.accepts(np.array([n, 0])) for n in range(3)] == [False, True, True]

    def test_parameters_and_sparse_constants(self):
        from scipy.sparse import csr_array

        twice = cp.Parameter(value=2.0)
        matrix = csr_array(np.array([[1.0, 1.0], [1.0, -1.0]]))
        one = csr_array(np.array([[1.0, 0.0]]))

        def constraints(rank: Any) -> tuple[Any, ...]:
            row = cp.reshape(_vector(rank), (1, 2), order="C")
            return twice * rank["q"] <= 4, row @ matrix.T + one <= np.array([[4.0, 1.0]])

        own = _own(PROBLEM, constraints)
        accepted = [x for x in np.ndindex(4, 4) if own.accepts(np.array(x))]
        assert accepted == [
            x for x in np.ndindex(4, 4) if x[0] <= 2 and sum(x) <= 3 and x[0] - x[1] <= 1
        ]


class TestRepaired:
    def test_single_steps(self):
        own = _own(PROBLEM, lambda r: [r["q"] + r["v"] == 3, r["q"] >= 2])
        assert own.repaired(np.array([0, 0])).tolist() in ([2, 1], [3, 0])
        start = np.array([2, 1])
        assert own.repaired(start) is start
        assert own.repaired(np.array([3, 3])).tolist() in ([2, 1], [3, 0])

    def test_the_budget_is_kept(self):
        problem = Problem({"q": [3.0, 2.0], "v": [2.5, 2.0]}, 2)
        own = _own(problem, lambda r: [r["q"] + r["v"] >= 3])
        with pytest.raises(ValueError, match=r"^constraints: rounding found no whole ranks"):
            own.repaired(np.array([1, 1]))

    def test_steps_are_those_allowed(self):
        problem = Problem(np.ones((3, 6)), 99, tied=[["0", "2"]], multiple_of=2)
        own = _own(problem, lambda r: [r["0"] + r["2"] >= 3, r["1"] >= 3])
        assert own.repaired(np.array([0, 0, 0])).tolist() == [2, 4, 2]

    def test_out_of_several_undefined_places(self):
        own = _own(PROBLEM, lambda r: [cp.log(r["q"]) >= 0, cp.log(r["v"]) >= 0])
        assert own.repaired(np.array([0, 0])).tolist() == [1, 1]

    def test_where_no_step_helps(self):
        own = _own(PROBLEM, lambda r: [r["q"] == 0.5])
        expected = (
            "rounding found no whole ranks that satisfy them; `relax` has the continuous ones"
        )
        with pytest.raises(ValueError, match=expected):
            own.repaired(np.array([0, 0]))


class TestRefuses:
    @pytest.mark.parametrize(
        ("constraints", "expected"),
        [
            ([1], "constraints: expected a function from ranks by name to a list of cvxpy"),
            (lambda r: None, "constraints: expected a list of cvxpy constraints, got None"),
            (lambda r: r["q"] <= 1, "constraints: expected a list of cvxpy constraints, got Ineq"),
            (
                lambda r: [r["q"] <= 1, True],
                "constraints: number 2 (True): expected an inequality or equality of cvxpy",
            ),
            (
                lambda r: [cp.diag(_vector(r)) >> 0],
                ">> 0): expected an inequality or equality of cvxpy expressions",
            ),
            (
                lambda r: [cp.square(r["q"]) >= 1],
                "expected a convex one, by cvxpy's rules",
            ),
            (lambda r: [cp.square(r["q"]) == 1], "expected a convex one, by cvxpy's rules"),
            (
                lambda r: [r["q"] <= cp.Variable(name="z")],
                "expected the ranks as its only variables, got [Variable((), z)]",
            ),
            (
                lambda r: [r["q"] <= cp.Parameter(name="p")],
                "<= p): expected a value of the parameter p",
            ),
            (lambda r: [r["q"] <= np.nan], "<= nan): expected finite numbers"),
            (lambda r: [cp.square(r["q"]) <= np.inf], "<= inf): expected finite numbers"),
            (lambda r: [1e-300 * r["q"] <= 1e300], "<= 1e+300): expected finite numbers"),
        ],
    )
    def test_what_is_no_constraint(self, constraints, expected):
        with pytest.raises(ValueError, match=re.escape(expected)) as caught:
            _own(PROBLEM, constraints)
        assert str(caught.value).startswith("constraints: ")

    def test_an_unknown_layer_by_its_name(self):
        with pytest.raises(KeyError, match="'o'"):
            _own(PROBLEM, lambda r: [r["o"] <= 1])

    @pytest.mark.parametrize("kind", [lambda e: e <= 0, lambda e: e == 0, cp.Zero])
    def test_what_is_taken(self, kind):
        own = _own(PROBLEM, lambda r: [kind(r["q"] - r["v"])])
        assert own.accepts(np.array([1, 1]))
        assert not own.accepts(np.array([2, 1]))

    def test_constraints_without_ranks(self):
        own = _own(PROBLEM, lambda r: [cp.Constant(1) <= 2, 0 * r["q"] <= 2])
        assert len(own) == 2
        assert own.accepts(np.array([3, 3]))
        assert not _own(PROBLEM, lambda r: [cp.Constant(3) <= 2]).accepts(np.array([0, 0]))
