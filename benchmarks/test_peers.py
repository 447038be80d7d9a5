"""The strongest peer on the two smaller shapes; `run_peers.py` has the whole table."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers import Items, ortools
from lorambo_alloc.testing import power_law


@pytest.mark.parametrize("shape", "ab")
def test_ortools(benchmark: BenchmarkFixture, shape: str) -> None:
    """OR-Tools' solver call alone; its value must not be above ours."""
    pytest.importorskip("ortools", reason="pip install 'lorambo-alloc[bench]'")
    instance = power_law(shape)
    peer = benchmark.pedantic(ortools, args=(Items.of(instance), 60.0), rounds=3)
    allocation = instance.allocate()
    assert peer.ranks is not None
    value = allocation.problem.value_of(peer.ranks)
    assert value <= allocation.problem.value_of(allocation.ranks)
    benchmark.extra_info |= {
        "instance": instance.name,
        "value": float(value),
        "status": "proven" if peer.proven else "unproven",
        "below_ours": float(allocation.problem.value_of(allocation.ranks) - value),
    }
