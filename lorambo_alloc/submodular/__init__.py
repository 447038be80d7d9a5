"""Selection under a budget by set functions of elements that interact."""

from lorambo_alloc.submodular.bounds import curvature, instance_bound
from lorambo_alloc.submodular.checks import (
    BoundCheck,
    Violation,
    bound_check,
    submodularity_ratio,
)
from lorambo_alloc.submodular.constraints import (
    Cardinality,
    Constraint,
    Knapsack,
)
from lorambo_alloc.submodular.coupled import CoupledQuadratic
from lorambo_alloc.submodular.coverage import Coverage, Modular
from lorambo_alloc.submodular.function import Function
from lorambo_alloc.submodular.greedy import (
    Run,
    density_greedy,
    density_greedy_or_best_single,
    greedy,
    lazy_greedy,
)
from lorambo_alloc.submodular.guarantees import GUARANTEES, Guarantee, guarantee
from lorambo_alloc.submodular.guesses import one_guess, two_guesses
from lorambo_alloc.submodular.local_search import local_search
from lorambo_alloc.submodular.log_det import LogDet
from lorambo_alloc.submodular.matroids import LaminarMatroid, PartitionMatroid
from lorambo_alloc.submodular.objectives import SetFunction, State
from lorambo_alloc.submodular.select import Selection, select

__all__ = [
    "GUARANTEES",
    "BoundCheck",
    "Cardinality",
    "Constraint",
    "CoupledQuadratic",
    "Coverage",
    "Function",
    "Guarantee",
    "Knapsack",
    "LaminarMatroid",
    "LogDet",
    "Modular",
    "PartitionMatroid",
    "Run",
    "Selection",
    "SetFunction",
    "State",
    "Violation",
    "bound_check",
    "curvature",
    "density_greedy",
    "density_greedy_or_best_single",
    "greedy",
    "guarantee",
    "instance_bound",
    "lazy_greedy",
    "local_search",
    "one_guess",
    "select",
    "submodularity_ratio",
    "two_guesses",
]
