"""What ranks are worth in training, against losses really lost and gradients by autograd."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")

import lorambo_adapters.training.probe as rank_probe  # noqa: E402
from lorambo_adapters.ranks.resize import resize  # noqa: E402
from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402
from lorambo_adapters.training.curves import kept_gains, new_gains, product_pairs  # noqa: E402
from lorambo_adapters.training.probe import RankProbe  # noqa: E402
from tests.adapters.resize_models import (  # noqa: E402
    adapted,
    deltas,
    everything,
    plain,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Sum(torch.nn.Module):
    """Two layers, of which each alone has a quadratic loss."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(7, 5, bias=False)
        self.two = torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.one(x[:, :7]) + self.two(x[:, 7:])


def regression(**options):
    torch.manual_seed(0)
    return adapted(Sum(), target_modules=["one", "two"], **options)


def pairs(count=2, n=40, seed=3, inputs=13, outputs=5):
    torch.manual_seed(seed)
    return [
        (torch.randn(n, inputs).double(), torch.randn(n, outputs).double()) for _ in range(count)
    ]


def half_squares(model, batch):
    error = model(batch[0]) - batch[1]
    return error.square().flatten(1).sum(1) / 2


def outputs(model, batch):
    return model(batch[0])


GAUSSIAN = TrueFisher(outputs, "gaussian", draws="all")


def base(model, name):
    return model.get_base_model().get_submodule(name).get_base_layer()


def changed_loss(model, name, change, batch):
    """The mean loss with W + change, in one layer."""
    weight = base(model, name).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += change
        value = half_squares(model, batch).mean().item()
        weight.copy_(before)
    return value


def best_rank(delta, rank):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_below_the_present_rank_a_curve_is_the_loss_really_lost():
    model, batches = regression(), pairs()
    found = RankProbe(model, loss_fn=half_squares, fisher=GAUSSIAN).measure(batches)
    whole = half_squares(model, batches[1]).mean().item()
    for name, delta in deltas(model).items():
        curve = found.curves[name]
        for rank in range(5):
            lost = changed_loss(model, name, best_rank(delta, rank) - delta, batches[1]) - whole
            assert curve[4] - curve[rank] == pytest.approx(lost, abs=1e-11, rel=1e-9)


def test_above_it_a_curve_is_the_loss_really_saved(monkeypatch):
    monkeypatch.setattr(rank_probe, "new_gains", lambda b, C, V, rho: new_gains(b, C, 0 * V, rho))
    model, batches = regression(r=2), pairs(1) * 2
    probe = RankProbe(model, loss_fn=half_squares, fisher=GAUSSIAN, ahead=3, damping=1e-13)
    found = probe.measure(batches)
    whole = half_squares(model, batches[1]).mean().item()
    for name in ("one", "two"):
        curve, (u, v) = found.curves[name], found.directions[name]
        assert len(curve) == 6
        assert u.shape[1] == 3
        for m in (1, 2, 3):
            x = torch.zeros(m, dtype=torch.float64)

            def loss(x, m=m, u=u, v=v, name=name):
                layer = base(model, name)
                weight = layer.weight.detach() + (u[:, :m] * x) @ v[:, :m].T
                parameters = {f"{path(model, name)}.weight": weight}
                outs = torch.func.functional_call(model, parameters, (batches[1][0],))
                return (outs - batches[1][1]).square().sum(1).mean() / 2

            slope = torch.autograd.functional.jacobian(loss, x)
            hessian = torch.autograd.functional.hessian(loss, x)
            saved = whole - loss(-torch.linalg.solve(hessian, slope)).item()
            assert saved > 0
            assert curve[2 + m] - curve[2] == pytest.approx(saved, rel=1e-9)


def path(model, name):
    layer = base(model, name)
    return next(p for p, module in model.named_modules() if module is layer)


