"""Estimates that are corrupted, probes that fail, and moves that break off."""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.mask import active_ranks  # noqa: E402
from lorambo_adapters.ranks.transaction import Transaction  # noqa: E402
from lorambo_adapters.training.probe import ProbeFailed  # noqa: E402  (needs torch)
from lorambo_alloc import InfeasibleError, OnlineAllocator, cubic_budget, uniform_rank  # noqa: E402
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
    present,
    seed_all,
)

UNIFORM = 4 * sum(COSTS.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_estimate_that_is_not_finite_is_left_out_and_the_others_count(bad):
    loop = Loop(classifier())
    spoilt = curves(second=10.0, last=0.01)
    spoilt["first"][3] = bad
    controller = controlled(loop, uniform_rank(4), probe=Told(spoilt))
    loop.run(2, controller)
    with pytest.warns(UserWarning, match="'first'"):
        loop.run(1, controller)
    ranks = controller.allocator.ranks
    assert ranks["first"] == 4 == active_ranks(loop.model)["first"]
    assert ranks["second"] > 4 > ranks["last"]
    assert controller.allocator.rejected == {"first": 1}
    assert present(loop.model) <= UNIFORM


def test_a_huge_estimate_takes_what_its_layer_may_have_and_no_more_than_the_budget():
    loop = Loop(classifier())
    rounds = curves(), curves(first=1e130), curves()
    controller = controlled(loop, uniform_rank(2), probe=Told(*rounds))
    spent = []
    loop.run(9, controller, lambda: spent.append(present(loop.model)))
    assert max(spent) <= UNIFORM // 2
    assert controller.allocator.ranks["first"] == 5
    assert [e["event"] for e in controller.history.events].count("moved") >= 2
    assert all(math.isfinite(loss) for loss in loop.losses)


def out_of_memory(model, batch):
    raise torch.OutOfMemoryError("out of memory (as a test wants it)")


def not_finite(model, batch):
    return model(**batch).loss * math.nan


def interrupted(model, batch):
    raise OSError("no such data")


@pytest.mark.parametrize("loss_fn", [out_of_memory, not_finite, interrupted])
def test_where_the_probe_fails_the_training_goes_on_as_without_it(loss_fn):
    runs = []
    for failing in (False, True):
        loop = Loop(classifier(lora_dropout=0.2))
        seed_all(5)
        controller: Any = None
        if failing:
            controller = controlled(loop, uniform_rank(4), loss_fn=loss_fn)
        loop.run(2, controller)
        if failing:
            with pytest.warns(UserWarning, match="step 3: probing has failed, .* ranks stay"):
                loop.run(1, controller)
            assert controller.history.events[-1]["event"].startswith("failed: probing: ProbeFailed")
            assert controller.history.ranks.tolist() == [[4, 4, 4], [4, 4, 4]]
        else:
            loop.run(1)
        loop.run(2, controller)
        runs.append((loop.losses, [p.detach().clone() for p in loop.trained]))
        runs[-1] += (torch.get_rng_state(),)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert torch.equal(runs[0][2], runs[1][2])


def test_on_request_a_failure_is_raised():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), loss_fn=out_of_memory, on_error="raise")
    loop.run(2, controller)
    with pytest.raises(ProbeFailed) as caught:
        loop.run(1, controller)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert controller.allocator.ranks == dict.fromkeys(NAMES, 4)


def test_a_probe_that_fails_keeps_no_budget_from_being_kept():
    loop = Loop(classifier())
    failure = torch.OutOfMemoryError("out of memory")
    budget = cubic_budget(UNIFORM, 60, begin=0, end=7)
    controller = controlled(loop, budget, probe=Told(failure))
    kept = []

    def look():
        kept.append(present(loop.model) <= controller.allocator.budget_at(loop.steps))

    with pytest.warns(UserWarning, match="probing has failed"):
        loop.run(8, controller, look)
    assert all(kept)
    assert present(loop.model) <= 60
    events = [event["event"].split(":")[0] for event in controller.history.events]
    assert events == ["start", "moved", "failed", "moved", "failed"]  # 6's cut was made at 3


