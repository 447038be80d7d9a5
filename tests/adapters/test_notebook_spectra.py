"""What the notebooks' spectra are made by, on a tiny model."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
transformers = pytest.importorskip("transformers", reason="transformers is absent")

from lorambo_alloc import Spectra  # noqa: E402
from notebooks import make_spectra  # noqa: E402  (needs torch)

FILES = {
    "activations",
    "difference",
    "difference-weighted",
    "gradient",
    "gradient-1-pass",
    "gradient-3-passes",
    "gradient-whitened",
    "lora",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files, from a BERT of one layer and three steps of each training."""
    model, out = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("made")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{a}" for a in letters)]
    (model / "vocab.txt").write_text("\n".join(words))
    vocabulary = {word: i for i, word in enumerate(words)}
    settings = {"vocab": vocabulary} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    transformers.BertTokenizerFast(vocab_file=str(model / "vocab.txt"), **settings).save_pretrained(
        model
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(model)
    options = "--classifier-steps 3 --steps 3 --length 16".split()
    make_spectra.main(["--model", str(model), "--out", str(out), *options])
    return out


def test_each_file_has_each_layer(made):
    assert {path.stem for path in made.glob("*.npz")} == FILES
    names = set(Spectra.load(made / "gradient.npz"))
    assert len(names) == 6
    assert "encoder.layer.0.attention.self.query" in names
    for name in FILES:
        spectra = Spectra.load(made / f"{name}.npz")
        assert set(spectra) == names
        assert spectra.shapes is not None
        assert spectra.shapes["encoder.layer.0.intermediate.dense"] == (40, 24)
        assert all(values[0] > 0 for values in spectra.values())
        assert all((values == values.astype(np.float32)).all() for values in spectra.values())


def test_the_whole_gradient_is_what_the_sketches_see(made):
    whole, sketched = (Spectra.load(made / f"gradient{s}.npz") for s in ("", "-3-passes"))
    for name, values in whole.items():  # so small that the sketches hold everything
        most = min(len(values), len(sketched[name]))
        assert sketched[name][:most] == pytest.approx(values[:most], abs=1e-4 * values[0])


def test_what_was_trained_is_said(made):
    log = json.loads((made / "made.json").read_text())
    assert set(log["held_out"]) == {"classifier alone", "all weights", "LoRA of rank 16"}
    assert all(0 < run["loss"] < 5 for run in log["held_out"].values())
    assert log["package"] is None


def test_the_files_beside_the_notebooks_are_these():
    folder = make_spectra.HERE / "data"
    assert {path.stem for path in folder.glob("*.npz")} == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
