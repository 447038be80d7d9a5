"""Loops with habits of their own: what a controller listens to, and what stops in the middle."""

import copy
import io
import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters import trainer  # noqa: E402  (needs torch)
from lorambo_adapters.ranks.mask import active_ranks  # noqa: E402
from lorambo_adapters.ranks.resize import resize  # noqa: E402
from lorambo_adapters.training.captured_batches import CapturedBatches  # noqa: E402
from lorambo_adapters.training.controller_state import rounded  # noqa: E402
from lorambo_alloc import uniform_rank  # noqa: E402
from tests.adapters.resize_models import assert_same, everything_that_counts  # noqa: E402
from tests.adapters.trained_models import (  # noqa: E402
    COSTS,
    NAMES,
    Loop,
    Told,
    batch,
    classifier,
    controlled,
    curves,
    generators,
    present,
    seed_all,
)

UNIFORM = 4 * sum(COSTS.values())


pytestmark = pytest.mark.usefixtures("one_thread")  # sums to the bit


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_evaluation_with_gradients_is_not_measured_on(wrapped):
    model = classifier()
    call = torch.nn.DataParallel(model) if wrapped else model
    calls = CapturedBatches(call, 2)
    given = [batch(i) for i in range(3)]
    call(**given[0])
    model.eval()  # the one inside, as loops do that keep both
    call(**given[1])
    with torch.inference_mode():
        call(**given[1])
    model.train()
    call(**given[2])
    found = calls.batches()
    assert [b["x"] is given[i]["x"] for b, i in zip(found, (0, 2), strict=True)] == [True, True]


def test_a_loop_that_never_trains_in_training_mode_is_told():
    loop = Loop(classifier())
    loop.model.eval()
    controller = controlled(loop, uniform_rank(4))
    with pytest.raises(ValueError, match="calls of the model in training mode to measure on"):
        loop.run(3, controller)


def test_arguments_that_need_gradients_are_kept_without_them():
    """A probe neither goes back through the training's graph nor adds to the gradient of a leaf."""
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), options={"switching_cost": 1e9})
    before = torch.eye(8).requires_grad_()
    leaf, seen = batch(9)["x"].requires_grad_(), None
    for i in range(3):
        x = batch(i)["x"] @ before if i < 2 else leaf
        loop.model(x=x, labels=batch(i)["labels"]).loss.backward()
        seen = copy.deepcopy(leaf.grad)
        controller.step()
    assert controller.history.events[-1]["event"] == "kept"
    assert seen is not None
    assert torch.equal(leaf.grad, seen)
    assert not any(b["x"].requires_grad for b in controller._batches._captured.batches())


def test_gradients_of_any_age_are_left_to_the_loop():
    """step() before zero_grad(), after it, or between the parts of an accumulated batch."""
    runs = []
    for place in (None, "before", "after"):
        loop = Loop(classifier(), accumulate=1)
        controller = controlled(loop, uniform_rank(4), options={"switching_cost": 1e9})
        for i in range(7):
            loop.model(**batch(i)).loss.backward()
            loop.optimizer.step()
            if place == "before":
                controller.step()
            if i % 2:
                loop.optimizer.zero_grad(set_to_none=False)
            if place == "after":
                controller.step()
        runs.append([p.detach().clone() for p in loop.trained] + [p.grad for p in loop.trained])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_model_is_saved_and_copied_without_the_hook():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4))
    loop.run(2, controller)
    kept = controller._batches._captured.batches()
    file = io.BytesIO()
    torch.save(loop.model, file)  # the whole model, by pickle
    file.seek(0)
    x = batch(5)["x"]
    for other in (torch.load(file, weights_only=False), copy.deepcopy(loop.model)):
        hooks = list(other._forward_pre_hooks.values())
        assert [type(hook).__module__ for hook in hooks] == ["builtins"]
        other.eval()
        loop.model.eval()
        with torch.no_grad():
            expected = loop.model(x=x).logits
        assert torch.equal(other(x=x).logits, expected)
        loop.model.train()
    after = controller._batches._captured.batches()
    assert all(a["x"] is b["x"] for a, b in zip(kept, after, strict=True))
    loop.run(1, controller)
    assert len(controller.history) == 2
    again = CapturedBatches(other, 2)  # a copy can be listened to anew
    other.train()(**batch(0))
    assert len(again) == 1


def test_a_controller_that_nobody_closed_keeps_no_batches():
    model = classifier()
    calls: Any = CapturedBatches(model, 2)
    given = batch(0)
    model(**given)
    counted = torch.utils.weak.WeakIdKeyDictionary()
    counted[given["x"]] = True
    del given, calls
    assert not counted
    model(**batch(1))


def test_while_another_adapter_is_active_the_ranks_stay():
    loop = Loop(classifier())
    loop.model.add_adapter("other", loop.model.peft_config["default"])
    probe_round = curves(first=9.0, last=0.01)
    controller = controlled(loop, uniform_rank(4))
    loop.run(2, controller)
    loop.model.set_adapter("other")
    with pytest.warns(UserWarning, match="step 3: probing has failed, .* active"):
        controller.step()
    assert active_ranks(loop.model) == dict.fromkeys(NAMES, 4)
    assert active_ranks(loop.model, "other") == dict.fromkeys(NAMES, 4)
    loop.model.set_adapter("default")
    controller._probe = Told(probe_round)
    loop.run(3, controller)
    assert controller.allocator.ranks["first"] == 7 == active_ranks(loop.model)["first"]
    assert active_ranks(loop.model, "other") == dict.fromkeys(NAMES, 4)


