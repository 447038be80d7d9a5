"""The batches that a training's ranks are measured on: those it has just seen, or others."""

from __future__ import annotations

import contextlib
import json
import random
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Literal

import numpy as np

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.training.probe_batches needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.sharded import peeled
from lorambo_adapters.spectra.batches import same_random_numbers
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.probe import cycled
from lorambo_adapters.training.captured_batches import CapturedBatches
from lorambo_adapters.training.fewer_samples import first_samples, half_of
from lorambo_alloc.costs import whole_number


class ProbeBatches:
    """The batches of a probe: of a collection, or those given last, or those of the last calls.

    Args:
        model: the one that the training calls: with its wrapper, if it has one.
        collection: any iterable; None: there is none.
        count: how many a probe has.
        samples: how many samples of a batch to measure on, its first ones. "half": half of each
            that is not of a collection, as `half_of` takes it. None: all.
        has_loss: whether there is a function for the loss, so that labels are not asked for.
        seed: of the generators while a batch is taken from the collection.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        collection: Iterable[Any] | None,
        count: int,
        *,
        samples: int | Literal["half"] | None,
        has_loss: bool,
        seed: int,
    ) -> None:
        self._model, self._count, self._has_loss = peeled(model)[0], count, has_loss
        if samples is not None and samples != "half":
            samples = whole_number(samples, "samples_per_batch", 1)
        self._samples: int | Literal["half"] | None = samples
        self._given: deque[Any] = deque(maxlen=count)
        self._captured = CapturedBatches(model, count)
        self._cycled = None
        if collection is not None:
            self._cycled = CycledBatches(collection, self._model, seed)

    @property
    def position(self) -> int | None:
        """How many were taken from the collection; None if there is none."""
        return None if self._cycled is None else self._cycled.position

    def go_to(self, position: int | None) -> None:
        """Pass over batches of the collection, such that so many were taken."""
        if self._cycled is not None and position is not None:
            with same_generators(self._model):
                self._cycled.go_to(position)

    def keep(self, batch: Any) -> None:
        """Keep a batch that the training has seen, by reference.

        Raises:
            ValueError: there is a collection.
        """
        if self._cycled is not None:
            raise ValueError("batch: expected none beside batches=, got one")
        self._given.append(batch)

    def take(self, workers: Workers) -> list[Any]:
        """At least 2 in every worker; or none in any, as long as some has too few.

        Raises:
            NoLossError: (in all workers) some worker's have no loss.
            Exception: (in all workers) what taking batches from the collection raised.
        """
        found: list[Any] = []
        failure: Exception | None = None
        try:
            if self._cycled is not None:
                with same_generators(self._model):
                    found = self._cycled.take(self._count)
            else:
                found = list(self._given) or self._captured.batches()
            check_loss(found, self._has_loss)
            found = self._fewer(found)
        except Exception as error:
            failure = error
        least = len(found)
        if workers.count > 1:
            kind = type(failure).__name__ if failure else ""
            mine = json.dumps([kind, str(failure), len(found)]).encode()
            for index, message in enumerate(workers.gather(mine)):
                kind, text, count = json.loads(message)
                least = min(least, count)
                if kind and failure is None:
                    known = NoLossError if kind == NoLossError.__name__ else RuntimeError
                    failure = known(f"worker {index}: {kind}: {text}")
        if failure is not None:
            raise failure
        return found if least > 1 else []

    def _fewer(self, batches: list[Any]) -> list[Any]:
        samples = self._samples
        if samples is None or (samples == "half" and self._cycled is not None):
            return batches
        if samples == "half":
            return [half_of(batch) for batch in batches]
        return [first_samples(batch, samples) for batch in batches]

    @contextlib.contextmanager
    def undisturbed(self) -> Generator[None]:
        """Inside, the model's calls are made as the training made its last one, and not kept.

        The random generators are left as they were.
        """
        precision = self._captured.precision
        with contextlib.ExitStack() as stack:
            stack.enter_context(same_generators(self._model))
            stack.enter_context(self._captured.paused())
            if precision is not None:
                stack.enter_context(precision.during_calls(self._model))
            yield

    def close(self) -> None:
        """Let go of all of them."""
        self._captured.close()
        self._given.clear()


class CycledBatches:
    """Batches of a collection, over and over; those of an iterator are kept.

    Torch's generators are seeded while a batch is taken, so that a loader that shuffles gives the
    same order again after a restart; afterwards they are as they were.

    Args:
        batches: any iterable.
        model: whose devices' generators are meant.
        seed: the seed.

    Attributes:
        position: how many were taken.

    Raises:
        ValueError: (from `take`) there are none, or it is a single batch; (from `go_to`) more were
            taken already.
    """

    def __init__(self, batches: Iterable[Any], model: torch.nn.Module, seed: int) -> None:
        self._model, self._seed = model, seed
        self._stream = cycled(batches)
        self.position = 0

    def take(self, count: int) -> list[Any]:
        """The next ones."""
        found: list[Any] = []
        for _ in range(count):
            with same_random_numbers(self._model, self._seed + self.position):
                found.append(next(self._stream))
            self.position += 1
        return found

    def go_to(self, position: int) -> None:
        """Pass over batches, such that so many were taken."""
        if position < self.position:
            raise ValueError(
                f"batches: expected at most {position} that were taken, got {self.position}; make "
                "a new controller to go back"
            )
        self.take(position - self.position)


@contextlib.contextmanager
def same_generators(model: torch.nn.Module) -> Generator[None]:
    """Leave all random generators as they were: torch's, numpy's global one, and Python's."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one)
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class NoLossError(ValueError):
    """The batches to measure on have no loss, and no later ones will have one."""


def check_loss(batches: Sequence[Any], has_loss: bool) -> None:
    """Make sure that there are batches, and that the model can compute their loss, if it has to.

    Args:
        batches: to measure on.
        has_loss: whether there is a function for the loss.

    Raises:
        NoLossError: there are none, or they have no labels.
    """
    if not batches:
        raise NoLossError(
            "expected calls of the model in training mode to measure on, got none: give the "
            "controller the model that the loop calls (with its wrapper), or call step(batch), or "
            "give batches="
        )
    for batch in () if has_loss else batches:
        got = f"a batch of type {type(batch).__name__}"
        if hasattr(batch, "keys"):
            if batch.get("labels") is not None:
                continue
            got = f"{', '.join(map(repr, batch.keys())) or 'nothing'} without them"
        raise NoLossError(
            f"expected 'labels' among the model's arguments, for its own loss, got {got}; give "
            "loss_fn=, with batches= or step(batch) that have what it needs"
        )
