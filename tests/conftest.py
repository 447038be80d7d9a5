"""Hypothesis profiles: `dev` is quick and random, `ci` is thorough and the same on every run.

`HYPOTHESIS_PROFILE` (or pytest's `--hypothesis-profile`) chooses one; without it `ci` is used where
the variable `CI` is set, and `dev` elsewhere. A property whose examples are slow or quick scales its
share with `tests.strategies.examples`.
"""

import os

from hypothesis import HealthCheck, settings

# What a strategy draws is judged by its tests' coverage; the time of a draw is not.
_CALM = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("dev", deadline=None, max_examples=40, suppress_health_check=_CALM)
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=400,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=_CALM,
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)
