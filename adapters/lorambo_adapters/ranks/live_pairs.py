"""Two models of one architecture: the layers of both, and the modules that are taken over whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.live_pairs needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import TargetLayer, find_layers
from lorambo_adapters.spectra.extraction import MatrixReader
from lorambo_adapters.targets import unwrap

HEADS = ("classifier", "score", "qa_outputs")
"""What PEFT trains in full for sequence and token classification and for question answering."""

_KINDS = ("linear", "conv1d")


@dataclass(frozen=True)
class LayerPair:
    """One layer of both models.

    Attributes:
        before: the base's.
        after: the tuned model's.
    """

    before: TargetLayer
    after: TargetLayer

    @property
    def bias(self) -> torch.Tensor | None:
        """The tuned model's, if the layer has one."""
        return getattr(self.after.module, "bias", None)

    def difference(self, dtype: torch.dtype) -> torch.Tensor:
        """Tuned less base weight, d x k, where the base's weight lies; a new tensor."""
        before = self.before.matrix()
        wide = torch.promote_types(torch.promote_types(before.dtype, self.after_dtype), dtype)
        after = self.after.matrix(before.device).to(wide, copy=True)
        return after.sub_(before.to(wide))

    @property
    def after_dtype(self) -> torch.dtype:
        """The type of the tuned weight."""
        weight: Any = self.after.module.weight
        return weight.dtype

    def reader(self, double: bool) -> MatrixReader:
        """The difference, for `extract`; formed in float64 where asked for."""
        dtype = torch.float64 if double else torch.float32
        return MatrixReader(
            self.before.name, self.before.shape, lambda: self.difference(dtype), "tuned less base"
        )


def bare(model: Any, which: str) -> torch.nn.Module:
    """The model without what `unwrap` sees through.

    Raises:
        ValueError: it is no module, or has adapters.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{which}: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, Mapping) else ():
            kind = getattr(config, "peft_type", None)
            kind = str(getattr(kind, "value", kind))
            if getattr(config, "is_prompt_learning", False) or "ADAPTION_PROMPT" in kind:
                raise ValueError(
                    f"{which}: expected a model without prompts of PEFT's, got {kind}; what they "
                    "do is in no weight, so there is no difference to extract"
                )
    model = unwrap(model)
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
            raise ValueError(
                f"{which}: expected a model without adapters, got one at {name!r}; call "
                "merge_and_unload() first"
            )
    return model


def saved_modules(
    base: torch.nn.Module, tuned: torch.nn.Module, names: Sequence[str] | None
) -> list[str]:
    """The modules that PEFT will take from the adapter whole, by their full names.

    PEFT takes every module whose name ends with one of the given names, "pre_classifier" for
    "classifier" too.

    Args:
        base: before.
        tuned: after.
        names: as PEFT's `modules_to_save`; None for those of `HEADS`.

    Raises:
        ValueError: a name is of no module, a module lies in another one or shares a tensor with
            the rest of the model, or its tensors have other shapes in the two models.
    """
    if isinstance(names, str):
        raise ValueError(f"modules_to_save: expected a list of names, got {names!r}")
    every = [name for name, _ in base.named_modules(remove_duplicate=False) if name]
    ends = tuple(HEADS if names is None else names)
    for end in () if names is None else ends:
        if not end or not any(name.endswith(end) for name in every):
            raise ValueError(f"modules_to_save: expected names of the base's modules, got {end!r}")
    found = [name for name in every if ends and name.endswith(ends)]
    if names is None:  # a head's own parts may be called like heads
        found = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    for name in found:
        inside = next((other for other in found if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise ValueError(
                f"modules_to_save: expected modules of which none lies in another, got {name!r} "
                f"in {inside!r}"
            )
        _check_saved(base, tuned, name)
    return found


def saved_tensors(tuned: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tuned tensors of these modules, by the name that `state_dict` has."""
    return {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in tuned.get_submodule(name).state_dict().items()
    }


def pairs_of(
    base: torch.nn.Module,
    tuned: torch.nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] | None,
    saved: Sequence[str],
) -> list[LayerPair]:
    """The linear layers of both models, without those that are saved whole.

    Raises:
        ValueError: as `find_layers`; a target is not a linear layer, or is missing from the tuned
            model or another one there; it or its bias has several names; the message names the
            layer.
    """
    pairs: list[LayerPair] = []
    for layer in find_layers(base, targets, exclude=exclude):
        if any(f"{layer.name}.".startswith(f"{name}.") for name in saved):
            continue
        if layer.kind not in _KINDS:
            raise ValueError(
                f"layer {layer.name!r}: expected a Linear or Conv1D, got "
                f"{type(layer.module).__name__} ({layer.kind}); leave it out with exclude"
            )
        pairs.append(LayerPair(layer, _other(tuned, layer)))
    if not pairs:
        raise ValueError(f"targets: expected layers besides {', '.join(saved)}, got none")
    _check_own(base, pairs)
    return pairs


def _check_own(base: torch.nn.Module, pairs: Sequence[LayerPair]) -> None:
    modules: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), []).append(name)
    parameters: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    for pair in pairs:
        layer = pair.before
        names = modules[id(layer.module)]
        if len(names) > 1:
            raise ValueError(
                f"layer {layer.name!r}: expected a module of one name, got {', '.join(names)}: an "
                "adapter names each once; leave it out with exclude"
            )
        names = parameters.get(id(getattr(layer.module, "bias", None)), [])
        if len(names) > 1:
            raise ValueError(
                f"layer {layer.name!r}: expected a bias of its own, got one that is "
                f"{', '.join(names)}: an adapter would change all of them; leave it out with "
                "exclude"
            )


def _other(tuned: torch.nn.Module, layer: TargetLayer) -> TargetLayer:
    where = f"layer {layer.name!r}: expected the same in the tuned model"
    try:
        module: Any = tuned.get_submodule(layer.name)
    except AttributeError:
        raise ValueError(f"{where}, got none of that name") from None
    before: Any = layer.module
    if type(module) is not type(before):
        raise ValueError(f"{where}, a {type(before).__name__}, got a {type(module).__name__}")
    if module.weight.shape != before.weight.shape:
        raise ValueError(
            f"{where}, a weight of shape {tuple(before.weight.shape)}, got "
            f"{tuple(module.weight.shape)}; leave it out with exclude"
        )
    one, two = (getattr(each, "bias", None) is not None for each in (before, module))
    if one != two:
        raise ValueError(f"{where}, {'a' if one else 'no'} bias, got {'one' if two else 'none'}")
    return replace(layer, module=module)


def _check_saved(base: torch.nn.Module, tuned: torch.nn.Module, name: str) -> None:
    where = f"modules_to_save: module {name!r}"
    try:
        before, after = (model.get_submodule(name).state_dict() for model in (base, tuned))
    except AttributeError:
        raise ValueError(f"{where}: expected it in the tuned model too, got none") from None
    shapes = _shapes(before), _shapes(after)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{where}: expected tensors of the same shapes in both models, got {shapes[0]} in the "
            f"base and {shapes[1]} in the tuned model; load the base with the tuned model's number "
            "of labels, or, for an adapter without it, pass modules_to_save without it (perhaps "
            f"[]), exclude={name!r} and refit=0: the predictions cannot be compared then"
        )
    own = {id(parameter) for parameter in base.get_submodule(name).parameters()}
    for other, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(f"{name}."):
            raise ValueError(
                f"{where}: expected tensors of its own, got one that is {other!r} too: an adapter "
                "cannot hold shared weights"
            )


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
