"""What a model's last calls were given, and under which precision they were made."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.captured_batches needs torch: "
        "pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.sharded import peeled
from lorambo_adapters.targets import unwrap

# The Trainer of transformers divides by it the loss of a part of an accumulated batch.
_OF_THE_TRAINER = ("num_items_in_batch",)


@dataclass(frozen=True)
class Precision:
    """What `torch.autocast` was set to on one kind of device.

    Attributes:
        device: the kind, as "cuda".
        enabled: whether it was on.
        dtype: its type.
    """

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Precision:
        """That of this thread at this moment."""
        enabled = torch.is_autocast_enabled(device)
        return cls(device, enabled, torch.get_autocast_dtype(device))

    @contextlib.contextmanager
    def during_calls(self, model: torch.nn.Module) -> Generator[None]:
        """The same while the model's forward runs, and not around it: not in a backward pass."""
        if not self.enabled:
            yield
            return
        entered: list[torch.autocast] = []

        def enter(*_: object) -> None:
            entered.append(torch.autocast(self.device, self.dtype))
            entered[-1].__enter__()

        def leave(*_: object) -> None:
            if entered:
                entered.pop().__exit__(None, None, None)

        # Also where the forward raises, or the caller would go on in this precision.
        handles = [
            model.register_forward_pre_hook(enter),
            model.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            while entered:
                leave()


_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def _without_graph(value: Any) -> Any:
    """A tensor that needs no gradient: a probe's passes end there, and it holds no graph."""
    wanted = isinstance(value, torch.Tensor) and value.requires_grad
    return value.detach() if wanted else value


class _Listener:
    """The hook on the model; in copies of the model, and in what it is saved as, one that is idle.

    It holds neither the model nor the batches.
    """

    def __init__(self, owner: CapturedBatches, model: torch.nn.Module) -> None:
        self._owner, self._model = weakref.ref(owner), weakref.ref(model)
        self._inner = weakref.ref(peeled(model)[0])

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        owner, inner = self._owner(), self._inner()
        if owner is None or inner is None or module is not self._model():
            return
        if inner.training and torch.is_grad_enabled():
            owner.keep(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes any arguments and does nothing; loading it needs the standard library alone.
        return getattr, (contextlib.nullcontext(), "__exit__")


class CapturedBatches:
    """What the model's last training calls were given, by reference: no copies are made.

    Calls in evaluation mode and calls without gradients are passed over. Tensors that are part of a
    graph are kept without it. Tensors that are written over after the call, as those of a CUDA
    graph, are not what they were. Copies of the model, and what it is saved as, are not listened
    to.

    Args:
        model: the one that the training calls: with its wrapper, if it has one.
        count: how many calls to keep.

    Attributes:
        precision: what autocast was set to in the last one; None before the first.
    """

    def __init__(self, model: torch.nn.Module, count: int) -> None:
        self._calls: deque[_Call] = deque(maxlen=count)
        self.precision: Precision | None = None
        self._base: Any = weakref.ref(unwrap(peeled(model)[0]))
        device = next((p.device.type for p in model.parameters()), "cpu")
        self._device = device
        self._handle = model.register_forward_pre_hook(_Listener(self, model), with_kwargs=True)

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a call's arguments, and the precision it is made under."""
        call = (
            tuple(_without_graph(value) for value in args),
            {key: _without_graph(value) for key, value in kwargs.items()},
        )
        self._calls.append(call)
        self.precision = Precision.now(self._device)

    def __len__(self) -> int:
        return len(self._calls)

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Keep nothing of the calls inside."""
        calls, precision = list(self._calls), self.precision
        try:
            yield
        finally:
            self._calls.clear()
            self._calls.extend(calls)
            self.precision = precision

    def batches(self) -> list[dict[str, Any]]:
        """The arguments of the calls by name, the oldest first.

        Raises:
            ValueError: some were given by place, and their names are not known.
        """
        return [self._named(args, kwargs) for args, kwargs in self._calls]

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        entries = {key: value for key, value in kwargs.items() if key not in _OF_THE_TRAINER}
        if not args:
            return entries
        named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(self._base().forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in named]
        if len(args) > len(names):
            raise ValueError(
                "expected calls of the model whose arguments have names, got some without; call "
                "step(batch), or give batches="
            )
        return dict(zip(names, args, strict=False)) | entries

    def close(self) -> None:
        """Keep no more, and let go of what was kept."""
        self._handle.remove()
        self._calls.clear()
