"""Ranks that follow a training by the Trainer of transformers."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
transformers = pytest.importorskip("transformers", reason="transformers is absent")
pytest.importorskip("accelerate", reason="accelerate is absent, which the Trainer needs")

from lorambo_adapters.ranks.mask import active_ranks  # noqa: E402
from lorambo_adapters.ranks.stored_ranks import ranks_of  # noqa: E402
from lorambo_adapters.trainer import allocator_for  # noqa: E402
from lorambo_adapters.trainer_callback import RankCallback, restore_ranks  # noqa: E402
from lorambo_adapters.training.checkpoint import read_ranks  # noqa: E402  (needs torch)
from lorambo_alloc import cubic_budget, storage, uniform_rank  # noqa: E402
from tests.adapters.callback_models import (  # noqa: E402
    STEPS,
    Held,
    arguments,
    callback_for,
    llama,
    losses,
    sentences,
    trainer_of,
)
from tests.adapters.resize_models import quiet  # noqa: E402

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("callback_worker.py")


class Watch(transformers.TrainerCallback):
    """What a training holds at the beginning and the end of every step."""

    def __init__(self, ranks):
        self.ranks, self.parameters = ranks, {}

    def _look(self, state, model, optimizer):
        tensors = [p for name, p in model.named_parameters() if ".lora_" in name]
        step = state.global_step
        self.parameters[step] = sum(p.numel() for p in tensors)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in tensors}
        assert {id(p) for p in optimizer.state} <= trained
        allocator = self.ranks.controller.allocator
        assert allocator.steps == step
        assert self.parameters[step] == allocator.cost <= allocator.budget_at(step)

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self._look(state, model, optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self._look(state, model, optimizer)
        assert all(p.grad is None for p in model.parameters())


def unwrapped(trainer):
    """A copy of the model without accelerate's autocast."""
    model = copy.deepcopy(trainer.model)
    return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    model = llama()
    ranks = callback_for(model)
    watch = Watch(ranks)
    trainer = trainer_of(model, arguments(folder), ranks, watch)
    trainer.train()
    return folder, trainer, ranks, watch


def test_ranks_move_within_the_budget_at_every_step(whole):
    _, trainer, ranks, watch = whole
    history = ranks.history
    assert history.steps.tolist() == [0, 3, 6, 9, 12]
    events = [event["event"] for event in history.events]
    assert events[0] == "start"
    assert "moved" in events
    assert not any(event.startswith("failed") for event in events)
    assert (history.spent <= history.budgets).all()
    costs = ranks.controller.allocator.costs
    assert set(history.budgets.tolist()) == {2 * sum(costs.values())}
    last = dict(zip(history.names, history.ranks[-1].tolist(), strict=True))
    assert last != dict.fromkeys(last, 2)
    assert {name: rank for name, rank in last.items() if rank} == active_ranks(trainer.model)
    assert max(watch.parameters.values()) <= history.budgets[0]


def test_the_log_says_what_has_moved(whole):
    _, trainer, ranks, _ = whole
    history = ranks.history
    moved = {
        step: int(abs(after - before).sum())
        for step, before, after in zip(
            history.steps.tolist()[1:], history.ranks[:-1], history.ranks[1:], strict=True
        )
        if (after != before).any()
    }
    found = {entry["step"]: entry for entry in trainer.state.log_history if "ranks_moved" in entry}
    assert {step: entry["ranks_moved"] for step, entry in found.items()} == moved
    prices = dict(zip(history.steps.tolist(), history.prices.tolist(), strict=True))
    spent = dict(zip(history.steps.tolist(), history.spent.tolist(), strict=True))
    for step, entry in found.items():
        assert entry["rank_price"] == prices[step]
        assert entry["rank_parameters"] == spent[step]


