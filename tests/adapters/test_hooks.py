"""The hooks: they hand over what makes autograd's own gradient, whatever the model does around."""

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from lorambo_adapters.layers import TargetLayer, find_layers  # noqa: E402
from lorambo_adapters.spectra.hooks import GradientHooks, InputHooks  # noqa: E402
from lorambo_adapters.spectra.inputs import DenseInputs, TokenInputs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


class Sums:
    """G of each layer as the hooks' receiver, and the number of calls."""

    def __init__(self, layers):
        self.gradients = {layer.name: torch.zeros(layer.shape) for layer in layers}
        self.calls = dict.fromkeys(self.gradients, 0)

    def __call__(self, layer, inputs, g):
        self.calls[layer.name] += 1
        assert g.dtype in (torch.float32, torch.float64)
        self.gradients[layer.name] = self.gradients[layer.name].to(g.dtype)
        inputs.accumulate(self.gradients[layer.name], g, 1.0)


def hooked(model, run, targets, mask=None):
    """What the hooks see of a run in which no parameter requires a gradient."""
    model.requires_grad_(False)
    layers = find_layers(model, targets)
    sums = Sums(layers)
    with GradientHooks(layers, sums, model=model) as hooks:
        hooks.begin(mask)
        run(model).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    return sums


def autograd(model, run, name):
    model.requires_grad_(True)
    run(model).backward()
    gradient = model.get_submodule(name).weight.grad.clone()
    model.zero_grad()
    return gradient


def check(model, run, targets, tolerance=1e-5):
    sums = hooked(model, run, targets)
    for layer in find_layers(model, targets):
        expected = autograd(model, run, layer.name)
        expected = expected.T if layer.kind in ("conv1d", "embedding") else expected.flatten(1)
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            sums.gradients[layer.name], expected, rtol=0, atol=tolerance * scale
        )
    return sums


def mlp(inplace=False):
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7, bias=False), torch.nn.ReLU(inplace=inplace), torch.nn.Linear(7, 3)
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_with_checkpoints_and_activations_in_place(inplace, reentrant):
    x = torch.randn(2, 4, 5)

    def run(model):
        if reentrant is None:
            return model(x).square().sum()
        # Reentrant checkpoints have a gradient only where an input requires one.
        start = x.clone().requires_grad_(reentrant)
        return checkpoint(model, start, use_reentrant=reentrant).square().sum()

    sums = check(mlp(inplace), run, ["0", "2"])
    assert sums.calls == {"0": 1, "2": 1}


def test_a_layer_that_is_called_twice_counts_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(torch.tanh(self.inner(x)))

    x = torch.randn(6, 4)
    sums = check(Twice(), lambda model: model(x).square().sum(), ["inner"])
    assert sums.calls == {"inner": 2}


def test_a_keyword_as_input_and_a_trained_input():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(input=x)

    x = torch.randn(6, 4, requires_grad=True)
    model = Named()
    check(model, lambda m: m(x.detach()).square().sum(), ["inner"])
    hooked(model, lambda m: m(x).square().sum(), ["inner"])
    with_hooks, x.grad = x.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(with_hooks, x.grad)  # the hooks change no gradient


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": (1, 2), "padding_mode": "reflect"},
    ],
)
def test_convolutions(options):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, (3, 2), **options))
    x = torch.randn(2, 3, 6, 7)
    check(model, lambda m: m(x).square().sum(), ["0"])


def test_embedding_tables_leave_the_padding_row_out():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4, padding_idx=0), torch.nn.Linear(4, 3))
    ids = torch.tensor([[1, 2, 0], [2, 2, 8]])
    check(model, lambda m: m(ids).square().sum(), ["0", "1"])


def test_conv1d_of_transformers():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is absent")
    x = torch.randn(3, 4)
    model = torch.nn.Sequential(utils.Conv1D(6, 4))
    check(model, lambda m: m(x).square().sum(), ["0"])


def test_masked_tokens_are_not_there():
    x = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    x[mask == 0] = float("nan")  # not even multiplied by zero
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False))
    sums = hooked(model, lambda m: m(x)[mask != 0].square().sum(), ["0"], mask)
    expected = autograd(model, lambda m: m(x[mask != 0]).square().sum(), "0")
    torch.testing.assert_close(sums.gradients["0"], expected)


