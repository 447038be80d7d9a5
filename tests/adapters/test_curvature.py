"""Kronecker factors, against the exact Fisher information by autograd."""

import dataclasses
import itertools
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.spectra.curvature import curvature_factors  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402
from lorambo_adapters.spectra.whitening import SymmetricFactor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

F = torch.nn.functional
OUTPUTS = TrueFisher(lambda model, batch: model(batch[0]), draws="all")
GAUSSIAN = TrueFisher(lambda model, batch: model(batch[0]), likelihood="gaussian", draws="all")


def matrices(curvature) -> dict[str, Any]:
    """(A, B) by layer, as tensors or None: which of them is the test's business."""
    return curvature.matrices()


def powers(factors, exponent=1.0, damped=True) -> Any:
    return factors.powers(exponent, damped=damped)


def kron(factors):
    """B kron A, acting on the rows of a d x k update one after the other."""
    (right, left), (d, k) = powers(factors, damped=False), factors.shape
    right = torch.eye(k).double() if right is None else right
    left = torch.eye(d).double() if left is None else left
    right, left = (torch.diag(m) if m.ndim == 1 else m for m in (right, left))
    return torch.kron(left, right)


def exact_fisher(model, weight, outputs, likelihood):
    """The mean over terms of J^T H J, from the Jacobian of all outputs: terms x classes."""
    rows = [
        torch.autograd.grad(value, weight, retain_graph=True)[0].flatten()
        for value in outputs.flatten()
    ]
    jacobian = torch.stack(rows).view(*outputs.shape, -1)
    if likelihood == "gaussian":
        return torch.einsum("ncp,ncq->pq", jacobian, jacobian) / len(outputs)
    p = torch.softmax(outputs.detach(), -1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,nce,neq->pq", jacobian, hessian, jacobian) / len(outputs)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def linear(d=3, k=4, bias=True):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(k, d, bias=bias)).double()


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()


def classified(n=7, k=4, classes=3):
    torch.manual_seed(2)
    return torch.randn(n, k, dtype=torch.float64), torch.randint(classes, (n,))


def cross_entropies(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_kfac_is_the_fisher_of_one_linear_layer_with_squared_error():
    model, batch = linear(), classified()
    factors = curvature_factors(model, [batch], fisher=GAUSSIAN, targets=["0"])
    outputs = model(batch[0])
    exact = exact_fisher(model, model[0].weight, outputs, "gaussian")
    assert relative(kron(factors["0"]), exact) < 1e-12
    # It is the Hessian of the mean of half the squared errors, too.
    target = torch.randn(7, 3, dtype=torch.float64)

    def loss(weight):
        predicted = F.linear(batch[0], weight, model[0].bias)
        return 0.5 * (predicted - target).square().sum(1).mean()

    hessian = torch.autograd.functional.hessian(loss, model[0].weight.detach())
    assert relative(kron(factors["0"]), hessian.reshape(12, 12)) < 1e-12


def test_kfac_is_the_fisher_of_one_linear_layer_with_softmax_for_one_sample():
    model, (x, labels) = linear(), classified(1)
    factors = curvature_factors(model, [(x, labels)], fisher=OUTPUTS, targets=["0"])
    exact = exact_fisher(model, model[0].weight, model(x), "categorical")
    assert relative(kron(factors["0"]), exact) < 1e-12
    empirical = curvature_factors(model, [(x, labels)], cross_entropies, targets=["0"])
    gradient = torch.autograd.grad(cross_entropies(model, (x, labels)).sum(), model[0].weight)[0]
    expected = torch.outer(gradient.flatten(), gradient.flatten())
    assert relative(kron(empirical["0"]), expected) < 1e-12


def test_kfac_is_the_fisher_with_softmax_where_all_samples_have_the_same_distribution():
    model, batch = linear(bias=False), classified()
    with torch.no_grad():
        model[0].weight.zero_()
    factors = curvature_factors(model, [batch], fisher=OUTPUTS, targets=["0"])
    exact = exact_fisher(model, model[0].weight, model(batch[0]), "categorical")
    assert relative(kron(factors["0"]), exact) < 1e-12


def test_the_second_last_layer_of_a_linear_network_is_exact_and_a_nonlinear_one_is_not():
    torch.manual_seed(3)
    deep = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)).double()
    batch = classified()
    factors = curvature_factors(deep, [batch], fisher=GAUSSIAN, targets=["0", "1"])
    for name in ("0", "1"):
        weight = deep.get_submodule(name).weight
        exact = exact_fisher(deep, weight, deep(batch[0]), "gaussian")
        assert relative(kron(factors[name]), exact) < 1e-12
    model = network()
    found = curvature_factors(model, [batch], fisher=OUTPUTS, targets=["0", "2"])
    errors = {}
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        exact = exact_fisher(model, weight, model(batch[0]), "categorical")
        errors[name] = relative(kron(found[name]), exact)
        # The traces differ by the correlation of |x|^2 and |g|^2 alone.
        assert float(kron(found[name]).trace()) == pytest.approx(float(exact.trace()), rel=0.5)
    assert all(1e-3 < error < 0.5 for error in errors.values()), errors


