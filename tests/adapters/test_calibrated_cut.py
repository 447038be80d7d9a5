"""Cuts in a norm, biases beside them, and the moments that the norm is made of."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.layers import find_layers  # noqa: E402
from lorambo_adapters.ranks.weighted_cut import Fold, WeightedCut  # noqa: E402
from lorambo_adapters.spectra.batches import attention_masks  # noqa: E402
from lorambo_adapters.spectra.centred_moments import centred_sums  # noqa: E402
from lorambo_adapters.spectra.fisher import FisherLoss  # noqa: E402
from tests.adapters.calibrated_models import bert, examples  # noqa: E402

DAMPING = 0.1


def drawn(d, k, seed=0):
    """A difference, and moments of few samples: without damping they would be singular."""
    generator = torch.Generator().manual_seed(seed)

    def moment(n):
        rows = torch.randn(n // 2, n, generator=generator, dtype=torch.float64)
        rows *= 3.0 ** torch.arange(n) / 3.0**n
        return rows.T @ rows

    difference = torch.randn(d, k, generator=generator)
    return difference, moment(d), moment(k)


def square_root(moment):
    """Symmetric, by numpy: the roots that the library does not form."""
    matrix = moment.numpy() + DAMPING * np.trace(moment.numpy()) / len(moment) * np.eye(len(moment))
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize(("d", "k"), [(7, 12), (12, 7), (8, 8)])
def test_the_cut_is_what_matrix_square_roots_give(d, k):
    difference, left, right = drawn(d, k)
    cut = WeightedCut(difference, left, right, damping=DAMPING)
    roots = square_root(left), square_root(right)
    u, values, vt = np.linalg.svd(roots[0] @ difference.double().numpy() @ roots[1])
    np.testing.assert_allclose(cut.values, values, rtol=1e-6, atol=1e-8 * values[0])
    for rank in range(1, min(d, k) + 1):
        nearest = (u[:, :rank] * values[:rank]) @ vt[:rank]
        nearest = np.linalg.solve(roots[0], nearest) @ np.linalg.inv(roots[1])
        np.testing.assert_allclose(cut.cut(rank).numpy(), nearest, atol=1e-6)
        assert np.linalg.matrix_rank(cut.cut(rank).numpy()) == rank


@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_matrix_of_that_rank_is_nearer(rank):
    difference, left, right = drawn(9, 6, seed=3)
    roots = [torch.from_numpy(square_root(moment)) for moment in (left, right)]

    def distance(matrix):
        return float((roots[0] @ (difference.double() - matrix) @ roots[1]).norm())

    cut = WeightedCut(difference, left, right, damping=DAMPING)
    u, v = cut.factors(rank)
    best = distance(u @ v.T)
    assert best == pytest.approx(float(np.linalg.norm(cut.values[rank:])), rel=1e-6)
    generator = torch.Generator().manual_seed(5)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            moved = [
                side + size * side.std() * torch.randn(side.shape, generator=generator)
                for side in (u, v)
            ]
            assert distance(moved[0] @ moved[1].T) >= best
    plain = WeightedCut(difference)
    assert distance(plain.cut(rank)) > 1.05 * best
    assert float((difference - plain.cut(rank)).norm()) < float((difference - u @ v.T).norm())


def test_moments_of_zeros_cut_plainly():
    difference, _, right = drawn(5, 6)
    zeros = WeightedCut(difference, torch.zeros(5, 5), torch.zeros(6, 6), damping=DAMPING)
    torch.testing.assert_close(zeros.cut(2), WeightedCut(difference).cut(2))
    nothing = WeightedCut(torch.zeros(5, 6), None, right)
    assert not nothing.values.any()
    assert all(bool(torch.isfinite(side).all()) for side in nothing.factors(3))
    assert not nothing.cut(3).any()


def test_a_moment_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected B of shape \(5, 5\), got \(6, 6\)"):
        WeightedCut(torch.zeros(5, 6), torch.eye(6))
    with pytest.raises(ValueError, match=r"expected A of shape \(6, 6\), got \(5, 5\)"):
        WeightedCut(torch.zeros(5, 6), torch.eye(5), torch.eye(5))


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_folded_bias_keeps_the_mean_output(rank):
    difference, left, right = drawn(5, 6)
    generator = torch.Generator().manual_seed(2)
    base, bias = torch.randn(5, 6, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(40, 6, generator=generator) + torch.arange(6.0)
    mean = x.double().mean(0)
    fold = Fold(bias, difference.double() @ mean, mean)
    factors = WeightedCut(difference, left, right, damping=DAMPING).factors(rank) if rank else None
    update = factors[0] @ factors[1].T if factors else torch.zeros(5, 6, dtype=torch.float64)
    wanted = (x @ (base + difference).T + bias).double().mean(0)
    found = (x.double() @ (base.double() + update).T + fold.beside(factors)).mean(0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(fold.beside(factors), bias.double(), atol=1e-2)


def test_moments_are_those_of_what_the_hooks_see(transformers):
    model = bert(transformers).eval()
    layers = find_layers(model, r".*(query|intermediate\.dense)")
    batches = examples("classes")
    masks = attention_masks(model, layers)
    sums = centred_sums(model, layers, batches, FisherLoss(None, "empirical", None), mask=masks)
    assert sums.reached == {layer.name for layer in layers}
    for layer in layers:
        kept, slopes = [], []

        def keep(module, args, output, kept=kept, slopes=slopes):
            kept.append(args[0].detach())
            output.retain_grad()
            slopes.append(output)

        with torch.enable_grad():
            handle = layer.module.register_forward_hook(keep)
            for batch in batches:
                (8 * model(**batch).loss).backward()
            handle.remove()
        rows = torch.cat([x[b["attention_mask"] == 1] for x, b in zip(kept, batches, strict=True)])
        g = [y.grad[b["attention_mask"] == 1] for y, b in zip(slopes, batches, strict=True)]
        rows, g = rows.double(), torch.cat(g).double()
        moments = sums.take(layer.name)
        torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.inputs, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        centred = torch.cov(rows.T, correction=0)
        torch.testing.assert_close(moments.centred, centred, rtol=1e-3, atol=1e-4)
        scale = float(moments.gradients.abs().max())
        close = {"rtol": 1e-3, "atol": 1e-5 * scale}
        torch.testing.assert_close(moments.gradients, g.T @ g / 40, **close)
        model.zero_grad()


def summed(parts):
    """What `centred_sums` makes of these batches in a layer, in the parts' type."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3).to(parts[0].dtype)
    model = torch.nn.Sequential(layer)
    losses = FisherLoss(lambda m, b: m(b).square().sum(1), "empirical", None)
    sums = centred_sums(model, find_layers(model, ["0"]), parts, losses, mask=lambda batch: None)
    return sums.take("0")


