"""Instances to try a solver on, and slow oracles to judge its answers by.

For this library's own tests and benchmarks, and for anyone who writes a solver:

- **Instances of real size**: `power_law` (spectra in the shapes of real models), `large`,
  `mixture_of_experts`, `non_concave`, `multiples_of_8`, and the families that are known to be hard
  for knapsack solvers (`HARD_FAMILIES`).
- **Small random instances**: `small_instance` draws from every family and every limit of `Problem`.
- **Oracles**: `brute_force`, `brute_force_bottleneck` and `dynamic_program` know no solver, no
  bound and no tolerance: they enumerate in exact arithmetic.

A generator depends on its arguments alone: the same seed gives the same instance.
"""

from lorambo_alloc.testing.hard import (
    HARD_FAMILIES,
    inverse_strongly_correlated,
    near_proportional,
    parity,
    proportional,
    proportional_large_costs,
    strongly_correlated_concave,
    strongly_correlated_linear,
    subset_sum,
    weakly_correlated,
)
from lorambo_alloc.testing.instances import (
    Instance,
    large,
    mixture_of_experts,
    multiples_of_8,
    non_concave,
    power_law,
)
from lorambo_alloc.testing.oracles import brute_force, brute_force_bottleneck, dynamic_program
from lorambo_alloc.testing.small import SMALL_FAMILIES, small_instance

__all__ = [
    "HARD_FAMILIES",
    "SMALL_FAMILIES",
    "Instance",
    "brute_force",
    "brute_force_bottleneck",
    "dynamic_program",
    "inverse_strongly_correlated",
    "large",
    "mixture_of_experts",
    "multiples_of_8",
    "near_proportional",
    "non_concave",
    "parity",
    "power_law",
    "proportional",
    "proportional_large_costs",
    "small_instance",
    "strongly_correlated_concave",
    "strongly_correlated_linear",
    "subset_sum",
    "weakly_correlated",
]
