"""What a controller of ranks is restarted from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.controller_state needs torch: "
        "pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.adapter_layers import adapter_layers
from lorambo_adapters.training.checkpoint import mask_as
from lorambo_adapters.training.model_allocator import check_ranks
from lorambo_adapters.training.probe_batches import ProbeBatches
from lorambo_alloc import OnlineAllocator
from lorambo_alloc.history import RankHistory

_VERSION = 1


def state_of(
    model: torch.nn.Module,
    adapter: str,
    mode: str,
    allocator: OnlineAllocator,
    history: RankHistory,
    position: int | None,
) -> dict[str, Any]:
    """The state as what JSON can hold; in mode "mask" with the rows that count."""
    return {
        "version": _VERSION,
        "adapter": adapter,
        "mode": mode,
        "allocator": allocator.state_dict(),
        "history": history.to_json(),
        "position": position,
        "active": _active(model, adapter) if mode == "mask" else {},
    }


def restored(
    state: Mapping[str, Any],
    model: torch.nn.Module,
    adapter: str,
    mode: str,
    allocator: OnlineAllocator,
    batches: ProbeBatches,
) -> RankHistory:
    """Put the allocator, the masks and the batches where they stood.

    Args:
        state: as of `state_of`.
        model: with the ranks that it had then.
        adapter: the adapter's name.
        mode: the controller's.
        allocator: of the same layers.
        batches: from which no more were taken than then.

    Returns:
        The history up to then.

    Raises:
        ValueError: something does not go with the state; nothing has been changed then.
    """
    for key, value in {"version": _VERSION, "adapter": adapter, "mode": mode}.items():
        found = state.get(key) if isinstance(state, Mapping) else state
        if found != value:
            raise ValueError(f"state: expected {key} {value!r}, got {found!r}")
    before, masks = allocator.state_dict(), _active(model, adapter)
    try:
        history, position = RankHistory.from_json(state["history"]), state["position"]
        allocator.load_state_dict(state["allocator"])
        known = allocator.costs, allocator.fixed_costs
        if (history.costs, history.fixed_costs) != known:
            raise ValueError("state: expected a history of the allocator's layers, got another")
        mask_as(model, {"active": state["active"]}, adapter)
        check_ranks(allocator, model, adapter)
        batches.go_to(position)
    except BaseException as error:
        allocator.load_state_dict(before)
        if mode == "mask":
            mask_as(model, {"active": masks}, adapter)
        if isinstance(error, KeyError):
            raise ValueError(f"state: expected an entry {error}, got none") from error
        raise
    return history


def rounded(curves: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, list[float]]:
    """To 6 significant digits, for a record; the allocator's own estimates are exact."""
    return {
        name: [float(f"{value:.6g}") for value in curve.tolist()] for name, curve in curves.items()
    }


def _active(model: torch.nn.Module, adapter: str) -> dict[str, list[int]]:
    """Which rows of each layer's tensors count."""
    return {name: x.active.tolist() for name, x in adapter_layers(model, adapter).items()}
