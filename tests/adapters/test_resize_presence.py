"""Rank 0: layers that lose the adapter altogether, and get it back."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.resize import resize  # noqa: E402  (needs torch)
from lorambo_adapters.ranks.transaction import Transaction  # noqa: E402
from tests.adapters.resize_models import (  # noqa: E402
    Everything,
    assert_same,
    deltas,
    everything,
    everything_that_counts,
    loaded,
    plain,
    quiet,
)

TOKENS = torch.arange(8).view(2, 4) % 11
NAMES = ["table", "conv", "linear", "conv1d"]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_without_the_adapter_calculates_its_base_and_is_saved_so(tmp_path, name):
    model = everything(conv1d=True)
    optimizer = torch.optim.AdamW(trainable(model))
    train(model, optimizer, 2)
    before = deltas(model)
    report = resize(model, {name: 0}, optimizer)
    (change,) = report.changes
    assert (change.after, report.ranks[name]) == (0, 0)
    assert change.lost == pytest.approx(float(before[name].square().sum()))
    assert report.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    after = deltas(model)
    assert after.keys() == before.keys() - {name}
    assert all(torch.equal(after[n], before[n]) for n in after)
    assert {id(p) for p in trainable(model)} == {
        id(p) for g in optimizer.param_groups for p in g["params"]
    }
    assert set(optimizer.state) == set(trainable(model))
    train(model, optimizer, 2)
    with quiet():
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(set(NAMES) - {name})
    torch.manual_seed(0)
    other = loaded(Everything(True), tmp_path)
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    assert deltas(other).keys() == after.keys()
    model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_comes_back_as_a_new_one_begins(tmp_path, name, rslora):
    model = everything(conv1d=True, use_rslora=rslora, lora_dropout=0.25)
    fresh = {  # what PEFT itself makes of a layer
        n.removeprefix("base_model.model."): (p.shape, p.dtype, p.requires_grad)
        for n, p in everything(conv1d=True, r=3).named_parameters()
    }
    optimizer = torch.optim.AdamW(trainable(model))
    train(model, optimizer, 2)
    scale = {n: m.scaling["default"] for n, m in model.get_base_model().named_modules()
             if hasattr(m, "scaling")}  # fmt: skip
    resize(model, {name: 0}, optimizer)
    model.eval()
    before = model(TOKENS)
    report = resize(model, {name: 3}, optimizer)
    (change,) = report.changes
    assert (change.before, change.after, change.lost) == (0, 3, 0.0)
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=0)
    module = model.get_base_model().get_submodule(name)
    assert module.scaling["default"] == pytest.approx(scale[name], rel=1e-15)
    assert module.lora_dropout["default"].p == 0.25
    assert not module.lora_dropout["default"].training
    assert report.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    for n, p in model.get_base_model().named_parameters():
        if n.startswith(f"{name}.lora"):
            assert (p.shape, p.dtype, p.requires_grad) == fresh[n]
    assert {id(p) for p in trainable(model)} == {
        id(p) for g in optimizer.param_groups for p in g["params"]
    }
    model.train()
    train(model, optimizer, 3)
    assert deltas(model)[name].any()
    resize(model, {name: 2}, optimizer)
    model.eval()
    with quiet():
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = loaded(Everything(True), tmp_path)
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)


def test_a_layer_comes_back_with_directions_of_its_gradient():
    model = plain()
    resize(model, {"first": 0})
    gradient = torch.randn(7, 8, dtype=torch.float64)
    resize(model, {"first": 2}, gradients={"first": gradient})
    rows = model.get_base_model().first.lora_A["default"].weight.detach()
    expected = torch.linalg.svd(gradient).Vh[:2]
    torch.testing.assert_close((rows @ expected.T).abs().diag(), rows.norm(dim=1))


def test_targets_are_exact_where_another_module_ends_like_one_of_them():
    class Twins(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["q"](torch.tanh(self.q(x)))

    with quiet():
        model = peft.get_peft_model(Twins(), peft.LoraConfig(target_modules=["q"], r=2))
    resize(model, {"inner.q": 0})
    assert model.peft_config["default"].target_modules == "(?:q)"
    config = peft.LoraConfig(target_modules="(?:q)", r=2)
    assert peft.get_peft_model(Twins(), config).targeted_module_names == ["q"]
    resize(model, {"q": 0, "inner.q": 1})
    assert model.peft_config["default"].target_modules == {"inner.q"}


@pytest.mark.parametrize("ranks", [{"first": 0, "second": 5, "last": 2}, {"last": 2}])
def test_one_exception_at_any_moment_and_all_is_as_it_was(monkeypatch, ranks):
    model = plain()
    optimizer = torch.optim.AdamW(model.named_parameters())  # with names, which follow
    x = torch.randn(4, 8, dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()
    resize(model, {"last": 0}, optimizer)
    before = everything_that_counts(model, optimizer)
    names = [list(g["param_names"]) for g in optimizer.param_groups]
    commit, count = Transaction.commit, 0
    while True:

        def failing(self, at=count):
            if at <= len(self._steps):
                self._steps.insert(at, (lambda: 1 / 0, lambda: None))
            commit(self)

        with monkeypatch.context() as patch:
            patch.setattr(Transaction, "commit", failing)
            try:
                resize(model, ranks, optimizer)
                break
            except ZeroDivisionError:
                assert_same(before, everything_that_counts(model, optimizer))
                assert names == [g["param_names"] for g in optimizer.param_groups]
                count += 1
    assert count > 10
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is parameter


def test_layers_that_cannot_lose_or_get_the_adapter():
    with pytest.raises(ValueError, match="'first': expected a rank >= 1, got 0 for a DoRA"):
        resize(plain(use_dora=True), {"first": 0})
    with pytest.raises(ValueError, match="got 0 for an adapter with a bias of its own"):
        resize(plain(lora_bias=True), {"first": 0})
    with pytest.raises(ValueError, match="got 0 for a wrapped parameter's adapter"):
        resize(everything(), {"experts.plain": 0})
    with pytest.raises(ValueError, match="ranks: expected a rank >= 1 for some layer, got 0"):
        resize(plain(), {"first": 0, "second": 0, "last": 0})
    model = plain()
    with quiet():
        model.add_adapter("dora", peft.LoraConfig(target_modules=["first"], use_dora=True))
    with pytest.raises(ValueError, match=r"'last': expected a plain LoRA .* got an adapter"):
        resize(model, {"last": 2}, adapter="dora")
    layers = [model.get_base_model().first, model.get_base_model().second]
    groups = [{"params": [p for n, p in m.named_parameters() if "default" in n]} for m in layers]
    optimizer = torch.optim.SGD(groups, 0.1)
    resize(model, {"last": 0})
    before = everything_that_counts(model, optimizer)
    with pytest.raises(ValueError, match=r"'last': expected one group of the optimizer .* got 2"):
        resize(model, {"first": 2, "last": 2}, optimizer)
    assert_same(before, everything_that_counts(model, optimizer))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_a_masked_layer_that_has_more_than_factors_is_not_taken_away_unasked(options):
    model = plain(**options)
    resize(model, {"first": 0}, mode="mask")
    before = everything_that_counts(model)
    with pytest.raises(ValueError, match=r"layer 'first': expected a rank >= 1, got 0 for a"):
        resize(model, {"second": 5})
    assert_same(before, everything_that_counts(model))
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    resize(model, {"second": 5, "first": 1})
    torch.testing.assert_close(model(x), expected)


def test_a_layer_of_another_adapter_alone_is_given_this_one():
    model = plain()
    with quiet():
        model.add_adapter("two", peft.LoraConfig(target_modules=["first", "second"], r=2))
        model.delete_adapter("default")
        model.add_adapter("default", peft.LoraConfig(target_modules=["first"], r=3))
    model = model.double()
    model.set_adapter("default")
    optimizer = torch.optim.AdamW(trainable(model))
    x = torch.randn(3, 8, dtype=torch.float64)
    expected, other = model(x), deltas(model, "two")
    resize(model, {"second": 4}, optimizer)
    assert torch.equal(model(x), expected)
    assert_same(other, deltas(model, "two"))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in trainable(model)]
    model(x).sum().backward()
    assert bool(model.base_model.model.second.lora_B["default"].weight.grad.any())
