"""Models and tensors that several processes hold together."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.sharded needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

import torch.distributed as dist


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a `DTensor` (FSDP2, tensor parallelism)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor; of a `DTensor` gathered, which every process of its mesh has to do."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like_sharded(value: torch.Tensor, tensor: Any) -> torch.Tensor:
    """A whole tensor, spread as `tensor` is."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements)


def peeled(model: torch.nn.Module) -> tuple[torch.nn.Module, Any]:
    """The model inside the wrappers of torch.compile and data parallelism.

    Returns:
        The model (perhaps a `PeftModel`), and the `DistributedDataParallel` or None.
    """
    parallel = None
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif _kind(inner) == "DistributedDataParallel":
            parallel, inner = inner, inner.module
        elif _kind(inner) == "DataParallel":
            inner = inner.module
        else:
            return inner, parallel


def wrapper_of(model: torch.nn.Module) -> Any:
    """A `DistributedDataParallel` somewhere in this process that this model is inside of, or None.

    Nothing in a model leads to its wrapper, so all objects that the garbage collector knows are
    looked through, if there is more than one process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    inside = {id(module) for module in model.modules()}
    for thing in gc.get_objects():
        if type(thing).__name__ == "DistributedDataParallel" and isinstance(thing, torch.nn.Module):
            wrapped = thing._modules.get("module")
            if id(wrapped) in inside or (wrapped and any(m is model for m in wrapped.modules())):
                return thing
    return None


def flattened(model: torch.nn.Module) -> bool:
    """Whether some part is wrapped by the first FSDP, which flattens parameters into one."""
    return any(_kind(module) == "FullyShardedDataParallel" for module in model.modules())


def agree(value: object, parallel: Any, what: str) -> None:
    """Make sure that all processes ask for the same.

    Raises:
        ValueError: they do not; raised by all of them.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    group = None if parallel is None else parallel.process_group
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    if any(other != found[0] for other in found):
        different = next(i for i, other in enumerate(found) if other != found[0])
        raise ValueError(
            f"{what}: expected the same in every process, got another in process {different} of "
            "the group than in its first"
        )


def same_everywhere(tensors: Iterable[torch.Tensor], parallel: Any) -> None:
    """Overwrite these with those of the first process of a `DistributedDataParallel`, if any."""
    if parallel is not None:
        group = parallel.process_group
        for tensor in tensors:
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)


def _kind(module: object) -> str:
    return type(module).__name__
