"""Ranks that follow a training in plain PyTorch: probed, allocated and moved on a schedule."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.trainer needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.growth import Gradient
from lorambo_adapters.ranks.resize import resize
from lorambo_adapters.ranks.sharded import peeled
from lorambo_adapters.spectra.distributed import WorkerLost, Workers
from lorambo_adapters.training.controller_state import restored, rounded, state_of
from lorambo_adapters.training.model_allocator import allocator_for, check_ranks, ranks_of
from lorambo_adapters.training.probe import Measurement, RankProbe
from lorambo_adapters.training.probe_batches import NoLossError, ProbeBatches
from lorambo_adapters.training.together import connected, is_disconnected
from lorambo_alloc import OnlineAllocator, Proposal
from lorambo_alloc.costs import whole_number
from lorambo_alloc.history import RankHistory

__all__ = ["RankController", "allocator_for"]

Mode: TypeAlias = Literal["resize", "mask"]


class Probe(Protocol):
    """What measures, as `RankProbe` does."""

    def measure(self, batches: Sequence[Any], /) -> Measurement:
        """What each rank of each layer is worth, on these batches."""
        ...


class RankController:
    """Moves the ranks of a LoRA while it is trained, in a loop of your own.

        allocator = allocator_for(model, uniform_rank(4), period=100, warmup=100, freeze=5_000)
        with RankController(model, optimizer, allocator) as ranks:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                ranks.step()

    At the steps at which the allocator's timetable has a proposal, a probe measures what each
    layer's ranks are worth (`RankProbe`), the allocator observes that and solves anew, and `resize`
    moves ranks in the model and in the optimizer. At all other steps next to nothing is done. Where
    no rank moves, the training goes on to the bit as without a controller: weights, gradients,
    modes, buffers and random generators are as they were.

    The present ranks never cost more than `allocator.budget_at(step)`: they are cut at once where
    the controller finds them above it, without a probe if there is nothing to measure on yet, and
    ahead of a budget that falls.

    Gradient accumulation, clipping, schedulers, `torch.autocast` and `GradScaler` (give it as
    `loss_scale`) are as they always are: step() comes once after each `optimizer.step()`. A scaler
    that leaves out a step does not matter.

    What is measured on is one of

    - what the last calls of the model were given (in training mode and with gradients), caught by a
      hook and kept by reference; with the autocast they were made under. Their arguments need
      labels, as the loss is the model's own. Saved or copied, the model comes without the hook;
    - `step(batch)`: the last ones given;
    - `batches=`: any iterable, from which each probe takes the next ones, over and over.

    Resuming: `state_dict()` goes beside the model's weights, the optimizer's state and, where there
    is dropout, that of the random generators (`torch.get_rng_state`). The model has to have the
    checkpoint's ranks before they are loaded (`training.checkpoint.restore_ranks`, from PEFT's own
    files); then

        RankController(model, optimizer, allocator_for(model, ...), state=state)

    goes on with the same losses to the bit, on one device and thread. Batches that were caught are
    not in the state: save no later than `batches_per_probe` calls before a probe, or give
    `batches=`.

    Several processes (mode "mask", `DistributedDataParallel` or `fully_shard`): all make the same
    calls. They measure on their own batches and hold the same ranks at every step. A move that
    fails in one of them is an error in all, whatever `on_error`; the others may have moved. With
    `fully_shard` a probe takes a forward pass more for each batch that measures, and an error in
    one process alone can end the others at their time limit only.

    Args:
        model: what the loop calls: a `PeftModel`, perhaps compiled or in a wrapper.
        optimizer: as `resize` takes it. Where the loop makes another later, set `ranks.optimizer`.
        allocator: with the model's present ranks, as `allocator_for` makes it. Layers that it does
            not have keep their ranks.
        adapter: the adapter's name.
        batches: see above.
        loss_fn: as `RankProbe` takes it.
        probe: instead of one that is made with `probe_options`; it runs on the model without its
            wrappers, and with the same `workers`.
        batches_per_probe: at least 2: on the first half new directions are found, and on the others
            measured. A probe of two whole batches takes about 3 steps on them, of halves 1.6.
            (MiniLM, 36 layers, 2,064 tokens a step: at a period of 100 steps 3.1 % of the time with
            whole batches, and 1.6 % with halves.) Batches of one sample take at least 4.
        samples_per_batch: on how many samples of each batch to measure, its first ones. "half":
            half of them (rounded up, at least 2), for losses that are means over samples; batches
            from `batches`, and those that are not mappings of tensors with one row a sample, are
            taken whole. A number: that many of each, also from `batches`. None: all.
        mode: as `resize` takes it.
        workers: the data-parallel processes; by default in mode "mask" those of the model's
            `DistributedDataParallel`, else all. Where they are not connected yet, they are here,
            until `close()`.
        loss_scale: as `RankProbe` takes it.
        on_error: "keep": where a probe or a move fails, the ranks stay, a warning says why, and the
            history has it. "raise": the error is raised; model and optimizer are as they were.
        state: of `state_dict()`, to go on from.
        probe_options: further ones of `RankProbe`: ahead, width, fisher, terms, samples, mask,
            damping, seed.

    Raises:
        ValueError: an argument is not of this form; the allocator has other layers or ranks than
            the model; or (from `step`, at a probe) the batches have no loss.
        WorkerLost: (from `step` too, whatever `on_error`) another process has stopped.

    Warns:
        UserWarning: a probe or a move has failed, and the ranks stay as they are.

    Attributes:
        allocator: that one.
        history: ranks, prices and estimates (to 6 digits), an entry whenever something was looked
            at.
        seconds: spent on probing and moving.

    Example:
        >>> import torch
        >>> from lorambo_alloc import uniform_rank
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with RankController(model, optimizer, allocator_for(model, uniform_rank(1))) as ranks:
        ...     ranks.history
        RankHistory: 2 entries of 2 layers
          step  event  moved  spent  budget  price
             0  start      -     40      20      -
             0  moved      2     20      20    0.5
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        allocator: OnlineAllocator,
        *,
        adapter: str = "default",
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
        probe: Probe | None = None,
        batches_per_probe: int = 2,
        samples_per_batch: int | Literal["half"] | None = "half",
        mode: Mode = "resize",
        workers: Workers | None = None,
        loss_scale: Any = 1.0,
        on_error: Literal["keep", "raise"] = "keep",
        state: Mapping[str, Any] | None = None,
        **probe_options: Any,
    ) -> None:
        for what, value, known in (
            ("mode", mode, ("resize", "mask")),
            ("on_error", on_error, ("keep", "raise")),
        ):
            if value not in known:
                raise ValueError(f"{what}: expected one of {known}, got {value!r}")
        if probe is not None and probe_options:
            raise ValueError(f"probe: expected none beside {', '.join(probe_options)}, got one")
        self._started = time.perf_counter()
        self.seconds = 0.0
        self.model, self.optimizer, self.allocator = model, optimizer, allocator
        self._inner, parallel = peeled(model)
        self._adapter, self._on_error = adapter, on_error
        self._mode: Mode = mode
        self._closed = self._entered = False
        self._batches = ProbeBatches(
            model,
            batches,
            whole_number(batches_per_probe, "batches_per_probe", 2),
            samples=samples_per_batch,
            has_loss=loss_fn is not None or probe is not None,
            seed=probe_options.get("seed", 0),
        )
        try:
            self._workers, self._entered = connected(workers, mode, parallel)
            self._probe = probe or RankProbe(
                self._inner,
                adapter,
                loss_fn=loss_fn,
                loss_scale=loss_scale,
                workers=self._workers,
                **probe_options,
            )
            self.history = RankHistory(allocator.costs, allocator.fixed_costs)
            if state is not None:
                self.load_state_dict(state)
            else:
                check_ranks(self.allocator, self._inner, self._adapter)
                self._record("start")
            if allocator.over_budget:
                self._timed(batches is not None)
        except BaseException as error:
            self._leave(error)
            raise

    def step(self, batch: Any = None) -> Proposal | None:
        """Say that the optimizer has made a step; on schedule, probe and move ranks.

        Args:
            batch: the one just trained on, kept by reference for the next probe.

        Returns:
            What the allocator proposed; None where nothing was looked at, or a move has failed.
        """
        if self._closed:
            raise ValueError("expected a controller that is open, got one after close()")
        if batch is not None:
            self._batches.keep(batch)
        scheduled = self.allocator.next_due == self.allocator.steps + 1
        self.allocator.step()
        if not scheduled and not self.allocator.due:
            return None
        return self._timed(scheduled)

    @property
    def share(self) -> float:
        """Which part of the time since this controller was made went into probing and moving."""
        return self.seconds / (time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, as what JSON can hold."""
        return state_of(
            self._inner,
            self._adapter,
            self._mode,
            self.allocator,
            self.history,
            self._batches.position,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another controller stood; in mode "mask", mask what was masked then.

        Raises:
            ValueError: the state is of another version, mode, adapter or model, or the model has
                other ranks than it had then. The controller is then as it was.
        """
        self.history = restored(
            state, self._inner, self._adapter, self._mode, self.allocator, self._batches
        )

    def close(self) -> None:
        """Remove the hook, let go of the batches, and disconnect workers connected here."""
        self._leave(None)

    def __enter__(self) -> RankController:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self._closed = True
        self._batches.close()
        if self._entered:
            self._entered = False
            self._workers.__exit__(type(error) if error else None, error, None)

    def _timed(self, probe: bool) -> Proposal | None:
        on_cuda = next(self._inner.parameters()).is_cuda
        if on_cuda:  # what was queued before is the training's
            torch.cuda.synchronize()
        begin = time.perf_counter()
        try:
            return self._look(probe)
        finally:
            if on_cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - begin

    def _look(self, probe: bool) -> Proposal | None:
        """Measure if it is time, propose, and move."""
        measurement = self._measured() if probe else None
        if measurement is None and not self.allocator.over_budget:
            return None
        what = "allocating"
        try:
            if measurement is not None:
                known = set(self.allocator.names)
                self.allocator.observe({n: c for n, c in measurement.curves.items() if n in known})
            proposal = self._agreed(self.allocator.propose())
            if proposal:
                what = "moving ranks"
                self._move(proposal, {} if measurement is None else measurement.directions)
                self.allocator.accept(proposal)
        except WorkerLost:
            raise
        except Exception as error:
            if self._workers.count > 1:
                raise  # the others may have moved
            self._failed(what, error)
            return None
        self._record("moved" if proposal else "kept", proposal, measurement is not None)
        return proposal

    def _measured(self) -> Measurement | None:
        """What the probe finds; None if it fails, or there is too little to measure on yet."""
        try:
            batches = self._batches.take(self._workers)
            if not batches:
                return None
            with self._batches.undisturbed():
                return self._probe.measure(batches)
        except (WorkerLost, NoLossError):
            raise
        except Exception as error:
            self._failed("probing", error)
            return None

    def _agreed(self, proposal: Proposal) -> Proposal:
        """Worker 0's ranks: the same in all, but where a time limit ended the solution."""
        if self._workers.count == 1:
            return proposal
        ranks = json.loads(self._workers.gather(json.dumps(proposal.ranks).encode())[0])
        return proposal if ranks == proposal.ranks else replace(proposal, ranks=ranks)

    def _move(self, proposal: Proposal, directions: Mapping[str, Gradient]) -> None:
        inner, allocator = self._inner, self.allocator
        growing = {name for name, move in proposal.moves.items() if move > 0}
        try:
            resize(
                self.model,
                proposal.ranks,
                self.optimizer,
                self._adapter,
                gradients={name: d for name, d in directions.items() if name in growing},
                mode=self._mode,
            )
        except RuntimeError as error:
            if self._workers.count > 1 and is_disconnected(error):
                raise WorkerLost(
                    f"worker {self._workers.index} of {self._workers.count}: another worker has "
                    "stopped while ranks were moved"
                ) from error
            raise
        except BaseException:  # Ctrl-C, before or after the ranks have moved
            allocator.accept(ranks_of(inner, self._adapter, allocator.names))
            raise
        self._workers.barrier()

    def _failed(self, what: str, error: Exception) -> None:
        if self._on_error == "raise":
            raise error
        text = f"{type(error).__name__}: {error}"
        self._record(f"failed: {what}: {text}")
        warnings.warn(
            f"step {self.allocator.steps}: {what} has failed, and the ranks stay as they are "
            f"({text})",
            stacklevel=6,
        )

    def _record(self, event: str, proposal: Proposal | None = None, measured: bool = False) -> None:
        allocator = self.allocator
        solved = None if proposal is None else proposal.allocation
        self.history.record(
            allocator.steps,
            allocator.ranks,
            budget=allocator.budget_at(allocator.steps),
            price=None if proposal is None else proposal.price,
            status="" if solved is None else solved.certificate.status,
            reason="" if proposal is None else proposal.reason,
            notes=() if proposal is None else proposal.notes,
            estimates=rounded(allocator.means()) if measured else None,
            event=event,
        )