def per_term_gradients(model, modules, batch, loss_fn):
    """Each sample's outputs' gradients, by autograd, one sample at a time."""
    found = {name: [] for name in modules}
    for i in range(len(batch[0])):
        handles, kept = [], {}
        for name, module in modules.items():

            def keep(module, args, output, name=name, kept=kept):
                output.retain_grad()
                kept[name] = args[0].detach(), output

            handles.append(module.register_forward_hook(keep))
        loss_fn(model, tuple(part[i : i + 1] for part in batch)).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (x, output) in kept.items():
            found[name].append((x, output.grad))
    return {
        name: tuple(torch.cat(side).flatten(0, -2) for side in zip(*pairs, strict=True))
        for name, pairs in found.items()
    }


@pytest.mark.parametrize("kind", ["kfac", "input", "ekfac", "diagonal"])
def test_factors_are_what_their_formulas_say(kind):
    model, batch = network(), classified(9)
    modules = {"0": model[0], "2": model[2]}
    reference = per_term_gradients(model, modules, batch, cross_entropies)
    halves = [tuple(part[:5] for part in batch), tuple(part[5:] for part in batch)]
    found = curvature_factors(
        model, halves, cross_entropies, kind=kind, targets=["0", "2"], damping=0.0
    )
    assert found.kind == kind
    assert found.terms == (0 if kind == "input" else 9)
    for name, (x, g) in reference.items():
        a, b = x.T @ x / 9, g.T @ g / 9
        right, left = matrices(found)[name]
        if kind in ("kfac", "input"):
            torch.testing.assert_close(right, a, rtol=1e-10, atol=1e-12)
        if kind == "input":
            assert left is None
            continue
        if kind == "kfac":
            torch.testing.assert_close(left, b, rtol=1e-10, atol=1e-12)
            continue
        basis_a, basis_b = torch.eye(x.shape[1]).double(), torch.eye(g.shape[1]).double()
        if kind == "ekfac":
            basis_a, basis_b = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
        else:
            right, left = torch.diag(right), torch.diag(left)
        second = (g @ basis_b).square().T @ (x @ basis_a).square() / 9
        fitted = torch.outer((basis_b.T @ left @ basis_b).diagonal(),
                             (basis_a.T @ right @ basis_a).diagonal())  # fmt: skip
        # The row and column sums are S's, so no product is nearer in the divergence, nor KFAC's.
        torch.testing.assert_close(fitted.sum(0), second.sum(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fitted.sum(1), second.sum(1), rtol=1e-9, atol=1e-12)
        plain = torch.outer((basis_b.T @ b @ basis_b).diagonal(),
                            (basis_a.T @ a @ basis_a).diagonal())  # fmt: skip
        # Where there is no curvature at all, rounding may leave either of them below 0.
        fitted, plain = fitted.clamp(min=1e-30), plain.clamp(min=1e-30)
        assert divergence(second, fitted) <= divergence(second, plain) + 1e-12
        assert float(right.trace()) == pytest.approx(float(a.trace()), rel=1e-10)
        off = basis_a.T @ right @ basis_a
        assert float((off - torch.diag(off.diagonal())).abs().max()) < 1e-10


def divergence(p, q):
    """The generalised Kullback-Leibler divergence."""
    return float((torch.special.xlogy(p, p / q) - p + q).sum())


def test_a_mean_a_sum_and_one_loss_a_term_give_the_same_factors():
    model, batch = network(), classified(8)
    halves = [tuple(part[:3] for part in batch), tuple(part[3:] for part in batch)]

    def mean(model, batch):
        return cross_entropies(model, batch).mean()

    kwargs = {"targets": ["0", "2"], "damping": 0.0}
    each = curvature_factors(model, halves, cross_entropies, **kwargs).matrices()
    variants = [
        curvature_factors(model, halves, mean, terms=lambda batch: len(batch[1]), **kwargs),
        curvature_factors(model, iter([batch]), mean, terms=8, **kwargs),
        curvature_factors(
            model, [batch], lambda m, b: 2 * cross_entropies(m, b).repeat(2) / 4, terms=8, **kwargs
        ),
    ]
    for variant in variants:
        assert variant.terms == 8
        for name, pair in variant.matrices().items():
            for side, expected in zip(pair, each[name], strict=True):
                torch.testing.assert_close(side, expected, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match=r"got a scalar; if it is their mean.*terms="):
        curvature_factors(model, [batch], mean, **kwargs)


def test_drawn_labels_converge_to_the_expectation_at_the_rate_of_monte_carlo():
    model, batch = network(), classified(6)
    exact = curvature_factors(model, [batch], fisher=OUTPUTS, targets=["0", "2"], damping=0.0)
    gaussian = curvature_factors(model, [batch], fisher=GAUSSIAN, targets=["0", "2"], damping=0.0)
    for true, expected in ((OUTPUTS, exact), (GAUSSIAN, gaussian)):
        fisher = dataclasses.replace(true, draws=2000)
        drawn = curvature_factors(model, [batch], fisher=fisher, targets=["0", "2"], damping=0.0)
        for name in expected:
            ours, theirs = drawn.matrices()[name], expected.matrices()[name]
            assert relative(ours[0], theirs[0]) < 1e-12  # inputs are counted once
            assert relative(ours[1], theirs[1]) < 0.05
    again = curvature_factors(model, [batch], fisher=fisher, targets=["0", "2"], damping=0.0)
    assert torch.equal(again.matrices()["0"][1], drawn.matrices()["0"][1])


def test_terms_that_do_not_count_are_left_out_of_the_true_fisher():
    model, (x, _) = network(), classified(6)
    keep = torch.tensor([1, 0, 1, 1, 0, 1])
    part = TrueFisher(lambda m, b: (m(b), keep), draws="all")
    found = curvature_factors(model, [x], fisher=part, targets=["2"], damping=0.0)
    kept = curvature_factors(
        model, [(x[keep == 1], None)], fisher=OUTPUTS, targets=["2"], damping=0.0
    )
    assert found.terms == kept.terms == 4
    assert relative(found.matrices()["2"][1], kept.matrices()["2"][1]) < 1e-12


def test_a_convolution_and_an_embedding_table():
    torch.manual_seed(4)
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    ).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    found = matrices(
        curvature_factors(conv, [x], lambda m, x: m(x).square().sum(1), targets=["0"], damping=0.0)
    )["0"]
    patches = F.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found[0], patches.T @ patches / len(patches))
    assert found[1].shape == (3, 3)
    table = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Flatten(), torch.nn.Linear(6, 2))
    ids = torch.tensor([[0, 1], [1, 4], [1, 1]])
    factors = curvature_factors(
        table.double(), [ids], lambda m, x: m(x).square().sum(1), kind="ekfac", targets=["0"]
    )["0"]
    kfac = curvature_factors(
        table, [ids], lambda m, x: m(x).square().sum(1), targets=["0"], damping=0.0
    )["0"]
    assert powers(kfac)[0].tolist() == pytest.approx([1 / 6, 4 / 6, 0, 0, 1 / 6])
    assert powers(factors)[0].shape == (5,)


