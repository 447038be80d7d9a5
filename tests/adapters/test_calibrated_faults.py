"""Extraction by examples where something is wrong, or ends it: what is said, and what is left."""

from copy import deepcopy

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.ranks.calibrated import extract_calibrated  # noqa: E402
from lorambo_adapters.spectra.fisher import TrueFisher  # noqa: E402
from lorambo_alloc import InfeasibleError  # noqa: E402
from tests.adapters import calibrated_models as models  # noqa: E402
from tests.adapters.conftest import quiet  # noqa: E402

# Few and short examples, so that the tests are quick.
pytestmark = pytest.mark.filterwarnings("ignore:.*singular values are refitted:UserWarning")


class Snapshot:
    """All that a caller could notice of a model, compared to the bit."""

    def __init__(self, model):
        self.model = model
        self.tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers()),
        }
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.rest = self.look()

    def look(self):
        needs = {name: p.requires_grad for name, p in self.model.named_parameters()}
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in self.model.modules()]
        return needs, [m.training for m in self.model.modules()], hooks

    def check(self):
        now = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers()),
        }
        assert list(now) == list(self.tensors)
        for name, tensor in now.items():
            assert tensor is self.tensors[name], name
            assert torch.equal(tensor, self.values[name]), name
        assert self.look() == self.rest
        assert all(p.grad is None for p in self.model.parameters())


def in_use(model):
    """In training mode but for a part, and with a frozen tensor."""
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [models.bert, models.gpt2])
def test_the_models_are_as_they_were(transformers, tmp_path, make):
    base = in_use(make(transformers))
    tuned, batches = models.updated(base), models.examples("lm" if make is models.gpt2 else "c")
    before = Snapshot(base), Snapshot(tuned)
    state = torch.random.get_rng_state()
    first = extract_calibrated(base, tuned, batches, "uniform:1")
    for each in before:
        each.check()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(not t.requires_grad for t in first.tensors.values())
    memory = {p.untyped_storage().data_ptr() for m in (base, tuned) for p in m.parameters()}
    assert not memory & {t.untyped_storage().data_ptr() for t in first.tensors.values()}


@pytest.mark.parametrize("moment", range(7))
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_behind(transformers, tmp_path, moment, kind):
    base = in_use(models.bert(transformers))
    tuned, batches = models.updated(base), models.examples("classes", 2)
    before = Snapshot(base), Snapshot(tuned)
    # When the two are compared, at the base, after the first cut, in a step, between steps, in the
    # tuned model.
    calls = {0: 0, 1: 1, 2: 3, 3: 6, 4: 7, 5: 10, 6: 2}[moment]
    count = [0]

    def stop(*_):
        count[0] += 1
        if count[0] > calls:
            raise kind

    victim = tuned if moment == 6 else base
    handle = victim.register_forward_pre_hook(stop)
    with pytest.raises(kind):
        extract_calibrated(base, tuned, batches, "uniform:1", tmp_path / "out")
    handle.remove()
    for each in before:
        each.check()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_no_half_adapter(transformers, tmp_path, monkeypatch):
    base = models.bert(transformers)
    tuned = models.updated(base)
    before = Snapshot(base), Snapshot(tuned)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorambo_adapters.ranks.tensor_writer.TensorWriter.finish", full)
    with pytest.raises(OSError, match="No space left"):
        extract_calibrated(base, tuned, models.examples("c"), "uniform:1", tmp_path / "out")
    for each in before:
        each.check()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(transformers, tmp_path):
    base = models.bert(transformers)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for path, error in ((tmp_path / "out", FileExistsError), (tmp_path / "a" / "b", OSError)):
        with pytest.raises(error):
            extract_calibrated(base, models.updated(base), models.examples("c"), 100, path)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def changed(model, name, module):
    copy = deepcopy(model)
    owner, _, last = name.rpartition(".")
    setattr(copy.get_submodule(owner), last, module)
    return copy


