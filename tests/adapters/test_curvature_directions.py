"""Slopes and joint curvature of candidate directions, against gradients of every sample."""

import itertools

import numpy as np
import pytest

from lorambo_alloc import allocate
from lorambo_alloc.submodular import CoupledQuadratic, select

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra.candidates import candidate_directions  # noqa: E402
from lorambo_adapters.spectra.curvature import curvature_factors  # noqa: E402
from lorambo_adapters.spectra.directions import (  # noqa: E402
    Coupled,
    coupled_directions,
    first_dimension,
)
from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402
from lorambo_adapters.spectra.loss_units import curvature_spectra  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()


def classified(n=9):
    torch.manual_seed(2)
    return torch.randn(n, 4).double(), torch.randint(3, (n,))


def cross_entropies(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def random_directions(shapes, columns=3):
    torch.manual_seed(3)
    return {
        name: (torch.randn(d, columns).double(), torch.randn(k, columns).double())
        for name, (d, k) in shapes.items()
    }


def sample_derivatives(model, losses, directions, transposed=()):
    """u^T G_n v for each loss, by autograd."""
    rows = []
    for loss in losses:
        row = []
        for name, (u, v) in directions.items():
            weight = model.get_submodule(name).weight
            gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
            gradient = gradient.flatten(1).T if name in transposed else gradient.flatten(1)
            row.append(((gradient @ v) * u).sum(0))
        rows.append(torch.cat(row))
    return torch.stack(rows)


def check(found, c, terms):
    np.testing.assert_allclose(found.b, (c.sum(0) / terms).numpy(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.C, (c.T @ c / terms).numpy(), rtol=1e-10, atol=1e-14)
    assert (found.C == found.C.T).all()


def test_slopes_and_curvature_are_those_of_every_samples_gradient():
    model, batch = network(), classified()
    directions = random_directions({"2": (3, 5), "0": (5, 4)})
    halves = [tuple(part[:5] for part in batch), tuple(part[5:] for part in batch)]
    found = coupled_directions(model, halves, cross_entropies, directions)
    check(found, sample_derivatives(model, cross_entropies(model, batch), directions), 9)
    assert found.layers == ["2"] * 3 + ["0"] * 3
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    # The second moment of what b is the mean of: no gain exceeds a half.
    assert CoupledQuadratic(found.b, found.C, rho=1e-9).value(range(6)) <= 0.5
    mean = coupled_directions(
        model, [batch], lambda m, b: cross_entropies(m, b).mean(), directions, terms=9
    )
    np.testing.assert_allclose(mean.C, found.C, rtol=1e-10)
    np.testing.assert_allclose(mean.b, found.b, rtol=1e-10)


def test_the_true_fisher_is_the_gauss_newton_matrix():
    model, batch = network(), classified()
    directions = random_directions({"0": (5, 4), "2": (3, 5)})
    fisher = TrueFisher(lambda m, b: m(b[0]), draws="all")
    found = coupled_directions(model, [batch], cross_entropies, directions, fisher=fisher)
    outputs = model(batch[0])
    jacobian = sample_derivatives(model, outputs.flatten(), directions).view(9, 3, 6)
    p = torch.softmax(outputs.detach(), -1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("ncp,nce,neq->pq", jacobian, hessian, jacobian) / 9
    np.testing.assert_allclose(found.C, exact.numpy(), rtol=1e-10, atol=1e-14)
    c = sample_derivatives(model, cross_entropies(model, batch), directions)
    np.testing.assert_allclose(found.b, c.mean(0).numpy(), rtol=1e-10, atol=1e-14)
    drawn = TrueFisher(fisher.predict, draws=2000)
    sampled = coupled_directions(model, [batch], cross_entropies, directions, fisher=drawn)
    assert np.linalg.norm(sampled.C - found.C) < 0.05 * np.linalg.norm(found.C)


class Sequences(torch.nn.Module):
    """An embedding table, a layer that is called twice, and one of pooled tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.table = torch.nn.Embedding(6, 4)
        self.twice = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 3)
        self.double()

    def forward(self, ids, attention_mask):
        x = self.table(ids)
        x = torch.tanh(self.twice(x))
        x = torch.cumsum(self.twice(x), 1)
        return self.head((x * attention_mask[..., None]).sum(1))


def test_tokens_of_a_sample_add_up_and_padding_does_not_count():
    model = Sequences()
    ids = torch.randint(6, (5, 4))
    mask = torch.ones(5, 4, dtype=torch.long)
    mask[1, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "y": torch.randint(3, (5,))}

    def losses(model, batch):
        outputs = model(batch["input_ids"], batch["attention_mask"])
        return torch.nn.functional.cross_entropy(outputs, batch["y"], reduction="none")

    directions = random_directions({"table": (4, 6), "twice": (4, 4), "head": (3, 4)})
    found = coupled_directions(model, [batch], losses, directions)
    # The padding is behind all that counts, so nothing of it reaches the loss.
    c = sample_derivatives(model, losses(model, batch), directions, transposed=("table",))
    check(found, c, 5)
    # A mask that takes away tokens that do reach it must lower what is left.
    part = coupled_directions(
        model, [batch], losses, directions, mask=lambda batch: torch.zeros_like(mask)
    )
    assert not part.b[:6].any()
    np.testing.assert_allclose(part.b[6:], found.b[6:])  # five rows, not twenty: not masked


def test_convolutions():
    torch.manual_seed(5)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2, padding=1, stride=2), torch.nn.Tanh(), torch.nn.Flatten()
    ).double()
    x = torch.randn(4, 2, 4, 4).double()

    def losses(model, x):
        return model(x).square().sum(1)

    directions = random_directions({"0": (3, 8)})
    check(
        coupled_directions(model, [x], losses, directions),
        sample_derivatives(model, losses(model, x), directions),
        4,
    )


class Added(torch.nn.Module):
    """W x + V z: half its squared error is quadratic in both weights, and they interact."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.w = torch.nn.Linear(5, 4, bias=False)
        self.v = torch.nn.Linear(3, 4, bias=False)
        self.double()

    def forward(self, inputs):
        return self.w(inputs[0]) + self.v(inputs[1])


def test_what_a_set_of_directions_saves_is_what_the_loss_loses():
    model = Added()
    z = torch.randn(30, 3).double()
    x = torch.cat([z + 0.3 * torch.randn(30, 3).double(), torch.randn(30, 2).double()], 1)
    target = torch.randn(30, 4).double() + z @ torch.randn(3, 4).double()
    batch = ((x, z), target)

    def losses(model, batch):
        return 0.5 * (model(batch[0]) - batch[1]).square().sum(1)

    fisher = TrueFisher(lambda m, b: m(b[0]), likelihood="gaussian", draws="all")
    factors = curvature_factors(model, [batch], losses, fisher=fisher, damping=0.0)
    # Tuples of tensors: the first dimension of the first one.
    found = coupled_directions(
        model, [batch], losses, fisher=fisher, curvature=factors, per_layer=3
    )
    assert found.layers == ["w"] * 3 + ["v"] * 3
    f = CoupledQuadratic(found.b, found.C, layers=found.layers)
    before = losses(model, batch).mean().item()
    original = {name: model.get_submodule(name).weight.detach().clone() for name in "wv"}
    columns = [(name, j) for name in ("w", "v") for j in range(3)]
    for size in range(1, 7):
        for chosen in itertools.combinations(range(6), size):
            x_best = np.linalg.solve(found.C[np.ix_(chosen, chosen)], found.b[list(chosen)])
            with torch.no_grad():
                for name, weight in original.items():
                    model.get_submodule(name).weight.copy_(weight)
                for j, coefficient in zip(chosen, x_best, strict=True):
                    name, column = columns[j]
                    u, v = (side[:, column] for side in found.directions[name])
                    model.get_submodule(name).weight -= coefficient * torch.outer(u, v)
                lost = before - losses(model, batch).mean().item()
            assert lost == pytest.approx(f.value(chosen), rel=1e-9)
    # The layers say much the same, so together they save less than each does alone.
    assert f.value(range(6)) < 0.9 * (f.value(range(3)) + f.value(range(3, 6)))
    selection = select(f, {"w": 1, "v": 1}, 2)
    assert selection.ranks is not None
    assert sum(selection.ranks.values()) == 2


def quadratic(model, batch, name, update):
    """<G, D> + 1/2 <D, F D> of the mean cross entropy, in the exact true Fisher."""
    weight = model.get_submodule(name).weight
    g = torch.autograd.grad(cross_entropies(model, batch).mean(), weight)[0]

    def outputs(weight):
        return torch.func.functional_call(model, {f"{name}.weight": weight}, (batch[0],))

    logits, change = torch.autograd.functional.jvp(outputs, weight.detach(), update)
    p = torch.softmax(logits, -1)
    curvature = ((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).mean()
    return float((g * update).sum() + 0.5 * curvature)


def test_curves_are_what_the_first_candidates_of_a_layer_save_in_the_exact_quadratic_model():
    model, batch = network(), classified(40)
    fisher = TrueFisher(lambda m, b: m(b[0]), draws="all")
    factors = curvature_factors(
        model, [batch], cross_entropies, fisher=fisher, damping=1e-3, targets=["0", "2"]
    )
    found = coupled_directions(
        model, [batch], cross_entropies, fisher=fisher, curvature=factors, per_layer=3,
        targets=["0", "2"],
    )  # fmt: skip
    curves = found.curves()
    assert list(curves) == ["0", "2"]
    ranks = {"0": 3, "2": 2}  # three classes: logits have two degrees of freedom
    for i, (name, most) in enumerate(ranks.items()):
        u, v = found.directions[name]
        saved = []
        for rank in range(most + 1):
            of = slice(3 * i, 3 * i + rank)
            x = torch.from_numpy(np.linalg.solve(found.C[of, of], found.b[of]))
            saved.append(-quadratic(model, batch, name, -(u[:, :rank] * x) @ v[:, :rank].T))
            # No other coefficients do better.
            for _ in range(3 if rank else 0):
                other = x + 0.1 * torch.randn(rank).double()
                update = -(u[:, :rank] * other) @ v[:, :rank].T
                assert -quadratic(model, batch, name, update) < saved[-1]
        np.testing.assert_allclose(curves[name][: most + 1], saved, rtol=1e-10, atol=1e-14)
        assert (np.diff(curves[name]) >= 0).all()
    f = CoupledQuadratic(found.b, found.C, rho=0.3, layers=found.layers)
    damped = found.curves(rho=0.3)
    assert damped["2"][2] == pytest.approx(f.value([3, 4]), rel=1e-12)
    assert damped["2"][2] < curves["2"][2]
    with pytest.raises(ValueError, match="rho: expected a finite number >= 0, got -1"):
        found.curves(-1)


def test_curves_go_to_the_solver_and_a_direction_without_curvature_adds_nothing():
    b, c = np.array([3.0, 3.0, 1.0, 2.0]), np.diag([2.0, 2.0, 4.0, 1.0])
    c[0, 1] = c[1, 0] = 2.0  # the second candidate is the first one again
    found = Coupled(b, c, ["q", "q", "q", "v"], {})
    curves = found.curves()
    np.testing.assert_allclose(curves["q"], [0, 2.25, 2.25, 2.375])
    np.testing.assert_allclose(curves["v"], [0, 2.0])
    allocation = allocate(curves, 2)
    assert allocation.certificate.value == pytest.approx(4.25)
    flat = Coupled(b, np.zeros((4, 4)), ["q", "q", "q", "v"], {}).curves()
    assert flat["q"].tolist() == [0, 0, 0, 0]


def test_whitened_gradients_overstate_what_curves_measure():
    # The factors leave out products of a sample's tokens, and a mean over them has little else.
    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    pooled = torch.nn.Sequential(model[0])
    x = torch.randn(30, 1, 4).double() + 0.3 * torch.randn(30, 8, 4).double()
    batch = x, torch.randint(3, (30,))

    def losses(model, batch):
        return torch.nn.functional.cross_entropy(
            model(batch[0]).mean(1), batch[1], reduction="none"
        )

    fisher = TrueFisher(lambda m, b: m(b[0]).mean(1), draws="all")
    kwargs = {"fisher": fisher, "targets": ["0"]}
    factors = curvature_factors(pooled, [batch], losses, damping=0.0, **kwargs)
    spectra = curvature_spectra(pooled, [batch], losses, curvature=factors, targets=["0"])
    curves = coupled_directions(
        pooled, [batch], losses, curvature=factors, per_layer=2, **kwargs
    ).curves()
    weight = model[0].weight

    def mean(weight):
        outputs = torch.nn.functional.linear(x, weight, model[0].bias).mean(1)
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    # Of logits that are linear in the weight the Fisher is the Hessian.
    g = torch.autograd.grad(mean(weight), weight)[0].flatten()
    hessian = torch.autograd.functional.hessian(mean, weight.detach()).reshape(12, 12)
    most = 0.5 * float(g @ torch.linalg.pinv(hessian, hermitian=True) @ g)
    assert curves["0"][-1] <= most * (1 + 1e-9)
    assert curves["0"][-1] > 0.8 * most
    assert 5 * most < (spectra["0"] ** 2).sum() < 9 * most  # there are 8 tokens


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("shape", [(20, 15), (90, 80)])  # summed exactly, and sketched
def test_default_candidates_are_the_singular_pairs_of_the_whitened_gradient(whitened, shape):
    torch.manual_seed(7)
    d, k = shape
    model = torch.nn.Sequential(torch.nn.Linear(k, d), torch.nn.Tanh()).double()
    x = torch.randn(40, k).double() * torch.logspace(0, -2, k).double()
    batches = [x[:25], x[25:]]

    def losses(model, x):
        return (model(x) * torch.linspace(1, 2, d)).square().sum(1)

    factors = None
    if whitened:
        factors = curvature_factors(model, batches, losses, damping=0.1, targets=["0"])
    u, v = candidate_directions(model, iter(batches), losses, 4, curvature=factors, targets=["0"])[
        "0"
    ]
    assert u.shape == (d, 4)
    assert v.shape == (k, 4)
    g = torch.autograd.grad(losses(model, x).mean(), model[0].weight)[0]
    m = g if factors is None else factors["0"].whiten(g)
    expected = torch.linalg.svdvals(m)[:4]
    slopes = ((g @ v) * u).sum(0)
    # The sketch of a flat whitened spectrum is the coarsest of the four.
    torch.testing.assert_close(slopes, expected, rtol=0.01, atol=0)
    if factors is not None:
        # Of unit curvature, and uncoupled, in the Kronecker model.
        weighed = torch.stack([factors["0"].weigh(torch.outer(a, b)).flatten()
                               for a, b in zip(u.T, v.T, strict=True)])  # fmt: skip
        torch.testing.assert_close(weighed @ weighed.T, torch.eye(4).double(), rtol=0, atol=1e-6)


def test_fewer_candidates_where_the_gradient_has_a_lower_rank():
    model, batch = network(), classified(2)
    found = coupled_directions(model, [batch], cross_entropies, per_layer=8, targets=["0", "2"])
    assert found.layers == ["0"] * 2 + ["2"] * 2
    with pytest.raises(ValueError, match="expected a gradient that is not zero"):
        candidate_directions(model, [batch], lambda m, b: 0 * cross_entropies(m, b), targets=["0"])


def test_bad_input_is_refused():
    model, batch = network(), classified()
    good = random_directions({"0": (5, 4)})

    def call(directions, **kwargs):
        return coupled_directions(model, [batch], cross_entropies, directions, **kwargs)

    with pytest.raises(ValueError, match=r"layer '0': expected U of shape \(5, m\)"):
        call(random_directions({"0": (4, 5)}))
    with pytest.raises(ValueError, match=r"names of the model's layers, got '2\.x'"):
        call({"0": good["0"], "2.x": good["0"]})
    with pytest.raises(ValueError, match="at least one layer, got none"):
        call({})
    with pytest.raises(ValueError, match="layer '0': got NaN or infinity"):
        call({"0": (good["0"][0] * float("nan"), good["0"][1])})
    with pytest.raises(ValueError, match="expected a multiple of 4 samples"):
        call(good, samples=lambda batch: 4)
    with pytest.raises(ValueError, match="at least one batch"):
        coupled_directions(model, [], cross_entropies, good)
    with pytest.raises(ValueError, match="at least one batch"):
        candidate_directions(model, [], cross_entropies, targets=["0"])
    with pytest.raises(ValueError, match="layer '0': expected finite gradients"):
        candidate_directions(
            model, [batch], lambda m, b: (m(b[0]) - m(b[0])).sum(1).sqrt(), targets=["0"]
        )
    with pytest.raises(ValueError, match="at least one term in the batches"):
        coupled_directions(model, [batch], lambda m, b: cross_entropies(m, b)[:0], good)
    some = TrueFisher(lambda m, b: (m(b[0]), torch.arange(9) > 0))
    with pytest.raises(ValueError, match="the terms of the loss, 9 in this batch, got 8"):
        call(good, fisher=some)
    padded = torch.nn.Sequential(torch.nn.Embedding(5, 3, padding_idx=0))
    with pytest.raises(ValueError, match="embedding table with padding_idx"):
        coupled_directions(padded, [batch], cross_entropies, random_directions({"0": (3, 5)}))
    with pytest.raises(ValueError, match="pass samples="):
        first_dimension({"scale": 3.0})
    assert first_dimension([[], ("text", torch.zeros(7, 2))]) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model, batch = network(), classified()
    here = coupled_directions(
        model, [batch], cross_entropies, random_directions({"0": (5, 4), "2": (3, 5)})
    )
    there = coupled_directions(
        model.cuda(), [tuple(part.cuda() for part in batch)], cross_entropies, here.directions
    )
    np.testing.assert_allclose(there.C, here.C, rtol=1e-9, atol=1e-12)
