"""`decompose`: against svdvals on every route, and on matrices that iterations find hard."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra.decompose import (  # noqa: E402  (needs torch)
    arithmetic,
    decompose,
    is_exact,
    squared_norm,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = float(np.finfo(np.float64).eps)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_values(values, d, k, dtype=torch.float64):
    """A d x k matrix with these singular values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left = torch.linalg.qr(gaussian(d, len(values), seed=1)).Q
    right = torch.linalg.qr(gaussian(k, len(values), seed=2)).Q
    return ((left * values) @ right.T).to(dtype)


def power_law(n, exponent):
    return np.arange(1, n + 1) ** -exponent


def svdvals(matrix):
    return torch.linalg.svdvals(matrix.double()).numpy()


class TestExact:
    @pytest.mark.parametrize(
        ("shape", "method"),
        [
            ((20, 20), "svdvals"),
            ((20, 26), "svdvals"),
            ((20, 40), "qr"),
            ((40, 20), "qr"),
            ((20, 200), "gram"),
            ((200, 20), "gram"),
            ((1, 1), "svdvals"),
            ((1, 300), "gram"),
        ],
    )
    def test_all_values(self, shape, method):
        matrix = gaussian(*shape)
        found = decompose(matrix)
        assert found.method == method
        assert (found.unresolved, found.shortfall) == (0.0, 0.0)
        assert found.values.dtype == np.float64
        np.testing.assert_allclose(found.values, svdvals(matrix), rtol=1e-13)

    @pytest.mark.parametrize("shape", [(30, 30), (30, 60), (30, 300)])
    def test_the_largest_values_and_what_they_leave(self, shape):
        matrix = gaussian(*shape)
        values, unresolved = decompose(matrix, 7)
        true = svdvals(matrix)
        np.testing.assert_allclose(values, true[:7], rtol=1e-13)
        assert unresolved == pytest.approx(np.sum(true[7:] ** 2), rel=1e-12)

    def test_a_rank_beyond_the_sides(self):
        matrix = gaussian(5, 9)
        values, unresolved = decompose(matrix, 100)
        assert (len(values), unresolved) == (5, 0.0)

    @pytest.mark.parametrize("shape", [(24, 24), (24, 48)])
    def test_small_values_are_right_to_the_roundings_of_the_largest(self, shape):
        true = 10.0 ** -np.arange(24)
        values = decompose(with_values(true, *shape)).values
        assert np.max(np.abs(values - true)) < 50 * EPS

    def test_the_gram_matrix_is_as_accurate_as_stated(self):
        true = 10.0 ** -np.arange(16)
        found = decompose(with_values(true, 16, 128))
        assert found.method == "gram"
        bound = 50 * np.minimum(EPS / true, math.sqrt(EPS))
        assert np.all(np.abs(found.values - true) <= bound)
        assert np.max(np.abs(found.values**2 - true**2)) < 50 * EPS

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_narrow_types_are_decomposed_in_double(self, dtype):
        matrix = gaussian(12, 15, dtype=dtype)
        np.testing.assert_allclose(decompose(matrix).values, svdvals(matrix), rtol=1e-13)