def test_the_next_probe_does_what_a_failed_one_did_not():
    loop = Loop(classifier())
    rounds = torch.OutOfMemoryError("out of memory"), curves(first=9.0, last=0.01)
    controller = controlled(loop, uniform_rank(4), probe=Told(*rounds))
    with pytest.warns(UserWarning, match="probing has failed"):
        loop.run(3, controller)
    assert controller.allocator.ranks["first"] == 4
    loop.run(3, controller)
    assert controller.allocator.ranks["first"] == 7


@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_a_move_that_breaks_off_leaves_all_as_it_was(monkeypatch, mode):
    budget, probe = uniform_rank(3), Told(curves(last=0.1))
    commit = Transaction.commit

    def breaking(self):
        self._steps.insert(len(self._steps) // 2, (lambda: 1 / 0, lambda: None))
        commit(self)

    loop = Loop(classifier())
    loop.run(2)
    controller = controlled(loop, budget, mode=mode, probe=probe)
    loop.run(2, controller)
    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "commit", breaking)
        before = []
        step = controller.step

        def looked_at():
            before.append(everything_that_counts(loop.model, loop.optimizer))
            step()
            before.append(everything_that_counts(loop.model, loop.optimizer))

        controller.step = looked_at
        with pytest.warns(UserWarning, match="step 3: moving ranks has failed, .*ZeroDivision"):
            loop.run(1, controller)
    assert_same(*before)
    ranks = controller.allocator.ranks
    assert {n: r for n, r in ranks.items() if r} == active_ranks(loop.model)
    assert controller.history.events[-1]["event"].startswith("failed: moving ranks: Zero")
    controller.step = step
    loop.run(3, controller)
    assert controller.history.events[-1]["event"] == "moved"
    assert controller.allocator.ranks != ranks
    assert {n: active_ranks(loop.model).get(n, 0) for n in NAMES} == controller.allocator.ranks
    assert present(loop.model, mode) <= UNIFORM * 3 // 4


def test_a_cut_that_broke_off_is_made_at_the_next_step_without_a_probe(monkeypatch):
    loop = Loop(classifier())
    probe = Told(curves())
    controller = controlled(loop, cubic_budget(UNIFORM, 60, begin=2, end=7), probe=probe)
    loop.run(2, controller)
    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "commit", lambda self: 1 / 0)
        with pytest.warns(UserWarning, match="moving ranks has failed"):
            loop.run(1, controller)
    assert present(loop.model) == UNIFORM
    loop.run(1, controller)
    assert present(loop.model) <= controller.allocator.budget_at(5)
    assert len(probe.batches) == 1
    assert controller.history.steps.tolist() == [0, 3, 4]


def test_interrupted_by_ctrl_c_it_is_as_it_was(monkeypatch):
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4))
    loop.run(2, controller)

    def interrupt(self, batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(controller._probe), "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.run(1, controller)
    assert active_ranks(loop.model) == controller.allocator.ranks == dict.fromkeys(NAMES, 4)
    monkeypatch.undo()
    loop.run(3, controller)
    assert controller.history.events[-1]["event"] in ("kept", "moved")


def test_limits_that_leave_nothing_are_a_failure_too(monkeypatch):
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), probe=Told(curves()))

    def nothing(self):
        raise InfeasibleError(5, 7)

    monkeypatch.setattr(OnlineAllocator, "propose", nothing)
    with pytest.warns(UserWarning, match=r"allocating has failed, .*InfeasibleError"):
        loop.run(3, controller)
    assert active_ranks(loop.model) == dict.fromkeys(NAMES, 4)


def test_the_warning_points_at_the_loop():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), loss_fn=out_of_memory)
    for i in range(2):
        controller.step(batch(i))
    with pytest.warns(UserWarning, match="probing has failed") as caught:
        controller.step(batch(2))
    assert caught[0].filename == __file__