def test_new_directions_are_the_gradients_outside_the_adapters_span():
    model, batches = regression(r=2), pairs()
    found = RankProbe(model, loss_fn=half_squares, ahead=3).measure(batches)
    for name, delta in deltas(model).items():
        weight = base(model, name).weight.requires_grad_()
        (gradient,) = torch.autograd.grad(half_squares(model, batches[0]).mean(), weight)
        weight.requires_grad_(False)
        u, _, vt = torch.linalg.svd(delta)
        u, v = u[:, :2], vt[:2].T
        rest = gradient - u @ (u.T @ gradient)
        rest = rest - rest @ v @ v.T
        wanted = torch.linalg.svd(rest)
        left, right = found.directions[name]
        for j in range(3):
            sign = torch.sign(left[:, j] @ wanted[0][:, j])
            torch.testing.assert_close(left[:, j] * sign, wanted[0][:, j], rtol=0, atol=1e-9)
            torch.testing.assert_close(right[:, j] * sign, wanted[2][j], rtol=0, atol=1e-9)
    report = resize(model, {"one": 5, "two": 3}, gradients=found.directions)
    assert report.ranks == {"one": 5, "two": 3}


def brute_force(model, name, batch, losses, sigma_min=1e-9, shape=None, tokens=None):
    """E(r) by every sample's gradient with respect to the base's weight: the empirical Fisher."""
    delta = deltas(model)[name] if tokens is None else tokens
    weight = base(model, name).weight.requires_grad_()
    gradients = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses(model, batch)
    ]
    weight.requires_grad_(False)
    if weight.shape != delta.shape or shape == "transposed":
        gradients = [g.T for g in gradients]
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    kept = int((s > sigma_min).sum())
    changes = torch.stack(
        [
            torch.stack([(g * (s[j] * torch.outer(u[:, j], vt[j]))).sum() for j in range(kept)])
            for g in gradients
        ]
    ).double()
    b, C = changes.mean(0), changes.T @ changes / len(gradients)
    lost = [float(-b[r:].sum() + C[r:, r:].sum() / 2) for r in range(kept + 1)]
    return np.array(lost)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5, "rank_pattern": {"first": 2}},
        {"lora_alpha": 40, "lora_dropout": 0.0},
        {"use_dora": True},
    ],
    ids=["plain", "rslora", "alpha", "dora"],
)
def test_curves_are_those_of_every_samples_gradient(options):
    model, batches = plain(**options), pairs(n=6, inputs=8, outputs=3)
    found = RankProbe(model, loss_fn=half_squares, ahead=2).measure(batches)
    for name in ("first", "second", "last"):
        delta = None
        if options.get("use_dora"):
            # By autograd through s B A before the norm, which PEFT holds constant.
            layer = model.get_base_model().get_submodule(name)
            b, a = layer.lora_B["default"], layer.lora_A["default"]
            delta = layer.scaling["default"] * (b.weight @ a.weight).detach()
            scale = magnitudes(layer, delta)
            lost = brute_force_dora(model, name, batches[1], delta, scale)
        else:
            lost = brute_force(model, name, batches[1], half_squares)
        curve = found.curves[name]
        np.testing.assert_allclose(
            curve[: len(lost)], lost[0] - lost, rtol=1e-9, atol=1e-12 * abs(lost).max()
        )


def magnitudes(layer, delta):
    weight = layer.get_base_layer().weight.detach() + delta
    return layer.lora_magnitude_vector["default"].weight.detach() / weight.norm(dim=1)


def brute_force_dora(model, name, batch, delta, scale):
    """The gradient with respect to s B A of scale (W + s B A) x is scale g x^T, g at the output."""
    layer = model.get_base_model().get_submodule(name)
    kept = {}
    handles = [
        layer.register_forward_hook(
            lambda _, args, out: kept.update(x=args[0].detach(), out=out) or out.retain_grad()
        )
    ]
    try:
        half_squares(model, batch).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    g, x = kept["out"].grad * scale, kept["x"]
    model.zero_grad(set_to_none=True)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    u, s, vt = u[:, :4], s[:4], vt[:4]
    changes = (g @ u) * (x @ vt.T) * s
    b, C = changes.mean(0), changes.T @ changes / len(changes)
    count = len(b) if min(delta.shape) > 3 else 3
    return np.array(
        [float(-b[r:count].sum() + C[r:count, r:count].sum() / 2) for r in range(count + 1)]
    )


