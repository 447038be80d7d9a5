"""Hypothesis profiles and fixtures.

Profiles: `dev` is quick and random, `few` is as quick and the same on every run, `ci` is thorough
and the same on every run.

`HYPOTHESIS_PROFILE` (or pytest's `--hypothesis-profile`) chooses one; without it `ci` is used where
the variable `CI` is set, and `dev` elsewhere. A property whose examples are slow or quick scales
its share with `tests.strategies.examples`.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

# What a strategy draws is judged by its tests' coverage; the time of a draw is not.
_CALM = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("dev", deadline=None, max_examples=40, suppress_health_check=_CALM)
for name, count in (("few", 40), ("ci", 200)):
    settings.register_profile(
        name,
        deadline=None,
        max_examples=count,
        derandomize=True,
        database=None,
        print_blob=True,
        suppress_health_check=_CALM,
    )
# For mutation testing: few examples, and no time spent on making a failure small.
settings.register_profile(
    "mutation",
    deadline=None,
    max_examples=20,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    # mutmut runs all tests several times in one process, each time with new test classes.
    suppress_health_check=[*_CALM, HealthCheck.differing_executors],
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


@pytest.fixture
def tampered(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies one of the library's files with some of it replaced.

    Keywords `name=array` replace an array, `"header.key"=value` an entry of the header; None
    leaves it out.
    """

    def change(path: Path, **changes: Any) -> Path:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        header = json.loads(str(arrays["header"]))
        for key, value in changes.items():
            place, name = (header, key.removeprefix("header.")) if "." in key else (arrays, key)
            place[name] = value
            if value is None:
                del place[name]
        if "header" in arrays and "header" not in changes:
            arrays["header"] = np.array(json.dumps(header))
        copy = tmp_path / "tampered.npz"
        np.savez(copy, **arrays)
        return copy

    return change


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: results are the same to the bit, and small matrices are not slowed."""
    torch = pytest.importorskip("torch", reason="torch is absent")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seeded() -> None:
    """Torch's generator from seed 0."""
    pytest.importorskip("torch", reason="torch is absent").manual_seed(0)
