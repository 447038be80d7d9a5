"""Experts in 3-D parameters: what each gets and gives, against autograd and sums by hand."""

import contextlib
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is absent")
peft = pytest.importorskip("peft", reason="peft is absent: its names of experts are used here")

from torch.nn import functional  # noqa: E402
from torch.overrides import _get_current_function_mode_stack  # noqa: E402

from lorambo_adapters.layers import expert_groups, find_layers, stored_transposed  # noqa: E402
from lorambo_adapters.spectra.activations import activation_spectra  # noqa: E402
from lorambo_adapters.spectra.curvature import curvature_factors  # noqa: E402
from lorambo_adapters.spectra.gradients import gradient_spectra  # noqa: E402
from lorambo_adapters.spectra.hooks import GradientHooks, InputHooks  # noqa: E402
from lorambo_adapters.spectra.lora import lora_spectra  # noqa: E402
from lorambo_adapters.spectra.probe import probe_spectra  # noqa: E402
from lorambo_alloc import allocate  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "intermediate_size": 24,
}


def family(name, implementation=None, **more):
    t, sizes = transformers, {**SIZES, **more}
    config, model = {
        "mixtral": lambda: (
            t.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
            t.MixtralForCausalLM,
        ),
        "qwen2_moe": lambda: (
            t.Qwen2MoeConfig(
                **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                shared_expert_intermediate_size=12, decoder_sparse_step=1,
            ),
            t.Qwen2MoeForCausalLM,
        ),
        "qwen3_moe": lambda: (
            t.Qwen3MoeConfig(
                **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8,
            ),
            t.Qwen3MoeForCausalLM,
        ),
        "gpt_oss": lambda: (
            t.GptOssConfig(
                **sizes, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                layer_types=["full_attention"] * sizes["num_hidden_layers"],
            ),
            t.GptOssForCausalLM,
        ),
        "llama4": lambda: (
            t.Llama4TextConfig(
                **sizes, num_local_experts=4, num_experts_per_tok=1, head_dim=8,
                intermediate_size_mlp=20, attention_chunk_size=32,
                layer_types=["full_attention"] * sizes["num_hidden_layers"], moe_layers=[0, 1],
            ),
            t.Llama4ForCausalLM,
        ),
    }[name]()  # fmt: skip
    torch.manual_seed(1)
    model = model(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some initialise experts and biases with zeros
            parameter.normal_(std=0.3)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.eval()


def with_adapters(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers', of what PEFT calls
        return peft.get_peft_model(model, config)


def batch(rows=2, length=7, padded=False):
    ids = torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 4:] = 0
        mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def loss_of(model, inputs):
    return model(**inputs).loss


def experts_of(model):
    return find_layers(model, None, target_parameters=["gate_up_proj", "down_proj"])


def autograd(model, layers, inputs, run=loss_of):
    """Each expert's gradient (d x k), by making the parameters require one."""
    parameters = {id(p): p for p in (getattr(e.module, e.parameter) for e in layers)}
    for parameter in parameters.values():
        parameter.requires_grad_(True).grad = None
    run(model, inputs).backward()
    found = {}
    for layer in layers:
        gradient = getattr(layer.module, layer.parameter).grad
        part = gradient if layer.expert is None else gradient[layer.expert]
        found[layer.name] = part.T if stored_transposed(layer) else part
    model.requires_grad_(False)
    model.zero_grad()
    return found


class Sums:
    def __init__(self):
        self.gradients, self.rows = {}, {}

    def __call__(self, layer, inputs, g):
        assert g.shape == (len(inputs), layer.shape[0])
        assert inputs.matrix.shape == (len(inputs), layer.shape[1])
        before = self.gradients.get(layer.name, 0)
        self.gradients[layer.name] = before + g.double().T @ inputs.matrix.double()
        self.rows[layer.name] = self.rows.get(layer.name, 0) + len(inputs)


def hooked(model, layers, inputs, run=loss_of, mask=None):
    model.requires_grad_(False)
    sums = Sums()
    forwards = [m.forward for m in model.modules()]
    with GradientHooks(layers, sums, model=model) as hooks:
        hooks.begin(mask)
        run(model, inputs).backward()
    assert [m.forward for m in model.modules()] == forwards
    assert not any("forward" in vars(m) for m in model.modules())
    assert not _get_current_function_mode_stack()
    return sums


def check(model, inputs, run=loss_of, tolerance=1e-10):
    layers = experts_of(model)
    model.requires_grad_(False)
    sums = hooked(model, layers, inputs, run)
    expected = autograd(model, layers, inputs, run)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert sums.gradients
    for layer in layers:
        assert expected[layer.name].shape == layer.shape
        got = sums.gradients.get(layer.name)
        if got is None:  # no token was sent there
            assert not expected[layer.name].any()
        else:
            torch.testing.assert_close(
                got, expected[layer.name].double(), rtol=0, atol=tolerance * largest
            )
    return sums


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_autograd(name, implementation):
    sums = check(family(name, implementation).double(), batch())
    rows = [n for layer, n in sums.rows.items() if layer.startswith("model.layers.0.mlp.experts.d")]
    assert sum(rows) == 2 * 14  # each of 14 tokens goes to two experts


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_gradients_by_the_default_implementation(name):
    # float32, because torch's grouped product knows no float64.
    model = family(name)
    assert model.config._experts_implementation == "grouped_mm"
    check(model, batch(), tolerance=1e-5)


def test_gradients_of_products_with_all_experts_at_once():
    model = family("llama4").double()
    sums = check(model, batch())
    for kind in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.feed_forward.experts.{kind}."
        assert sum(n for layer, n in sums.rows.items() if layer.startswith(name)) == 14


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_gradient_checkpoints_count_once(implementation, reentrant):
    single = implementation == "grouped_mm"
    model = family("mixtral", implementation).train()
    model = model if single else model.double()
    plain = hooked(model, experts_of(model), batch())
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    again = hooked(model, experts_of(model), batch())
    assert again.rows == plain.rows
    for name, gradient in plain.gradients.items():
        atol = (1e-5 if single else 1e-12) * float(gradient.abs().max())
        torch.testing.assert_close(again.gradients[name], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_mixed_precision(name, implementation):
    if name == "llama4" and implementation != "eager":
        pytest.skip("Llama 4 has one implementation")
    model = family(name, None if name == "llama4" else implementation)
    if implementation == "grouped_mm":
        model = model.bfloat16()  # its product is not one that autocast converts

    def run(model, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model, inputs)

    check(model, batch(), run, tolerance=2e-2)


def by_hand(module, kept=None):
    """A forward of Mixtral's experts, token by expert; of tokens not kept, weights are constants.

    Returns it and, by parameter and expert, the inputs and outputs of the products of those kept.
    """
    seen = {}

    def product(name, expert, x, keeps):
        weight = getattr(module, name)[expert]
        y = keeps * (x @ weight.T) + (1 - keeps) * (x @ weight.detach().T)
        if y.requires_grad:
            y.retain_grad()
        rows = keeps[:, 0].bool()
        if rows.any():
            seen.setdefault((name, expert), []).append((x.detach()[rows], y, rows))
        return y

    def forward(hidden, index, weights):
        out = torch.zeros_like(hidden)
        flat = torch.ones(len(hidden)) if kept is None else kept.reshape(-1)
        keeps = flat.to(hidden)[:, None]
        for expert in range(module.num_experts):
            token, place = torch.where(index == expert)
            gate, up = product("gate_up_proj", expert, hidden[token], keeps[token]).chunk(2, -1)
            y = product("down_proj", expert, module.act_fn(gate) * up, keeps[token])
            out = out.index_add(0, token, y * weights[token, place, None])
        return out

    return forward, seen


@contextlib.contextmanager
def experts_by_hand(model, kept=None):
    seen = {}
    modules = {
        name: module for name, module in model.named_modules() if name.endswith("mlp.experts")
    }
    for name, module in modules.items():
        module.forward, seen[name] = by_hand(module, kept)
    yield seen
    for module in modules.values():
        del module.forward


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_padding_is_left_out(name, implementation):
    model = family(name, implementation)
    single = implementation == "grouped_mm"
    model = (model if single else model.double()).requires_grad_(False)
    inputs = batch(padded=True)
    layers, mask = experts_of(model), inputs["attention_mask"]
    sums = hooked(model, layers, inputs, mask=mask)
    with experts_by_hand(model, mask):
        expected = autograd(model, layers, inputs)
    everything = autograd(model, layers, inputs)
    largest = max(float(g.abs().max()) for g in expected.values())
    for layer in layers:
        got = sums.gradients.get(layer.name, torch.zeros(layer.shape).double())
        atol = (1e-5 if single else 1e-10) * largest
        torch.testing.assert_close(got, expected[layer.name].double(), rtol=0, atol=atol)
    # Padded tokens' labels count in this loss, so that the mask makes a difference.
    assert any(
        float((everything[name] - expected[name]).abs().max()) > 1e-3 * largest for name in expected
    )
    rows = [n for layer, n in sums.rows.items() if layer.startswith("model.layers.0.mlp.experts.d")]
    assert sum(rows) == 2 * int(mask.sum())


def test_padding_where_all_experts_are_multiplied_at_once():
    model = family("llama4").double().requires_grad_(False)
    inputs = batch(padded=True)
    got: dict[str, Any] = {}
    layers = experts_of(model)
    seen = []
    first = model.model.layers[0].feed_forward
    handle = first.experts.register_forward_pre_hook(lambda m, args: seen.append(args[0]))

    def receive(layer, x: Any):
        got[layer.name] = x.matrix

    with InputHooks(layers, receive) as hooks:
        hooks.begin(inputs["attention_mask"])
        model(**inputs)
    handle.remove()
    sent = seen[0].view(4, 14, 16)
    kept = inputs["attention_mask"].reshape(-1).bool()
    for expert in range(4):
        expected = sent[expert][kept & (sent[expert] != 0).any(1)]
        name = f"model.layers.0.feed_forward.experts.gate_up_proj.{expert}"
        assert torch.equal(got.get(name, torch.zeros(0, 16).double()), expected)
    assert sum(len(x) for name, x in got.items() if "0.feed_forward.experts.down" in name) == int(
        kept.sum()
    )


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_spectra_of_gradients_inputs_and_curvature(implementation):
    model = family("mixtral", implementation).double().requires_grad_(False)
    inputs = batch(padded=True)
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    mask = inputs["attention_mask"]
    layers = [layer for layer in find_layers(model) if layer.kind == "expert"]
    assert {layer.expert for layer in layers} == {None, 0, 1, 2, 3}  # the routers are matrices
    # Labels are of the next token.
    terms = int((inputs["labels"][:, 1:] != -100).sum())
    with experts_by_hand(model, mask):
        expected = autograd(model, layers, inputs)
    with experts_by_hand(model, mask) as seen:
        for layer in layers:
            getattr(layer.module, layer.parameter).requires_grad_(True)
        (loss_of(model, inputs) * terms).backward()
    model.requires_grad_(False)
    assert not silent_of(model, experts_of(model), inputs, mask)
    gradients = gradient_spectra(model, [inputs])
    activations = activation_spectra(model, [inputs], centered=False)
    factors = curvature_factors(model, [inputs], damping=0.0)
    for layer in layers:
        values = torch.linalg.svdvals(expected[layer.name])
        close(gradients[layer.name], values, 1e-9 * float(values[0]) + 1e-12)
        if layer.expert is None:
            continue
        path, parameter, expert = layer.name.rsplit(".", 2)
        ((x, y, rows),) = seen[path][parameter, int(expert)]
        g = y.grad[rows]
        inner = torch.linalg.svdvals(x)[: len(activations[layer.name])]
        close(activations[layer.name][: len(inner)], inner, 1e-6 * float(inner[0]))
        a, b = factors.matrices()[layer.name]
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a.double(), x.T @ x / len(x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.double(), g.T @ g / terms, rtol=1e-9, atol=1e-12)


def close(values, expected, atol):
    torch.testing.assert_close(
        torch.tensor(values), expected[: len(values)], rtol=0, atol=atol, check_dtype=False
    )


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_layers_found_by_their_parameters_are_targets(name):
    # PEFT's "all-linear" does not reach the experts of these families.
    model = family(name).double() if name == "llama4" else family(name, "eager").double()
    layers = experts_of(model)
    assert not {layer.name for layer in layers} & {layer.name for layer in find_layers(model)}
    expected = autograd(model, layers, batch())
    silent = [name for name, gradient in expected.items() if not gradient.any()]
    warned = pytest.warns(UserWarning, match=f"reached {len(silent)} layers")
    with warned if silent else contextlib.nullcontext():
        spectra = gradient_spectra(model, [batch()], targets=layers)
    assert list(spectra) == [layer.name for layer in layers]
    for layer in layers:
        values = torch.linalg.svdvals(expected[layer.name])
        close(spectra[layer.name], values, 1e-9 * float(values[0]) + 1e-12)
    with pytest.raises(ValueError, match="targets: expected layers of this model alone, got 'mod"):
        gradient_spectra(family(name), [batch()], targets=layers)


def silent_of(model, layers, inputs, mask):
    """The layers of the experts to which the router sends no token that counts."""
    sent = {}
    kept = mask.reshape(-1).bool()
    handles = [
        layer.module.register_forward_pre_hook(
            lambda m, args: sent.update({m: set(args[1][kept].reshape(-1).tolist())})
        )
        for layer in layers
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return [layer.name for layer in layers if layer.expert not in sent[layer.module]]


def test_an_expert_without_tokens_is_zero_and_named():
    model = family("mixtral").requires_grad_(False)
    first = {key: value[:1, :2] for key, value in batch().items()}
    layers = experts_of(model)
    silent = silent_of(model, layers, first, first["attention_mask"])
    assert 0 < len(silent) < len(layers)
    with pytest.warns(UserWarning, match=rf"no gradient reached {len(silent)} layers.*{silent[0]}"):
        spectra = gradient_spectra(model, [first])
    assert not any(spectra[name].any() for name in silent)
    with pytest.warns(UserWarning, match=rf"no input reached {len(silent)} layers.*{silent[0]}"):
        spectra = activation_spectra(model, [first])
    assert {name for name in spectra if not spectra[name].any()} >= set(silent)


class Stack(torch.nn.Module):
    """Three experts (4 x 5), and a way to use them."""

    def __init__(self, use):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 4, 5))
        self.register_buffer("ids", torch.tensor([2, 0, 2, 2, 0, 1]))
        self.use = use

    def forward(self, x, *sizes):
        return self.use(x, self.up, *sizes or [self.ids])


class Whole(torch.nn.Module):
    def __init__(self, use):
        super().__init__()
        self.experts = Stack(use)

    def forward(self, x):
        return self.experts(x)


def stack(use):
    model = Whole(use).double().requires_grad_(False)
    return model, find_layers(model, None, target_parameters=["up"])


def squares(model, x):
    return model(x).square().sum()


def grouped(x, w, ids):
    return torch.ops.transformers.grouped_mm_fallback(x, w.mT, torch.tensor([1, 1, 5]))


def interleaved(x, w, ids):
    """Ids of two dimensions, and a product of a batch of two."""
    return torch.matmul(x.view(3, 2, 1, 5), w[ids.view(3, 2)].transpose(-1, -2))


WAYS = {
    "a loop": lambda x, w, ids: sum(
        functional.linear(x, each) ** (i + 1) for i, each in enumerate(w)
    ),
    "an index": lambda x, w, ids: x @ w[torch.tensor(1)].T + torch.mm(x, w[2].t()),
    "selected": lambda x, w, ids: functional.linear(input=x, weight=w.select(0, 2)),
    "the left factor": lambda x, w, ids: (w[1] @ x.T).T + torch.matmul(w[1], x[0]),
    "in three dimensions": lambda x, w, ids: x.view(2, 3, 5) @ w[1].T,
    "columns in batches": lambda x, w, ids: w[1] @ x.view(2, 3, 5).mT,
    "with a term": lambda x, w, ids: torch.addmm(torch.ones(4).double(), x, w[0].T),
    "all at once": lambda x, w, ids: torch.bmm(x.view(3, 2, 5), w.mT),
    "all, with a term": lambda x, w, ids: torch.baddbmm(
        torch.ones(3, 2, 4).double(), x.view(3, 2, 5), w.mT
    ),
    "all of the same": lambda x, w, ids: torch.matmul(x, w.transpose(1, 2)),
    "all from the left": lambda x, w, ids: w @ x.view(3, 2, 5).mT,
    "gathered": lambda x, w, ids: torch.bmm(x[:, None], w[ids].mT),
    "gathered from the left": lambda x, w, ids: torch.bmm(w.index_select(0, ids), x[..., None]),
    "interleaved": interleaved,
    "grouped": grouped,
    "converted": lambda x, w, ids: x.float() @ w.to(torch.float32)[1].T,
    "copied": lambda x, w, ids: x @ w.clone().contiguous()[1].T.contiguous(),
    "adapted": lambda x, w, ids: x @ (w + torch.ones_like(w))[1].T,
    "adapted by factors": lambda x, w, ids: (
        x @ torch.baddbmm(w, w.new_ones(3, 4, 1), w.new_ones(3, 1, 5), alpha=2)[1].T
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_multiply(way):
    model, layers = stack(WAYS[way])
    x = torch.randn(6, 5).double()
    sums = hooked(model, layers, x, squares)
    expected = autograd(model, layers, x, squares)
    tolerance = 1e-5 if way == "converted" else 1e-12
    for layer in layers:
        got = sums.gradients.get(layer.name, torch.zeros(4, 5).double())
        torch.testing.assert_close(got, expected[layer.name], rtol=tolerance, atol=tolerance)
    assert sums.gradients


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        return None, None


def assigned(x, w, ids):
    buffer = torch.zeros(4, 5).double()
    buffer[:] = w[0]
    return x @ buffer.T


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (lambda x, w, ids: torch.einsum("ti,eoi->teo", x, w), "got 'einsum'; leave it out"),
        (lambda x, w, ids: x @ w.view(12, 5).T, "got 'matmul'"),
        (lambda x, w, ids: x @ w[0][:2].T, "got 'matmul'"),
        (lambda x, w, ids: x @ (w[0] * 2).T, "got 'mul'"),
        (lambda x, w, ids: x @ torch.cat([w[0], w[1]]).T, "got 'cat'"),
        (lambda x, w, ids: torch.addmm(x[:, :4], x, w[0].T, alpha=2), "got 'addmm'"),
        (assigned, "got '__setitem__'"),
        (lambda x, w, ids: x @ w.clone().mul_(2)[0].T, "got 'mul_'"),
        (lambda x, w, ids: x @ w[0].clone().copy_(w[1]).T, "got 'copy_'"),
        (lambda x, w, ids: x @ w[0].detach().T, "got 'detach'"),
        (lambda x, w, ids: x @ w.data[0].T, "got 'data'"),
        (lambda x, w, ids: x, "Stack to multiply tokens by this parameter .* got none"),
        (lambda x, w, ids: Own.apply(x, w[0]), "inside a function that computes its own gradient"),
        (
            lambda x, w, ids: x[:, :4] @ w[0],
            r"with a d x k matrix, got one with a k x d one; set `is_transposed` .* to True",
        ),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(way, said):
    model, layers = stack(way)
    with pytest.raises(ValueError, match=rf"layer 'experts\.up\.0': .*{said}"):
        hooked(model, layers, torch.randn(6, 5).double().requires_grad_(), squares)
    assert not _get_current_function_mode_stack()
    assert "forward" not in vars(model.experts)


def test_the_advice_names_the_implementation():
    model, layers = stack(lambda x, w, ids: torch.einsum("ti,eoi->teo", x, w))
    model.experts.config = type("Config", (), {"_experts_implementation": "sonicmoe"})
    said = r"\(experts implementation 'sonicmoe'\); call model.set_experts_implementation"
    with pytest.raises(ValueError, match=said):
        hooked(model, layers, torch.randn(6, 5).double(), squares)


def test_an_interrupted_forward_leaves_nothing_behind():
    def stop(x, w, ids):
        raise KeyboardInterrupt

    model, layers = stack(stop)
    with pytest.raises(KeyboardInterrupt):
        hooked(model, layers, torch.randn(6, 5).double(), squares)
    assert not _get_current_function_mode_stack()
    assert "forward" not in vars(model.experts)


def shuffled(x, w, ids):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    y = functional.silu(x[order, :].unsqueeze(1)) * 2.0
    return torch.bmm(w[ids], y.squeeze(1)[..., None])


def repeated(x, w, ids):
    return functional.linear(x.view(2, 3, 5).reshape(-1, 5).repeat_interleave(2, dim=0), w[1])


@pytest.mark.parametrize("way", [shuffled, repeated])
def test_rows_are_followed(way):
    model, layers = stack(way)
    x = torch.randn(6, 5).double()
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    got = hooked(model, layers, x, squares, mask=mask)
    # Tokens that do not count are the same as zeros here, but for being counted.
    expected = hooked(model, layers, x * mask[:, None], squares)
    for name, gradient in expected.gradients.items():
        found = got.gradients.get(name, torch.zeros(4, 5).double())
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)
    assert sum(got.rows.values()) == sum(expected.rows.values()) * 2 // 3


def test_rows_that_cannot_be_followed_are_refused_only_under_a_mask():
    model, layers = stack(lambda x, w, ids: functional.linear(x.flip(0), w[1]))
    x = torch.randn(6, 5).double()
    assert hooked(model, layers, x, squares, mask=torch.ones(6)).rows == {"experts.up.1": 6}
    with pytest.raises(
        ValueError, match=r"layer 'experts\.up\.1': .*followed.* in or before Stack"
    ):
        hooked(model, layers, x, squares, mask=torch.tensor([1, 0, 1, 1, 1, 1]))


@pytest.mark.parametrize("copies", [1, 2])
def test_rows_that_were_sent_before_the_module_are_refused_under_a_mask(copies):
    def sorted_rows(x, w, sizes):
        parts = zip(x.split(sizes), w, strict=True)
        return torch.cat([functional.linear(part, each) for part, each in parts])

    class Sends(Whole):
        def forward(self, x):
            sent = x.repeat_interleave(copies, 0).flip(0)
            return self.experts(sent, [copies, 2 * copies, 3 * copies])

    model = Sends(sorted_rows).double().requires_grad_(False)
    layers = find_layers(model, None, target_parameters=["up"])
    x = torch.randn(6, 5).double()
    assert sum(hooked(model, layers, x, squares).rows.values()) == 6 * copies
    with pytest.raises(ValueError, match=r"followed.* in or before Stack"):
        hooked(model, layers, x, squares, mask=torch.tensor([1, 0, 1, 1, 1, 1]))


ORDER = torch.tensor([4, 2, 0, 5, 1, 3])


def repeated_for_all(x, w, ids):
    return (x.repeat(3, 1).view(3, 6, 5) @ w.mT).sum(0)


@pytest.mark.parametrize(
    "way",
    [
        repeated_for_all,
        lambda x, w, ids: (x @ w.mT).sum(0),
        lambda x, w, ids: (x[None] @ w.mT).sum(0),
        lambda x, w, ids: torch.bmm(x.unsqueeze(0).expand(3, -1, -1), w.mT).sum(0),
        lambda x, w, ids: (x[ORDER, None][:, 0] @ w.mT).sum(0)[ORDER.argsort()],
    ],
)
def test_rows_are_followed_to_all_experts(way):
    model, layers = stack(way)
    x = torch.randn(6, 5).double()
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    got = hooked(model, layers, x, squares, mask=mask)
    expected = autograd(model, layers, x, lambda m, x: m(x)[mask.bool()].square().sum())
    for layer in layers:
        torch.testing.assert_close(got.gradients[layer.name], expected[layer.name])


def test_tokens_repeated_before_the_module_for_some_experts_alone():
    class Repeats(Whole):
        def forward(self, x):
            return self.experts(x.repeat(3, 1)).sum(0)

    model = Repeats(lambda x, w, ids: x.view(3, -1, 5) @ w.mT).double().requires_grad_(False)
    layers = find_layers(model, None, target_parameters=["up"])[1:]
    x = torch.randn(6, 5).double()
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    got = hooked(model, layers, x, squares, mask=mask)
    expected = autograd(model, layers, x, lambda m, x: m(x)[mask.bool()].square().sum())
    assert len(got.gradients) == 2
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient, expected[name])


def places(x, experts, of):
    """Each token at the next free place of its expert's, of as many places as there are tokens."""
    chosen = functional.one_hot(of, 3)
    place = functional.one_hot((chosen.cumsum(0) - 1).clamp(min=0), len(x)) * chosen[..., None]
    sent = torch.einsum("tec,ti->eci", place.to(x), x)
    return torch.einsum("tec,eco->to", place.to(x), experts(sent))


class Places(Whole):
    def forward(self, x):
        return places(x, self.experts, torch.tensor([0, 0, 1, 2, 1, 0]))


def turned_in_place(x, w, ids):
    y = x.clone()
    flat = y.view(-1, 5)
    y[:] = x.flip(0)
    return functional.linear(flat, w[1])


def turned_in_a_part(x, w, ids):
    y = x.clone()
    y[:2].copy_(x[4:])
    return functional.linear(y, w[1])


@pytest.mark.parametrize(
    "model",
    [
        Whole(lambda x, w, ids: (x.flip(0) @ w.mT).sum(0)),
        Whole(lambda x, w, ids: places(x, lambda sent: sent @ w.mT, torch.arange(6) % 3)),
        Places(lambda sent, w, ids: torch.bmm(sent, w.mT)),
        Whole(turned_in_place),
        Whole(turned_in_a_part),
        Whole(lambda x, w, ids: functional.linear((x[None] * x.new_ones(3, 1, 1))[2], w[1])),
        Whole(lambda x, w, ids: w[1] @ x[:, :3].reshape(6, 3)[:5] + 0 * x.sum()),
    ],
)
def test_places_that_are_no_tokens_are_not_taken_for_them(model):
    model = model.double().requires_grad_(False)
    layers = find_layers(model, None, target_parameters=["up"])
    x = torch.randn(6, 5).double()
    assert hooked(model, layers, x, squares).gradients
    with pytest.raises(ValueError, match=r"layer 'experts\.up\..': .*followed.* or before Stack"):
        hooked(model, layers, x, squares, mask=torch.tensor([1, 0, 1, 1, 1, 1]))


def test_compiled_models_run_as_they_are_written():
    model, layers = stack(WAYS["an index"])
    x = torch.randn(6, 5).double()
    expected = autograd(model, layers, x, squares)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    got = hooked(model, layers, x, lambda _, x: compiled(x).square().sum()).gradients
    assert len(got) == 2
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name])
    assert not compiled(x).requires_grad


