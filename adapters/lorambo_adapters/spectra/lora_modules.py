"""The updates of the LoRA adapters that PEFT has put into a live model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.lora_modules needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import experts_transposed, floating_point
from lorambo_adapters.spectra.low_rank import LowRankUpdate, refuse
from lorambo_adapters.spectra.peft_config import DORA, changed_base
from lorambo_adapters.targets import unwrap

# Variants of PEFT's LoRA with the plain update (for aLoRA, at the tokens that it applies to).
_PLAIN = ("ALora", "Velora", "MiCA")

Read = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def live_updates(
    model: torch.nn.Module, adapters: Sequence[str] | None = None, ignore_magnitude: bool = False
) -> list[LowRankUpdate]:
    """Find the updates in a model, in the order of its modules.

    The scale is the one in use (`module.scaling`), whatever the configuration says. It makes no
    difference whether an adapter is merged.

    Args:
        model: a `PeftModel`, or any model into which PEFT has put LoRA layers.
        adapters: names; the active ones by default.
        ignore_magnitude: take B A of a DoRA, and leave out its magnitudes.

    Raises:
        ValueError: the model has no LoRA layer, or not one with such an adapter; or the update of
            some is not of the form scale * B A, or has no data. One message lists these.
    """
    wrappers = dict(lora_layers(unwrap(model)))
    if not wrappers:
        raise ValueError(
            f"expected a model with LoRA layers of PEFT, got {type(model).__name__} without any"
        )
    known = sorted({name for _, module in wrappers.values() for name in module.scaling})
    for adapter in adapters or ():
        if adapter not in known:
            raise ValueError(
                f"adapter: expected one of {', '.join(map(repr, known))}, got {adapter!r}"
            )
    updates: list[LowRankUpdate] = []
    problems: list[str] = []
    magnitudes = False
    for name, module in wrappers.values():
        for adapter in module.active_adapters if adapters is None else adapters:
            if adapter not in module.scaling:
                continue
            variant = variant_of(module, adapter)
            magnitudes |= "Dora" in variant
            if variant and not variant.startswith(("Dora", "_Dora", *_PLAIN)):
                problems.append(f"layer {name!r}: expected a plain LoRA, got {variant}")
                continue
            try:
                updates += _of_module(name, module, adapter)
            except ValueError as error:
                problems.append(f"layer {name!r}, adapter {adapter!r}: {error}")
    if magnitudes and not ignore_magnitude:
        problems.append(DORA)
    if not updates and not problems:
        raise ValueError(
            "expected an active LoRA adapter, got none; name one of " + ", ".join(known)
        )
    refuse(problems, type(unwrap(model)).__name__)
    return updates


def changed_bases(model: Any, adapters: Sequence[str] | None = None) -> set[str]:
    """The initialisations of these adapters (all by default) that changed the base's weights."""
    configs = getattr(model, "peft_config", None)
    configs = configs if isinstance(configs, dict) else {}
    found = {
        changed_base(getattr(config, "init_lora_weights", None))
        for name, config in configs.items()
        if adapters is None or name in adapters
    }
    return {name for name in found if name is not None}


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, tuple[str, Any]]]:
    """LoRA layers by their path, each with the name of the module that it wraps.

    Args:
        model: not a `PeftModel` (see `unwrap`), whose prefix the names would have.
    """
    found: set[str] = set()
    for path, module in model.named_modules():
        if not all(hasattr(module, part) for part in ("lora_A", "lora_B", "scaling", "base_layer")):
            continue
        found.add(path)
        pieces = path.split(".")
        name = ".".join(
            piece
            for i, piece in enumerate(pieces)
            if piece != "base_layer" or ".".join(pieces[:i]) not in found
        )
        yield path, (name, module)


def variant_of(module: Any, adapter: str) -> str:
    """The class of the adapter's variant of LoRA; empty for a plain one."""
    if hasattr(module, "lora_E"):
        return "AdaLoRA"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None:
        return type(variant).__name__
    return "Dora" if getattr(module, "use_dora", {}).get(adapter) else ""


def _of_module(name: str, module: Any, adapter: str) -> Iterator[LowRankUpdate]:
    scale = float(module.scaling[adapter])
    if adapter in module.lora_embedding_A:
        left, right = module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
    else:
        left, right = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    if left.ndim < 2 or left.ndim != right.ndim or left[0, 0].numel() != 1:
        raise ValueError(f"expected factors, got {tuple(right.shape)} and {tuple(left.shape)}")
    experts = int(getattr(module, "num_experts", 1))
    rank = right.shape[0] // experts
    if left.shape[1] != right.shape[0] or rank * experts != right.shape[0]:
        raise ValueError(
            "expected A and B of one rank, or a convolution without groups, got A "
            f"{tuple(right.shape)} and B {tuple(left.shape)}"
        )
    shape = int(left.shape[0]), int(right[0].numel())
    parameter = getattr(module, "parameter_name", None)
    full = name if parameter is None else f"{name}.{parameter}"
    stacked = parameter is not None and module.get_param().ndim == 3
    # Of experts that are kept as k x d without saying so (Llama 4), PEFT takes d for k.
    base = module.get_base_layer()
    turned = stacked and experts_transposed(base) and not getattr(base, "is_transposed", False)
    shape = (shape[1], shape[0]) if turned else shape
    for expert in range(experts):
        which = f"{full}.{expert}" if stacked else full

        def read(expert: int = expert, which: str = which) -> tuple[torch.Tensor, torch.Tensor]:
            # An expert's rows of A lie together, its columns of B `experts` apart.
            rows = slice(expert * rank, (expert + 1) * rank)
            b = floating_point(which, left.detach()).flatten(1)[:, expert::experts]
            a = floating_point(which, right.detach()).flatten(1)[rows]
            return (a.T, b.T) if turned else (b, a)

        yield LowRankUpdate(which, shape, rank, scale, read)
