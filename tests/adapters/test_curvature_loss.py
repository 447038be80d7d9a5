"""Gains in units of the loss: what the spectra predict is what the loss really falls by."""

import itertools
from typing import Any

import numpy as np
import pytest

from lorambo_alloc import Spectra, allocate

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra.curvature import curvature_factors  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402
from lorambo_adapters.spectra.loss_units import (  # noqa: E402
    curvature_spectra,
    noise_edge,
    weighted_spectra,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def powers(factors) -> Any:
    return factors.powers(1.0)


class Parallel(torch.nn.Module):
    """Two linear layers beside each other, each with its own input and its own output metric.

    Half the squared error of its outputs has the Hessian A kron Q^T Q in each layer's weight, and
    nothing between the layers.
    """

    def __init__(self, shapes=((5, 4), (3, 6))):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(k, d, bias=False) for d, k in shapes)
        self.metrics = [torch.randn(d, d).double() for d, _ in shapes]
        self.double()

    def forward(self, inputs):
        outputs = [
            layer(x) @ q.T for layer, x, q in zip(self.layers, inputs, self.metrics, strict=True)
        ]
        return torch.cat(outputs, 1)


NAMES = ["layers.0", "layers.1"]
PREDICT = TrueFisher(lambda model, batch: model(batch[0]), likelihood="gaussian", draws="all")


def parallel():
    model = Parallel()
    inputs = [torch.randn(20, 4).double() @ torch.randn(4, 4).double(), torch.randn(20, 6).double()]
    target = 3 * torch.randn(20, 8).double()
    # Batches of unlike sizes: each term has the same weight all the same.
    batches = [([x[part] for x in inputs], target[part]) for part in (slice(0, 13), slice(13, 20))]
    return model, batches, (inputs, target)