def test_a_mean_many_times_the_spread_does_not_cancel():
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(4, 64, 4, generator=generator)
    x[..., 0] -= x[..., 1] - 1e4
    single, double = (summed(list(x.to(t))) for t in (torch.float32, torch.float64))
    exact = torch.cov(x.double().flatten(0, 1).T, correction=0)
    torch.testing.assert_close(double.centred, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(single.centred, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.mean, x.double().flatten(0, 1).mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(single.inputs, double.inputs, rtol=1e-7, atol=0)


class Branches(torch.nn.Module):
    """Two layers with one input in some batches and with two in others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


@pytest.mark.parametrize("order", [(0, 1, 1), (1, 0, 0), (0, 1, 0), (1, 1, 0)])
def test_layers_that_share_an_input_at_times(order):
    generator = torch.Generator().manual_seed(0)
    pairs = [(x, x) if one else (x, y) for one, (x, y) in zip(
        order, 50 + torch.randn(3, 2, 16, 4, generator=generator), strict=True)]  # fmt: skip
    model = Branches()
    losses = FisherLoss(lambda m, b: m(*b).square().sum(1), "empirical", None)
    layers = find_layers(model, ["a", "b"])
    sums = centred_sums(model, layers, pairs, losses, mask=lambda batch: None)
    for name, rows in zip("ab", map(torch.cat, zip(*pairs, strict=True)), strict=True):
        moments = sums.take(name)
        exact = torch.cov(rows.double().T, correction=0)
        torch.testing.assert_close(moments.centred, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.mean, rows.double().mean(0), rtol=1e-7, atol=1e-7)
    with pytest.raises(NotImplementedError):
        sums.accumulators()


def test_sums_of_rounded_numbers_can_be_cut_without_damping():
    difference = drawn(12, 40)[0]
    generator = torch.Generator().manual_seed(0)
    rows = 100 * torch.randn(200, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    moment = (rows.T @ rows / 200).double()
    with pytest.raises(ValueError, match=r"positive definite with damping 0\.0.*larger damping"):
        WeightedCut(difference, None, moment)
    rounding = torch.finfo(torch.float32).eps
    cut = WeightedCut(difference, None, moment, rounding=rounding)
    assert all(bool(torch.isfinite(side).all()) for side in cut.factors(2))
