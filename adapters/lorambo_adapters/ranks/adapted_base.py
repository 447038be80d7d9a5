"""A base model that computes what it will with an adapter, while its own tensors stay untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.adapted_base needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer
from lorambo_adapters.ranks.refit import Factors
from lorambo_adapters.ranks.weighted_cut import Fold

Stored = tuple[torch.Tensor, torch.Tensor]
"""PEFT's lora_A (r x k) and lora_B (d x r), in the type in which they are stored."""


class AdaptedBase:
    """The base with low-rank updates beside its layers, as PEFT adds them. A context manager.

    Inside, other tensors take the place of some of the model's (biases, a head), and hooks add
    scale B A x to the layers' outputs, in float32 at least, with the factors as they are stored.
    No weight is written to and no d x k product formed. At the end, or if an error comes, the
    model has its own tensors back, the same objects.

    Args:
        model: the base; parameters are frozen by the caller.
        layers: linear ones, which may get an update.
        tensors: by the name that `state_dict` has, what takes the place of a tensor. Biases of
            layers may change later (`cut`).
        folds: layer to what its bias is made of, beside a cut; other biases stay.
        dtypes: layer to the type in which its factors are stored.
        scale: of every layer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[TargetLayer],
        tensors: Mapping[str, torch.Tensor],
        folds: Mapping[str, Fold],
        dtypes: Mapping[str, torch.dtype],
        scale: float,
    ) -> None:
        self.folds = folds
        self._model, self._layers = model, layers
        self._tensors, self._dtypes, self._scale = tensors, dtypes, scale
        self._stored: dict[str, Stored] = {}
        self._sides: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._originals: list[tuple[dict[str, Any], str, Any]] = []
        self._own: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> AdaptedBase:
        try:
            for key, tensor in self._tensors.items():
                self._replace(key, tensor)
            for layer in self._layers:
                hook = layer.module.register_forward_hook(self._beside(layer), with_kwargs=True)
                self._handles.append(hook)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._originals:
            place, name, tensor = self._originals.pop()
            place[name] = tensor
        self._own.clear()
        self._sides.clear()

    @property
    def stored(self) -> Mapping[str, Stored]:
        """The factors of the present cut, as they will be stored; they stay at the end."""
        return self._stored

    def biases(self) -> dict[str, torch.Tensor]:
        """Layer to the bias beside the present cut, in float64, of those that are folded."""
        return {name: fold.beside(self._product(name)) for name, fold in self.folds.items()}

    def cut(self, factors: Factors) -> None:
        """Set the updates to U V^T, rounded, and the biases to what goes with these.

        Raises:
            ValueError: factors leave the range of their type.
        """
        self._stored, self._sides = {}, {}
        for name, (u, v) in factors.items():
            self._stored[name] = self._rounded(name, u, v)
            right, left = self._stored[name]
            work = torch.promote_types(left.dtype, torch.float32)
            self._sides[name] = left.to(work) * self._scale, right.to(work).T
        with torch.no_grad():
            for name, bias in self.biases().items():
                self._own[f"{name}.bias"].copy_(bias)

    def _product(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        stored = self._stored.get(name)
        if stored is None:
            return None
        right, left = (each.to(self.folds[name].mean.device) for each in stored)
        return left.double() * self._scale, right.double().T

    def _rounded(self, name: str, u: torch.Tensor, v: torch.Tensor) -> Stored:
        left, right, dtype = u / self._scale, v, self._dtypes[name]
        lengths = left.norm(dim=0), right.norm(dim=0)
        even = (lengths[0] > 0) & (lengths[1] > 0)
        # Columns of one length on both sides use a type's range best.
        ratio = torch.where(even, lengths[1] / torch.where(even, lengths[0], 1.0), 1.0).sqrt()
        a, b = (right / ratio).T.to(dtype).contiguous(), (left * ratio).to(dtype).contiguous()
        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
            raise ValueError(
                f"layer {name!r}: expected factors in the range of {dtype}, got an overflow with "
                f"scale {self._scale!r}; give another dtype or scale"
            )
        return a, b

    def _replace(self, key: str, tensor: torch.Tensor) -> None:
        owner, _, name = key.rpartition(".")
        module = self._model.get_submodule(owner)
        place: dict[str, Any] = module._parameters if name in module._parameters else {}
        place = place or module._buffers
        before = place[name]
        own = tensor.detach().to(before, copy=True)
        self._originals.append((place, name, before))
        is_parameter = isinstance(before, torch.nn.Parameter)
        place[name] = torch.nn.Parameter(own, requires_grad=False) if is_parameter else own
        self._own[key] = place[name]

    def _beside(self, layer: TargetLayer) -> Callable[..., torch.Tensor | None]:
        def hook(
            module: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor
        ) -> torch.Tensor | None:
            sides = self._sides.get(layer.name)
            if sides is None:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            left, right = (each.to(x.device) for each in sides)
            return output + ((x.to(right.dtype) @ right) @ left.T).to(output.dtype)

        return hook
