"""What a rank probe leaves behind, what it refuses, and how it runs in other precisions."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.spectra.fisher import Fisher, TrueFisher  # noqa: E402
from lorambo_adapters.training.probe import ProbeFailed, RankProbe  # noqa: E402
from tests.adapters.resize_models import (  # noqa: E402
    adapted,
    assert_same,
    everything_that_counts,
    plain,
    quiet,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def pairs(count=2, n=40):
    torch.manual_seed(3)
    return [(torch.randn(n, 8).double(), torch.randn(n, 3).double()) for _ in range(count)]


def half_squares(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1) / 2


class Stateful(torch.nn.Module):
    """Batch statistics and dropout, in training."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 7)
        self.norm = torch.nn.BatchNorm1d(7)
        self.drop = torch.nn.Dropout(0.3)
        self.last = torch.nn.Linear(7, 3)
        self.seldom = torch.nn.Linear(3, 3)

    def forward(self, x):
        y = self.last(self.drop(torch.tanh(self.norm(self.first(x)))))
        return y + self.seldom(y[:3]).sum() if x[0, 0] > 9 else y


def stateful():
    torch.manual_seed(6)
    model = adapted(Stateful(), target_modules=["first", "last", "seldom"], lora_dropout=0.2)
    model.train()
    model.get_base_model().drop.eval()
    (half_squares(model, pairs(1)[0]).mean()).backward()
    return model


def state(model):
    return {
        **everything_that_counts(model),
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def test_nothing_is_left_behind_and_a_second_probe_finds_the_same():
    model, batches = stateful(), pairs()
    before = state(model)
    probe = RankProbe(model, loss_fn=half_squares)
    one = probe.measure(batches)
    assert_same(before, state(model))
    torch.rand(3)
    two = probe.measure(batches)
    assert all((two.curves[name] == curve).all() for name, curve in one.curves.items())
    assert one.skipped == {"seldom": "no gradient reached it in these batches"}


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize(
    "fault",
    [MemoryError("full"), torch.OutOfMemoryError("full"), RuntimeError("device"), None, ValueError],
    ids=["memory", "device memory", "runtime", "not finite", "no labels"],
)
def test_a_fault_in_a_pass_is_told_and_leaves_nothing_behind(fault, when):
    model, batches = stateful(), pairs()
    before, calls = state(model), []

    def losses(model, batch):
        calls.append(None)
        found = half_squares(model, batch)
        if len(calls) < when:
            return found
        if fault is None:
            return found * float("nan")
        raise fault

    with pytest.raises(ProbeFailed) as told:
        RankProbe(model, loss_fn=losses).measure(batches)
    cause = told.value.__cause__
    assert isinstance(cause, ValueError) if fault in (None, ValueError) else cause is fault
    assert len(calls) == when
    assert_same(before, state(model))


def test_gradients_and_factors_that_are_not_finite_are_told_by_name():
    model, batches = plain(), pairs()

    def losses(model, batch):
        found = half_squares(model, batch)
        return found + 0 * (model(batch[0]) * 0).sqrt().sum()  # its gradient is NaN

    with pytest.raises(ProbeFailed, match=r"layer '.*': expected finite gradients"):
        RankProbe(model, loss_fn=losses).measure(batches)
    with torch.no_grad():
        model.get_base_model().second.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ProbeFailed, match="layer 'second': expected finite factors"):
        RankProbe(model, loss_fn=half_squares).measure(batches)


def test_an_interruption_leaves_nothing_behind():
    model, batches = stateful(), pairs()
    before = state(model)

    def losses(model, batch):
        half_squares(model, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RankProbe(model, loss_fn=losses).measure(batches)
    assert_same(before, state(model))


def test_arguments_are_checked():
    model, batches = plain(), pairs()
    probe = RankProbe(model, loss_fn=half_squares)
    with pytest.raises(ValueError, match="at least 2"):
        probe.measure(batches[:1])
    with pytest.raises(ValueError, match="a list of batches"):
        probe.measure({"x": batches[0][0]})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="adapter"):
        RankProbe(model, "other", loss_fn=half_squares).measure(batches)
    options: list[dict[str, Any]] = [{"damping": 0}, {"ahead": 0}, {"width": 2}, {"loss_scale": 0}]
    for option in options:
        with pytest.raises(ValueError, match=next(iter(option))):
            RankProbe(model, loss_fn=half_squares, **option)
    with pytest.raises(ValueError, match="predict"):
        RankProbe(model, loss_fn=half_squares, fisher="true")
    with pytest.raises(ProbeFailed, match="at least 2 samples"):
        probe.measure([tuple(part[:1] for part in batch) for batch in batches])
    with model.disable_adapter(), pytest.raises(ValueError, match="active"):
        probe.measure(batches)