class TestBlockKrylov:
    @pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0])
    @pytest.mark.parametrize("shape", [(300, 300), (300, 700), (700, 300)])
    def test_power_laws(self, exponent, shape):
        true = power_law(300, exponent)
        matrix = with_values(true, *shape, dtype=torch.float32)
        found = decompose(matrix, 16, exact_below=0)
        assert found.method == "block_krylov"
        energy, captured = np.sum(true[:16] ** 2), np.sum(found.values**2)
        assert -1e-6 < 1 - captured / energy < 1e-4
        assert found.shortfall <= 3e-5
        total = float(matrix.double().square().sum())  # of the matrix as float32 has it
        assert found.unresolved == pytest.approx(total - captured, rel=1e-5)
        # Rayleigh's values are below the true ones, but for rounding in float32.
        assert np.all(found.values < true[:16] * (1 + 2e-6))

    def test_double_precision_is_kept(self):
        true = 10.0 ** -np.linspace(0, 6, 200)
        found = decompose(
            with_values(true, 200, 220), 20, exact_below=0, tolerance=0.0, oversample=100
        )
        np.testing.assert_allclose(found.values, true[:20], rtol=1e-12)

    def test_a_flat_spectrum_says_what_it_lacks(self):
        matrix = gaussian(600, 600, dtype=torch.float32)
        true = svdvals(matrix)
        found = decompose(matrix, 8, exact_below=0)
        lacking = 1 - np.sum(found.values**2) / np.sum(true[:8] ** 2)
        assert 0 < lacking < 0.03
        assert lacking / 4 < found.shortfall < 4 * lacking
        assert np.sum(found.values**2) + found.unresolved == pytest.approx(np.sum(true**2))

    def test_tolerance_decides_how_far_it_goes(self):
        matrix = with_values(power_law(400, 0.5), 400, 400, dtype=torch.float32)
        true = np.sum(svdvals(matrix)[:16] ** 2)
        lacking = [
            1 - np.sum(decompose(matrix, 16, exact_below=0, tolerance=t).values ** 2) / true
            for t in (1e-1, 1e-3, 1e-6)
        ]
        assert lacking[0] > lacking[1] > lacking[2] > -1e-6
        assert lacking[0] > 1e-4
        assert lacking[2] < 1e-6

    def test_more_blocks_of_one_basis_are_more_accurate(self):
        matrix = with_values(power_law(400, 0.5), 400, 400, dtype=torch.float32)
        keywords = {"exact_below": 0, "oversample": 48, "tolerance": 0.0}
        captured = [
            float(np.sum(decompose(matrix, 16, power_iterations=q, **keywords).values ** 2))
            for q in (1, 2, 4)
        ]
        assert captured == sorted(captured)
        single = decompose(matrix, 16, power_iterations=1, **keywords)
        assert single.shortfall == math.inf  # nothing to estimate it from

    @pytest.mark.parametrize("rank", [1, 3, 8, 40])
    def test_a_matrix_of_low_rank(self, rank):
        true = np.array([5.0, 4.0, 3.0])
        found = decompose(with_values(true, 320, 400, dtype=torch.float32), rank, exact_below=0)
        assert found.method == "block_krylov"
        expected = np.zeros(rank)
        expected[:3] = true[:rank]
        np.testing.assert_allclose(found.values, expected, atol=5e-5)
        assert found.unresolved == pytest.approx(np.sum(true[rank:] ** 2), abs=1e-4)

    def test_one_row_that_is_not_zero(self):
        matrix = torch.zeros(300, 300)
        matrix[17] = 2.0
        found = decompose(matrix, 8, exact_below=0)
        assert found.method == "block_krylov"
        np.testing.assert_allclose(found.values, [2 * math.sqrt(300)] + 7 * [0.0], atol=2e-4)

    def test_equal_values_are_all_found(self):
        true = np.concatenate([np.ones(30), 0.1 * np.ones(270)])
        found = decompose(with_values(true, 300, 300, dtype=torch.float32), 30, exact_below=0)
        assert np.sum(found.values**2) == pytest.approx(30, rel=1e-3)
        identity = decompose(torch.eye(256), 10, exact_below=0)
        np.testing.assert_allclose(identity.values, np.ones(10), rtol=1e-5)
        assert identity.unresolved == pytest.approx(246, rel=1e-5)

    def test_the_seed_decides(self):
        matrix = gaussian(300, 300, dtype=torch.float32)
        first, again, other = (
            decompose(matrix, 8, exact_below=0, seed=seed).values for seed in (3, 3, 4)
        )
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        np.testing.assert_allclose(first, other, rtol=0.03)

    def test_the_layout_makes_no_difference(self):
        matrix = with_values(power_law(300, 1.0), 300, 500, dtype=torch.float32)
        expected = decompose(matrix, 8, exact_below=0)
        wide = torch.zeros(300, 1000)
        wide[:, ::2] = matrix
        for same in (matrix.T, matrix.T.contiguous().T, wide[:, ::2]):
            found = decompose(same, 8, exact_below=0)
            np.testing.assert_allclose(found.values, expected.values, rtol=1e-4)
            assert found.unresolved == pytest.approx(expected.unresolved, rel=1e-3)

    def test_threads_make_no_difference(self):
        # On one thread the matrix is read in strips.
        matrix = with_values(power_law(300, 1.0), 300, 9000, dtype=torch.float32)
        expected = decompose(matrix, 8, exact_below=0).values
        torch.set_num_threads(2)
        np.testing.assert_allclose(decompose(matrix, 8, exact_below=0).values, expected, rtol=1e-5)

    def test_bfloat16(self):
        matrix = gaussian(300, 320, dtype=torch.bfloat16)
        found = decompose(matrix, 8, exact_below=0)
        expected = decompose(matrix.float(), 8, exact_below=0)
        assert np.array_equal(found.values, expected.values)
        assert found.unresolved == expected.unresolved