WAYS = ["the callback alone", "restore_ranks", "another folder", "added later", "own optimizer"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [5, 10])
def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(whole, tmp_path, way, at):
    folder, first, ranks, _ = whole
    checkpoint = folder / f"checkpoint-{at}"
    assert len(ranks_of(checkpoint)) < len(active_ranks(llama()))  # some were taken away
    model = llama()
    alone = way in ("the callback alone", "own optimizer")
    if not alone:
        restore_ranks(model, checkpoint)
        assert active_ranks(model) == dict(ranks_of(checkpoint))
    again = callback_for(model)
    args = arguments(folder if alone or way == "added later" else tmp_path, save_strategy="no")
    options = {}
    if way == "own optimizer":
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trained}, {"params": []}]  # as the Trainer makes them
        options["optimizers"] = (torch.optim.AdamW(groups, lr=args.learning_rate), None)
    watch = Watch(again)
    trainer = trainer_of(model, args, *([] if way == "added later" else [again, watch]), **options)
    if way == "added later":
        trainer.add_callback(again)
        trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert losses(trainer) == losses(first)
    assert again.history.to_json() == ranks.history.to_json()
    expected = first.model.state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in model.state_dict().items())
    assert active_ranks(model) != active_ranks(llama())


def test_the_saved_model_computes_the_same(whole, tmp_path):
    _, trainer, _, _ = whole
    trainer.save_model(str(tmp_path))
    with quiet():
        loaded = peft.PeftModel.from_pretrained(llama().unload(), tmp_path).eval()
    batch = torch.stack([s["input_ids"] for s in sentences(8)])
    with torch.no_grad():
        found = loaded(input_ids=batch).logits
        expected = unwrapped(trainer).eval()(input_ids=batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert dict(ranks_of(tmp_path)) == active_ranks(trainer.model)


def test_a_budget_that_falls_is_kept_at_every_step(tmp_path):
    model = llama(r=4)
    budget = cubic_budget(uniform_rank(4), uniform_rank(1), begin=2, end=9)
    ranks = callback_for(model, budget)
    watch = Watch(ranks)  # compares at every step
    trainer_of(model, arguments(tmp_path, save_strategy="no"), ranks, watch).train()
    assert ranks.controller.allocator.budget_at(STEPS) * 4 == watch.parameters[0]
    assert watch.parameters[STEPS] <= watch.parameters[0] / 4


def test_probing_leaves_the_training_as_it_is_where_no_rank_moves(tmp_path):
    found = []
    for follow in (False, True):
        model = llama()
        allocator = allocator_for(model, uniform_rank(2), period=2, switching_cost=1e9)
        callbacks = [RankCallback(allocator)] if follow else []
        trainer = trainer_of(model, arguments(tmp_path, save_strategy="no"), *callbacks)
        trainer.train()
        found.append(losses(trainer))
        if follow:
            assert len(callbacks[0].history) == 1 + STEPS // 2
    assert found[0] == found[1]


def test_without_accumulation_and_in_full_precision(tmp_path):
    model = llama()
    ranks = callback_for(model)
    options = {"gradient_accumulation_steps": 1, "bf16": False, "save_strategy": "no"}
    trainer_of(model, arguments(tmp_path, **options), ranks, Watch(ranks)).train()
    assert "moved" in [event["event"] for event in ranks.history.events]


@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_the_best_model_at_the_end_has_its_own_ranks(tmp_path, mode):
    model = llama(r=2 if mode == "resize" else 4)
    ranks = callback_for(model, mode=mode)
    held = Held()
    count = itertools.count()
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="worse_and_worse",
        greater_is_better=True,
    )
    trainer = trainer_of(
        model,
        args,
        ranks,
        held,
        eval_dataset=sentences(8),
        compute_metrics=lambda _: {"worse_and_worse": -next(count)},
    )
    trainer.train()
    assert trainer.state.best_global_step == 4
    assert active_ranks(model) == held.ranks[4] != held.ranks[STEPS]
    expected = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[0], rel=1e-6)
    assert len(set(expected)) == 3


