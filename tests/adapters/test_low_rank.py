"""Spectra of products from their factors, against the singular values of the product itself."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra.kronecker import Curvature  # noqa: E402
from lorambo_adapters.spectra.low_rank import (  # noqa: E402  (needs torch)
    LowRankUpdate,
    low_rank_spectra,
    product_values,
    refuse,
)
from lorambo_adapters.spectra.whitening import Factors, SymmetricFactor  # noqa: E402

EPS = 2.0**-52
SIDES = st.integers(1, 12)


def gaussians(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(seed, n, rank):
    """A symmetric positive semidefinite matrix."""
    x = gaussians(seed, rank, n)
    return x.T @ x / rank


def root(matrix):
    """The symmetric square root."""
    if matrix.ndim == 1:
        return matrix.sqrt().diag()
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@given(
    d=SIDES,
    k=SIDES,
    rank=SIDES,
    used=SIDES,
    sizes=st.tuples(st.integers(-60, 60), st.integers(-60, 60)),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_are_those_of_the_product(d, k, rank, used, sizes, seed):
    left = gaussians(seed, d, rank) * 2.0 ** sizes[0]
    right = gaussians(seed + 1, rank, k) * 2.0 ** sizes[1]
    left[:, used:] = 0  # of lower rank than it has columns
    expected = torch.linalg.svdvals(left @ right)[:rank]
    found = product_values(left, right)
    bound = float(torch.linalg.matrix_norm(left, 2) * torch.linalg.matrix_norm(right, 2))
    assert len(found) == min(d, k, rank)
    assert torch.all((found - expected).abs() <= 100 * EPS * bound)
    assert torch.all(found.diff() <= 0)


@given(
    d=SIDES,
    k=SIDES,
    rank=SIDES,
    kinds=st.tuples(*2 * [st.sampled_from(["none", "diagonal", "full", "deficient"])]),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_weighted_by_curvature(d, k, rank, kinds, seed):
    left, right = gaussians(seed, d, rank), gaussians(seed + 1, rank, k)
    sides, roots = [], []
    for i, (kind, n) in enumerate(zip(kinds, (k, d), strict=True)):
        side = {
            "none": None,
            "diagonal": gaussians(seed + 2 + i, n) ** 2,
            "full": moments(seed + 2 + i, n, 2 * n),
            "deficient": moments(seed + 2 + i, n, (n + 1) // 2),
        }[kind]
        sides.append(side)
        roots.append(torch.eye(n, dtype=torch.float64) if side is None else root(side))
    expected = torch.linalg.svdvals(roots[1] @ left @ right @ roots[0])[: min(d, k, rank)]
    found = product_values(left, right, (sides[0], sides[1]))
    bound = math.prod(
        float(torch.linalg.matrix_norm(m, 2)) for m in (left, right, roots[0], roots[1])
    )
    # The square root of what is lost in rounding, in the directions without curvature.
    assert torch.all((found - expected).abs() <= 20 * math.sqrt(EPS) * bound)
    # All that the loss is to second order.
    energy = (roots[1] @ left @ right @ roots[0]).square().sum()
    assert float(found.square().sum()) == pytest.approx(
        float(energy), rel=1e-9, abs=1e-12 * bound**2
    )


def test_well_conditioned_curvature_costs_no_digits():
    left, right = gaussians(0, 300, 5), gaussians(1, 5, 1100)
    a, b = moments(2, 1100, 3000), moments(3, 300, 900)
    expected = torch.linalg.svdvals(root(b) @ left @ right @ root(a))[:5]
    torch.testing.assert_close(product_values(left, right, (a, b)), expected, rtol=1e-12, atol=0)


def test_trailing_values_are_kept_as_they_are():
    # A cancels: the product is 1e-9 of its factors.
    left = torch.tensor([[1.0, 1.0], [0.0, 1e-9]], dtype=torch.float64)
    right = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    found = product_values(left, right)
    assert found[0] == pytest.approx(1e-9, rel=1e-6)
    assert 0 <= found[1] < 1e-15


def of(name, left, right, scale=1.0):
    shape = len(left), right.shape[1]
    return LowRankUpdate(name, shape, len(right), scale, lambda: (left, right))


def test_updates_of_one_layer_are_added_up():
    parts = [(gaussians(i, 9, 2 + i), gaussians(5 + i, 2 + i, 8), 0.5 - i) for i in range(3)]
    spectra = low_rank_spectra(
        [of("q", *parts[0]), of("v", *parts[1]), of("q", *parts[1]), of("q", *parts[2])],
        source="three",
    )
    total = sum(scale * left @ right for left, right, scale in parts)
    assert list(spectra) == ["q", "v"]
    np.testing.assert_allclose(spectra["q"], torch.linalg.svdvals(total), rtol=1e-12)
    assert len(spectra["v"]) == 3
    assert spectra.shapes == {"q": (9, 8), "v": (9, 8)}
    assert spectra.source == "three; QR of the factors in float64"


def test_with_curvature_squares_are_in_units_of_the_loss():
    left, right = gaussians(0, 6, 2), gaussians(1, 2, 5)
    a, b = moments(2, 5, 9), moments(3, 6, 9)
    update = 0.3 * left @ right
    quadratic = 0.5 * torch.trace(update.T @ b @ update @ a)
    spectra = low_rank_spectra(
        [of("q", left, right, 0.3)], source="one", curvature={"q": (a, b), "other": (None, None)}
    )
    assert np.square(spectra["q"]).sum() == pytest.approx(float(quadratic), rel=1e-12)
    assert "divided by sqrt(2)" in spectra.source
    half = low_rank_spectra([of("q", left, right)], source="one", curvature={"q": (None, None)})
    np.testing.assert_allclose(half["q"] * math.sqrt(2), product_values(left, right))


def test_factors_of_the_curvature_module_are_taken_damped():
    left, right = gaussians(0, 4, 2), gaussians(1, 2, 5)
    sides = [SymmetricFactor.of(moments(2 + i, n, 9), 0.1, EPS) for i, n in enumerate((5, 4))]
    factors = Factors("q", (4, 5), sides[0], sides[1])
    expected = torch.linalg.svdvals(factors.weigh(left @ right))[:2] / math.sqrt(2)
    curvature = Curvature({"q": factors}, kind="kfac", terms=9, damping=0.1, source="made up")
    spectra = low_rank_spectra([of("q", left, right)], source="one", curvature=curvature)
    np.testing.assert_allclose(spectra["q"], expected, rtol=1e-12)
    assert "weighted by made up" in spectra.source


def test_single_precision_moments_may_be_slightly_indefinite():
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    low = x.T @ x  # of rank 3, with eigenvalues a little below zero
    assert torch.linalg.eigvalsh(low)[0] < 0
    null = torch.linalg.eigh(low.double())[1][:, :4]
    found = product_values(null, torch.eye(4, dtype=torch.float64), (None, low))
    assert torch.all(found < 1e-3 * math.sqrt(float(low.trace())))


@pytest.mark.parametrize(
    ("curvature", "said"),
    [
        ({}, r"curvature: layer 'q' is missing"),
        ({"q": (torch.eye(4), None)}, r"expected A of shape \(5, 5\) or \(5,\), got \(4, 4\)"),
        ({"q": (None, torch.ones(5))}, r"expected B of shape \(4, 4\) or \(4,\), got \(5,\)"),
        ({"q": (torch.eye(5),)}, r"layer 'q': expected \(A, B\)"),
        ({"q": 3}, r"layer 'q': expected \(A, B\), got 3"),
        ({"q": Factors("q", (5, 4))}, r"expected shape \(4, 5\), got \(5, 4\)"),
        ({"q": (-torch.eye(5), None)}, r"layer 'q': expected a positive semidefinite .* factor A"),
        ({"q": (-torch.ones(5), None)}, r"layer 'q': expected a positive semidefinite"),
        ({"q": (None, torch.eye(4) * math.nan)}, r"expected a finite curvature factor B, got NaN"),
        ({"q": (torch.full((5,), math.inf), None)}, r"expected a finite curvature factor A"),
    ],
)
def test_bad_curvature_is_refused(curvature, said):
    update = of("q", gaussians(0, 4, 2), gaussians(1, 2, 5))
    with pytest.raises(ValueError, match=said):
        low_rank_spectra([update], source="one", curvature=curvature)


def test_all_faults_are_in_one_message():
    bad = gaussians(0, 4, 2)
    bad[1, 1] = math.nan
    updates = [of("q", bad, torch.ones(2, 5)), of("k", torch.ones(4, 2), torch.ones(2, 5))]
    updates.append(of("v", torch.ones(4, 2), torch.full((2, 5), math.inf)))
    with pytest.raises(ValueError, match=r"2 problems: layer 'q': .* factor B; layer 'v': .* A"):
        low_rank_spectra(updates, source="three")
    with pytest.raises(ValueError, match=r"layer 'q': expected updates of one shape .* \(4, 4\)"):
        low_rank_spectra([*updates, of("q", bad, torch.ones(2, 4))], source="four")


def test_long_lists_of_faults_are_cut():
    with pytest.raises(ValueError, match=r"^x: 7 problems: a; b; c; d; e; and 2 more$"):
        refuse(list("abcdefg"), "x")
    with pytest.raises(ValueError, match=r"^a$"):
        refuse(["a"])
    refuse([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_device():
    left, right = gaussians(0, 40, 5).cuda(), gaussians(1, 5, 30).cuda()
    moved = low_rank_spectra([of("q", left, right)], source="one", device="cuda")
    here = low_rank_spectra([of("q", left, right)], source="one", device="cpu")
    np.testing.assert_allclose(moved["q"], here["q"], rtol=1e-12)
