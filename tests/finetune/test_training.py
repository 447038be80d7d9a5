from itertools import islice

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks.finetune.arms import ARMS, Start, control, starting_ranks  # noqa: E402
from benchmarks.finetune.task import evaluate, shuffled  # noqa: E402
from benchmarks.finetune.training import Settings, adapted, losses_of, train  # noqa: E402
from lorambo_adapters.layers import find_layers  # noqa: E402
from tests.finetune.tiny_task import TinyTask  # noqa: E402

SETTINGS = Settings(steps=6, batch=8, measured=2, period=2, bfloat16=False)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return TinyTask()


def costs_of(task):
    return {layer.name: sum(layer.shape) for layer in find_layers(task.model(), task.targets)}


def run(task, name, *, rank=1, seed=0, split="dev"):
    start = starting_ranks(name, task, rank=rank, seed=seed, rate=1e-2, batches=2, size=8)
    return train(task, name, start, rank=rank, rate=1e-2, seed=seed, settings=SETTINGS, split=split)


# `short_run` and `adalora` take a while even here; the tests of the paper's settings run `adalora`.
@pytest.mark.parametrize("name", [n for n in ARMS if n not in ("short_run", "adalora")])
def test_every_arm_trains_with_exactly_the_budget(task, name):
    costs = costs_of(task)
    result = run(task, name, rank=2)
    assert np.isfinite(result["loss"])
    if ARMS[name].trains != "adapters":
        assert result["ranks"] is None
        return
    spent = sum(costs[layer] * rank for layer, rank in result["ranks"].items())
    assert result["parameters"] == spent
    assert spent <= result["budget"] == 2 * sum(costs.values())
    assert ARMS[name].online or spent == result["budget"]


def test_ranks_that_do_not_cost_the_budget_are_refused(task):
    costs = costs_of(task)
    ranks = dict.fromkeys(costs, 1)
    ranks[next(iter(ranks))] = 2
    with pytest.raises(AssertionError, match="parameters, got"):
        train(
            task,
            "uniform",
            Start(ranks, None, 0.0),
            rank=1,
            rate=1e-2,
            seed=0,
            settings=SETTINGS,
        )


def test_a_run_repeats_to_the_bit_and_its_losses_are_of_the_split(task):
    first, again = run(task, "gradient", split="test"), run(task, "gradient", split="test")
    assert first["losses"] == again["losses"]
    assert first["train_losses"] == again["train_losses"]
    assert len(losses_of(first)) == len(task.splits["test"])
    assert losses_of(first).mean() == pytest.approx(first["loss"], rel=1e-6)
    assert run(task, "gradient", seed=1, split="test")["losses"] != first["losses"]


def test_layers_start_from_the_same_rows_whatever_their_rank(task):
    costs = costs_of(task)
    first, second = (dict.fromkeys(costs, rank) for rank in (2, 3))
    models = []
    for ranks in (first, second):
        torch.manual_seed(0)
        models.append(adapted(task.model(), task, ranks, 5, 2.0))
    small, large = (dict(model.named_parameters()) for model in models)
    names = [name for name in small if ".lora_A." in name]
    assert len(names) == len(costs)
    for name in names:
        assert torch.equal(small[name], large[name][:2])
        assert small[name].abs().max() <= small[name].shape[1] ** -0.5
    different = adapted(task.model(), task, first, 6, 2.0)
    assert not torch.equal(dict(different.named_parameters())[names[0]], small[names[0]])


def test_the_order_of_the_batches_is_of_the_seed_alone(task):
    torch.manual_seed(1)
    first = [batch["input_ids"] for batch in islice(shuffled(task, 8, 3), 12)]
    torch.manual_seed(2)
    again = [batch["input_ids"] for batch in islice(shuffled(task, 8, 3), 12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    once = torch.cat(first[:6])
    assert sorted(map(tuple, once.tolist())) == sorted(map(tuple, task.splits["train"].tolist()))
    assert not torch.equal(first[0], first[6])


def test_examples_are_scored_in_their_order_in_batches_of_any_size(task):
    model = task.model()
    whole = evaluate(task, model, "dev", 24)
    parts = evaluate(task, model, "dev", 5)
    torch.testing.assert_close(whole.losses, parts.losses)
    assert whole.right is not None
    assert parts.right is not None
    assert torch.equal(whole.right, parts.right)


def test_controls_permute_ranks_among_layers_of_one_cost():
    costs = {"a": 2, "b": 2, "c": 2, "d": 5, "e": 5}
    ranks = {"a": 0, "b": 3, "c": 1, "d": 7, "e": 2}
    assert control("gradient", ranks, costs, 0) == ranks
    assert control("inverted:gradient", ranks, costs, 0) == {"a": 3, "b": 0, "c": 1, "d": 2, "e": 7}
    found = [control("shuffled:gradient", ranks, costs, seed) for seed in range(20)]
    assert len({tuple(other.values()) for other in found}) > 3
    for other in found:
        assert sorted(other[n] for n in "abc") == [0, 1, 3]
        assert sorted(other[n] for n in "de") == [2, 7]


def test_an_unknown_arm_is_refused(task):
    with pytest.raises(ValueError, match=r"arm: expected one of uniform, .*got 'best'"):
        starting_ranks("best", task, rank=1, seed=0, rate=1e-3, batches=1, size=8)
