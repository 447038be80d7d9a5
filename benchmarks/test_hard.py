"""`allocate` on the hard families: a certified gap within the time limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lorambo_alloc import Allocation
from lorambo_alloc.testing import HARD_FAMILIES


@pytest.mark.parametrize("family", HARD_FAMILIES)
def test_hard(measure: Callable[..., Allocation], family: str) -> None:
    """A certified gap below 1e-3, proven or not."""
    allocation = measure(HARD_FAMILIES[family](), rounds=1, time_limit=5.0)
    assert allocation.certificate.relative_gap < 1e-3
