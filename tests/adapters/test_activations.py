"""Spectra of inputs: against svdvals of the inputs themselves, and PEFT's incremental PCA."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lorambo_adapters.spectra import activations  # noqa: E402
from lorambo_adapters.spectra.activations import activation_spectra  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


class Heads(torch.nn.Module):
    """Three layers with one input, as attention has, and one with another."""

    def __init__(self, width=80):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(width, 40) for _ in range(3))
        self.out = torch.nn.Linear(40, width)

    def forward(self, x):
        x = torch.tanh(x)
        return self.out(self.q(x) + self.k(x) * self.v(x))


def batches_of(count, width=80):
    generator = torch.Generator().manual_seed(0)
    decay = 3 * torch.arange(1, width + 1) ** -1.0
    return [0.5 + torch.randn(4, 30, width, generator=generator) * decay for _ in range(count)]


def inputs_of_q(batches):
    return torch.tanh(torch.cat(batches)).flatten(0, -2).double()


@pytest.fixture
def sketched(monkeypatch):
    """Sketches for layers that would be summed."""
    monkeypatch.setattr(activations, "EXACT_SIDE", 0)


@pytest.mark.parametrize("centered", [True, False])
def test_exact_sums_match_svdvals(centered):
    batches = batches_of(3)
    spectra = activation_spectra(Heads(), batches, rank=30, centered=centered)
    x = inputs_of_q(batches)
    x = x - x.mean(0) if centered else x
    exact = torch.linalg.svdvals(x).numpy()
    for name in "qkv":
        np.testing.assert_allclose(spectra[name], exact[:30], rtol=1e-4)
        assert spectra.unresolved[name] == pytest.approx(np.square(exact[30:]).sum(), rel=1e-3)
    assert spectra.shapes == {"q": (40, 80), "k": (40, 80), "v": (40, 80), "out": (80, 40)}
    assert "0 of them sketched in 1 passes" in spectra.source


@pytest.mark.parametrize("centered", [True, False])
def test_sketches_come_near_from_below(sketched, centered):
    batches = batches_of(3)
    x = inputs_of_q(batches)
    exact = torch.linalg.svdvals(x - x.mean(0) if centered else x).numpy()
    errors = []
    for passes in (1, 2, 4):
        spectra = activation_spectra(
            Heads(), iter(batches), rank=16, centered=centered, passes=passes
        )
        assert f"4 of them sketched in {passes} passes" in spectra.source
        error = 1 - spectra["q"] / exact[:16]
        assert np.all(error > -1e-4)
        errors.append(error[:8].max())
        total = np.square(spectra["q"]).sum() + spectra.unresolved["q"]
        assert total == pytest.approx(np.square(exact).sum(), rel=1e-4)
    assert errors[0] < 0.2
    assert errors[1] < 0.02
    assert errors[2] < 1e-3


class Products(TorchDispatchMode):
    """Counts matrix products by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("passes", [1, 3])
def test_layers_with_one_input_share_the_products(sketched, passes):
    with Products() as products:
        spectra = activation_spectra(
            Heads(), batches_of(2), rank=16, targets=["q", "k", "v"], passes=passes
        )
    assert products.shapes.count((120, 32)) == 2 * passes  # X P, once a batch and pass
    assert products.shapes.count((80, 32)) == 2 * passes
    np.testing.assert_array_equal(spectra["q"], spectra["k"])
    np.testing.assert_array_equal(spectra["q"], spectra["v"])


def test_exact_sums_are_shared_too():
    with Products() as products:
        activation_spectra(Heads(), batches_of(2), targets=["q", "k", "v"])
    assert products.shapes.count((80, 80)) == 2


def test_ratios_are_those_of_peft():
    pca = pytest.importorskip("peft.utils.incremental_pca", reason="peft is absent")
    batches = batches_of(3)
    spectra = activation_spectra(Heads(), batches, rank=16, ratio=True, targets=["q"])
    # As EVA runs it, though with as many components as there are: then it is exact.
    for components, tolerance in ((80, 1e-4), (32, 0.05)):
        reference = pca.IncrementalPCA(n_components=components, lowrank=components < 80)
        for batch in batches:
            reference.partial_fit(torch.tanh(batch).flatten(0, -2).float())
        np.testing.assert_allclose(
            np.square(spectra["q"]),
            reference.explained_variance_ratio_[:16].numpy(),
            rtol=tolerance,
        )
    total = np.square(spectra["q"]).sum() + spectra.unresolved["q"]
    assert total == pytest.approx(1, rel=1e-4)


def test_padding_and_modes():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.inner = torch.nn.Dropout(0.5), torch.nn.Linear(6, 6)

        def forward(self, x, attention_mask):
            return self.inner(self.drop(x))

    model = Model()
    model.inner.eval()
    x, mask = torch.randn(3, 5, 6), torch.ones(3, 5)
    mask[1, 2:] = 0
    batch = {"x": x, "attention_mask": mask}
    spectra = activation_spectra(model, [batch], centered=False)
    exact = torch.linalg.svdvals(x[mask != 0].double()).numpy()
    np.testing.assert_allclose(spectra["inner"], exact, rtol=1e-5)
    assert model.training
    assert model.drop.training
    assert not model.inner.training
    whole = activation_spectra(model, [batch], centered=False, mask=lambda batch: None)
    assert whole["inner"][0] > exact[0]


def test_bfloat16_is_summed_in_float32():
    model = torch.nn.Sequential(torch.nn.Linear(20, 20)).bfloat16()
    batches = [b.bfloat16() for b in batches_of(3, 20)]
    spectra = activation_spectra(model, batches)
    x = torch.cat(batches).flatten(0, -2).double()
    exact = torch.linalg.svdvals(x - x.mean(0)).numpy()
    np.testing.assert_allclose(spectra["0"], exact, rtol=1e-4)


def test_bad_input_is_named():
    model = Heads()
    with pytest.raises(ValueError, match="at least one batch"):
        activation_spectra(model, [])
    with pytest.raises(ValueError, match="layer 'q': expected finite inputs"):
        activation_spectra(model, [torch.full((2, 80), float("nan"))])
    with pytest.raises(ValueError, match=r"layer '0': .* embedding table"):
        activation_spectra(torch.nn.Sequential(torch.nn.Embedding(3, 2)), [], targets=["0"])
    with pytest.raises(ValueError, match="rank"):
        activation_spectra(model, batches_of(1), rank=0)
    with pytest.raises(ValueError, match="passes"):
        activation_spectra(model, batches_of(1), passes=0)


def test_layers_that_are_never_called_are_said():
    model = Heads()
    model.extra = torch.nn.Linear(4, 3)
    with pytest.warns(UserWarning, match="no input reached 1 layers, .* zero: 'extra'"):
        spectra = activation_spectra(model, batches_of(1))
    assert not spectra["extra"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    model, batches = Heads(), batches_of(2)
    expected = activation_spectra(model, batches)
    spectra = activation_spectra(model.to("cuda"), [b.to("cuda") for b in batches])
    for name in expected:
        np.testing.assert_allclose(
            spectra[name], expected[name], rtol=1e-3, atol=1e-4 * expected[name][0]
        )