def test_conv1d_is_measured_and_layers_of_other_kinds_say_why_not():
    model = everything(conv1d=True)
    torch.manual_seed(5)
    batches = [torch.randint(11, (6, 4)) for _ in range(2)]

    def losses(model, tokens):
        return model(tokens).square().sum(1)

    found = RankProbe(model, loss_fn=losses, ahead=2).measure(batches)
    assert set(found.curves) == {"linear", "conv1d"}
    assert set(found.skipped) == {"table", "conv"}
    assert "Embedding" in found.skipped["table"]
    assert "Conv2d" in found.skipped["conv"]
    delta = deltas(model)["conv1d"]
    stored = base(model, "conv1d").weight
    delta = delta if delta.shape == (6, 7) else delta.T
    lost = brute_force(
        model, "conv1d", batches[1], losses, tokens=delta,
        shape="transposed" if stored.shape == (7, 6) else None,
    )  # fmt: skip
    np.testing.assert_allclose(found.curves["conv1d"][:5], lost[0] - lost, rtol=1e-9, atol=1e-13)
    model = everything()
    found = RankProbe(model, loss_fn=losses, ahead=2).measure(batches)
    assert {"experts.stack.0", "experts.stack.2", "experts.plain"} <= set(found.skipped)
    assert "parameter" in found.skipped["experts.stack.1"]


def test_a_layer_without_its_adapter_begins_at_zero_and_a_cold_rank_counts_as_new():
    model, batches = plain(), pairs(inputs=8, outputs=3)
    resize(model, {"second": 0})
    probe = RankProbe(model, loss_fn=half_squares, ahead=3)
    found = probe.measure(batches)
    assert list(found.curves) == ["first", "second", "last"]
    assert len(found.curves["second"]) == 4
    assert found.curves["second"][0] == 0
    assert found.directions["second"][0].shape == (9, 3)
    # What has learnt nothing yet is worth what a new direction is worth.
    fresh = plain(random=False)
    resize(fresh, {"second": 0})
    there = RankProbe(fresh, loss_fn=half_squares, ahead=3).measure(batches)
    assert len(there.curves["first"]) == 8
    assert there.directions["first"][0].shape[1] == 7
    resize(fresh, {"first": 2})
    fewer = RankProbe(fresh, loss_fn=half_squares, ahead=3).measure(batches)
    np.testing.assert_allclose(fewer.curves["first"], there.curves["first"][:6], rtol=1e-9)
    assert there.curves["first"][1] != 0


def test_masked_ranks_do_not_count():
    model, batches = plain(), pairs(inputs=8, outputs=3)
    resize(model, {"first": 2, "second": 3}, mode="mask")
    masked = RankProbe(model, loss_fn=half_squares, ahead=2).measure(batches)
    resize(model, {"first": 2, "second": 3})
    resized = RankProbe(model, loss_fn=half_squares, ahead=2).measure(batches)
    assert {name: len(curve) for name, curve in masked.curves.items()} == {
        "first": 5, "second": 6, "last": 5
    }  # fmt: skip
    for name, curve in resized.curves.items():
        np.testing.assert_allclose(masked.curves[name], curve, rtol=1e-9, atol=1e-15)


def test_a_gain_expects_nothing_of_noise():
    model = regression(r=2)
    x = pairs(1, n=5)[0][0]  # few samples: their number less one counts
    gains, biased = [], []

    def spied(b, C, V, rho):
        biased.append(new_gains(b, C, 0 * V, rho)[3])
        return new_gains(b, C, V, rho)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_probe, "new_gains", spied)
        probe = RankProbe(model, loss_fn=half_squares, fisher=GAUSSIAN, ahead=3)
        with torch.no_grad():
            ideal = model(x)
        generator = torch.Generator().manual_seed(1)
        for _ in range(300):
            noise = torch.randn(2, *ideal.shape, generator=generator, dtype=torch.float64)
            found = probe.measure([(x, ideal + each) for each in noise])
            gains.append([curve[5] - curve[2] for curve in found.curves.values()])
    mean, error = np.mean(gains), np.std(np.mean(gains, 1)) / 300**0.5
    assert abs(mean) < 4 * error
    assert np.mean(biased) > 20 * error