def test_models_that_do_not_fit_are_refused(transformers, peft):
    base = models.bert(transformers)
    tuned, batches = models.updated(base), models.examples("c")
    name = "bert.encoder.layer.1.intermediate.dense"

    def refused(message, *, base=base, tuned=tuned, batches=batches, **options):
        with pytest.raises(ValueError, match=message):
            extract_calibrated(base, tuned, batches, "uniform:1", **options)

    linear = torch.nn.Linear
    where = rf"layer '{name}': expected the same in the tuned model"
    wider, bare = linear(16, 25), linear(16, 24, bias=False)
    refused(
        rf"{where}, a weight of shape \(24, 16\).*got \(25, 16\)", tuned=changed(tuned, name, wider)
    )
    refused(rf"{where}, a bias, got none", tuned=changed(tuned, name, bare))
    other = changed(tuned, name, torch.nn.Bilinear(2, 2, 2))
    refused(rf"{where}, a Linear, got a Bilinear", tuned=other)
    missing = deepcopy(tuned)
    del missing.bert.encoder.layer[1]
    refused("layer 'bert.encoder.layer.1.*in the tuned model, got none", tuned=missing)
    refused("expected two models, got one twice", tuned=base)
    refused("tuned: expected a target that differs", tuned=deepcopy(base), modules_to_save=[])
    refused("tuned: expected a torch.nn.Module, got OrderedDict", tuned=tuned.state_dict())
    with quiet():
        adapted = peft.get_peft_model(deepcopy(base), peft.LoraConfig(target_modules=["query"]))
    refused("base: expected a model without adapters, got one at .*query", base=adapted)
    refused(
        r"module 'classifier': expected tensors of the same shapes.*'weight': \(3, 16\).*\(5, 16\)",
        tuned=changed(tuned, "classifier", linear(16, 5)),
    )
    refused("names of the base's modules, got 'head'", modules_to_save=["head"])
    refused("expected a list of names, got 'classifier'", modules_to_save="classifier")
    refused("none lies in another, got '.*dense' in", modules_to_save=["layer.0", "0.output.dense"])
    refused(
        "layer 'bert.embeddings.word_embeddings': expected a Linear or Conv1D, got Embedding",
        targets=["word_embeddings"],
    )
    refused("expected layers besides classifier, got none", targets=["classifier"])
    refused("batches: expected at least one batch, got none", batches=[])
    refused("got dict; wrap it in a list", batches=batches[0])
    refused("expected a finite number >= 0, got -1", damping=-1)
    refused("scale: expected a finite number that is not 0, got 0", scale=0)
    refused("largest_change: expected a number above 0, got 0", largest_change=0)
    refused("refit", refit=-1)
    refused("max_rank", max_rank=0)
    refused("fisher: expected 'empirical', 'true' or a TrueFisher, got 'mine'", fisher="mine")
    gaussian = TrueFisher(likelihood="gaussian")
    refused("expected a categorical likelihood.*pass refit=0", fisher=gaussian)
    refused("overflow with scale", scale=1e-30, dtype=torch.float16)
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    refused("expected a mapping with labels, got none", batches=unlabelled)
    broken = deepcopy(tuned)
    broken.get_submodule(name).weight.data[0, 0] = torch.nan
    refused(f"layer '{name}' of tuned less base: expected a matrix of finite", tuned=broken)


def test_budgets_that_buy_nothing_are_refused(transformers):
    base = models.llama(transformers)
    tuned, batches = models.updated(base), models.examples("lm")
    with pytest.raises(ValueError, match=r"budget 3: expected at least one rank to fit.*cheapest"):
        extract_calibrated(base, tuned, batches, 3)
    with pytest.raises(ValueError, match="expected a uniform rank up to max_rank, which is 2"):
        extract_calibrated(base, tuned, batches, "uniform:4", max_rank=2)
    with pytest.raises(InfeasibleError):
        extract_calibrated(base, tuned, batches, 100, min_rank=1)


def test_a_shared_head_cannot_be_saved(transformers):
    base = models.gpt2(transformers)
    with pytest.raises(ValueError, match=r"'lm_head'.*'transformer.wte.weight' too"):
        extract_calibrated(
            base, models.updated(base), models.examples("lm"), 500, modules_to_save=["lm_head"]
        )


def test_a_layer_that_no_gradient_reaches_is_said(transformers):
    base = models.bert(transformers)
    base.unused = torch.nn.Linear(4, 4)
    tuned = models.updated(base)
    with pytest.warns(UserWarning, match="no gradient reached 1 layers, which are cut plainly"):
        lora = extract_calibrated(base, tuned, models.examples("c"), "uniform:2", min_rank=1)
    assert lora["unused"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in lora.tensors.values())
    u, s, vt = torch.linalg.svd((tuned.unused.weight - base.unused.weight).detach())
    right, left = (lora.tensors[f"base_model.model.unused.lora_{side}.weight"] for side in "AB")
    rank = lora["unused"]
    torch.testing.assert_close(left @ right, (u[:, :rank] * s[:rank]) @ vt[:rank])


def test_tokens_that_no_sample_owns_are_not_refitted():
    class Sparse(torch.nn.Module):
        """Sends some rows alone through its layer, as a router would."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return torch.cat([self.layer(x[:3]), x[3:]])

    torch.manual_seed(0)
    base = Sparse()
    options = {"targets": ["layer"], "fisher": "true", "predict": lambda m, b: m(b["x"])}
    batches, tuned = [{"x": torch.randn(8, 4)}], models.updated(base)
    with pytest.raises(ValueError, match=r"layer 'layer': .*got 3; leave it out.*refit=0"):
        extract_calibrated(base, tuned, batches, 8, **options)
    assert extract_calibrated(base, tuned, batches, 8, refit=0, **options)["layer"] == 1
