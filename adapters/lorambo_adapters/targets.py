"""Which modules and parameters a LoRA would adapt: the names, matched as PEFT matches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.targets needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.names import Targets, name_matcher

_SEQUENCE_CLASSIFICATION_HEADS = ("score", "classifier")
_DATA_PARALLEL = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel


def base_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module of the model before PEFT, with the name that PEFT's patterns see.

    What `unwrap` takes off is seen through: the base layer stands under the name of the LoRA layer
    around it, and neither the adapter's own modules nor what `modules_to_save`
    covers appears.
    """
    model = unwrap(model)
    wrappers: set[str] = set()
    saved: set[str] = set()
    for name, module in model.named_modules():
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts))]
        if any(outer in saved for outer in above):
            continue
        if any(outer in wrappers and parts[i + 1] != "base_layer" for i, outer in enumerate(above)):
            continue
        if _is_wrapper(module):
            wrappers.add(name)
        elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            saved.add(name)
        else:
            through = {len(outer.split(".")) for outer in above if outer in wrappers}
            yield ".".join(part for i, part in enumerate(parts) if i not in through), module


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The base model inside a `PeftModel`, a compiled or a data-parallel model, in any order.

    Another one is returned as it is.

    Raises:
        ValueError: not a module.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, _DATA_PARALLEL):
            inner = inner.module
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif _is_a(inner, "peft.", "PeftMixedModel"):
            inner = inner.base_model.model
        elif isinstance(inner, torch.nn.Module):
            return inner
        else:
            raise ValueError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")


def is_all_linear(targets: Targets) -> bool:
    """Whether this is PEFT's word for every linear layer, in any case of letters."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def module_matcher(
    model: torch.nn.Module,
    targets: Targets,
    *,
    exclude: Targets = None,
    task_type: str | None = None,
) -> Callable[[str], bool]:
    """A test of module names that agrees with `LoraConfig(target_modules=targets)`.

    Args:
        model: where "all-linear" looks for linear layers.
        targets: "all-linear", a regular expression that has to match the whole name, or a list of
            names and of suffixes that begin after a dot. None or an empty list: no module.
        exclude: PEFT's `exclude_modules`, a regular expression or a list as above.
        task_type: PEFT's; only "SEQ_CLS" makes a difference, see `find_layers`.

    Raises:
        ValueError: not of this form, or not a regular expression.

    References:
        PEFT 0.21.2, `tuners/tuners_utils.py`, `check_target_module_exists` and
        `_maybe_include_all_linear_layers`; `peft_model.py`,
        `PeftModelForSequenceClassification`, for what SEQ_CLS adds to `modules_to_save`.
    """
    if is_all_linear(targets):
        # As in PEFT, the names found go through the suffix rule once more.
        targets = list(_all_linear(model, task_type))
    included, excluded = name_matcher(targets, "targets"), name_matcher(exclude, "exclude")
    heads = _SEQUENCE_CLASSIFICATION_HEADS if task_type == "SEQ_CLS" else ()

    def matches(name: str) -> bool:
        if not name or not included(name) or excluded(name):
            return False
        return not any(part in heads for part in name.split("."))

    return matches


def parameter_matcher(target_parameters: Sequence[str] | None) -> Callable[[str], bool]:
    """A test of parameter names that agrees with `LoraConfig(target_parameters=...)`.

    Raises:
        ValueError: not a list of names.
    """
    if isinstance(target_parameters, str):
        raise ValueError(f"target_parameters: expected a list of names, got {target_parameters!r}")
    return name_matcher(target_parameters, "target_parameters")


def as_peft_reads(
    model: torch.nn.Module,
    targets: Targets,
    target_parameters: Sequence[str] | None,
    *,
    exclude: Targets = None,
    task_type: str | None = None,
) -> tuple[Targets, Sequence[str] | None]:
    """The targets after PEFT's translation for mixture-of-experts models of transformers 5.

    There the experts' projections, once linear layers of their own, are fused into 3-D parameters,
    and PEFT turns the old names ("all-linear" among them) into `target_parameters`. Its own
    function does it here, so that the installed version decides; without PEFT nothing changes.

    Raises:
        ValueError: PEFT's, where one of two projections that are fused is named without the other.
    """
    model = unwrap(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    stacked = any(p.ndim == 3 and p.shape[0] > 1 for p in model.parameters())
    if not (targets and model_type and stacked):  # importing PEFT takes seconds
        return targets, target_parameters
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return targets, target_parameters
    config = LoraConfig(
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=list(target_parameters or ()),
        exclude_modules=exclude if exclude is None or isinstance(exclude, str) else list(exclude),
        task_type=task_type,
    )
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    modules = config.target_modules
    modules = modules if isinstance(modules, str) else sorted(modules or ())
    return modules, sorted(config.target_parameters or ())


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, a linear layer with its weight transposed."""
    return _is_a(module, "transformers.", "Conv1D")


def _all_linear(model: torch.nn.Module, task_type: str | None) -> Iterator[str]:
    model = unwrap(model)
    left_out: list[object] = []
    if _is_a(model, "transformers.", "PreTrainedModel"):
        head: Any = getattr(model, "get_output_embeddings")()  # noqa: B009  (not of nn.Module)
        if head is None and task_type == "SEQ_CLS":
            heads = (getattr(model, name, None) for name in _SEQUENCE_CLASSIFICATION_HEADS)
            head = next((module for module in heads if module is not None), None)
        left_out = [head.get_base_layer() if head is not None and _is_wrapper(head) else head]
    for name, module in base_modules(model):
        if isinstance(module, torch.nn.Linear) or is_conv1d(module):
            if not any(module is head for head in left_out):
                yield name


def _is_a(module: torch.nn.Module, package: str, name: str) -> bool:
    """Like isinstance, for a class of a package that need not be installed."""
    return any(
        base.__name__ == name and base.__module__.startswith(package)
        for base in type(module).__mro__
    )


def _is_wrapper(module: torch.nn.Module) -> bool:
    return hasattr(module, "base_layer") and callable(getattr(module, "get_base_layer", None))
