"""Ranks that follow a training by the Trainer of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any, Literal

try:
    import torch
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.trainer_callback needs torch, transformers and PEFT: "
        "pip install 'lorambo-alloc[torch,peft]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.sharded import peeled, wrapper_of
from lorambo_adapters.trainer import RankController
from lorambo_adapters.training.checkpoint import (
    RANKS_FILE,
    fit_to,
    mask_as,
    read_ranks,
    restore_ranks,
    restored_from,
    write_ranks,
)
from lorambo_alloc import OnlineAllocator, RankHistory

__all__ = ["RankCallback", "restore_ranks"]

Mode = Literal["resize", "mask"]


class RankCallback(TrainerCallback):
    """A `RankController` for transformers' Trainer.

        allocator = allocator_for(model, uniform_rank(4), period=100, warmup=100, freeze=5_000)
        callback = RankCallback(allocator)
        Trainer(model, args, callbacks=[callback], ...).train()
        callback.history

    The controller makes its step after the optimizer's, when the scheduler has made its own and the
    gradients are cleared. What it measures on are the batches that the Trainer has just given to
    the model, without `num_items_in_batch`: the loss is then the mean over a batch, as if there
    were no gradient accumulation.

    Each checkpoint gets a file `lorambo_ranks.json`, with the ranks and the controller's state. The
    training goes on from it by `trainer.train(resume_from_checkpoint=...)`: whatever the Trainer
    loads into the model, the model is first given the ranks of these tensors. So it is with the
    best model at the end (`load_best_model_at_end`). For this the callback has to be there when the
    Trainer is made; if it is added later, or the checkpoint is not in this training's output
    folder, call `restore_ranks(model, checkpoint)` before. Losses are then those of a training that
    was never interrupted, to the bit on one device, if the next probe comes `batches_per_probe`
    batches or more after the checkpoint: those before it are not stored. Otherwise give `batches`.

    With `model_init` the Trainer makes another model for each training, and loads a checkpoint into
    it before a callback sees it: there, `restore_ranks` belongs into `model_init`.

    After a step that moved ranks, the next entry with a loss in the Trainer's log has
    `ranks_moved`, `rank_price` (gain per parameter) and `rank_parameters`. They are in
    `state.log_history`; of the other callbacks, those that come later see them.

    An interrupted training (Ctrl-C) leaves the hooks on the model, for one that goes on;
    `callback.close()` takes them off.

    Args:
        allocator: an `OnlineAllocator`, as `allocator_for` makes it; or a function that makes it of
            the model when the training begins, for a Trainer that trains more than once.
        adapter: the adapter's name.
        mode: "resize" or "mask" (see `resize`); by default "mask" where several processes train one
            model, which is the only mode there, else "resize". An allocator for masks is made by
            `allocator_for(model, ..., mode="mask")`.
        loss_fn: as `RankProbe` takes it; by default the model's own loss, for which a batch needs
            labels. To be given, with `batches`, where the Trainer takes the labels out of the batch
            and computes the loss itself (label smoothing, `compute_loss_func`).
        batches: to measure on, instead of those of the training.
        options: further ones of `RankController`.

    Raises:
        ValueError: (as the training begins) the mode does not go with the Trainer's parallelism, or
            the training goes on from a checkpoint without ranks, or with other ones than the
            model's; or as `RankController`.

    Warns:
        UserWarning: a checkpoint's folder is not where it is expected, so its ranks are not kept;
            a training begins with an allocator that has made steps already; or as `RankController`.
    """

    def __init__(
        self,
        allocator: OnlineAllocator | Callable[[torch.nn.Module], OnlineAllocator],
        *,
        adapter: str = "default",
        mode: Mode | None = None,
        loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
        batches: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        if mode not in ("resize", "mask", None):
            raise ValueError(f"mode: expected 'resize', 'mask' or None, got {mode!r}")
        if not isinstance(allocator, OnlineAllocator) and not callable(allocator):
            raise ValueError(
                "allocator: expected an OnlineAllocator or a function that makes it of the model, "
                f"got {allocator!r}"
            )
        self._allocator = allocator
        self._adapter = adapter
        self._mode: Mode | None = mode
        self._loss_fn = loss_fn
        self._batches = batches
        self._options = options
        self._controller: RankController | None = None
        self._optimizer: Any = None
        self._hook: Any = None
        self._news: dict[str, float] = {}

    @property
    def controller(self) -> RankController:
        """The controller of the present training, or of the last one.

        Raises:
            ValueError: none has begun.
        """
        if self._controller is None:
            raise ValueError("expected a training that has begun; there is no controller before")
        return self._controller

    @property
    def history(self) -> RankHistory:
        """Ranks, prices and estimates by step."""
        return self.controller.history

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See to it that the model gets the ranks of what is loaded into it."""
        self._optimizer = _inner(kwargs.get("optimizer"))
        self._fit_what_is_loaded(args, kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the controller; go on with a checkpoint's state, if the training does."""
        model, mode = kwargs["model"], self._mode_for(args)
        if self._controller is not None:  # of a training that was interrupted
            self._controller.close()
        if args.label_smoothing_factor and self._loss_fn is None and self._batches is None:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {args.label_smoothing_factor:g}, for "
                "which the Trainer takes the labels out of its batches; give RankCallback loss_fn= "
                "(a function of model and batch) with batches= that have what it needs"
            )
        self._optimizer = _inner(kwargs["optimizer"])
        self._fit_what_is_loaded(args, model)
        resumed = self._resumed(args, state, model) if state.global_step else None
        allocator = self._allocator
        if not isinstance(allocator, OnlineAllocator):
            allocator = allocator(model)
            if not isinstance(allocator, OnlineAllocator):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(
                    "allocator: expected a function that makes an OnlineAllocator, got one that "
                    f"makes {allocator!r}"
                )
        if resumed is None and allocator.steps:
            warnings.warn(
                f"allocator: expected one at step 0, where this training begins, got one that has "
                f"made {allocator.steps} steps: its timetable and its budget go on from there; for "
                "new ones give RankCallback a function that makes the allocator",
                stacklevel=2,
            )
        self._news = {}
        scaler = getattr(kwargs["optimizer"], "scaler", None)  # accelerate's, with fp16=True
        options = self._options if scaler is None else {"loss_scale": scaler} | self._options
        self._controller = RankController(
            wrapper_of(model) or model,
            self._optimizer,
            allocator,
            adapter=self._adapter,
            batches=self._batches,
            loss_fn=self._loss_fn,
            mode=mode,
            state=resumed,
            **options,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the controller make its step."""
        controller = self.controller
        proposal = controller.step()
        if proposal:
            self._news["ranks_moved"] = self._news.get("ranks_moved", 0) + sum(
                map(abs, proposal.moves.values())
            )
            if proposal.price is not None:
                self._news["rank_price"] = proposal.price
            self._news["rank_parameters"] = controller.allocator.cost

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say what has moved since the last entry of the log."""
        if not self._news or logs is None or "loss" not in logs:
            return
        logs |= self._news
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1] |= self._news
        self._news = {}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write `lorambo_ranks.json` into the checkpoint's folder."""
        if not args.should_save:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            warnings.warn(
                f"{folder}: expected the checkpoint's folder, which is not there (in a search for "
                "hyperparameters it has another place): the training cannot go on from this "
                "checkpoint with its ranks",
                stacklevel=2,
            )
            return
        write_ranks(folder, state.global_step, self.controller.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it is, without the controller."""
        self.close()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and self._mode_for(args) == "mask":
            # The Trainer has loaded its weights, among which masks are not.
            mask_as(kwargs["model"], read_ranks(Path(best))["controller"], self._adapter)

    def close(self) -> None:
        """Take the hooks off the model, as at the end of a training; the history stays."""
        if self._controller is not None:
            self._controller.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _mode_for(self, args: TrainingArguments) -> Mode:
        several = args.world_size > 1
        if args.n_gpu > 1 or args.deepspeed:
            got = "DeepSpeed" if args.deepspeed else f"DataParallel on {args.n_gpu} devices"
            raise ValueError(
                f"expected one process for each device, by torchrun, or one device, got {got}"
            )
        if several and self._mode == "resize":
            raise ValueError(
                "mode: expected 'mask' where several processes train one model, got 'resize', "
                f"with {args.world_size} processes"
            )
        return self._mode or ("mask" if several else "resize")

    def _fit_what_is_loaded(self, args: TrainingArguments, model: Any) -> None:
        """Before tensors are loaded into the model, give it their ranks."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._mode_for(args) == "mask":  # its tensors keep their shapes
            return

        fit = _Fit(self._adapter, self._optimizer)
        self._hook = peeled(model)[0]._register_load_state_dict_pre_hook(fit, with_module=True)

    def _resumed(self, args: TrainingArguments, state: TrainerState, model: Any) -> dict[str, Any]:
        """The controller's state in the checkpoint that the Trainer goes on from.

        It does not say which, so it is one of this step: that of `restore_ranks`, that of the
        arguments, or that in the output folder.

        Raises:
            ValueError: there is none of this step.
        """
        named = args.resume_from_checkpoint
        places = (
            restored_from(model),
            Path(named) if isinstance(named, str) and Path(named).is_dir() else None,
            Path(str(args.output_dir)) / f"checkpoint-{state.global_step}",
        )
        for place in places:
            if place is not None and (place / RANKS_FILE).is_file():
                entries = read_ranks(place)
                if entries["step"] == state.global_step:
                    return entries["controller"]
        raise ValueError(
            f"expected {RANKS_FILE} of step {state.global_step}, at which the training goes on, in "
            f"{' or '.join(str(place) for place in places if place)}, got none; if the checkpoint "
            "is somewhere else, call restore_ranks(model, checkpoint) before the Trainer is made; "
            "if it was interrupted while it was written, go on from an earlier one"
        )


class _Fit:
    """The hook that gives a model the ranks of what is loaded into it.

    A model that is copied or pickled takes it along, without the optimizer, which trains the
    original.
    """

    def __init__(self, adapter: str, optimizer: Any = None) -> None:
        self._adapter, self._optimizer = adapter, optimizer

    def __call__(self, module: Any, tensors: MutableMapping[str, torch.Tensor], *_: object) -> None:
        fit_to(module, tensors, self._adapter, self._optimizer)

    def __reduce__(self) -> tuple[type[_Fit], tuple[str]]:
        return type(self), (self._adapter,)


def _inner(optimizer: Any) -> Any:
    """The optimizer inside the wrapper that accelerate puts around it."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer
