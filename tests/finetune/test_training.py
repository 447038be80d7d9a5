import argparse
import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks.finetune import predicted, starts, training  # noqa: E402
from benchmarks.finetune import protocol as protocols  # noqa: E402
from benchmarks.finetune.arms import ARMS, Start, control, starting_ranks  # noqa: E402
from benchmarks.finetune.predicted import correlations  # noqa: E402
from benchmarks.finetune.runs import Run  # noqa: E402
from benchmarks.finetune.task import evaluate, shuffled  # noqa: E402
from benchmarks.finetune.training import (  # noqa: E402
    Settings,
    adapted,
    losses_of,
    rescale,
    right_of,
    train,
)
from lorambo_adapters.layers import find_layers  # noqa: E402
from tests.finetune.tiny_task import TinyTask, UnevenTask  # noqa: E402

SETTINGS = Settings(steps=6, batch=8, measured=2, period=2, bfloat16=False)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


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
    assert len(right_of(first)) == len(task.splits["test"])
    assert right_of(first).mean() == first["accuracy"]
    assert np.array_equal(right_of(first), losses_of(first) < np.log(2))
    assert run(task, "gradient", seed=1, split="test")["losses"] != first["losses"]


@pytest.mark.parametrize(("split", "count"), [("dev", 5), ("test", 24)])
def test_as_many_examples_of_dev_are_scored_as_settings_say_and_all_of_test(task, split, count):
    start = starting_ranks("uniform", task, rank=1, seed=0, rate=1e-2, batches=2, size=8)
    few = replace(SETTINGS, dev_examples=5)
    cut = train(task, "uniform", start, rank=1, rate=1e-2, seed=0, settings=few, split=split)
    assert len(task.splits[split]) > 5
    whole = run(task, "uniform", split=split)
    np.testing.assert_allclose(losses_of(cut), losses_of(whole)[:count], rtol=1e-5)


def test_arms_see_the_same_batches_and_dropout_whatever_their_ranks(task):
    even = dict.fromkeys(costs_of(task), 2)
    # The two layers of an MLP cost the same, but their factors draw unequally many numbers.
    wide = {n: 4 if "intermediate" in n else 2 for n in even}
    uneven = {
        n: 0 if n.endswith("output.dense") and "attention" not in n else wide[n] for n in wide
    }
    losses = []
    for ranks in (even, uneven):
        start = Start(ranks, None, 0.0)
        # At this rate nothing is learnt, so that only batches and dropout can tell arms apart.
        result = train(task, "gradient", start, rank=2, rate=1e-12, seed=0, settings=SETTINGS)
        losses.append(result["train_losses"])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


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


@pytest.mark.parametrize("name", ["gradient", "gradient_rs", "gradient_alpha"])
def test_scales_fall_with_a_power_of_the_rank(task, name):
    names = list(costs_of(task))
    model = adapted(task.model(), task, {names[0]: 1, names[1]: 2, names[2]: 8}, 5, 3.0)
    rescale(model, 2, ARMS[name].power)
    modules = dict(model.named_modules())
    found = [modules[f"base_model.model.{n}"].scaling["default"] for n in names[:3]]
    power = {"gradient": 0, "gradient_rs": 0.5, "gradient_alpha": 1}[name]
    assert found == pytest.approx([3 * 2**power, 3, 3 / 4**power])


def test_an_arm_trains_with_its_scales(task):
    even = dict.fromkeys(costs_of(task), 2)
    first, second = [name for name in even if name.endswith("query")]
    uneven = even | {first: 3, second: 1}

    def loss(name, ranks):
        start = Start(ranks, None, 0.0)
        return train(task, name, start, rank=2, rate=1e-2, seed=0, settings=SETTINGS)["loss"]

    assert loss("gradient_alpha", even) == loss("gradient", even)
    assert loss("gradient_alpha", uneven) != loss("gradient", uneven)


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
    whole = evaluate(task, model, task.splits["dev"], 24)
    parts = evaluate(task, model, task.splits["dev"], 5)
    torch.testing.assert_close(whole.losses, parts.losses)
    assert whole.right is not None
    assert parts.right is not None
    assert torch.equal(whole.right, parts.right)