def test_a_mean_loss_counts_its_samples_and_a_loss_scale_is_divided_out():
    model, batches = plain(), pairs(4)
    wanted = RankProbe(model, loss_fn=half_squares).measure(batches).curves

    def mean(model, batch):
        return half_squares(model, batch).mean()

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(1))
    variants: list[dict[str, Any]] = [
        {},
        {"loss_scale": 1024.0},
        {"loss_scale": scaler},
        {"terms": 40},
    ]
    for options in variants:
        found = RankProbe(model, loss_fn=mean, **options).measure(batches).curves
        for name, curve in wanted.items():
            np.testing.assert_allclose(found[name], curve, rtol=1e-9, atol=1e-13)
    assert scaler.get_scale() == 64.0


def test_batches_add_up():
    model, batches = plain(), pairs(4, n=9)
    joined = [
        tuple(torch.cat(parts) for parts in zip(*half, strict=True))
        for half in (batches[:2], batches[2:])
    ]
    several = RankProbe(model, loss_fn=half_squares).measure(batches).curves
    for name, curve in RankProbe(model, loss_fn=half_squares).measure(joined).curves.items():
        np.testing.assert_allclose(several[name], curve, rtol=1e-8, atol=1e-12)


def test_tokens_that_are_no_multiple_of_the_samples_leave_their_layer_out():
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 7), torch.nn.Linear(7, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.first(torch.cat([x, x[:1]])))[:-1])

    torch.manual_seed(0)
    model = adapted(Pooled(), target_modules=["first", "last"])
    found = RankProbe(model, loss_fn=half_squares).measure(pairs(n=8))
    assert set(found.curves) == {"last"}
    assert "multiple of 8 samples as its tokens, got 9" in found.skipped["first"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_comes_near(dtype):
    batches = pairs()
    wanted = RankProbe(plain(), loss_fn=half_squares).measure(batches)
    model = plain().to(dtype)
    low = [tuple(part.to(dtype) for part in batch) for batch in batches]
    found = RankProbe(model, loss_fn=half_squares, loss_scale=8.0).measure(low)
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}[dtype]
    for name, curve in wanted.curves.items():
        below = slice(0, 5)
        assert abs(found.curves[name][below] - curve[below]).max() < bound * abs(curve).max()
        assert all(side.dtype == torch.float32 for side in found.directions.get(name, ()))


def test_autocast_in_the_loss_and_around_the_probe():
    model, batches = plain(dtype=torch.float32), pairs()
    batches = [tuple(part.float() for part in batch) for batch in batches]
    wanted = RankProbe(model, loss_fn=half_squares).measure(batches)

    def inside(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return half_squares(model, batch)

    one = RankProbe(model, loss_fn=inside).measure(batches)
    with torch.autocast("cpu", torch.bfloat16):
        two = RankProbe(model, loss_fn=half_squares).measure(batches)
    for name, curve in wanted.curves.items():
        assert abs(one.curves[name] - curve)[:5].max() < 0.1 * abs(curve).max()
        np.testing.assert_array_equal(one.curves[name], two.curves[name])


def language_model(checkpointing=False):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.train()
    if checkpointing:
        with quiet():  # a name that transformers will give up
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return adapted(model, target_modules="all-linear")


def sentences():
    torch.manual_seed(8)
    batches = []
    for count in (5, 4):
        tokens = torch.randint(30, (count, 7))
        mask = torch.ones_like(tokens)
        mask[0, 5:] = 0
        labels = tokens.masked_fill(mask == 0, -100)
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches


def test_a_transformers_model_has_its_own_loss_and_one_pass_forwards_a_batch():
    model, batches, calls = language_model(), sentences(), []
    handle = model.get_base_model().register_forward_hook(lambda *_: calls.append(None))
    found = RankProbe(model).measure(batches)
    handle.remove()
    assert len(calls) == 2
    assert len(found.curves) == 14

    def losses(model, batch):
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        wanted = batch["labels"][:, 1:].flatten()
        each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        return each[wanted != -100]

    def predict(model, batch):
        return model(**batch).logits[:, :-1], batch["labels"][:, 1:] != -100

    fishers: list[tuple[Fisher, Fisher | None]] = [(TrueFisher(predict), None)]
    fishers.append(("empirical", "empirical"))
    for fisher, own in fishers:
        one = RankProbe(model, fisher=own).measure(batches)
        two = RankProbe(model, loss_fn=losses, fisher=fisher).measure(batches)
        for name, curve in one.curves.items():
            # transformers calculates the loss in float32
            np.testing.assert_allclose(two.curves[name], curve, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_nothing(kind):
    wanted = RankProbe(language_model()).measure(sentences())
    found = RankProbe(language_model(kind)).measure(sentences())
    for name, curve in wanted.curves.items():
        np.testing.assert_allclose(found.curves[name], curve, rtol=1e-8, atol=1e-12)


def test_a_batch_without_labels_is_told():
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in sentences()]
    with pytest.raises(ProbeFailed, match="labels"):
        RankProbe(language_model()).measure(batches)
