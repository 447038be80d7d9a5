"""The ranks are the same on every processor, among equals too."""

import json
import os
import subprocess
import sys

import pytest

from lorambo_alloc.testing import HARD_FAMILIES

_RANKS = """
import json
from lorambo_alloc.testing import HARD_FAMILIES

families = [name for name in HARD_FAMILIES if name != "proportional_large_costs"]
print(json.dumps({n: HARD_FAMILIES[n](100, 32, 3).allocate().ranks.tolist() for n in families}))
"""


def _ranks(**environment: str) -> dict[str, list[int]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RANKS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_ranks_do_not_depend_on_how_numpy_sorts_on_this_processor():
    umath = pytest.importorskip("numpy._core._multiarray_umath")
    without = _ranks(NPY_DISABLE_CPU_FEATURES=" ".join(umath.__cpu_dispatch__))
    assert len(without) == len(HARD_FAMILIES) - 1
    assert without == _ranks()
