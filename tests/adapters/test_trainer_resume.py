"""A training whose ranks move, interrupted and resumed from files; and what is refused."""

import copy
import json

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.mask import active_ranks  # noqa: E402
from lorambo_adapters.ranks.resize import resize  # noqa: E402
from lorambo_adapters.trainer import RankController, allocator_for  # noqa: E402
from lorambo_adapters.training.checkpoint import restore_ranks  # noqa: E402  (needs torch)
from lorambo_alloc import cubic_budget, uniform_rank  # noqa: E402
from tests.adapters.trained_models import (  # noqa: E402
    COSTS,
    Loop,
    Told,
    batch,
    classifier,
    controlled,
    curves,
    present,
    seed_all,
    through_json,
)

UNIFORM = 4 * sum(COSTS.values())


pytestmark = pytest.mark.usefixtures("one_thread")  # sums to the bit


def load_weights(model, folder):
    """The adapter's from PEFT's file, into the ranks that are there."""
    weights = peft.load_peft_weights(str(folder))
    found = peft.set_peft_model_state_dict(model, weights)
    assert not found.unexpected_keys


def of_the_base(model):
    """What PEFT does not save: the statistics of the batches."""
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


@pytest.mark.parametrize("mode", ["resize", "mask"])
@pytest.mark.parametrize("source", ["calls", "loader"])
@pytest.mark.parametrize("scaled", [False, True])
def test_resumed_in_the_middle_the_losses_are_the_same_to_the_bit(tmp_path, mode, source, scaled):
    budget = cubic_budget(UNIFORM, 60, begin=2, end=12)
    options = {"period": 4, "discount": 0.8}

    def more(loop):
        batches = None
        if source == "loader":
            batches = torch.utils.data.DataLoader(
                [batch(1000 + i) for i in range(5)], batch_size=None, shuffle=True
            )
        return {"batches": batches, "loss_scale": loop.scaler if scaled else 1.0}

    loop = Loop(classifier(lora_dropout=0.1), scaled)
    controller = controlled(loop, budget, mode=mode, options=options, **more(loop))
    seed_all(1)
    loop.run(10, controller)
    assert len(set(controller.allocator.ranks.values())) > 1  # moved, and not all alike
    loop.model.save_pretrained(tmp_path)
    saved = through_json(controller.state_dict())
    others = copy.deepcopy(loop.state()), of_the_base(loop.model)
    numpy_and_python = seeds()
    loop.run(8, controller)
    history = controller.history.to_json()
    assert history["entries"][-1]["ranks"] != saved["history"]["entries"][-1]["ranks"]

    again = Loop.__new__(Loop)
    model = classifier(lora_dropout=0.1)
    if mode == "resize":
        restore_ranks(model, tmp_path)
    Loop.__init__(again, model, scaled)
    load_weights(model, tmp_path)
    again.load(others[0])
    model.load_state_dict(others[1], strict=False)
    allocator = allocator_for(model, budget, mode=mode, **options)
    resumed = RankController(
        model, again.optimizer, allocator, mode=mode, state=saved, **more(again)
    )
    assert present(model, mode) == allocator.cost
    numpy_and_python()
    again.run(8, resumed)
    assert again.losses == loop.losses[10:]
    assert resumed.history.to_json() == history
    assert resumed.allocator.state_dict() == controller.allocator.state_dict()


def seeds():
    import random

    import numpy as np

    # The global generator is the one that the loop uses.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    return lambda: (random.setstate(python), np.random.set_state(numpy))  # noqa: NPY002


def test_the_state_is_json_and_loads_as_what_it_was():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(2), probe=Told(curves(last=0.1)))
    loop.run(4, controller)
    state = through_json(controller.state_dict())
    assert state == controller.state_dict()
    again = RankController(
        loop.model, loop.optimizer, allocator_for(loop.model, uniform_rank(2)), state=state
    )
    assert again.state_dict() == state
    assert json.dumps(state)


def test_a_state_of_masks_masks_the_same_rows_also_where_they_are_new():
    loop = Loop(classifier())
    rounds = curves(first=9.0, second=0.01), curves(first=0.01, last=9.0, second=0.1)
    controller = controlled(
        loop, uniform_rank(2), mode="mask", probe=Told(*rounds), options={"discount": 0.01}
    )
    loop.run(6, controller)  # the second probe's new rows have zero columns, as masked ones have
    state = through_json(controller.state_dict())
    fresh = classifier()
    allocator = allocator_for(fresh, uniform_rank(2), mode="mask")
    again = RankController(fresh, Loop(fresh).optimizer, allocator, mode="mask", state=state)
    assert again.state_dict()["active"] == state["active"]
    assert active_ranks(fresh) == active_ranks(loop.model)
    factors = {n: loop.model.get_base_model().get_submodule(n).lora_B["default"] for n in COSTS}
    zero = [
        row
        for name, rows in state["active"].items()
        for row in rows
        if not factors[name].weight[:, row].any()
    ]
    assert zero


def other_layers():
    return classifier(target_modules=["first", "second"])


def fewer_ranks():
    model = classifier()
    resize(model, {"first": 3})
    return model


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (other_layers, {}, "state: .*'last'"),
        (fewer_ranks, {}, "layer 'first': expected .* the model's rank, 3, got 4"),
        (classifier, {"mode": "mask"}, "state: expected mode 'resize', got 'mask'"),
        (classifier, {"adapter": "x"}, "state: expected adapter 'default', got 'x'"),
        (classifier, {"version": 2}, "state: expected version 1, got 2"),
        (classifier, {"history": {}}, "expected a rank history"),
        (classifier, {"allocator": {}}, "state: .*version 1, got None"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_all_stays(make, change, message):
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4))
    loop.run(2, controller)
    state = through_json(controller.state_dict()) | change
    model = make()
    allocator = allocator_for(model, uniform_rank(4))
    controller = RankController(model, Loop(model).optimizer, allocator)
    before = controller.state_dict()
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(state)
    assert controller.state_dict() == before


def test_a_missing_entry_is_named():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4))
    state = controller.state_dict()
    del state["position"]
    with pytest.raises(ValueError, match="state: expected an entry 'position', got none"):
        controller.load_state_dict(state)


def test_a_layer_that_peft_has_not_wrapped_cannot_be_resumed(tmp_path):
    loop = Loop(classifier())
    options = {"probe": Told(curves(last=0.0)), "batches": [batch(0), batch(1)]}
    controller = controlled(loop, 5 * 16, **options)
    assert controller.allocator.ranks["last"] == 0
    loop.model.save_pretrained(tmp_path)
    base = peft.PeftModel.from_pretrained(classifier().get_base_model().__class__(), tmp_path)
    assert "last" not in active_ranks(base)
    with pytest.raises(ValueError, match=r"layer 'last': expected one that .* \(restore_ranks\)"):
        RankController(base, None, controller.allocator)