def test_scores_are_in_the_order_of_the_examples_though_computed_by_length():
    task = UnevenTask()
    model = task.model().eval()
    examples = task.splits["dev"]
    with torch.no_grad():
        single = [task.scores(model, task.batch([example])) for example in examples]
    found = evaluate(task, model, task.splits["dev"], 5)
    torch.testing.assert_close(found.losses, torch.cat([scores.losses for scores in single]))
    assert found.right is not None
    assert torch.equal(found.right, torch.cat([scores.right for scores in single]))
    assert len({len(example) for example in examples}) == 5


def test_batches_drawn_by_length_hold_every_example_once_and_pad_less():
    task = UnevenTask()

    def drawn(grouped, seed=3):
        torch.manual_seed(grouped)
        return [batch["input_ids"] for batch in islice(shuffled(task, 8, seed, grouped), 12)]

    def rows(batches):
        return sorted(tuple(row[row > 0].tolist()) for batch in batches for row in batch)

    plain, three, seven = drawn(1), drawn(3), drawn(7)
    for found in (plain, three, seven):
        assert all(len(batch) == 8 for batch in found)
        assert (
            rows(found[:6])
            == rows(found[6:])
            == sorted(tuple(row.tolist()) for row in task.splits["train"])
        )
    assert rows(three[:3]) == rows(plain[:3])  # the first three are drawn together
    assert sum(batch.numel() for batch in three) < sum(batch.numel() for batch in plain)
    again = drawn(3)
    assert all(torch.equal(a, b) for a, b in zip(three, again, strict=True))
    widths = [batch.shape[1] for batch in seven]
    assert widths[:6] != sorted(widths[:6]) or widths[6:] != sorted(widths[6:])


def test_what_is_left_over_of_a_draw_by_length_comes_last_and_is_dropped_where_it_is_short():
    task = UnevenTask()
    task.splits = {**task.splits, "train": task.splits["train"][:45]}
    found = [batch["input_ids"] for batch in islice(shuffled(task, 8, 0, 2), 5)]
    assert [len(batch) for batch in found] == [8] * 5
    once = {tuple(row[row > 0].tolist()) for batch in found for row in batch}
    assert once <= {tuple(row.tolist()) for row in task.splits["train"]}
    assert len(once) >= len({tuple(row.tolist()) for row in task.splits["train"]}) - 5


def test_a_training_draws_its_batches_as_its_settings_say():
    task = UnevenTask()
    start = Start(dict.fromkeys(costs_of(task), 1), None, 0.0)

    def losses(grouped):
        settings = replace(SETTINGS, grouped=grouped)
        found = train(task, "uniform", start, rank=1, rate=1e-12, seed=0, settings=settings)
        return found["train_losses"]

    assert losses(1) != losses(3)


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


@pytest.mark.parametrize("name", ["shuffled:online", "inverted:uniform", "shuffled:full"])
def test_a_control_of_ranks_that_are_not_measured_is_refused(task, name):
    with pytest.raises(ValueError, match="expected a control of an arm with measured ranks"):
        starting_ranks(name, task, rank=1, seed=0, rate=1e-3, batches=1, size=8)


