"""Forward and backward passes of a probe: as few as where the model's parameters lie allows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.probe_passes needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.sharded import is_sharded
from lorambo_adapters.spectra.fisher import FisherLoss


class Once:
    """A model that is called once: later calls get the first one's outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._outputs: Any = None

    def __call__(self, **batch: Any) -> Any:
        """The outputs for the first batch."""
        if self._outputs is None:
            self._outputs = self._model(**batch)
        return self._outputs


def one_graph_goes_once(model: torch.nn.Module) -> bool:
    """Whether a second backward pass through one forward pass can fail.

    `fully_shard` frees the gathered parameters after the first one, and gathers them again only
    where it finds the tensors in a module's output.
    """
    return any(is_sharded(parameter) for parameter in model.parameters())


def fisher_passes(
    losses: FisherLoss, model: Any, batch: Any, afresh: bool
) -> Iterator[tuple[int, torch.Tensor, bool]]:
    """The scalars of `losses.moments`, to back-propagate one after the other.

    Args:
        losses: whose Fisher it is.
        model: what is called.
        batch: what it is called with.
        afresh: a forward pass for each scalar, instead of one for all of them.

    Yields:
        The number of terms, the scalar, and whether its graph is needed once more.
    """
    terms, scalars = losses.moments(model, batch)
    for number in count(1):
        scalar, last = next(scalars)
        yield terms, scalar, not last and not afresh
        if last:
            return
        if afresh:
            del scalar
            # Drawn labels of this pass that are passed over cost no backward pass.
            scalars = islice(losses.moments(model, batch)[1], number, None)