def test_beside_adapters_of_peft():
    model = family("mixtral", "eager").double()
    config = peft.LoraConfig(
        r=2, target_modules=[], init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    adapted = with_adapters(model, config)
    layers = find_layers(adapted, None, target_parameters=["gate_up_proj", "down_proj"])
    expected = autograd(adapted, layers, batch())
    sums = hooked(adapted, layers, batch())
    for name, gradient in sums.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    assert len(sums.gradients) == 16


def test_experts_of_one_parameter_get_one_rank():
    model = family("mixtral")
    layers = find_layers(model)
    groups = expert_groups(layers)
    assert [len(group) for group in groups] == [4] * 4
    spectra = gradient_spectra(model, [batch()])
    allocation = allocate(spectra, 4000, tied=groups)
    for group in groups:
        assert len({allocation[name] for name in group}) == 1
    assert len(set(allocation.values())) > 1


@pytest.mark.parametrize(
    ("name", "implementation", "silent"),
    [("mixtral", "eager", 0), ("mixtral", "batched_mm", 0), ("gpt_oss", "eager", 1)],
)
def test_a_probe_learns_what_peft_learns(name, implementation, silent):
    rank, rate = 2, 1e-2
    model = family(name, implementation, num_hidden_layers=1).double()
    batches = [batch(2, 7), batch(1, 2), batch(1, 3)]  # the second has no token for some experts
    layers = experts_of(model)
    warned = pytest.warns(UserWarning, match="no gradient reached 2 layers")
    with warned if silent else contextlib.nullcontext():
        found = probe_spectra(
            model, None, batches, rank, 3, targets=layers, learning_rate=rate, progress=False
        )
    torch.manual_seed(0)
    sides = [layer.shape[1] for layer in layers]
    starts = [(torch.rand(rank, k, dtype=torch.float64) * 2 - 1) / k**0.5 for k in sides]
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    adapted = with_adapters(model, config)
    wrappers = {w.parameter_name: w for w in adapted.modules() if hasattr(w, "parameter_name")}
    with torch.no_grad():
        for name, wrapper in wrappers.items():
            mine = [a for a, layer in zip(starts, layers, strict=True) if layer.parameter == name]
            wrapper.lora_A["default"].weight.copy_(torch.cat(mine))
    factors = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=0.0)
    for inputs in batches:
        adapted(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = lora_spectra(adapted)
    assert found.shapes == expected.shapes
    assert any(values[1] > 1e-3 for values in expected.values())
    for name, values in expected.items():
        close(found[name], torch.tensor(values), 1e-8 * float(values[0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_on_the_device(implementation, reentrant):
    model = family("mixtral", implementation).cuda().train()
    if reentrant is not None:  # there the forward runs again in the backward pass's own thread
        how = {"use_reentrant": reentrant}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    check(model, {key: value.cuda() for key, value in batch().items()}, tolerance=1e-4)
