"""What the ranks of a training are measured on: calls that were caught, or batches given."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.training.captured_batches import CapturedBatches, Precision  # noqa: E402
from lorambo_adapters.training.fewer_samples import half_of  # noqa: E402
from lorambo_adapters.training.probe_batches import CycledBatches, same_generators  # noqa: E402
from lorambo_alloc import uniform_rank  # noqa: E402
from tests.adapters.trained_models import (  # noqa: E402
    Loop,
    Told,
    batch,
    classifier,
    controlled,
    curves,
    generators,
    seed_all,
)


def test_the_last_calls_are_kept_by_reference_and_by_name():
    model = classifier()
    calls = CapturedBatches(model, 2)
    given = [batch(i) for i in range(4)]
    for each in given[:3]:
        model(**each)
    with torch.no_grad():
        model(**given[3])
    found = calls.batches()
    assert [b["x"] is g["x"] for b, g in zip(found, given[1:3], strict=True)] == [True, True]
    with calls.paused():
        model(**given[3])
    assert [b["x"] is f["x"] for b, f in zip(calls.batches(), found, strict=True)] == [True, True]
    model(given[3]["x"], labels=given[3]["labels"])
    assert list(calls.batches()[-1]) == ["x", "labels"]
    assert calls.batches()[-1]["x"] is given[3]["x"]
    calls.close()
    model(**given[0])
    assert not calls.batches()


def test_what_the_trainer_divides_by_is_left_out():
    class Taking(torch.nn.Module):
        def forward(self, x, num_items_in_batch=None):
            return x

    model = Taking()
    calls = CapturedBatches(model, 2)
    model(torch.zeros(1), num_items_in_batch=3)
    assert list(calls.batches()[0]) == ["x"]


def test_arguments_without_names_are_refused():
    class Any(torch.nn.Module):
        def forward(self, *args):
            return args[0]

    model = Any()
    calls = CapturedBatches(model, 2)
    model(torch.zeros(1), 1)
    with pytest.raises(ValueError, match="arguments have names, got some without"):
        calls.batches()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapper_is_listened_to(compiled):
    model = classifier()
    call = torch.compile(model, backend="eager") if compiled else torch.nn.DataParallel(model)
    loop = Loop(model, call=call)
    probe = Told(curves())
    loop.run(3, controlled(loop, uniform_rank(4), probe=probe))
    assert len(probe.batches) == 1
    assert all(b.keys() == {"x", "labels"} for b in probe.batches[0])


def test_a_probe_calls_the_model_in_the_precision_of_the_training():
    loop = Loop(classifier(), scaled=True)
    controller = controlled(loop, uniform_rank(4), loss_scale=loop.scaler)
    calls = loop.model.get_base_model().calls
    loop.run(2, controller)
    assert set(calls) == {(torch.bfloat16, True)}
    calls.clear()
    controller.allocator.step()
    controller._timed(True)
    assert len(calls) == 2
    assert set(calls) == {(torch.bfloat16, True)}


def test_the_calls_of_a_probe_are_not_kept():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), samples_per_batch=3)
    loop.run(2, controller)
    before = controller._batches._captured.batches()
    controller.allocator.step()
    controller._timed(True)
    assert len(controller.history.estimates[-1]) == 3
    after = controller._batches._captured.batches()
    assert all(a["labels"] is b["labels"] for a, b in zip(before, after, strict=True))


def drawing(numbers):
    for number in numbers:
        noise = random.random() + np.random.rand()  # noqa: NPY002
        yield {**batch(number), "x": batch(number)["x"] + float(noise)}


def drawing_loss(model, given):
    x = given["x"] + float(np.random.rand()) + random.random()  # noqa: NPY002
    return model(x=x, labels=given["labels"]).loss


@pytest.mark.parametrize(
    "options", [{"batches": drawing(range(9))}, {"loss_fn": drawing_loss}], ids=["batches", "loss"]
)
def test_random_numbers_of_a_probe_are_not_taken_from_the_training(options):
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), options={"switching_cost": 1e9}, **options)
    loop.run(2, controller)
    before = generators()
    controller.allocator.step()
    controller._timed(True)
    assert len(controller.history.estimates[-1]) == 3
    assert generators() == before


def test_the_precision_holds_in_the_forward_alone_and_also_if_that_raises():
    model = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        precision = Precision.now("cpu")
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with precision.during_calls(model):
        assert not torch.is_autocast_enabled("cpu")
        assert model(torch.zeros(1, 2)).dtype == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 3))
        assert not torch.is_autocast_enabled("cpu")
    assert seen == [True]
    assert model(torch.zeros(1, 2)).dtype == torch.float32
    assert len(model._forward_hooks) == 1
    assert not model._forward_pre_hooks


def test_batches_are_taken_over_and_over():
    given = [batch(i) for i in range(3)]
    loop = Loop(classifier(), accumulate=1)
    probe = Told(curves())
    controller = controlled(
        loop, uniform_rank(4), probe=probe, batches=iter(given), options={"period": 1}
    )
    loop.run(3, controller)
    places = {id(each): place for place, each in enumerate(given)}
    found = [[places[id(each)] for each in batches] for batches in probe.batches]
    assert found == [[0, 1], [2, 0], [1, 2]]


def test_a_loader_that_shuffles_has_the_same_order_again_and_disturbs_no_generator():
    model = classifier()
    data = list(range(7))

    def loader():
        return torch.utils.data.DataLoader(data, batch_size=None, shuffle=True)

    seed_all(3)
    before = generators()
    one = CycledBatches(loader(), model, 0)
    first = one.take(4), one.take(5)
    assert generators() == before
    torch.manual_seed(99)
    other = CycledBatches(loader(), model, 0)
    other.go_to(4)
    assert other.take(5) == first[1]
    assert sorted(first[0] + first[1][:3]) == data
    assert one.position == other.position == 9
    with pytest.raises(ValueError, match="expected at most 3 that were taken, got 9"):
        one.go_to(3)


def test_generators_stay_as_they_were_whatever_is_raised():
    model = classifier()
    before = generators()

    def draw():
        with same_generators(model):
            raise KeyError(torch.rand(3), random.random(), np.random.rand())  # noqa: NPY002

    with pytest.raises(KeyError):
        draw()
    assert generators() == before


@pytest.mark.parametrize("batches", [[], iter([])])
def test_a_collection_without_batches(batches):
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), batches=batches)
    loop.run(2, controller)
    with pytest.warns(UserWarning, match="expected at least one batch, got none"):
        loop.run(1, controller)


def test_too_few_calls_yet_are_waited_for():
    loop = Loop(classifier(), accumulate=1)
    probe = Told(curves())
    controller = controlled(loop, uniform_rank(4), probe=probe, options={"period": 1})
    loop.run(1, controller)
    assert not probe.batches
    loop.run(1, controller)
    assert len(probe.batches[0]) == 2


def without_labels(loop, controller):
    for _ in range(3):
        x = batch(0)["x"]
        loop.model(x=x)
        controller.step()


def by_place(loop, controller):
    for _ in range(3):
        controller.step((batch(0)["x"], batch(0)["labels"]))


def nothing(loop, controller):
    for _ in range(3):
        controller.step()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (without_labels, "expected 'labels' .* got 'x' without them; give loss_fn="),
        (by_place, "expected 'labels' .* got a batch of type tuple"),
        (nothing, "expected calls of the model in training mode .*, got none"),
    ],
)
def test_batches_without_a_loss_are_an_error_at_the_first_probe(run, message):
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4))
    with pytest.raises(ValueError, match=message):
        run(loop, controller)
    assert controller.allocator.steps == 3


def test_with_a_loss_of_its_own_any_batch_will_do():
    def loss(model, pair):
        logits = model(x=pair[0]).logits
        return torch.nn.functional.cross_entropy(logits, pair[1], reduction="none")

    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), loss_fn=loss)
    for i in range(3):
        controller.step((batch(i)["x"], batch(i)["labels"]))
    assert controller.history.estimates[-1].keys() == {"first", "second", "last"}


def test_a_collection_and_batches_given_do_not_go_together():
    loop = Loop(classifier())
    controller = controlled(loop, uniform_rank(4), batches=[batch(0), batch(1)])
    with pytest.raises(ValueError, match="batch: expected none beside batches=, got one"):
        controller.step(batch(0))
    assert controller.allocator.steps == 0


def test_by_default_half_of_each_batch_of_the_training_is_measured_on():
    loop = Loop(classifier())
    probe = Told(curves())
    loop.run(3, controlled(loop, uniform_rank(4), probe=probe))
    assert [len(part["x"]) for part in probe.batches[0]] == [3, 3]
    assert [len(part["labels"]) for part in probe.batches[0]] == [3, 3]
    controller = controlled(loop, uniform_rank(4), probe=probe)
    for i in range(3):
        controller.step(batch(i))
    for number, found in zip((1, 2), probe.batches[-1], strict=True):
        assert torch.equal(found["x"], batch(number)["x"][:3])


@pytest.mark.parametrize("samples", ["half", None])
def test_batches_of_a_collection_are_whole_and_so_are_others_if_wanted(samples):
    loop = Loop(classifier())
    probe = Told(curves())
    given = [batch(i) for i in range(2)] if samples else None
    controller = controlled(
        loop, uniform_rank(4), probe=probe, batches=given, samples_per_batch=samples
    )
    loop.run(3, controller)
    assert [len(part["x"]) for part in probe.batches[0]] == [6, 6]


@pytest.mark.parametrize(("samples", "half"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (43, 22)])
def test_half_is_rounded_up_and_at_least_two(samples, half):
    whole = {
        "input_ids": torch.arange(2 * samples).reshape(samples, 2),
        "position_ids": torch.arange(2)[None],
        "labels": torch.arange(samples),
        "return_dict": True,
        "cache": None,
        "scale": torch.tensor(2.0),
    }
    cut = half_of(whole)
    assert {key: value for key, value in cut.items() if key in ("return_dict", "cache")} == {
        "return_dict": True,
        "cache": None,
    }
    assert torch.equal(cut["input_ids"], whole["input_ids"][:half])
    assert torch.equal(cut["labels"], whole["labels"][:half])
    assert cut["position_ids"] is whole["position_ids"]
    assert cut["scale"] is whole["scale"]


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(8, 2),
        (torch.zeros(8, 2), torch.zeros(8)),
        {"x": torch.zeros(8, 2), "patches": torch.zeros(20, 2)},
        {"x": torch.zeros(8, 2), "texts": ["a"] * 8},
        {"x": torch.zeros(8, 2), "more": {"x": torch.zeros(8)}},
        {"x": torch.tensor(1.0)},
        {},
    ],
    ids=["tensor", "tuple", "patches", "list", "nested", "number", "nothing"],
)
def test_batches_that_may_not_be_cut_are_taken_whole(given):
    assert half_of(given) is given


def test_a_probe_may_have_the_first_samples_alone():
    loop = Loop(classifier())
    probe = Told(curves())
    controller = controlled(loop, uniform_rank(4), probe=probe, samples_per_batch=4)
    weights = torch.ones(3)
    for i in range(3):
        controller.step({**batch(i), "weights": weights, "scale": torch.tensor(2.0), "name": "x"})
    for number, found in zip((1, 2), probe.batches[0], strict=True):
        assert torch.equal(found["x"], batch(number)["x"][:4])
        assert torch.equal(found["labels"], batch(number)["labels"][:4])
        assert found["weights"] is weights
        assert found["scale"] == 2
        assert found["name"] == "x"
    controller.step([batch(3)["x"]])
    controller.step([batch(4)["x"]])
    with pytest.warns(UserWarning, match="samples_per_batch: .* mappings with tensors, got list"):
        controller.step([batch(5)["x"]])
