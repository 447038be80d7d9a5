from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.finetune import products as module  # noqa: E402
from benchmarks.finetune.products import SummedInFloat32, products, slopes  # noqa: E402
from tests.finetune.tiny_task import TinyTask  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_products_are_those_of_rounded_numbers_summed_in_float32():
    a, b = torch.randn(2, 7, 300), torch.randn(2, 300, 5)
    bias = torch.randn(5)
    a, b, bias = a.bfloat16(), b.bfloat16(), bias.bfloat16()
    with SummedInFloat32():
        found = [
            torch.bmm(a, b),
            torch.mm(a[0], b[0]),
            torch.nn.functional.linear(a[0], b[0].T, bias),
            torch.baddbmm(bias, a, b),
        ]
        other = torch.mm(a[0].float(), b[0].float())
    first, second = a.double(), b.double()
    expected = [
        first @ second,
        first[0] @ second[0],
        first[0] @ second[0] + bias.double(),
        first @ second + bias.double(),
    ]
    for one, exact in zip(found, expected, strict=True):
        assert one.dtype is torch.bfloat16
        # To half a unit in the last place of eight bits, and a float32 sum's error.
        assert ((one.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
    assert other.dtype is torch.float32
    assert torch.equal(other, torch.mm(a[0].float(), b[0].float()))


@pytest.mark.parametrize("native", [True, False])
def test_a_gradient_in_bfloat16_is_near_that_in_float32_on_any_processor(monkeypatch, native):
    task = TinyTask()
    model: Any = task.model()
    batch = task.batch(task.splits["train"][:16])
    mode = SummedInFloat32()
    seen = []
    monkeypatch.setattr(module, "emulated", lambda device: module.nullcontext() if native else mode)
    original = SummedInFloat32.__torch_dispatch__

    def noted(self, func, types, args=(), kwargs=None):
        if func in module._PRODUCTS:
            seen.append(args[-1].dtype)
        return original(self, func, types, args, kwargs)

    monkeypatch.setattr(SummedInFloat32, "__torch_dispatch__", noted)

    def gradient(bfloat16):
        model.zero_grad()
        loss = slopes(model, batch, bfloat16=bfloat16)
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        return loss, weight.grad.clone()

    exact, slope = gradient(False)
    rounded, near = gradient(True)
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    assert 0 < (near - slope).norm() < 0.05 * slope.norm()
    linear = sum(p.dim() == 2 for p in model.bert.encoder.parameters())
    count = sum(dtype is torch.bfloat16 for dtype in seen)
    assert count == 0 if native else count >= 3 * linear  # forward, and two of each backward


@pytest.mark.parametrize("supported", [True, False])
def test_products_are_emulated_only_where_the_processor_has_none(monkeypatch, supported):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: supported)
    used = []
    monkeypatch.setattr(SummedInFloat32, "__enter__", lambda self: used.append(self))
    monkeypatch.setattr(SummedInFloat32, "__exit__", lambda self, *error: None)
    with products("cpu", bfloat16=True):
        assert torch.is_autocast_enabled("cpu")
    assert len(used) == (not supported)
    with products("cpu", bfloat16=False):
        assert not torch.is_autocast_enabled("cpu")
    assert len(used) == (not supported)
