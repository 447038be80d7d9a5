"""Ranks that follow a loop in plain PyTorch: what a controller leaves alone, and what it keeps."""

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.mask import active_ranks  # noqa: E402  (needs torch)
from lorambo_adapters.ranks.resize import resize  # noqa: E402
from lorambo_adapters.trainer import RankController, allocator_for  # noqa: E402
from lorambo_alloc import GainCurves, allocate, cubic_budget, uniform_rank  # noqa: E402
from tests.adapters.resize_models import (  # noqa: E402
    assert_same,
    everything_that_counts,
    loaded,
)
from tests.adapters.trained_models import (  # noqa: E402
    COSTS,
    NAMES,
    Classifier,
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


def loader(kind):
    batches = [batch(1000 + i) for i in range(5)]
    if kind == "iterator":
        return iter(batches)
    return torch.utils.data.DataLoader(
        batches, batch_size=None, shuffle=True, collate_fn=lambda b: b
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("source", ["calls", "step", "loader", "iterator"])
def test_where_no_rank_moves_the_training_is_the_same_to_the_bit(source, scaled):
    runs = []
    for with_controller in (False, True):
        model = classifier(lora_dropout=0.2)
        loop = Loop(model, scaled)
        seed_all(5)
        controller: Any = None
        if with_controller:
            batches = loader(source) if source in ("loader", "iterator") else None
            controller = controlled(
                loop,
                uniform_rank(4),
                options={"switching_cost": 1e9},
                batches=batches,
                loss_scale=loop.scaler if scaled else 1.0,
            )
        if source == "step" and with_controller:
            step = controller.step
            controller.step = lambda step=step, loop=loop: step(batch(loop.steps))
        loop.run(10, controller)
        runs.append((loop.losses, everything_that_counts(model, loop.optimizer), generators()))
        runs[-1] += (loop.state(),)
        if with_controller:
            assert [e["event"] for e in controller.history.events] == ["start", *["kept"] * 3]
            for found in controller.history.estimates[1:]:
                assert found.keys() == set(NAMES)
                assert all(np.any(curve != 0) for curve in found.values())
    (losses, numbers, states, inner), (losses_2, numbers_2, states_2, inner_2) = runs
    assert losses == losses_2
    assert states == states_2
    assert repr(inner) == repr(inner_2)
    keys = [key for key in numbers if not key.endswith("settings") and not key.startswith("group")]
    assert_same({k: numbers[k] for k in keys}, {k: numbers_2[k] for k in keys})


BUDGETS = {
    "constant": lambda: uniform_rank(2),
    "falling": lambda: cubic_budget(UNIFORM, 60, begin=2, end=13),
    "rising": lambda: cubic_budget(UNIFORM // 2, UNIFORM, begin=2, end=13),
}


@pytest.mark.parametrize("mode", ["resize", "mask"])
@pytest.mark.parametrize("kind", BUDGETS)
def test_the_budget_is_kept_at_every_step(kind, mode):
    model = classifier()
    loop = Loop(model)
    controller = controlled(loop, BUDGETS[kind](), mode=mode)
    allocator = controller.allocator
    spent = []

    def look():
        assert {n: active_ranks(model).get(n, 0) for n in NAMES} == allocator.ranks
        spent.append(present(model, mode))
        assert spent[-1] == allocator.cost <= allocator.budget_at(loop.steps)

    look()  # at once, as four ranks were there
    loop.run(16, controller, look)
    assert len(set(spent)) > 1 or kind == "constant"
    history = controller.history
    assert (history.spent <= history.budgets)[1:].all()  # the first entry is before the cut
    assert "moved" in [event["event"] for event in history.events]
    assert history.steps[-1] == 15
    assert sum(loop.losses[-4:]) < sum(loop.losses[:4])


def test_it_goes_where_the_gains_are_and_the_optimizer_with_it():
    model = classifier()
    loop = Loop(model)
    wanted = curves(first=8.0, second=1e-6, last=1.0)
    controller = controlled(loop, uniform_rank(4), probe=Told(wanted))
    loop.run(3, controller)
    limits = {"first": 7, "second": 7, "last": 4}
    best = allocate(GainCurves(wanted), uniform_rank(4), costs=COSTS, max_rank=limits)
    assert active_ranks(model) == {n: r for n, r in best.items() if r}
    assert set(loop.optimizer.param_groups[0]["params"]) == {
        p for p in model.parameters() if p.requires_grad
    }
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    loop.run(1, controller)
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert controller.history.events[-1] == {
        "event": "moved", "status": "optimal_exact", "reason": "", "notes": [],
    }  # fmt: skip


def test_over_budget_at_the_start_ranks_are_cut_by_what_is_measured_if_there_are_batches():
    cut = {}
    for batches in (None, [batch(i) for i in range(3)]):
        loop = Loop(classifier())
        probe = Told(curves(last=50.0, first=0.1, second=0.1))
        controller = controlled(loop, 60, probe=probe, batches=batches)
        assert present(loop.model) <= 60
        assert len(probe.batches) == (batches is not None)
        assert [e["event"] for e in controller.history.events] == ["start", "moved"]
        assert controller.history.steps.tolist() == [0, 0]
        cut[batches is None] = active_ranks(loop.model)
    assert cut[False]["last"] == 4
    assert cut[True] != cut[False]


def test_ahead_of_a_falling_budget_no_probe_is_made_between_the_scheduled_ones():
    loop = Loop(classifier())
    probe = Told(curves())
    controller = controlled(loop, cubic_budget(UNIFORM, 60, begin=0, end=9), probe=probe)
    loop.run(10, controller)
    assert len(probe.batches) == 3


def test_new_directions_are_those_of_the_probe():
    loop = Loop(classifier(), accumulate=1)
    controller = controlled(loop, UNIFORM, options={"period": 2}, samples_per_batch=None)
    probe, seen = controller._probe, []
    measure = probe.measure

    def told(batches):
        found = measure(batches)
        seen.append(found)
        told = curves(first=100.0, second=1e-3, last=1e-3)
        return type(found)(told, found.directions, found.skipped, found.seconds)

    probe.measure = told
    loop.run(2, controller)
    layer = loop.model.get_base_model().first
    rows = layer.lora_A["default"].weight.detach()[4:]
    assert len(rows) == 3
    assert not layer.lora_B["default"].weight.detach()[:, 4:].any()
    directions = seen[0].directions["first"][1][:, :3].to(rows)
    cosines = torch.nn.functional.normalize(rows) @ directions
    torch.testing.assert_close(cosines.abs(), torch.eye(3), rtol=0, atol=1e-5)


def test_a_saved_adapter_computes_the_same_and_has_the_ranks(tmp_path):
    loop = Loop(classifier(dtype=torch.float64))
    loop.call = lambda x, labels: loop.model(x=x.double(), labels=labels)
    allocator = allocator_for(loop.model, uniform_rank(2), period=2)
    controller = RankController(
        loop.model, loop.optimizer, allocator, probe=Told(curves(first=9.0, last=1e-6))
    )
    loop.run(7, controller)
    ranks = controller.allocator.ranks
    assert ranks["last"] == 0
    assert ranks["first"] > 2
    loop.model.eval()
    loop.model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = loaded(Classifier(), tmp_path)
    again.get_base_model().norm.load_state_dict(loop.model.get_base_model().norm.state_dict())
    again.eval()
    x = batch(77)["x"].double()
    assert active_ranks(again) == {n: r for n, r in ranks.items() if r}
    torch.testing.assert_close(again(x=x).logits, loop.model(x=x).logits, rtol=1e-12, atol=1e-14)


def test_closing_removes_the_hook_and_lets_go_of_the_batches():
    loop = Loop(classifier())
    with controlled(loop, uniform_rank(4)) as controller:
        assert len(loop.model._forward_pre_hooks) == 1
        loop.run(2, controller)
    assert not loop.model._forward_pre_hooks
    assert not loop.model._forward_hooks
    assert not controller._batches._captured.batches()
    with pytest.raises(ValueError, match="open, got one after close"):
        controller.step()
    controller.close()


def test_an_error_in_the_constructor_leaves_no_hook():
    loop = Loop(classifier())
    allocator = allocator_for(loop.model, uniform_rank(4))
    resize(loop.model, {"first": 2}, loop.optimizer)
    with pytest.raises(
        ValueError, match="layer 'first': expected the allocator to have the model's rank, 2, got 4"
    ):
        RankController(loop.model, loop.optimizer, allocator)
    assert not loop.model._forward_pre_hooks


def test_a_copy_of_the_model_is_not_listened_to():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4))
    loop.run(1, controller)
    before = controller._batches._captured.batches()
    other = copy.deepcopy(loop.model)
    other(**batch(5))
    after = controller._batches._captured.batches()
    assert all(a["x"] is b["x"] for a, b in zip(before, after, strict=True))


def test_time_is_counted_at_probes_alone():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), probe=Told(curves()))
    loop.run(2, controller)
    assert controller.seconds == 0 == controller.share
    loop.run(1, controller)
    seconds = controller.seconds
    assert 0 < controller.share < 1
    loop.run(2, controller)
    assert controller.seconds == seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "other"}, "mode: expected one of"),
        ({"on_error": "other"}, "on_error: expected one of"),
        ({"batches_per_probe": 1}, "batches_per_probe: expected a whole number >= 2, got 1"),
        ({"samples_per_batch": 0}, "samples_per_batch: expected a whole number >= 1, got 0"),
        ({"samples_per_batch": "third"}, "samples_per_batch: expected a whole number"),
        ({"probe": Told(curves()), "ahead": 4}, "probe: expected none beside ahead, got one"),
        ({"state": {"version": 9}}, "state: expected version 1, got 9"),
        ({"state": 3}, "state: expected version 1, got 3"),
    ],
)
def test_arguments(options, message):
    model = classifier()
    allocator = allocator_for(model, uniform_rank(4))
    with pytest.raises(ValueError, match=message):
        RankController(model, Loop(model).optimizer, allocator, **options)
    assert not model._forward_pre_hooks