def half_squared_errors(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(1)


def gradient(model, batch, name):
    weight = model.get_submodule(name).weight
    return torch.autograd.grad(half_squared_errors(model, batch).mean(), weight)[0]


def test_every_rank_vector_loses_exactly_what_is_predicted():
    model, batches, whole = parallel()
    factors = curvature_factors(
        model, batches, half_squared_errors, fisher=PREDICT, damping=0.0, targets=NAMES
    )
    spectra = curvature_spectra(
        model, batches, half_squared_errors, curvature=factors, targets=NAMES
    )
    gains = {name: np.concatenate([[0], np.cumsum(spectra[name] ** 2)]) for name in NAMES}
    before = half_squared_errors(model, whole).mean().item()
    weights = {name: model.get_submodule(name).weight for name in NAMES}
    gradients = {name: gradient(model, whole, name) for name in NAMES}
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    for ranks in itertools.product(range(5), range(4)):
        with torch.no_grad():
            for name, rank in zip(NAMES, ranks, strict=True):
                update = factors[name].best_update(gradients[name], rank)
                assert torch.linalg.matrix_rank(update) == rank
                weights[name].copy_(originals[name] + update)
            lost = before - half_squared_errors(model, whole).mean().item()
        predicted = sum(gains[name][rank] for name, rank in zip(NAMES, ranks, strict=True))
        assert lost == pytest.approx(predicted, rel=1e-10, abs=1e-10 * before)
    assert "in units of the mean loss per term" in spectra.source
    assert "true Fisher, gaussian" in spectra.source
    assert "of 20 terms" in spectra.source


def test_the_certified_value_of_an_allocation_is_the_loss_that_its_updates_lose():
    model, batches, whole = parallel()
    factors = curvature_factors(
        model, batches, half_squared_errors, fisher=PREDICT, damping=0.0, targets=NAMES
    )
    spectra = curvature_spectra(
        model, batches, half_squared_errors, curvature=factors, targets=NAMES
    )
    allocation = allocate(spectra, 36)
    before = half_squared_errors(model, whole).mean().item()
    updates = {
        name: factors[name].best_update(gradient(model, whole, name), int(allocation[name]))
        for name in NAMES
    }
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update
    lost = before - half_squared_errors(model, whole).mean().item()
    assert lost == pytest.approx(allocation.certificate.value, rel=1e-10)


def test_no_update_of_that_rank_does_better():
    model, batches, whole = parallel()
    name = NAMES[0]
    factors = curvature_factors(
        model, batches, half_squared_errors, fisher=PREDICT, damping=0.0, targets=[name]
    )[name]
    g = gradient(model, whole, name)
    best = float((factors.whiten(g) ** 2).sum()) / 2
    first = float(torch.linalg.svdvals(factors.whiten(g))[0] ** 2) / 2
    left = torch.randn(5, 1).double().requires_grad_()
    right = torch.randn(1, 4).double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [left, right], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    factors_a, factors_b = powers(factors)

    def closure():
        optimizer.zero_grad()
        update = left @ right
        value = (g * update).sum() + 0.5 * torch.trace(update.T @ factors_b @ update @ factors_a)
        value.backward()
        return value

    optimizer.step(closure)
    assert -closure().item() == pytest.approx(first, rel=1e-8)
    assert first < best


def test_damping_lowers_the_gains_and_gives_those_of_the_damped_quadratic():
    model, batches, whole = parallel()
    plain, damped = (
        curvature_spectra(
            model, batches, half_squared_errors, fisher=PREDICT, damping=damping, targets=NAMES
        )
        for damping in (0.0, 0.1)
    )
    factors = curvature_factors(
        model, batches, half_squared_errors, fisher=PREDICT, damping=0.1, targets=NAMES
    )
    for name in NAMES:
        assert (damped[name] < plain[name]).all()
        a, b = powers(factors[name])
        g = gradient(model, whole, name)
        update = factors[name].best_update(g, 2)
        value = (g * update).sum() + 0.5 * torch.trace(update.T @ b @ update @ a)
        assert -float(value) == pytest.approx(float((damped[name][:2] ** 2).sum()), rel=1e-10)


@pytest.mark.parametrize("kind", ["none", "input", "kfac", "ekfac", "diagonal"])
def test_values_are_those_of_the_whitened_gradient_over_root_two(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 20)
    ).double()
    x, labels = torch.randn(50, 40).double(), torch.randint(20, (50,))
    batches = [(x[:30], labels[:30]), (x[30:], labels[30:])]

    def losses(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    factors = curvature_factors(model, batches, losses, kind=kind, targets=["0", "2"])
    # Sketched (width 4 by 40 x 30) as well as exact.
    for width, rank in ((None, 64), (4, 3)):
        spectra = curvature_spectra(
            model, iter(batches), losses, rank, curvature=kind, targets=["0", "2"], width=width,
            passes=7, source="a test",
        )  # fmt: skip
        assert spectra.source.startswith("a test; whitened gradient / sqrt(2)")
        assert ("not in units of the loss" in spectra.source) == (kind in ("none", "input"))
        for name, values in spectra.items():
            g = torch.autograd.grad(losses(model, (x, labels)).mean(), model[int(name)].weight)[0]
            exact = torch.linalg.svdvals(factors[name].whiten(g)).numpy() / 2**0.5
            tolerance = 1e-9 if width is None else 0.05  # flat spectra
            np.testing.assert_allclose(values, exact[: len(values)], rtol=tolerance, atol=1e-12)
            energy = (exact[len(values) :] ** 2).sum()
            if width is None:
                assert spectra.unresolved[name] == pytest.approx(energy, abs=1e-12)


def test_updates_are_weighed_by_the_curvature(tmp_path):
    model, batches, whole = parallel()
    factors = curvature_factors(
        model, batches, half_squared_errors, fisher=PREDICT, damping=0.0, targets=NAMES
    )
    # From the minimum, the loss rises by what the truncation leaves out.
    optimum = {name: factors[name].best_update(gradient(model, whole, name), 6) for name in NAMES}
    spectra = weighted_spectra(optimum, factors)
    for name in NAMES:
        m = factors[name].weigh(optimum[name])
        np.testing.assert_allclose(spectra[name], torch.linalg.svdvals(m).numpy() / 2**0.5)
    # The optimum's own spectrum is the gradient's: both say the same of each rank.
    of_gradient = curvature_spectra(
        model, batches, half_squared_errors, curvature=factors, targets=NAMES
    )
    for name in NAMES:
        np.testing.assert_allclose(spectra[name], of_gradient[name], rtol=1e-9)
    short = weighted_spectra(optimum, factors, rank=1, source="deltas")
    assert short.unresolved["layers.0"] == pytest.approx(
        float((spectra["layers.0"][1:] ** 2).sum())
    )
    short.save(tmp_path / "spectra.npz")
    assert Spectra.load(tmp_path / "spectra.npz").source == short.source
    with pytest.raises(ValueError, match="layer 'other' is missing"):
        weighted_spectra({"other": torch.ones(2, 2)}, factors)
    with pytest.raises(ValueError, match=r"layer 'layers\.0': expected a finite update"):
        weighted_spectra({"layers.0": torch.full((5, 4), float("nan"))}, factors)


def classifier(n, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20)).double()
    x, labels = torch.randn(n, 30).double(), torch.randint(20, (n,))
    return model, (x, labels)


def cross_entropies(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_values_of_the_empirical_fisher_of_the_same_tokens_have_a_bound(damping):
    model, batch = classifier(25)  # fewer samples than a side: the bound is reached
    spectra = curvature_spectra(model, [batch], cross_entropies, damping=damping, targets=["0"])
    bound = 0.5**0.5
    assert spectra["0"].max() <= bound * (1 + 1e-9)
    if not damping:
        assert spectra["0"].max() == pytest.approx(bound, rel=1e-9)


def test_noise_alone_has_values_up_to_its_edge():
    # Labels drawn from the model itself: the gradient's mean is 0, and what is seen is noise.
    model, (x, _) = classifier(3000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        labels = torch.multinomial(torch.softmax(model(x), -1), 1)[:, 0]
    fisher = TrueFisher(lambda m, b: m(b[0]), draws="all")
    spectra = curvature_spectra(
        model, [(x, labels)], cross_entropies, fisher=fisher, damping=0.0, targets=["0"]
    )
    with pytest.raises(ValueError, match="terms: expected a whole number >= 1, got 0"):
        noise_edge((19, 30), 0)
    with pytest.raises(ValueError, match="at least one term in the batches"):
        curvature_spectra(
            model, [(x, labels)], lambda m, b: cross_entropies(m, b)[:0], curvature="none",
            targets=["0"],
        )  # fmt: skip
    edge = noise_edge((19, 30), 3000)  # 20 probabilities have 19 degrees of freedom
    assert 0.8 * edge < spectra["0"][0] < 1.05 * edge