def test_nested_gains_are_unbiased_and_those_of_each_leading_block():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    C, beta = root @ root.T + np.eye(4), rng.normal(size=4) / 4
    noise = rng.normal(size=(4, 4)) / 8
    draws = beta + rng.normal(size=(4000, 4)) @ noise.T
    rho = 1e-3
    found = np.array([new_gains(b, C, noise @ noise.T, rho) for b in draws])
    exact = [
        0.5 * beta[:m] @ np.linalg.solve(C[:m, :m] + rho * np.eye(m), beta[:m]) for m in range(5)
    ]
    assert (abs(found.mean(0) - exact) <= 4 * found.std(0) / 4000**0.5).all()
    one = new_gains(beta, C, np.zeros((4, 4)), rho)
    np.testing.assert_allclose(one, exact, rtol=1e-12)
    assert new_gains(np.zeros(3), np.zeros((3, 3)), np.zeros((3, 3)), 0.0).tolist() == [0] * 4
    assert kept_gains(np.zeros(0), np.zeros(0), np.zeros((0, 0))).tolist() == [0]
    with pytest.raises(ValueError, match="damping"):
        new_gains(beta, np.ones((4, 4)), np.zeros((4, 4)), 0.0)


def test_a_product_is_decomposed_without_its_zeros():
    torch.manual_seed(0)
    left, right = torch.randn(9, 4).double(), torch.randn(4, 6).double()
    left[:, 2] = 0
    u, sigma, v = product_pairs(left, right, -3.0)
    assert len(sigma) == 3
    torch.testing.assert_close((u * sigma) @ v.T, -3.0 * left @ right)


def test_rounding_in_a_rank_is_nothing_that_it_has_learnt():
    model, batches = plain(random=False), pairs(inputs=8, outputs=3)
    factors = model.get_base_model().first
    b, a = (getattr(factors, f"lora_{side}")["default"].weight for side in "BA")
    with torch.no_grad():
        # A gradient of rank 1, rounded as in float32 training.
        b += 1e-3 * torch.outer(torch.randn(7).double(), a @ torch.randn(8).double())
    wanted = RankProbe(model, loss_fn=half_squares, ahead=3).measure(batches)
    assert wanted.directions["first"][0].shape[1] == 6
    with torch.no_grad():
        b.copy_(b.float())
    found = RankProbe(model, loss_fn=half_squares, ahead=3).measure(batches)
    np.testing.assert_allclose(found.curves["first"], wanted.curves["first"], rtol=1e-4)
    assert len(set(found.curves["first"])) == 8


class Scaled(torch.nn.Module):
    """A layer in other units: inputs times a, and the weight over a."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(4)
        self.factor = factor
        self.layer = torch.nn.Linear(8, 7)
        self.head = torch.nn.Linear(7, 3)
        with torch.no_grad():
            self.layer.weight /= factor

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x * self.factor)))


@pytest.mark.parametrize("fisher", ["empirical", GAUSSIAN])
def test_curves_are_in_one_unit_whatever_the_units_of_a_layer(fisher):
    batches, found = pairs(inputs=8, outputs=3), []
    for factor in (1.0, 1024.0):
        model = adapted(Scaled(factor), target_modules=["layer"])
        with torch.no_grad():
            model.get_base_model().layer.lora_A["default"].weight /= factor
        probe = RankProbe(model, loss_fn=half_squares, fisher=fisher)
        found.append(probe.measure(batches).curves["layer"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert abs(found[0]).max() > 1e-3