def test_damping_is_relative_to_the_mean_eigenvalue_and_zero_damping_is_a_pseudo_inverse():
    model, batch = network(), classified(2)  # fewer samples than sides: singular factors
    found = curvature_factors(model, [batch], cross_entropies, targets=["0"], damping=0.25)["0"]
    plain = powers(found, damped=False)
    for side, damped, added in zip(plain, powers(found), found.damping, strict=True):
        assert added == pytest.approx(0.25 * float(side.trace()) / len(side))
        torch.testing.assert_close(damped, side + added * torch.eye(len(side)).double())
    for root, damped in zip(powers(found, -0.5), powers(found), strict=True):
        torch.testing.assert_close(root @ damped @ root, torch.eye(len(root)).double())
    singular = curvature_factors(model, [batch], cross_entropies, targets=["0"], damping=0.0)["0"]
    for root, side in zip(powers(singular, -0.5), plain, strict=True):
        torch.testing.assert_close(root @ root, torch.linalg.pinv(side, hermitian=True, rtol=1e-8))
    zero = SymmetricFactor(torch.zeros(3), None, 0.1)
    assert zero.power(-0.5).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_massive_input_does_not_make_all_others_count_as_nothing(dtype):
    # Language models have single inputs a thousand times as large as all others.
    torch.manual_seed(8)
    n = 300
    x = torch.randn(2 * n, n, dtype=torch.float64)
    x[:, 7] *= 1000.0
    model = torch.nn.Sequential(torch.nn.Linear(n, 2, dtype=dtype))
    factors = curvature_factors(model, [x.to(dtype)], kind="input", targets=["0"])["0"]
    exact = x.T @ x / len(x)
    exact += 1e-3 * exact.trace() / n * torch.eye(n)
    inverse = powers(factors, -1.0)[0]
    assert relative(inverse, torch.linalg.inv(exact)) < 1e-3
    # What the sums do not resolve is not worth more than what they do, however small the damping.
    low = SymmetricFactor(torch.tensor([1e-9, 1.0]), None, 1e-12, 1e-7)
    assert low.power(-0.5).tolist() == pytest.approx([1e7**0.5, 1.0])
    assert SymmetricFactor(low.values, None, 0.0, 1e-7).power(-0.5).tolist() == [0.0, 1.0]


