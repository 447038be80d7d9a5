"""The processes that train one model whose ranks move."""

from __future__ import annotations

from typing import Any

try:
    import torch.distributed as dist
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.together needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.distributed import Workers


def connected(workers: Workers | None, mode: str, parallel: Any) -> tuple[Workers, bool]:
    """The workers, and whether they were connected here.

    Args:
        workers: what the caller gave. None: in mode "mask" those of `parallel`, or all processes;
            in mode "resize" this one alone.
        mode: as `resize` takes it.
        parallel: the model's `DistributedDataParallel`, if it has one.

    Raises:
        ValueError: several workers, and mode "resize".
        WorkerLost: another one cannot be reached.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if workers is None:
        if mode == "resize" or not several:
            return Workers.alone(), False
        workers = Workers(None if parallel is None else parallel.process_group)
    if workers.count > 1 and mode == "resize":
        raise ValueError(
            "mode: expected 'mask' where several processes train one model, got 'resize' with "
            f"{workers.count} workers"
        )
    if workers.count == 1 or workers.is_connected:
        return workers, False
    return workers.__enter__(), True


def is_disconnected(error: RuntimeError) -> bool:
    """Whether a collective call has ended because another process has."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