def test_a_probe_that_fails_stops_an_online_arm(task, monkeypatch):
    def broken(self, batches):
        raise RuntimeError("no memory")

    monkeypatch.setattr(training.RankProbe, "measure", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        run(task, "online")


def test_uninformed_ranks_begin_elsewhere_and_stay_within_the_budget(task):
    informed, random = run(task, "online"), run(task, "online_random")
    assert informed["history"]["ranks"][1] == random["history"]["ranks"][1]
    assert informed["losses"] != random["losses"]


def test_a_short_run_learns_more_ranks_than_uniform_has(task):
    found = starting_ranks("short_run", task, rank=3, seed=0, rate=1e-2, batches=2, size=8)
    assert max(found.ranks.values()) > 3


def test_with_a_floor_every_layer_has_a_rank(task):
    ranks = {
        name: starting_ranks(name, task, rank=2, seed=0, rate=1e-2, batches=2, size=8).ranks
        for name in ("gradient", "gradient_floor")
    }
    assert min(ranks["gradient"].values()) == 0
    assert min(ranks["gradient_floor"].values()) == 1
    assert max(ranks["gradient_floor"].values()) > 2


def test_a_single_step_has_a_schedule(task):
    start = Start(dict.fromkeys(costs_of(task), 1), None, 0.0)
    settings = replace(SETTINGS, steps=1)
    result = train(task, "uniform", start, rank=1, rate=1e-2, seed=0, settings=settings)
    assert np.isfinite(result["loss"])


def test_a_start_is_kept_for_the_settings_that_it_was_measured_with(task, tmp_path, monkeypatch):
    agreed = replace(protocols.protocol("minilm"), rates=(1e-2, 2e-2))
    monkeypatch.setattr(protocols, "protocol", lambda name: agreed)
    seen = []

    def measured(*given, **options):
        seen.append(options)
        return starting_ranks(*given, **options)

    monkeypatch.setattr(starts, "starting_ranks", measured)
    at, other = (Run("tiny", "gradient", 1, rate, 0, "dev") for rate in (1e-2, 2e-2))
    first = starts.kept_start(at, task, SETTINGS, tmp_path)
    assert starts.kept_start(other, task, SETTINGS, tmp_path).ranks == first.ranks
    assert len(seen) == 1
    starts.kept_start(at, task, replace(SETTINGS, batch=4, measured=9), tmp_path)
    assert len(seen) == 2
    assert (seen[1]["size"], seen[1]["batches"]) == (4, 9)
    scaled = replace(at, arm="gradient_alpha")
    starts.kept_start(scaled, task, replace(SETTINGS, batch=4, measured=9), tmp_path)
    assert len(seen) == 2


@pytest.mark.parametrize(("arm", "shared"), [("gradient_floor", True), ("start", False)])
def test_budgets_share_what_a_signal_of_the_model_measures(
    arm, shared, task, tmp_path, monkeypatch
):
    agreed = replace(protocols.protocol("minilm"), rates=(1e-2, 2e-2), budgets=(1, 2, 40))
    monkeypatch.setattr(protocols, "protocol", lambda name: agreed)
    seen = []

    def measured(*given, **options):
        seen.append(options["rank"])
        return starting_ranks(*given, **options)

    monkeypatch.setattr(starts, "starting_ranks", measured)
    for rank in (1, 2):
        found = starts.kept_start(Run("tiny", arm, rank, 1e-2, 0, "dev"), task, SETTINGS, tmp_path)
        alone = starting_ranks(arm, task, rank=rank, seed=0, rate=1e-2, batches=2, size=8)
        assert found.ranks == alone.ranks
    assert seen == ([1] if shared else [1, 2])
    written = {path.name for path in tmp_path.glob("*/*")}
    assert written == {f"{arm}-b1-s0.json", f"{arm}-b2-s0.json"}  # another `most` at 40
    anew = replace(SETTINGS, batch=4)
    for rank in (2, 1):
        run = Run("tiny", arm, rank, 1e-2, 0, "dev")
        assert starts.kept_start(run, task, anew, tmp_path).ranks.keys() == found.ranks.keys()
    assert seen == ([1, 2] if shared else [1, 2, 2, 1])


def test_what_was_measured_for_another_budget_is_left_as_it_is(task, tmp_path, monkeypatch):
    agreed = replace(protocols.protocol("minilm"), rates=(1e-2, 2e-2), budgets=(1, 2))
    monkeypatch.setattr(protocols, "protocol", lambda name: agreed)
    for rank in (1, 2):
        starts.kept_start(Run("tiny", "gradient", rank, 1e-2, 0, "dev"), task, SETTINGS, tmp_path)
    first, second = (tmp_path / "tiny" / f"gradient-b{rank}-s0.json" for rank in (1, 2))
    content = json.loads(first.read_text()) | {"seconds": 99.0}
    first.write_text(json.dumps(content))
    second.unlink()
    starts.kept_start(Run("tiny", "gradient", 2, 1e-2, 0, "dev"), task, SETTINGS, tmp_path)
    assert second.exists()
    assert json.loads(first.read_text()) == content


@pytest.mark.parametrize("kind", ["shuffled", "inverted"])
def test_a_control_permutes_the_ranks_that_were_measured(kind, task, tmp_path, monkeypatch):
    agreed = replace(protocols.protocol("minilm"), rates=(1e-2, 2e-2))
    monkeypatch.setattr(protocols, "protocol", lambda name: agreed)
    run = Run("tiny", f"{kind}:gradient", 1, 1e-2, 5, "dev")
    own = starting_ranks(run.arm, task, rank=1, seed=5, rate=1e-2, batches=2, size=8)
    assert starts.kept_start(run, task, SETTINGS, tmp_path).ranks == own.ranks
    written = {path.name for path in tmp_path.glob("*/*")}
    assert written == {f"gradient-b{rank}-s5.json" for rank in agreed.budgets}
    with pytest.raises(ValueError, match="control of an arm with measured ranks"):
        starts.kept_start(replace(run, arm=f"{kind}:uniform"), task, SETTINGS, tmp_path)


def test_a_signal_that_tells_nothing_has_no_correlation_at_one_cost():
    draw = np.random.default_rng(0)
    names = [str(i) for i in range(900)]
    content = {
        "costs": {name: 768 if int(name) % 3 else 1920 for name in names},
        "saved": dict(zip(names, draw.lognormal(0, 0.3, 900), strict=True)),
        "predicted": {"noise": dict(zip(names, draw.lognormal(0, 0.3, 900), strict=True))},
    }
    cells = [cell.strip() for cell in correlations(content).splitlines()[-1].split("|")]
    plain, each, *at_one_cost = (float(cell) for cell in cells[3:7])
    assert abs(plain) < 0.1
    assert each > 0.4  # of the costs alone
    assert max(abs(correlation) for correlation in at_one_cost) < 0.1


def test_layers_of_one_cost_have_a_correlation_of_their_own():
    saved = {"a": 1.0, "b": 2.0, "c": 3.0, "x": 1.0, "y": 2.0, "z": 3.0, "alone": 1.0}
    content = {
        "costs": {name: 768 for name in "abc"} | {name: 1920 for name in "xyz"} | {"alone": 5},
        "saved": saved,
        "predicted": {"signal": saved | {"x": 3.0, "z": 1.0}},
    }
    head, _, row = (line.split("|") for line in correlations(content).splitlines())
    found = {name.strip(): cell.strip() for name, cell in zip(head, row, strict=True)}
    assert found["cost 768 (3)"] == "1.00"
    assert found["cost 1920 (3)"] == "-1.00"
    assert found["cost 5 (1)"] == "-"


def test_layers_are_trained_alone_and_together(task, tmp_path, monkeypatch):
    monkeypatch.setattr(predicted, "protocol", lambda _: SimpleNamespace(settings=SETTINGS))
    monkeypatch.setattr(predicted, "SIGNALS", {"gradient": predicted.SIGNALS["gradient"]})
    options = argparse.Namespace(
        rank=1, steps=4, rate=2e-2, held_out=24, every=4, seed=100, output=None
    )
    file = tmp_path / "predicted.json"
    content = predicted.measure(task, options, file)
    names = list(costs_of(task))[::4]
    assert list(content["saved"]) == names
    assert list(content["together"]) == ["0.02", "0.01", "0.005"]
    assert len(set(content["together"].values())) == 3
    assert "| gradient | 3 " in predicted.correlations(content)
    # What is there is not trained again, and what is missing is found to the bit.
    first, *_ = names
    edited = json.loads(file.read_text())
    kept = {name: 7.0 for name in names if name != first}
    edited["saved"] = kept
    del edited["together"]["0.01"]
    file.write_text(json.dumps(edited))
    again = predicted.measure(task, options, file)
    assert again["saved"] == kept | {first: content["saved"][first]}
    assert again["together"] == content["together"]
    with pytest.raises(ValueError, match="has other settings"):
        predicted.measure(task, argparse.Namespace(**vars(options) | {"rank": 2}), file)


def test_two_ranks_at_most_move_at_once_where_an_arm_says_so(task):
    most = {}
    for name in ("both_late", "both_two"):
        history = run(task, name, rank=4)["history"]
        most[name] = np.abs(np.diff(history["ranks"], axis=0)).sum(1).max()
    assert most["both_two"] <= 2 < most["both_late"]