def test_no_curvature_is_the_identity_and_takes_no_batches():
    found = curvature_factors(network(), [], kind="none", targets=["0", "2"])
    assert found.whitenings() == {"0": (None, None), "2": (None, None)}
    assert not found.in_loss_units
    gradient = torch.randn(5, 4)
    assert torch.equal(found["0"].whiten(gradient), gradient.double())


def test_inputs_need_no_loss():
    model, (x, _) = network(), classified()
    for batch in (x, {"input": x}):
        found = curvature_factors(model, [batch], kind="input", targets=["0"], damping=0.0)
        torch.testing.assert_close(matrices(found)["0"][0], x.T @ x / 7)
    assert "terms" not in found.source


def test_layers_with_one_input_share_a_factor():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)

        def forward(self, x):
            return torch.cat([self.q(x), self.v(x)], 1)

    found = curvature_factors(Two(), [torch.randn(6, 4)], lambda m, x: m(x).square().sum(1))
    assert found["q"].right is found["v"].right
    pairs = found.whitenings()
    assert pairs["q"][0] is pairs["v"][0]


def test_parameters_and_random_numbers_are_left_as_they_were():
    model, batch = network(), classified()
    model.insert(1, torch.nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    found = [
        curvature_factors(model, [batch], cross_entropies, kind="ekfac", targets=["0", "3"])
        for _ in range(2)
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(found[0].matrices()["3"][1], found[1].matrices()["3"][1])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("kind", ["input", "kfac", "ekfac", "diagonal"])
def test_the_model_is_as_it_was_after_an_error_in_the_middle(kind):
    model, batch = network(), classified()
    model[2].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones(3, 5, dtype=torch.float64)
    calls = itertools.count()
    state = torch.random.get_rng_state()

    def losses(model, batch):
        found = cross_entropies(model, batch)
        if next(calls) == 1:
            raise KeyboardInterrupt
        return found

    run: Any = curvature_factors
    with pytest.raises(KeyboardInterrupt):
        run(model, [batch, batch], losses, kind=kind, targets=["0", "2"])
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert model[2].weight.grad is not None
    assert bool((model[2].weight.grad == 1).all())
    assert model[0].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_sum_of_losses_may_leave_the_range_of_float16():
    torch.manual_seed(9)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    x, labels = torch.randn(40_000, 4), torch.randint(3, (40_000,))

    def losses(model, batch):
        return 10 * cross_entropies(model, batch)

    wide = matrices(curvature_factors(model, [(x, labels)], losses, targets=["0"]))["0"]
    half = matrices(curvature_factors(model.half(), [(x.half(), labels)], losses, targets=["0"]))[
        "0"
    ]
    for mine, theirs in zip(half, wide, strict=True):
        assert relative(mine, theirs) < 0.01


def test_an_image_without_a_batch_is_a_batch_of_one():
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1)).double()
    image = torch.randn(2, 4, 4, dtype=torch.float64)
    found = [
        matrices(curvature_factors(model, [x], lambda m, x: m(x).square().sum()[None],
                                   targets=["0"]))["0"]
        for x in (image, image[None])
    ]  # fmt: skip
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_terms_of_loss_and_predict_must_agree():
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    x, labels = torch.randn(5, 2, 4).double(), torch.randint(3, (5, 2))

    def tokens(model, batch):
        return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")

    def samples(model, batch):
        return tokens(model, batch).sum(1)

    kwargs: Any = {"fisher": OUTPUTS, "targets": ["0"]}
    match = "expected predict to count the terms of the loss, 5 in this batch, got 10"
    with pytest.raises(ValueError, match=match):
        curvature_factors(model, [(x, labels)], samples, **kwargs)
    right = curvature_factors(model, [(x, labels)], tokens, **kwargs)
    said = curvature_factors(model, [(x, labels)], samples, terms=10, **kwargs)
    assert torch.equal(matrices(right)["0"][1], matrices(said)["0"][1])


