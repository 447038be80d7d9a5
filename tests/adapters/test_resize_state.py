"""What an optimizer keeps: resumed, of a centred RMSprop, and in an optimizer inside another."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.resize import resize  # noqa: E402  (needs torch)
from tests.adapters.resize_models import (  # noqa: E402
    Plain,
    assert_same,
    everything_that_counts,
    loaded,
    plain,
)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def steps(model, optimizer, count=3, seed=0):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses = []
    for _ in range(count):
        loss = model(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("named", [False, True])
def test_a_layer_that_came_back_is_resumed_with_its_own_state(tmp_path, named):
    model = plain()
    chosen = dict(model.named_parameters()) if named else {}
    given = [(n, p) for n, p in chosen.items() if p.requires_grad] or trainable(model)
    optimizer = torch.optim.AdamW(given, lr=0.01)
    steps(model, optimizer)
    resize(model, {"first": 0, "second": 0}, optimizer)
    steps(model, optimizer)
    resize(model, {"second": 4, "first": 4}, optimizer)
    steps(model, optimizer)
    group = optimizer.param_groups[0]
    assert [id(p) for p in group["params"]] == [id(p) for p in trainable(model)]
    if named:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert group["param_names"] == names

    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = loaded(Plain(), tmp_path)
    for name, parameter in again.named_parameters():
        parameter.requires_grad_("lora_" in name)
    resumed = torch.optim.AdamW(trainable(again), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = steps(model, optimizer, 5)
    assert steps(again, resumed, 5) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_centred_rmsprop_never_gets_a_negative_variance(mode):
    torch.manual_seed(0)
    model = plain()
    optimizer = torch.optim.RMSprop(trainable(model), centered=True, lr=1e-5)
    steps(model, optimizer, 200)  # nearly constant gradients: the variance is small beside the mean
    before = {
        side: optimizer.state[getattr(model.base_model.model.first, f"lora_{side}").default.weight]
        for side in "AB"
    }
    variances = {
        side: float((state["square_avg"] - state["grad_avg"] ** 2).mean())
        for side, state in before.items()
    }
    resize(model, {"first": 1, "second": 1, "last": 1}, optimizer, mode=mode)
    for state in optimizer.state.values():
        assert bool((state["square_avg"] >= state["grad_avg"] ** 2).all())
    for side, variance in variances.items():
        weight = getattr(model.base_model.model.first, f"lora_{side}").default.weight
        state = optimizer.state[weight]
        new = float((state["square_avg"] - state["grad_avg"] ** 2).mean())
        assert variance / 30 < new < variance * 30
    assert all(loss < float("inf") for loss in steps(model, optimizer))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_an_optimizer_around_another_is_refused():
    class Around(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})
            self.base_optimizer = torch.optim.AdamW(self.param_groups)
            self.param_groups = self.base_optimizer.param_groups

        def step(self):
            self.base_optimizer.step()

    model = plain()
    optimizer = Around(trainable(model))
    steps(model, optimizer)
    before = everything_that_counts(model, optimizer.base_optimizer)
    with pytest.raises(ValueError, match=r"Around around AdamW \(base_optimizer\)"):
        resize(model, {"first": 2}, optimizer)
    assert_same(before, everything_that_counts(model, optimizer.base_optimizer))


class Accelerated:
    """As Accelerate's optimizer: another name for the state of the one inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_an_optimizer_that_passes_its_state_on_is_taken():
    model = plain()
    optimizer = torch.optim.AdamW(trainable(model))
    steps(model, optimizer)
    resize(model, {"first": 2}, Accelerated(optimizer))
    weight = model.base_model.model.first.lora_A.default.weight
    assert optimizer.state[weight]["exp_avg"].shape == (2, 8)


def test_what_is_noted_on_a_parameter_stays_on_it():
    model = plain()
    model.base_model.model.first.lora_A["default"].weight.no_decay = True
    resize(model, {"first": 2})
    assert model.base_model.model.first.lora_A["default"].weight.no_decay
