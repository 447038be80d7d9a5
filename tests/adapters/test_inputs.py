"""Which processors multiply bfloat16."""

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra.inputs import multiplies_bfloat16  # noqa: E402


@pytest.mark.parametrize("supported", [True, False])
def test_it_asks_the_processor_and_trusts_other_devices(monkeypatch, supported):
    class Operators:
        @staticmethod
        def _is_mkldnn_bf16_supported():
            return supported

    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    asked = multiplies_bfloat16.__wrapped__
    assert asked("cpu") is supported
    assert asked("cuda") is True
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert asked("cpu") is False