def test_no_term_at_all_is_refused_but_a_batch_without_one_adds_nothing():
    model, batch = network(), classified()

    def labelled(model, batch):
        return cross_entropies(model, batch)[batch[1] > 0]

    none = batch[0], batch[1] * 0
    with pytest.raises(ValueError, match="at least one term in the batches"):
        curvature_factors(model, [none], labelled, targets=["0"])
    found = curvature_factors(model, [none, batch], labelled, targets=["0"])
    alone = curvature_factors(model, [batch], labelled, targets=["0"])
    assert found.terms == alone.terms == int((batch[1] > 0).sum())
    assert torch.equal(matrices(found)["0"][1], matrices(alone)["0"][1])


def test_bad_input_is_refused():
    model, batch = network(), classified()
    call: Any = curvature_factors
    fisher: Any = TrueFisher
    with pytest.raises(ValueError, match=r"kind: expected one of .* got 'full'"):
        call(model, [batch], cross_entropies, kind="full")
    with pytest.raises(ValueError, match="damping: expected a finite number >= 0"):
        call(model, [batch], cross_entropies, damping=-1.0)
    with pytest.raises(ValueError, match="fisher: expected 'empirical', 'true' or a TrueFisher"):
        call(model, [batch], cross_entropies, fisher="exact")
    with pytest.raises(ValueError, match=r"expected TrueFisher\(predict"):
        call(model, [batch], cross_entropies, fisher="true")
    with pytest.raises(ValueError, match="at least one batch"):
        call(model, [], cross_entropies, targets=["0"])
    with pytest.raises(ValueError, match="expected a finite loss"):
        call(model, [batch], lambda m, b: cross_entropies(m, b) * float("nan"), targets=["0"])
    with pytest.raises(ValueError, match="depends on no layer"):
        call(model, [batch], lambda m, b: torch.ones(3), targets=["0"])
    with pytest.raises(ValueError, match="layer '0': expected finite inputs"):
        call(model, [(batch[0] * float("inf"), None)], lambda m, b: m(b[0]), kind="input",
             targets=["0"])  # fmt: skip
    mask = TrueFisher(lambda m, b: (m(b[0]), torch.ones(2)), draws="all")
    with pytest.raises(ValueError, match="predict: expected a mask of shape"):
        call(model, [batch], fisher=mask, targets=["0"])
    flat = TrueFisher(lambda m, b: m(b[0])[:, 0])
    with pytest.raises(ValueError, match=r"outputs of shape \(samples, ..., classes\), got \(7,\)"):
        call(model, [batch], fisher=flat, targets=["0"])
    none = TrueFisher(lambda m, b: (m(b[0]), torch.zeros(7)))
    with pytest.raises(ValueError, match="at least one term that counts"):
        call(model, [batch], fisher=none, targets=["0"])
    with pytest.raises(ValueError, match="loss_fn: expected a tensor, got float"):
        call(model, [batch], lambda m, b: 1.0, targets=["0"])
    with pytest.raises(ValueError, match="terms: expected a whole number >= 1, got 0"):
        call(model, [batch], cross_entropies, terms=0, targets=["0"])
    with pytest.raises(ValueError, match="draws: expected a whole number >= 1"):
        fisher(draws=0)
    with pytest.raises(ValueError, match="likelihood: expected 'categorical'"):
        fisher(likelihood="poisson")
    factors = call(model, [batch], cross_entropies, targets=["0"])
    with pytest.raises(ValueError, match=r"layer '0': expected a matrix of shape \(5, 4\)"):
        factors["0"].whiten(torch.ones(4, 5))
    with pytest.raises(ValueError, match="rank: expected a whole number >= 0, got -1"):
        factors["0"].best_update(torch.ones(5, 4), -1)


