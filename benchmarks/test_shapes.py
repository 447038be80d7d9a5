"""`allocate` on spectra in the shapes of real models: each must be proven optimal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lorambo_alloc import Allocation
from lorambo_alloc.testing import (
    large,
    mixture_of_experts,
    multiples_of_8,
    non_concave,
    power_law,
)


@pytest.mark.parametrize("shape", "abcd")
def test_power_law(measure: Callable[..., Allocation], shape: str) -> None:
    """Dicts of arrays with the shapes of RoBERTa, Llama 8B, Llama 70B, and random costs."""
    allocation = measure(power_law(shape), rounds=15)
    assert allocation.certificate.status != "gap_certified"


def test_mixture_of_experts(measure: Callable[..., Allocation]) -> None:
    """A dict of 45,032 arrays."""
    allocation = measure(mixture_of_experts(), rounds=5)
    assert allocation.certificate.status != "gap_certified"


def test_large(measure: Callable[..., Allocation]) -> None:
    """A ready 2-D array of 8.2e7 values."""
    allocation = measure(large(), rounds=5)
    assert allocation.certificate.status != "gap_certified"


def test_multiples_of_8(measure: Callable[..., Allocation]) -> None:
    """A step of 8 breaks the free precedence, so this is a multiple-choice knapsack."""
    measure(multiples_of_8(), rounds=5, time_limit=5.0)


def test_non_concave(measure: Callable[..., Allocation]) -> None:
    """Noisy estimated curves."""
    measure(non_concave(), rounds=5, time_limit=5.0)
