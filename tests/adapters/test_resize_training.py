"""Live resizing in the middle of training: moments, gradients, groups, and all or nothing."""

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

from lorambo_adapters.ranks.resize import resize  # noqa: E402  (needs torch)
from lorambo_adapters.ranks.transaction import Transaction  # noqa: E402
from tests.adapters.resize_models import (  # noqa: E402
    assert_same,
    everything,
    everything_that_counts,
    plain,
)

NAMES = ["first", "second", "last"]
ADAM = {
    "adam": lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1, amsgrad=True),
    "fused": lambda ps: torch.optim.Adam(ps, 1e-2, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, 1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 1e-3, momentum=0.9, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 1e-2),
}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    return x, torch.sin(x[:, :3] * 2)


def loss_of(model, step):
    x, y = batch(step)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def factor_modules(model, name):
    module = model.get_base_model().get_submodule(name)
    return {side: getattr(module, f"lora_{side}")["default"] for side in "AB"}


def hold_still(model, old_rank):
    """Exclude the gradient of new directions: rows of A and columns of B beyond the old rank."""
    for name in NAMES:
        factors = factor_modules(model, name)
        keep_a = torch.arange(len(factors["A"].weight)) < old_rank
        factors["A"].weight.register_hook(lambda g, k=keep_a: g * k[:, None])
        factors["B"].weight.register_hook(lambda g, k=keep_a: g * k)


@pytest.mark.parametrize("kind", ADAM)
def test_after_growing_training_stays_on_its_loss_curve(kind):
    curves = []
    for grow in (False, True):
        model = plain()
        optimizer = ADAM[kind](trainable(model))
        losses = train(model, optimizer, range(8))
        if grow:
            resize(model, {"first": 6, "second": 9, "last": 5}, optimizer)
            hold_still(model, 4)
        curves.append(losses + train(model, optimizer, range(8, 20)))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-11, atol=0)
    assert curves[0][-1] != curves[0][7]


def test_a_new_direction_changes_the_curve_if_it_may_learn():
    curves = []
    for grow in (False, True):
        model = plain()
        optimizer = ADAM["adam"](trainable(model))
        train(model, optimizer, range(8))
        if grow:
            resize(model, dict.fromkeys(NAMES, 9), optimizer)
        curves.append(train(model, optimizer, range(8, 20)))
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-12)
    assert abs(curves[0][-1] - curves[1][-1]) > 1e-4 * curves[0][-1]


def rotated_into(model, wide):
    """Give `wide` the adapter of `model`, its directions rotated into more of them."""
    torch.manual_seed(3)
    for name in NAMES:
        few, many = factor_modules(model, name), factor_modules(wide, name)
        rows, columns = len(many["A"].weight), len(few["A"].weight)
        turn = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q
        with torch.no_grad():
            many["A"].weight.copy_(turn @ few["A"].weight)
            many["B"].weight.copy_(few["B"].weight @ turn.T)


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("root", [True, False])
def test_after_a_lossless_truncation_training_stays_on_its_loss_curve(monkeypatch, decay, root):
    """SGD with momentum does not see a rotation, so this is exact where moments are carried."""
    if not root:  # as where the choice nearest to the old directions does not exist
        monkeypatch.setattr("lorambo_adapters.ranks.projection._WELL_CONDITIONED", 0.0)

    def optimizer_of(model):
        return torch.optim.SGD(trainable(model), 0.05, momentum=0.9, weight_decay=decay)

    narrow, wide = plain(r=2, lora_alpha=3), plain(r=6, lora_alpha=9)
    rotated_into(narrow, wide)
    one, other = optimizer_of(narrow), optimizer_of(wide)
    curve, before = train(narrow, one, range(20)), train(wide, other, range(8))
    report = resize(wide, dict.fromkeys(NAMES, 2), other)
    assert report.lost < 1e-24
    torch.testing.assert_close(before + train(wide, other, range(8, 20)), curve, rtol=1e-9, atol=0)