def test_a_crash_while_the_file_is_written_leaves_none(tmp_path, monkeypatch):
    model = llama()
    ranks = callback_for(model)

    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "fsync", interrupted)  # when all is written, but not in place
    trainer = trainer_of(model, arguments(tmp_path), ranks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    folder = tmp_path / "checkpoint-5"
    assert (folder / "adapter_model.safetensors").exists()
    assert not [file.name for file in folder.iterdir() if "lorambo" in file.name]
    model = llama()
    trainer = trainer_of(model, arguments(tmp_path), callback_for(model))
    with pytest.raises(ValueError, match=r"expected lorambo_ranks.json of step 5.*earlier one"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_ranks_masked_instead_of_moved(tmp_path):
    found = []
    for at in (None, 5):
        model = llama(r=4)
        ranks = callback_for(model, mode="mask")
        trainer = trainer_of(model, arguments(tmp_path / "mask"), ranks)
        trainer.train(resume_from_checkpoint=at and str(tmp_path / f"mask/checkpoint-{at}"))
        found.append((losses(trainer), ranks.history.to_json(), active_ranks(model)))
        costs = ranks.controller.allocator.costs
        spent = sum(costs[name] * rank for name, rank in active_ranks(model).items())
        assert spent <= 2 * sum(costs.values())
    assert found[0] == found[1]
    assert "moved" in [event["event"] for event in ranks.history.events]


def test_labels_that_the_trainer_takes_away(tmp_path):
    model = llama()
    args = arguments(tmp_path, label_smoothing_factor=0.1, save_strategy="no")
    with pytest.raises(ValueError, match=r"label_smoothing_factor: .*loss_fn=.*batches="):
        trainer_of(model, args, callback_for(model)).train()

    def summed(outputs, labels, num_items_in_batch):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return loss / num_items_in_batch

    args = arguments(tmp_path, save_strategy="no")
    with pytest.raises(ValueError, match=r"expected 'labels' .*give loss_fn=, with batches="):
        trainer_of(model, args, callback_for(model), compute_loss_func=summed).train()

    def loss_fn(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        terms = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        )
        return terms[labels.flatten() != -100]

    some = [{k: torch.stack([s[k] for s in sentences(8)]) for k in ("input_ids", "labels")}] * 2
    model = llama()
    ranks = callback_for(model, loss_fn=loss_fn, batches=some)
    trainer_of(model, args, ranks, Watch(ranks), compute_loss_func=summed).train()
    assert "moved" in [event["event"] for event in ranks.history.events]


def test_a_training_that_is_interrupted_goes_on_in_the_same_program(whole, tmp_path):
    model = llama()
    ranks = RankCallback(lambda m: allocator_for(m, uniform_rank(2), warmup=3, period=3), ahead=3)

    class Interrupt(transformers.TrainerCallback):
        done = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7 and not self.done:
                Interrupt.done = True
                raise KeyboardInterrupt

    trainer = trainer_of(model, arguments(tmp_path), ranks, Watch(ranks), Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == losses(whole[1])
    assert not model._load_state_dict_pre_hooks


def test_a_model_left_by_an_interrupted_training_can_be_copied_stored_and_freed(tmp_path):
    model = llama()
    ranks = callback_for(model)

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, arguments(tmp_path), ranks, Interrupt()).train()
    hooks: Any = model._load_state_dict_pre_hooks.values()
    (hook,) = (wrapped.hook for wrapped in hooks)
    copied = pickle.loads(pickle.dumps(hook))  # by torch.save(model) and copy.deepcopy(model)
    assert copied._optimizer is None
    assert hook._optimizer is ranks.controller.optimizer
    history = ranks.history.to_json()
    ranks.close()
    assert not model._load_state_dict_pre_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert ranks.history.to_json() == history
    ranks.close()
    callback_for(model).close()  # of which no training has begun


def test_an_allocator_that_has_made_steps_already(tmp_path):
    model = llama()
    ranks = callback_for(model)
    args = arguments(tmp_path, save_strategy="no", logging_steps=5)
    trainer = trainer_of(model, args, ranks)
    trainer.train()
    assert ranks.history.events[-1]["event"] == "moved"  # at 12, after the last entry of the log
    with pytest.warns(UserWarning, match=r"expected one at step 0, .* has made 12 steps: .*func"):
        trainer.train()
    assert ranks.history.steps.tolist() == [12, 15, 18, 21, 24]
    first = next(e for e in trainer.state.log_history if "loss" in e)
    assert first.get("ranks_moved", 0) == abs(ranks.history.ranks[1] - ranks.history.ranks[0]).sum()


def test_a_model_that_the_trainer_makes_goes_on_with_restored_ranks(tmp_path):
    checkpoint = str(tmp_path / "checkpoint-5")

    def restored():
        model = llama()
        restore_ranks(model, checkpoint)
        return model

    found = []
    for made, at in ((lambda: llama(), None), (restored, checkpoint)):
        ranks = RankCallback(lambda m: allocator_for(m, uniform_rank(2), period=3), ahead=3)
        trainer = transformers.Trainer(
            args=arguments(tmp_path),
            model_init=made,
            train_dataset=sentences(),
            callbacks=[ranks],
        )
        trainer.train(resume_from_checkpoint=at)
        found.append((losses(trainer), ranks.history.to_json()))
    assert found[0] == found[1]


def test_a_function_that_makes_something_else(tmp_path):
    other: Any = lambda model: None  # noqa: E731
    with pytest.raises(ValueError, match="makes an OnlineAllocator, got one that makes None"):
        trainer_of(llama(), arguments(tmp_path), RankCallback(other)).train()


def test_checkpoints_that_do_not_fit(whole, tmp_path):
    checkpoint = whole[0] / "checkpoint-5"
    with pytest.raises(ValueError, match=r"'model.layers.0.*': expected the scale of .*, 4, got 8"):
        restore_ranks(llama(lora_alpha=16), checkpoint)
    missing = llama(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"expected one that has the adapter"):
        restore_ranks(missing, checkpoint)
    with pytest.raises(FileNotFoundError):
        restore_ranks(llama(), tmp_path)
    text = (checkpoint / "lorambo_ranks.json").read_text()
    for old, new, what in (
        ('"version": 1', '"version": 99', "version 1 or older, got 99"),
        ('"training ranks"', '"other"', "expected training ranks, got 'other'"),
        (text, text[:100], "expected training ranks as JSON"),
    ):
        (tmp_path / "lorambo_ranks.json").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=what):
            read_ranks(tmp_path)


def test_ranks_that_are_not_those_of_the_checkpoint_are_refused(whole):
    folder, *_ = whole
    model = llama()
    ranks = callback_for(model)
    state: Any = transformers.TrainerState(global_step=5)
    kwargs = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    with pytest.raises(ValueError, match=r"layer .*expected .*restore_ranks"):
        ranks.on_train_begin(arguments(folder), state, transformers.TrainerControl(), **kwargs)


def test_a_checkpoint_somewhere_else_is_said(tmp_path):
    model = llama()
    ranks = callback_for(model)
    trainer = trainer_of(model, arguments(tmp_path / "a", save_strategy="no"), ranks)
    trainer.train()
    args, control = arguments(tmp_path / "b"), transformers.TrainerControl()
    with pytest.warns(UserWarning, match=r"b/checkpoint-12: expected the checkpoint's folder"):
        ranks.on_save(args, trainer.state, control, model=model)


def test_arguments_that_are_refused():
    model = llama()
    mode: Any = "other"
    with pytest.raises(ValueError, match="mode: expected 'resize', 'mask' or None, got 'other'"):
        RankCallback(allocator_for(model, uniform_rank(2)), mode=mode)
    nothing: Any = uniform_rank(2)
    with pytest.raises(ValueError, match=r"allocator: expected an OnlineAllocator .* got Uniform"):
        RankCallback(nothing)
    with pytest.raises(ValueError, match="expected a training that has begun"):
        _ = callback_for(model).history
    for options, what in (
        ({"n_gpu": 2}, "got DataParallel on 2 devices"),
        ({"deepspeed": "x.json"}, "got DeepSpeed"),
        ({"world_size": 2}, "mode: expected 'mask' where several processes .* with 2 processes"),
    ):
        nothing: Any = None
        args: Any = SimpleNamespace(**{"n_gpu": 0, "deepspeed": None, "world_size": 1, **options})
        with pytest.raises(ValueError, match=what):
            callback_for(model).on_init_end(args, nothing, nothing, model=model)


def test_two_processes_hold_the_same_ranks_at_every_step(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(WORKER), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert "mode: expected 'mask'" in one["refusal"]
    for found, theirs in zip(one["runs"], other["runs"], strict=True):
        assert found["ranks"] == theirs["ranks"]
        assert found["history"] == theirs["history"]
    whole, resumed = one["runs"]
    assert list(whole["ranks"]) == [str(step) for step in range(1, STEPS + 1)]
    assert len({json.dumps(ranks) for ranks in whole["ranks"].values()}) > 2
    assert list(resumed["ranks"]) == [str(step) for step in range(6, STEPS + 1)]
    assert all(whole["ranks"][step] == ranks for step, ranks in resumed["ranks"].items())
    assert resumed["losses"] == whole["losses"]
    assert resumed["history"] == whole["history"]
    spent = [entry["spent"] for entry in (whole, resumed)]
    assert all(0 < cost <= whole["budget"] for costs in spent for cost in costs)
