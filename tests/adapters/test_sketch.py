"""The sketches: exact on low rank, additive, and with estimates that are what they claim."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra import inputs as inputs_module  # noqa: E402
from lorambo_adapters.spectra.gaussians import Gaussians  # noqa: E402
from lorambo_adapters.spectra.inputs import DenseInputs, TokenInputs  # noqa: E402
from lorambo_adapters.spectra.sketch import (  # noqa: E402
    PROBES,
    ExactSum,
    SubspaceSketch,
    TwoSidedSketch,
    two_sided_widths,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BFLOAT16 = torch.bfloat16
CPU, DOUBLE, NONE = torch.device("cpu"), torch.float64, (None, None)


@pytest.fixture(autouse=True)
def arithmetic_for_bfloat16(monkeypatch):
    """On any processor: where it has none, torch is slow, and these matrices are small."""
    monkeypatch.setattr(inputs_module, "multiplies_bfloat16", lambda device: True)


def data(d, k, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator, dtype=DOUBLE)
    decay = torch.arange(1, d + 1, dtype=DOUBLE) ** -1.0
    g = torch.randn(tokens, d, generator=generator, dtype=DOUBLE) * decay
    return x, g


def two_sided(shape, width, seed=0, whitening=NONE, rounded=False):
    columns = two_sided_widths(width)[1]
    gaussians = Gaussians(max(shape), columns, columns, seed)
    return TwoSidedSketch(shape, width, gaussians, whitening, CPU, DOUBLE, rounded)


def subspace(shape, width, passes, seed=0, whitening=NONE, rounded=False):
    gaussians = Gaussians(max(shape), 2 * width + PROBES, PROBES, seed)
    return SubspaceSketch(shape, width, passes, gaussians, whitening, CPU, DOUBLE, rounded)


def feed(sketch, x, g, passes=1):
    for number in range(1, passes + 1):
        sketch.update(DenseInputs(x, DOUBLE), g, 1.0)
        if number < passes:
            sketch.next_pass(1.0)
    return sketch


def run(sketch, x, g, passes=1):
    return feed(sketch, x, g, passes).spectrum(1.0)


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


def low(d, k, tokens, seed=0):
    """Tokens and gradients in bfloat16, and their exact product."""
    x, g = (m.to(BFLOAT16) for m in data(d, k, tokens, seed))
    return x, g, g.double().T @ x.double()


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_what_is_decomposed_is_what_the_rounded_test_matrices_gave(shape, passes):
    # These tokens are float64, so that test matrices are all that is rounded.
    if passes == 1:
        x, g = data(*shape, tokens=5)
        sketch = two_sided(shape, 16, rounded=True)
        assert sketch._omega.dtype == sketch._psi.dtype == BFLOAT16
        values, unresolved = run(sketch, x, g)
        expected = torch.linalg.svdvals(g.T @ x).numpy()[:5]
        np.testing.assert_allclose(values[:5], expected, rtol=1e-9)
        assert unresolved < 1e-9 * values[0] ** 2
        return
    x, g = data(*shape, tokens=300)
    sketch = feed(subspace(shape, 8, passes, rounded=True), x, g, passes)
    values, unresolved = sketch.spectrum(1.0)
    gradient = g.T @ x if passes == 3 else x.T @ g
    (rounded,) = sketch.carried
    assert rounded.dtype == BFLOAT16
    basis = torch.linalg.qr(rounded.double())[0]
    np.testing.assert_allclose(values, torch.linalg.svdvals(gradient @ basis).numpy(), rtol=1e-9)
    rest = gradient - gradient @ basis @ basis.T
    truth = float((rest @ sketch._probes.double()).square().sum()) / PROBES
    assert unresolved == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("shape", [(160, 120), (120, 160)])
@pytest.mark.parametrize("passes", [2, 3, 5])
def test_bfloat16_products_come_about_as_close(shape, passes):
    x, g, gradient = low(*shape, tokens=300)
    expected = torch.linalg.svdvals(gradient).numpy()
    found, unresolved = run(subspace(shape, 16, passes, rounded=True), x, g, passes)
    fine, rest = run(subspace(shape, 16, passes), x, g, passes)
    assert not np.array_equal(found, fine)
    np.testing.assert_allclose(found[:16], fine[:16], rtol=5e-3)
    assert np.all(found < expected[:32] * 1.005)
    assert unresolved == pytest.approx(rest, rel=0.01)


@pytest.mark.parametrize("shape", [(48, 40), (40, 48)])
def test_the_energy_of_a_two_sided_sketch_is_unbiased_in_bfloat16(shape):
    x, g, gradient = low(*shape, tokens=100)
    energy = float(gradient.square().sum())
    totals, differences = [], []
    for seed in range(300):
        values, unresolved = run(two_sided(shape, 16, seed, rounded=True), x, g)
        totals.append((np.square(values).sum() + unresolved) / energy)
        values, unresolved = run(two_sided(shape, 16, seed), x, g)
        differences.append(totals[-1] - (np.square(values).sum() + unresolved) / energy)
    error = np.std(totals) / len(totals) ** 0.5
    assert abs(np.mean(totals) - 1) < 4 * error
    assert error < 0.02
    # With the same Gaussian numbers, much closer than the sketch's own error lets see.
    assert 0 < np.max(np.abs(differences)) < 0.05
    assert abs(np.mean(differences)) < 5e-4


def test_bfloat16_products_are_off_by_what_is_stated():
    x, g, gradient = low(160, 120, tokens=400)
    single = float((g.double().square().sum(1) * x.double().square().sum(1)).sum())
    sketch = two_sided((160, 120), 32, rounded=True)
    sketch.update(DenseInputs(x, torch.float32), g, 0.5)
    y, z = sketch.accumulators
    for found, exact in (
        (y, gradient @ sketch._omega.double()),
        (z, sketch._psi.double().T @ gradient),
    ):
        columns = min(found.shape)
        assert 2**-20 < float((2 * found - exact).square().sum()) / columns / single < 2**-17
    # And no more than the sum's own rounding where the precision is enough.
    sketch = two_sided((160, 120), 32)
    sketch.update(DenseInputs(x, torch.float32), g.float(), 1.0)
    exact = gradient @ sketch._omega.double()
    assert float((sketch.accumulators[0] - exact).norm()) < 1e-6 * float(exact.norm())


def test_what_is_not_bfloat16_on_both_sides_is_multiplied_as_ever():
    x, g, gradient = low(60, 50, tokens=200)
    for inputs, given in (
        (DenseInputs(x.float()), g),
        (DenseInputs(x, torch.float32), g.float()),
        (DenseInputs(x.half(), torch.float32), g.half()),
    ):
        truth = given.double().T @ inputs.matrix.double()
        sketch = two_sided((60, 50), 8, rounded=True)
        sketch.update(inputs, given, 1.0)
        exact = truth @ sketch._omega.double()
        assert float((sketch.accumulators[0] - exact).norm()) < 1e-6 * float(exact.norm())
    # Both kinds among layers that share their input: each finds its own products.
    inputs = DenseInputs(x, torch.float32)
    gaussians = Gaussians(60, 10, 10, 0)
    sketches = [
        TwoSidedSketch((60, 50), 8, gaussians, NONE, CPU, torch.float32, True) for _ in range(4)
    ]
    for sketch, given in zip(sketches, (g, g.float(), g, g), strict=True):
        sketch.update(inputs, given, 1.0)
    exact = gradient @ sketches[0]._omega.double()
    for sketch, error in zip(sketches, (2**-8, 1e-6, 2**-8, 2**-8), strict=True):
        assert float((sketch.accumulators[0] - exact).norm()) < error * float(exact.norm())
    assert not torch.equal(sketches[0].accumulators[0], sketches[1].accumulators[0])
    torch.testing.assert_close(sketches[0].accumulators, sketches[2].accumulators, rtol=0, atol=0)


@pytest.mark.parametrize("rounded", [False, True])
def test_an_embedding_tables_tokens(rounded):
    d, k = 40, 90
    ids = torch.randint(0, k, (300,), generator=torch.Generator().manual_seed(1))
    g = data(d, k, tokens=300)[1].to(BFLOAT16)
    gradient = g.double().T @ torch.eye(k, dtype=DOUBLE)[ids]
    expected = torch.linalg.svdvals(gradient).numpy()
    gaussians = Gaussians(k, 2 * 16 + PROBES, PROBES, 0)
    sketch = SubspaceSketch((d, k), 16, 3, gaussians, NONE, CPU, torch.float32, rounded)
    for number in range(3):
        sketch.update(TokenInputs(ids, torch.float32), g, 1.0)
        if number < 2:
            sketch.next_pass(1.0)
    values, _ = sketch.spectrum(1.0)
    np.testing.assert_allclose(values[:8], expected[:8], rtol=2e-3)


def test_a_whitened_sketch_is_not_rounded():
    whitening = torch.linspace(1, 2, 40, dtype=DOUBLE), None
    for make in (
        lambda **options: two_sided((60, 40), 8, **options),
        lambda **options: subspace((60, 40), 4, 3, **options),
    ):
        assert make(rounded=True).rounded
        assert not make(rounded=True, whitening=whitening).rounded
        assert not make().rounded


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("kind", ["exact", "one pass", "two passes", "three passes"])
@pytest.mark.parametrize("rounded", [False, True])
def test_singular_pairs(shape, kind, rounded):
    x, g = data(*shape, tokens=5)
    generator = torch.Generator().manual_seed(3)
    factors = [torch.rand(side, generator=generator, dtype=DOUBLE) + 0.5 for side in shape[::-1]]
    whitening = NONE if rounded else (factors[0], factors[1])
    options = {"whitening": whitening, "rounded": rounded}
    passes = {"two passes": 2, "three passes": 3}.get(kind, 1)
    if kind == "exact":
        sketch = ExactSum(shape, whitening, CPU, DOUBLE)
    elif kind == "one pass":
        sketch = two_sided(shape, 16, **options)
    else:
        sketch = subspace(shape, 8, passes, **options)
    gradient = g.T @ x
    if not rounded:
        gradient = factors[1][:, None] * gradient * factors[0]
    left, values, right = feed(sketch, x, g, passes).pairs(2.0)
    assert left.shape == (shape[0], 5)  # what is zero is left out
    assert right.shape == (shape[1], 5)
    # A rounded basis spans the gradient's range up to its rounding.
    near = 5e-3 * float(gradient.norm()) if rounded and passes > 1 else 1e-9
    assert float((left @ torch.diag(values) @ right.T - gradient / 2).norm()) < near
    identity = torch.eye(5, dtype=DOUBLE)
    torch.testing.assert_close(left.T @ left, identity)
    torch.testing.assert_close(right.T @ right, identity)
    np.testing.assert_allclose(values.numpy(), sketch.spectrum(2.0)[0][:5], rtol=1e-8)


def test_the_pairs_of_a_gradient_of_full_rank():
    shape = (60, 40)
    x, g = data(*shape, tokens=300)
    sketch = feed(subspace(shape, 8, 6), x, g, 6)
    left, values, right = sketch.pairs(1.0)
    u, _, v = torch.linalg.svd(g.T @ x)
    np.testing.assert_allclose(values.numpy(), sketch.spectrum(1.0)[0], rtol=1e-10)
    for found, exact in ((left, u), (right, v.T)):
        inner = (found[:, :4] * exact[:, :4]).sum(0).abs()
        assert torch.all(inner > 1 - 1e-3)
    zero = torch.zeros(5, 40, dtype=DOUBLE), torch.zeros(5, 60, dtype=DOUBLE)
    assert feed(subspace(shape, 8, 3), *zero, 3).pairs(1.0)[0].shape == (60, 0)


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