def test_gradients_in_flight_are_those_of_the_new_factors():
    """An oblique projection: factors of unlike sizes that together have a lower rank."""
    model = plain()
    sizes = torch.tensor([3.0, 1.0, 0.2, 1.0], dtype=torch.float64)
    for name in NAMES:
        factors = factor_modules(model, name)
        with torch.no_grad():
            mix = torch.randn(2, 4, dtype=torch.float64)
            factors["A"].weight.mul_(sizes[:, None])
            factors["B"].weight.copy_(factors["B"].weight[:, :2] @ mix)
    loss_of(model, 0).backward()
    resize(model, dict.fromkeys(NAMES, 2))
    carried = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(carried) == 6
    model.zero_grad()
    loss_of(model, 0).backward()
    for name, parameter in model.named_parameters():
        if name in carried:
            torch.testing.assert_close(carried[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_moments_follow_the_projection():
    model = plain()
    optimizer = ADAM["adam"](trainable(model))
    train(model, optimizer, range(5))
    old = {}
    for name in NAMES:
        for side, factor in factor_modules(model, name).items():
            entries = {k: v.clone() for k, v in optimizer.state[factor.weight].items()}
            old[name, side] = factor.weight.detach().clone(), entries
    resize(model, {"first": 2, "second": 3}, optimizer)
    for name in ("first", "second"):
        new = {s: f.weight for s, f in factor_modules(model, name).items()}
        p = torch.linalg.pinv(old[name, "B"][0]) @ new["B"].detach()
        q = (new["A"].detach() @ torch.linalg.pinv(old[name, "A"][0])).T
        for side, matrix in (("A", p.T), ("B", q.T)):
            state, before = optimizer.state[new[side]], old[name, side][1]
            assert state["step"] == 5
            rows = {key: v.T if side == "B" else v for key, v in before.items() if key != "step"}
            expected = {"exp_avg": matrix @ rows["exp_avg"]}
            for key in ("exp_avg_sq", "max_exp_avg_sq"):
                expected[key] = matrix.square() @ rows[key]
            for key, value in expected.items():
                value = value.T if side == "B" else value
                torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-14)
            assert all(value.shape == new[side].shape for k, value in state.items() if k != "step")
    for side, factor in factor_modules(model, "last").items():
        for key, value in old["last", side][1].items():
            assert torch.equal(optimizer.state[factor.weight][key], value)


def test_directions_without_effect_are_left_out_first_and_the_others_stay_as_they_are():
    model = plain()
    optimizer = ADAM["adam"](trainable(model))
    train(model, optimizer, range(5))
    resize(model, {"first": 7}, optimizer)  # three directions with zero columns in B
    before = {
        side: (f.weight.detach().clone(), optimizer.state[f.weight]["exp_avg_sq"].clone())
        for side, f in factor_modules(model, "first").items()
    }
    resize(model, {"first": 5}, optimizer)
    for side, factor in factor_modules(model, "first").items():
        kept = (slice(None), slice(5)) if side == "B" else slice(5)
        assert torch.equal(factor.weight, before[side][0][kept])
        assert torch.equal(optimizer.state[factor.weight]["exp_avg_sq"], before[side][1][kept])


def test_the_first_step_of_a_new_direction_is_no_larger_than_those_of_others():
    model = plain()
    optimizer = torch.optim.Adam(trainable(model), 1e-2)
    train(model, optimizer, range(60))
    for state in optimizer.state.values():  # as after so many steps that no bias is left
        state["exp_avg_sq"] /= 1 - 0.999**60
        state["step"].fill_(1e6)
    factors = factor_modules(model, "second")
    means = {
        side: optimizer.state[factor.weight]["exp_avg_sq"].mean(0 if side == "A" else 1)
        for side, factor in factors.items()
    }
    resize(model, {"second": 6}, optimizer)
    for side, factor in factors.items():
        state = optimizer.state[factor.weight]
        first, square = (state[key] for key in ("exp_avg", "exp_avg_sq"))
        first, square = (first, square) if side == "A" else (first.T, square.T)
        assert not first[4:].any()
        torch.testing.assert_close(square[4:], means[side].expand(2, -1))
    weight = factors["B"].weight
    before = weight.detach().clone()
    train(model, optimizer, [60])
    steps = (weight.detach() - before).abs()[:, 4:]
    # From second moments of 0 all would be lr (1 - 0.9) / sqrt(1 - 0.999) = 3.2 lr.
    assert 0 < float(steps.max()) < 1e-2


def test_groups_schedulers_and_scalers_go_on():
    model = plain()
    sides = {s: [factor_modules(model, n)[s].weight for n in NAMES] for s in "AB"}
    groups = [
        {"params": sides["A"], "lr": 1e-3, "betas": (0.8, 0.9), "name": "a"},
        {"params": sides["B"], "lr": 2e-2, "weight_decay": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(number):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    step(0)
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    lists = [g["params"] for g in optimizer.param_groups]
    resize(model, {"first": 2, "second": 8}, optimizer)
    assert options == [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]
    assert all(g["params"] is kept for g, kept in zip(optimizer.param_groups, lists, strict=True))
    for group, side in zip(optimizer.param_groups, "AB", strict=True):
        expected = [factor_modules(model, n)[side].weight for n in NAMES]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert set(optimizer.state) == {p for g in optimizer.param_groups for p in g["params"]}
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    step(1)
    assert optimizer.param_groups[0]["lr"] == 2.5e-4
    after = [p for g in optimizer.param_groups for p in g["params"]]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", ["resize", "mask"])
def test_an_exception_at_any_moment_leaves_all_as_it_was(monkeypatch, mode):
    model = plain()
    optimizer = ADAM["adam"](trainable(model))
    train(model, optimizer, range(3))
    loss_of(model, 3).backward()
    before = everything_that_counts(model, optimizer)
    commit = Transaction.commit
    ranks = {"first": 2, "second": 3} | ({"last": 6} if mode == "resize" else {})
    count = 0
    while True:

        def failing(self, at=count):
            steps = self._steps
            if at <= len(steps):
                steps.insert(at, (lambda: 1 / 0, lambda: None))
            commit(self)

        with monkeypatch.context() as patch:
            patch.setattr(Transaction, "commit", failing)
            try:
                resize(model, ranks, optimizer, mode=mode)
            except ZeroDivisionError:
                assert_same(before, everything_that_counts(model, optimizer))
                count += 1
                continue
        break
    assert count > 20
    changed = everything_that_counts(model, optimizer)
    with pytest.raises(AssertionError):
        assert_same(before, changed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(state1=s.pop("exp_avg").to(torch.uint8)), r"'state1' with numbers in"),
        (lambda s: s.update(row=torch.zeros(3)), r"'row' with shape \(3,\)"),
        (lambda s: s.update(z=s["exp_avg"].clone()), r"'z' with a name without a known law"),
        (lambda s: s.update(old=[torch.zeros(3)]), r"'old' with a list"),
        (lambda s: s.update(state1=s["exp_avg"]), r"'state1' with a name without a known law"),
    ],
)
def test_state_that_cannot_follow_is_refused_and_nothing_has_happened(spoil, message):
    model = plain()
    optimizer = ADAM["adam"](trainable(model))
    train(model, optimizer, range(2))
    spoil(optimizer.state[factor_modules(model, "second")["B"].weight])
    before = everything_that_counts(model, optimizer)
    with pytest.raises(ValueError, match=message):
        resize(model, {"first": 2, "second": 3}, optimizer)
    assert_same(before, everything_that_counts(model, optimizer))
    resize(model, {"first": 2}, optimizer)  # only layers that change are looked at


def test_an_optimizer_of_other_parameters_is_refused():
    model = plain()
    with pytest.raises(ValueError, match="got one with none of its parameters"):
        resize(model, {"first": 2}, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match="expected one with param_groups and state, got int"):
        resize(model, {"first": 2}, 3)
    with pytest.raises(ValueError, match="state belongs to single parameters, got LBFGS"):
        resize(model, {"first": 2}, torch.optim.LBFGS(trainable(model)))


def test_parameters_with_hooks_are_refused_where_they_would_be_replaced():
    model = plain()
    weight = factor_modules(model, "first")["A"].weight
    handle = weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="'first': expected parameters without gradient hooks"):
        resize(model, {"first": 2})
    resize(model, {"first": 2}, mode="mask")
    handle.remove()
    resize(model, {"first": 3})


