"""The sketches: exact on low rank, additive, and with estimates that are what they claim."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra.inputs import DenseInputs  # noqa: E402
from lorambo_adapters.spectra.sketch import (  # noqa: E402
    PROBES,
    ExactSum,
    Gaussians,
    SubspaceSketch,
    TwoSidedSketch,
    two_sided_widths,
)

CPU, DOUBLE, NONE = torch.device("cpu"), torch.float64, (None, None)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(d, k, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator, dtype=DOUBLE)
    decay = torch.arange(1, d + 1, dtype=DOUBLE) ** -1.0
    g = torch.randn(tokens, d, generator=generator, dtype=DOUBLE) * decay
    return x, g


def two_sided(shape, width, seed=0, whitening=NONE):
    columns = two_sided_widths(width)[1]
    gaussians = Gaussians(max(shape), columns, columns, seed)
    return TwoSidedSketch(shape, width, gaussians, whitening, CPU, DOUBLE)


def subspace(shape, width, passes, seed=0, whitening=NONE):
    gaussians = Gaussians(max(shape), 2 * width + PROBES, PROBES, seed)
    return SubspaceSketch(shape, width, passes, gaussians, whitening, CPU, DOUBLE)


def run(sketch, x, g, passes=1):
    for number in range(1, passes + 1):
        sketch.update(DenseInputs(x), g, 1.0)
        if number < passes:
            sketch.next_pass(1.0)
    return sketch.spectrum(1.0)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_a_gradient_of_low_rank_is_recovered(shape, passes):
    x, g = data(*shape, tokens=5)  # rank 5
    sketch = two_sided(shape, 16) if passes == 1 else subspace(shape, 8, passes)
    values, unresolved = run(sketch, x, g, passes)
    expected = torch.linalg.svdvals(g.T @ x).numpy()
    np.testing.assert_allclose(values[:5], expected[:5], rtol=1e-9)
    assert np.all(values[5:] < 1e-6 * values[0])
    assert unresolved < 1e-9 * values[0] ** 2


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_more_passes_converge_from_below(shape):
    x, g = data(*shape, tokens=300)
    expected = torch.linalg.svdvals(g.T @ x).numpy()
    errors = []
    for passes in (2, 3, 4, 6):
        values, unresolved = run(subspace(shape, 8, passes), x, g, passes)
        assert np.all(values <= expected[:16] * (1 + 1e-12))
        assert unresolved > 0
        errors.append(np.max(1 - values[:6] / expected[:6]))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[1] < 0.02
    assert errors[3] < 1e-4


def test_updates_add_up():
    x, g = data(30, 50, tokens=64)
    for make in (lambda: two_sided((30, 50), 12), lambda: subspace((30, 50), 6, 2)):
        whole, parts = make(), make()
        whole.update(DenseInputs(x), g, 0.5)
        for start in range(0, 64, 16):
            part = slice(start, start + 16)
            parts.update(DenseInputs(x[part]), g[part], 0.5)
        for a, b in zip(whole.accumulators, parts.accumulators, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(48, 40), (40, 48)])
def test_the_energy_of_a_two_sided_sketch_is_unbiased(shape):
    x, g = data(*shape, tokens=100)
    energy = float((g.T @ x).square().sum())
    totals = []
    for seed in range(300):
        values, unresolved = run(two_sided(shape, 16, seed), x, g)
        totals.append((np.square(values).sum() + unresolved) / energy)
    error = np.std(totals) / len(totals) ** 0.5
    assert abs(np.mean(totals) - 1) < 4 * error
    assert error < 0.02


def test_the_residual_of_a_two_sided_sketch_has_the_variance_that_is_stated():
    # With Omega fixed, so that R is: only Psi is drawn anew.
    shape, width = (48, 40), 16
    narrow, wide = two_sided_widths(width)
    x, g = data(*shape, tokens=100)
    gradient = g.T @ x
    omega = torch.randn(40, narrow, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    q = torch.linalg.qr(gradient @ omega)[0]
    rest = gradient - q @ (q.T @ gradient)
    estimates = []
    generator = torch.Generator().manual_seed(2)
    for _ in range(2000):
        psi = torch.randn(48, wide, generator=generator, dtype=DOUBLE)
        z, basis = psi.T @ gradient, torch.linalg.qr(psi.T @ q)[0]
        estimates.append(float((z - basis @ (basis.T @ z)).square().sum()) / (wide - narrow))
    truth = float(rest.square().sum())
    variance = 2 * float((rest @ rest.T).square().sum()) / (wide - narrow)
    assert abs(np.mean(estimates) - truth) < 4 * (variance / 2000) ** 0.5
    assert np.var(estimates) == pytest.approx(variance, rel=0.15)


def test_the_probes_have_the_mean_and_variance_that_are_stated():
    shape, width = (48, 40), 6
    x, g = data(*shape, tokens=100)
    gradient = g.T @ x
    basis = torch.linalg.qr(torch.randn(48, 12, dtype=DOUBLE))[0]
    rest = gradient - basis @ (basis.T @ gradient)
    estimates = []
    for seed in range(1000):
        sketch = subspace(shape, width, 2, seed)
        sketch.restore(2, [basis])
        sketch.update(DenseInputs(x), g, 1.0)
        estimates.append(sketch.spectrum(1.0)[1])
    variance = float((rest @ rest.T).square().sum()) / 4
    assert abs(np.mean(estimates) - float(rest.square().sum())) < 4 * (variance / 1000) ** 0.5
    assert np.var(estimates) == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_whitening(shape, diagonal):
    d, k = shape
    x, g = data(d, k, tokens=6)
    generator = torch.Generator().manual_seed(3)
    factors = []
    for side in (k, d):
        square = torch.randn(side, side, generator=generator, dtype=DOUBLE)
        square = square @ square.T / side + torch.eye(side, dtype=DOUBLE)
        factors.append(square.diagonal().clone() if diagonal else square)
    right, left = (torch.diag(f) if diagonal else f for f in factors)
    expected = torch.linalg.svdvals(left @ (g.T @ x) @ right).numpy()[:6]
    whitening = (factors[0], factors[1])
    exact = ExactSum(shape, whitening, CPU, DOUBLE)
    np.testing.assert_allclose(run(exact, x, g)[0][:6], expected, rtol=1e-10)
    sketch = two_sided(shape, 12, whitening=whitening)
    np.testing.assert_allclose(run(sketch, x, g)[0][:6], expected, rtol=1e-8)
    for passes in (2, 3):
        sketch = subspace(shape, 6, passes, whitening=whitening)
        np.testing.assert_allclose(run(sketch, x, g, passes)[0][:6], expected, rtol=1e-8)
    one_side = ExactSum(shape, (factors[0], None), CPU, DOUBLE)
    expected = torch.linalg.svdvals((g.T @ x) @ right).numpy()[:6]
    np.testing.assert_allclose(run(one_side, x, g)[0][:6], expected, rtol=1e-10)


@pytest.mark.parametrize("width", [4, 16, 64, 65, 200])
@pytest.mark.parametrize("shape", [(500, 400), (400, 3000), (3000, 400)])
def test_the_sums_keep_to_the_formula(width, shape):
    sketch = two_sided(shape, width)
    numbers = sum(a.numel() for a in sketch.accumulators)
    assert numbers <= sum(shape) * width
    narrow, wide = two_sided_widths(width)
    assert narrow < wide
    assert narrow + wide == 2 * width
    chain = subspace(shape, width, 2)
    assert sum(a.numel() for a in chain.accumulators) == shape[0] * 2 * width
    chain.next_pass(1.0)
    assert sum(a.numel() for a in chain.accumulators) == shape[1] * (2 * width + PROBES)


def test_zero_is_zero():
    zero = torch.zeros(5, 40, dtype=DOUBLE), torch.zeros(5, 30, dtype=DOUBLE)
    for sketch, passes in ((two_sided((30, 40), 8), 1), (subspace((30, 40), 4, 3), 3)):
        values, unresolved = run(sketch, *zero, passes)
        assert not values.any()
        assert unresolved == 0


def test_a_sum_that_is_complete_stays_as_it_is():
    x, g = data(6, 4, tokens=9)
    exact = ExactSum((6, 4), NONE, CPU, DOUBLE)
    exact.update(DenseInputs(x), g, 1.0)
    exact.next_pass(2.0)
    exact.update(DenseInputs(x), g, 1.0)
    exact.next_pass(7.0)
    expected = torch.linalg.svdvals(g.T @ x).numpy() / 2
    np.testing.assert_allclose(exact.spectrum(5.0)[0], expected, rtol=1e-12)


def test_passes_that_are_missing_or_too_many():
    with pytest.raises(ValueError, match="expected 3 passes over the batches, got 1"):
        subspace((30, 40), 4, 3).spectrum(1.0)
    with pytest.raises(ValueError, match="one pass"):
        two_sided((30, 40), 8).next_pass(1.0)


def test_test_matrices_are_shared_and_independent():
    gaussians = Gaussians(20, 6, 6, 0)
    a = gaussians.right(10, slice(0, 4), CPU, DOUBLE)
    assert a is gaussians.right(10, slice(0, 4), CPU, DOUBLE)
    assert not torch.equal(a, gaussians.left(10, slice(0, 4), CPU, DOUBLE))
    assert gaussians.fingerprint() == Gaussians(20, 6, 6, 0).fingerprint()
    assert gaussians.fingerprint() != Gaussians(20, 6, 6, 1).fingerprint()