def test_masks_by_layer_and_of_other_lengths():
    x = torch.randn(4, 5)
    keep = torch.tensor([True, False, True, False])
    model = mlp()
    whole = hooked(model, lambda m: m(x).square().sum(), ["0", "2"]).gradients
    half = hooked(model, lambda m: m(x).square().sum(), ["0", "2"], {"2": keep}).gradients
    torch.testing.assert_close(half["0"], whole["0"])
    assert not torch.allclose(half["2"], whole["2"])
    # A mask of another number of tokens is not this layer's.
    other = hooked(model, lambda m: m(x).square().sum(), ["0", "2"], torch.tensor([1, 0]))
    torch.testing.assert_close(other.gradients["2"], whole["2"])
    with pytest.raises(ValueError, match="mask: expected a tensor, got list"):
        hooked(model, lambda m: m(x).sum(), ["0"], [1, 0])


def test_bfloat16_and_autocast_are_summed_in_float32():
    x = torch.randn(64, 5)

    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    check(mlp(), autocast, ["0", "2"], tolerance=2e-2)  # autograd rounds its gradient to bfloat16

    low = x.bfloat16()
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)).bfloat16()
    sums = hooked(model, lambda m: m(low).float().square().sum(), ["0"])
    output = model(low).float()
    expected = (2 * output).bfloat16().float().T @ low.float()
    torch.testing.assert_close(sums.gradients["0"], expected, rtol=1e-6, atol=1e-5)


def test_a_backward_pass_under_autocast_keeps_float32():
    x = torch.randn(64, 5)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)).requires_grad_(False)
    layers = find_layers(model, ["0"])
    sums = Sums(layers)
    with GradientHooks(layers, sums), torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
        loss.backward()
    output = model(x).detach()
    low = torch.autocast("cpu", torch.bfloat16)
    with low:
        output = model(x).float()
    expected = (2 * output).bfloat16().float().T @ x
    torch.testing.assert_close(sums.gradients["0"], expected, rtol=1e-5, atol=1e-4)


def test_inputs_are_kept_through_autograd_so_that_checkpoints_can_drop_them():
    x = torch.randn(4, 5)
    model = mlp().requires_grad_(False)
    layers = find_layers(model, ["0", "2"])
    saved = []
    with (
        GradientHooks(layers, Sums(layers)),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
        ),
    ):
        model(x)
    assert (4, 5) in saved
    assert (4, 7) in saved


def test_layers_with_one_input_share_it():
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = torch.tanh(x)
            return self.q(x) + self.k(x) * self.v(x)

    seen = []
    model = Heads().requires_grad_(False)
    layers = find_layers(model, ["q", "k", "v"])
    with GradientHooks(layers, lambda layer, inputs, g: seen.append(inputs)):
        model(torch.randn(3, 4)).sum().backward()
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]
    # What one of them has multiplied with a test matrix, the others find.
    test = torch.randn(4, 2)
    seen[0].products(test).append(seen[0].times(test))
    assert len(seen[1].products(test)) == 1
    assert seen[2].products(torch.randn(4, 2)) == []


def test_nothing_is_handed_over_outside():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2)).requires_grad_(False)
    layers = find_layers(model, ["0"])
    sums = Sums(layers)
    with GradientHooks(layers, sums):
        loss = model(torch.randn(2, 3)).sum()
        with torch.no_grad():
            model(torch.randn(2, 3))
    loss.backward()
    assert sums.calls == {"0": 0}


def test_input_hooks_see_the_inputs_only():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    ids = torch.tensor([[1, 2, 0], [2, 2, 8]])
    got = {}
    hooks = InputHooks(find_layers(model, ["0", "1"]), lambda layer, x: got.update({layer.name: x}))
    with hooks:
        hooks.begin(torch.tensor([[1, 1, 0], [1, 0, 0]]))
        model(ids)
    assert isinstance(got["0"], TokenInputs)
    assert got["0"].ids.tolist() == [1, 2, 2]
    assert isinstance(got["1"], DenseInputs)
    torch.testing.assert_close(got["1"].matrix, model[0].weight.detach()[[1, 2, 2]])
    torch.testing.assert_close(got["0"].times(torch.eye(9)), torch.eye(9)[[1, 2, 2]])
    assert hooks.called == {"0", "1"}


def test_what_cannot_be_hooked_is_named():
    grouped = torch.nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="layer 'conv': expected a convolution without groups"):
        InputHooks([TargetLayer("conv", (2, 36), "conv2d", grouped)], lambda layer, x: None)


def test_quantised_layers():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent")
    dense = torch.nn.Linear(64, 32, bias=False)
    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    model = torch.nn.Sequential(layer.to("cpu")).requires_grad_(False)
    (target,) = find_layers(model, ["0"])
    assert target.kind == "quantized"
    x = torch.randn(8, 64)
    sums = hooked(model, lambda m: m(x).square().sum(), ["0"])
    torch.testing.assert_close(
        sums.gradients["0"], 2 * model(x).T @ x, rtol=1e-4, atol=1e-3
    )  # the loss is |W x|^2