def test_experts_and_embeddings_train_on():
    model = everything()
    optimizer = ADAM["adam"](trainable(model))
    tokens = torch.arange(8).view(2, 4) % 11

    def step():
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    before = step()
    names = ["table", "conv", "linear", "conv1d", "experts.plain"]
    experts = [f"experts.stack.{i}" for i in range(3)]
    resize(model, dict.fromkeys(names, 2) | dict.fromkeys(experts, 6), optimizer)
    resize(model, dict.fromkeys(names, 5) | dict.fromkeys(experts, 3), optimizer)
    assert all(
        value.shape == parameter.shape
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key != "step"
    )
    assert [step() for _ in range(30)][-1] < before


def test_where_little_is_lost_the_other_directions_stay_nearly_what_they_are():
    model = plain()
    factors = factor_modules(model, "first")
    with torch.no_grad():
        factors["B"].weight[:, 1] *= 1e-8
    old = {side: factor.weight.detach().clone() for side, factor in factors.items()}
    report = resize(model, {"first": 3})
    assert 0 < report.lost < 1e-12
    kept = [0, 2, 3]
    torch.testing.assert_close(factors["A"].weight, old["A"][kept], rtol=0, atol=1e-7)
    torch.testing.assert_close(factors["B"].weight, old["B"][:, kept], rtol=0, atol=1e-7)


def test_states_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent")
    x = torch.randn(4, 8)
    for kind, options in ((bnb.optim.AdamW8bit, {"min_8bit_size": 1}), (bnb.optim.AdamW32bit, {})):
        model = plain(dtype=torch.float32)
        optimizer = kind(trainable(model), lr=1e-2, **options)
        model(x).square().mean().backward()
        optimizer.step()
        if options:
            with pytest.raises(
                ValueError, match=r"AdamW8bit's 'state1' with numbers in torch.uint8"
            ):
                resize(model, {"first": 2, "second": 6}, optimizer)
            for name in ("first", "second"):  # the way out that the message names
                for factor in factor_modules(model, name).values():
                    del optimizer.state[factor.weight]
        resize(model, {"first": 2, "second": 6}, optimizer)
        model(x).square().mean().backward()
        optimizer.step()
        for parameter in trainable(model):
            assert optimizer.state[parameter]["state1"].shape == parameter.shape