def test_a_layer_that_no_gradient_reaches_is_warned_about_and_has_no_gain():
    model, batch = network(), classified()
    model.append(torch.nn.Linear(3, 3).double())

    def loss(model, batch):
        return F.cross_entropy(model[:3](batch[0]), batch[1], reduction="none")

    with pytest.warns(UserWarning, match="no gradient reached 1 layers"):
        found = curvature_factors(model, [batch], loss, targets=["0", "3"])
    assert not found["3"].whiten(torch.ones(3, 3)).any()


def test_sums_in_float32_and_bfloat16_models():
    torch.manual_seed(5)
    x, labels = torch.randn(64, 16), torch.randint(3, (64,))
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    exact = matrices(
        curvature_factors(model.double(), [(x.double(), labels)], cross_entropies, targets=["0"])
    )["0"]
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        found = matrices(
            curvature_factors(
                model.to(dtype), [(x.to(dtype), labels)], cross_entropies, targets=["0"]
            )
        )["0"]
        for mine, theirs in zip(found, exact, strict=True):
            assert mine.dtype == torch.float64
            assert relative(mine, theirs) < error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model, batch = network(), classified()
    kwargs: Any = {"kind": "ekfac", "targets": ["0", "2"]}
    here = matrices(curvature_factors(model, [batch], cross_entropies, **kwargs))
    there = matrices(
        curvature_factors(
            model.cuda(), [tuple(part.cuda() for part in batch)], cross_entropies, **kwargs
        )
    )
    for name, pair in here.items():
        for mine, theirs in zip(pair, there[name], strict=True):
            assert theirs.device.type == "cuda"
            torch.testing.assert_close(mine, theirs.cpu(), rtol=1e-8, atol=1e-10)


def test_every_combination_of_kind_and_fisher_runs():
    model, batch = network(), classified()
    run: Any = curvature_factors
    fishers = ["empirical", OUTPUTS, TrueFisher(OUTPUTS.predict)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, fisher in itertools.product(["input", "kfac", "ekfac", "diagonal"], fishers):
            loss = cross_entropies
            found = run(model, [batch], loss, kind=kind, fisher=fisher, targets=["0", "2"])
            assert kind in repr(found)
            for factors in found.values():
                whitened = factors.whiten(torch.ones(factors.shape)).numpy()
                assert np.isfinite(whitened).all()
