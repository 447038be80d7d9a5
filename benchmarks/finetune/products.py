"""Products in bfloat16, also on processors that have no arithmetic for it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.finetune.task import Batch
from lorambo_adapters.spectra.inputs import multiplies_bfloat16

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default)


def slopes(model: Any, batch: Batch, *, bfloat16: bool) -> float:
    """Add the gradient of a batch's loss to the parameters'; returns the loss."""
    device = batch["input_ids"].device.type
    with products(device, bfloat16=bfloat16):
        loss = model(**batch).loss
    with emulated(device) if bfloat16 else nullcontext():
        loss.backward()
    return float(loss.detach())


@contextmanager
def products(device: str, *, bfloat16: bool) -> Generator[None]:
    """`torch.autocast` in bfloat16, if wanted.

    Where a processor has no products in bfloat16, torch's own take many times as long as those in
    float32. There, and only there, they are computed as what they are defined to be: products of
    rounded numbers, summed in float32, and the sum rounded.
    """
    if not bfloat16:
        yield
        return
    with emulated(device), torch.autocast(device, torch.bfloat16):
        yield


def emulated(device: str) -> AbstractContextManager[Any]:
    """Products of bfloat16 tensors by `SummedInFloat32`, where the device multiplies none."""
    return nullcontext() if multiplies_bfloat16(device) else SummedInFloat32()


class SummedInFloat32(TorchDispatchMode):
    """Matrix products of bfloat16 tensors are computed in float32 and rounded."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Everything else is left as it is."""
        if func in _PRODUCTS and args[-1].dtype is torch.bfloat16:
            args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
            return func(*args, **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))
