"""One thread for every benchmark, and one way to record an answer."""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before numpy

# isort: split

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from lorambo_alloc import Allocation
from lorambo_alloc.testing import Instance


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[..., Allocation]:
    """Time whole `allocate` calls and store the objective and the status beside the time."""

    def run(instance: Instance, rounds: int, **options: object) -> Allocation:
        allocation: Allocation = benchmark.pedantic(
            instance.allocate, kwargs=options, rounds=rounds, warmup_rounds=1 if rounds > 1 else 0
        )
        certificate = allocation.certificate
        certificate.verify(allocation.problem, allocation.ranks)
        benchmark.extra_info |= {
            "instance": instance.name,
            "value": float(certificate.value),
            "status": certificate.status,
            "relative_gap": float(certificate.relative_gap),
        }
        return allocation

    return run