def test_another_optimizer_is_told_to_the_controller():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), probe=Told(curves(first=9.0, last=0.01)))
    loop.run(2, controller)
    loop.optimizer = torch.optim.SGD(loop.trained, 0.1, momentum=0.9)
    loop.scheduler = torch.optim.lr_scheduler.ConstantLR(loop.optimizer)
    controller.optimizer = loop.optimizer
    loop.run(1, controller)
    assert controller.history.events[-1]["event"] == "moved"
    trained = {p for p in loop.model.parameters() if p.requires_grad}
    assert set(loop.optimizer.param_groups[0]["params"]) == trained


def test_an_exception_in_the_loop_closes_it():
    loop = Loop(classifier())

    def broken():
        if loop.steps == 2:
            raise KeyError("in the loop")

    with (
        pytest.raises(KeyError, match="in the loop"),
        controlled(loop, uniform_rank(4)) as controller,
    ):
        loop.run(5, controller, broken)
    assert not loop.model._forward_pre_hooks
    loop.run(2)


class InterruptingLoss:
    """A loss that is interrupted in the n-th pass, forward or backward."""

    def __init__(self, passes, backward):
        self.left, self.backward = passes, backward

    def __call__(self, model, given):
        loss = model(**given).loss
        self.left -= 1
        if self.left:
            return loss
        if not self.backward:
            raise KeyboardInterrupt
        loss.register_hook(self.interrupt)
        return loss

    def interrupt(self, grad):
        raise KeyboardInterrupt


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_ctrl_c_in_a_pass_of_a_probe_leaves_all_as_it_was(passes, backward):
    loop = Loop(classifier(lora_dropout=0.2), scaled=True)
    seed_all(4)
    loss = InterruptingLoss(passes, backward)
    controller = controlled(
        loop, uniform_rank(4), loss_fn=loss, loss_scale=loop.scaler, options={"warmup": 3}
    )
    loop.run(2, controller)
    loop.model(**batch(50)).loss.backward()
    modules = list(loop.model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    before = everything_that_counts(loop.model, loop.optimizer), generators()
    gradients = [p.grad.clone() for p in loop.trained]
    with pytest.raises(KeyboardInterrupt):
        controller.step()
    assert_same(before[0], everything_that_counts(loop.model, loop.optimizer))
    assert generators() == before[1]
    assert all(torch.equal(p.grad, g) for p, g in zip(loop.trained, gradients, strict=True))
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    assert not torch.is_autocast_enabled("cpu")
    loop.run(3, controller)
    assert controller.history.events[-1]["event"] in ("kept", "moved")


@pytest.mark.parametrize("moved", [False, True])
def test_ctrl_c_in_a_move_leaves_the_allocator_with_the_ranks_of_the_model(monkeypatch, moved):
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), probe=Told(curves(first=9.0, last=0.01)))
    loop.run(2, controller)

    def interrupted(*args, **options):
        if moved:
            resize(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "resize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run(1, controller)
    ranks = {name: active_ranks(loop.model).get(name, 0) for name in NAMES}
    assert controller.allocator.ranks == ranks
    assert (ranks["first"] > 4) == moved
    loop.run(4, controller)
    assert controller.allocator.ranks["first"] == 7
    assert present(loop.model) <= UNIFORM


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
@pytest.mark.parametrize("where", ["model", "layers"])
def test_a_probe_compiles_nothing(where):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    loop = Loop(classifier())
    model = loop.model
    parts = [model] if where == "model" else [getattr(model.get_base_model(), n) for n in NAMES]
    torch._dynamo.reset()
    for part in parts:
        part.compile(backend=backend)
    plain = Loop(classifier())
    found = []
    for each in (loop, plain):
        controller = controlled(each, uniform_rank(4), options={"switching_cost": 1e9})
        seed_all(2)
        each.run(2, controller)
        controller.allocator.step()
        count = len(compiled)
        controller._timed(True)
        assert len(compiled) == count > 0
        found.append(controller.history.estimates[-1])
    torch._dynamo.reset()
    for name in NAMES:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


def test_the_record_has_six_digits_of_the_estimates_and_the_allocator_all():
    loop = Loop(classifier())
    noisy = {name: curve / 3 for name, curve in curves().items()}
    controller = controlled(loop, uniform_rank(4), probe=Told(noisy))
    loop.run(4, controller)
    means = controller.allocator.means()
    for name, curve in controller.history.estimates[-1].items():
        np.testing.assert_allclose(curve, means[name], rtol=5.1e-6)
        assert np.any(curve != means[name])
    assert rounded({"a": np.array([0.0, -1234567.0, 1e-9 / 3, np.inf])}) == {
        "a": [0.0, -1234570.0, 3.33333e-10, np.inf]
    }
    entry = json.dumps(controller.state_dict()["history"]["entries"][-1]["estimates"])
    assert len(entry) < 10 * sum(len(curve) for curve in means.values()) + 40


def test_fixed_costs_of_layers_are_in_the_history():
    loop = Loop(classifier())
    fixed = {"first": 5, "second": 0, "last": 7}
    options = {"fixed_costs": fixed}
    controller = controlled(loop, UNIFORM, probe=Told(curves()), options=options)
    loop.run(3, controller)
    allocator, history = controller.allocator, controller.history
    assert history.fixed_costs == allocator.fixed_costs == fixed
    assert history.spent[-1] == allocator.cost <= UNIFORM
    state = controller.state_dict()
    with pytest.raises(ValueError, match="state: expected a history of the allocator's layers"):
        controlled(loop, UNIFORM, probe=Told(curves()), state=state)
    again = controlled(loop, UNIFORM, probe=Told(curves()), state=state, options=options)
    assert again.history.to_json() == history.to_json()