class TestScale:
    @pytest.mark.parametrize("exponent", [-300, -60, 60, 250])
    @pytest.mark.parametrize("shape", [(20, 20), (20, 200)])
    def test_exact(self, exponent, shape):
        # Squares of such doubles under- or overflow.
        matrix = gaussian(*shape)
        scale = 2.0**exponent
        np.testing.assert_allclose(
            decompose(matrix * scale, 5).values, decompose(matrix, 5).values * scale, rtol=1e-12
        )

    @pytest.mark.parametrize("exponent", [-120, -40, 40, 115])
    def test_block_krylov_in_single_precision(self, exponent):
        matrix = with_values(power_law(200, 1.0), 200, 200, dtype=torch.float32)
        scale = 2.0**exponent
        found, expected = (decompose(m, 8, exact_below=0) for m in (matrix * scale, matrix))
        np.testing.assert_allclose(found.values, expected.values * scale, rtol=1e-6)
        assert found.unresolved == pytest.approx(expected.unresolved * scale**2, rel=1e-6)

    def test_zeros(self):
        for rank, exact_below in [(None, 0), (3, 0), (3, 1000), (99, 0)]:
            found = decompose(torch.zeros(40, 50), rank, exact_below=exact_below)
            assert np.array_equal(found.values, np.zeros(min(rank or 40, 40)))
            assert (found.unresolved, found.method) == (0.0, "zero")


class TestArguments:
    def test_the_matrix_is_not_written_to(self):
        matrix = gaussian(200, 200, dtype=torch.float32).requires_grad_()
        before = matrix.detach().clone()
        values = decompose(matrix, 5, exact_below=0).values
        decompose(matrix)
        assert torch.equal(matrix, before)
        assert torch.as_tensor(values).requires_grad is False

    @pytest.mark.parametrize(
        ("matrix", "said"),
        [
            (torch.zeros(3), r"got shape \(3,\)"),
            (torch.zeros(0, 3), r"got shape \(0, 3\)"),
            (torch.zeros(2, 2, dtype=torch.int8), "torch.int8"),
            (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
            (torch.zeros(2, 2, device="meta"), "meta device"),
            (torch.eye(2).to_sparse(), "torch.sparse_coo"),
            (torch.tensor([[1.0, math.nan]]), "NaN or infinity"),
            (torch.tensor([[1.0, -math.inf]]), "NaN or infinity"),
        ],
    )
    def test_what_is_no_matrix(self, matrix, said):
        with pytest.raises(ValueError, match=said):
            decompose(matrix)

    @pytest.mark.parametrize(
        ("keywords", "said"),
        [
            ({"rank": 0}, "rank"),
            ({"rank": 1.5}, "rank"),
            ({"exact_below": -1}, "exact_below"),
            ({"oversample": -1}, "oversample"),
            ({"power_iterations": 0}, "power_iterations"),
            ({"tolerance": -1e-9}, "tolerance"),
            ({"seed": -1}, "seed"),
            ({"tolerance": math.nan}, "tolerance"),
        ],
    )
    def test_numbers_out_of_range(self, keywords, said):
        with pytest.raises(ValueError, match=said):
            decompose(torch.eye(3), **keywords)

    def test_which_method(self):
        assert is_exact((4096, 4096), None)
        assert is_exact((1023, 9000), 64)
        assert not is_exact((1024, 9000), 64)
        assert is_exact((1024, 1024), 129)
        assert not is_exact((1024, 1024), 128)
        assert arithmetic((4096, 4096), 64) < arithmetic((4096, 4096), None) / 20


class TestSquaredNorm:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_is_that_of_the_entries_in_double(self, dtype):
        matrix = gaussian(700, 600, dtype=dtype)  # several pieces
        expected = math.fsum((matrix.double().numpy() ** 2).ravel())
        for same in (matrix, matrix.T, torch.cat([matrix, matrix], 1)[:, :600]):
            assert squared_norm(same) == pytest.approx(expected, rel=1e-13)

    def test_single_precision_would_have_lost_it(self):
        matrix = torch.full((1000, 1000), 1e-4)
        matrix[0, 0] = 1e2
        rest = float(torch.tensor(1e-4).double()) ** 2 * 999_999
        assert squared_norm(matrix) - 1e4 == pytest.approx(rest, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(300, 300), (300, 600), (300, 2400)])
def test_cuda_agrees_with_the_cpu(shape):
    matrix = with_values(power_law(300, 0.75), *shape, dtype=torch.float32)
    for keywords in ({}, {"rank": 16}, {"rank": 16, "exact_below": 0}):
        expected, found = decompose(matrix, **keywords), decompose(matrix.cuda(), **keywords)
        assert found.method == expected.method
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-7)
        assert found.unresolved == pytest.approx(expected.unresolved, rel=1e-4)
