"""What tests of models share: a tiny configuration, and packages that may be absent."""

import contextlib
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
TINY |= {"intermediate_size": 24, "num_key_value_heads": 2}


@pytest.fixture
def transformers() -> ModuleType:
    """The package; tests that ask for it are skipped where it is absent."""
    return pytest.importorskip("transformers", reason="transformers is absent")


@pytest.fixture
def peft(transformers: ModuleType) -> ModuleType:
    """The package, and transformers with it."""
    return pytest.importorskip("peft", reason="peft is absent: pip install peft")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of PEFT and transformers: deprecations, fan_in_fan_out, embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
