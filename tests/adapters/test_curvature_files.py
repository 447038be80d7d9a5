"""Curvature written to a file and read again."""

import itertools
import json
import os
from typing import Any

import pytest

from lorambo_alloc import storage

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")
safetensors = pytest.importorskip(
    "safetensors", reason="safetensors is absent: pip install 'lorambo-alloc[torch]'"
)

from safetensors.torch import load_file, save_file  # noqa: E402

from lorambo_adapters.spectra import curvature_files  # noqa: E402  (needs torch)
from lorambo_adapters.spectra.curvature import curvature_factors  # noqa: E402
from lorambo_adapters.spectra.kronecker import Curvature  # noqa: E402
from lorambo_adapters.spectra.loss_units import curvature_spectra  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(torch.nn.Module):
    """q and v have one input; then another layer, and a table before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(9, 6)
        self.q, self.v = torch.nn.Linear(6, 5), torch.nn.Linear(6, 3)
        self.out = torch.nn.Linear(8, 4)

    def forward(self, ids):
        x = self.table(ids)
        return self.out(torch.tanh(torch.cat([self.q(x), self.v(x)], -1)))


TARGETS = ["table", "q", "v", "out"]


def losses(model, ids):
    return model(ids).square().sum((1, 2))


def ids():
    torch.manual_seed(1)
    return torch.randint(9, (7, 3))


def found(kind="kfac") -> Curvature:
    run: Any = curvature_factors
    return run(Attention(), [ids()], losses, kind=kind, targets=TARGETS, damping=0.01)


def sides(curvature) -> list[Any]:
    return [side for factors in curvature.values() for side in (factors.right, factors.left)]


@pytest.mark.parametrize("kind", ["none", "input", "kfac", "ekfac", "diagonal"])
def test_a_round_trip_is_equal_to_the_bit_and_shares_what_was_shared(kind, tmp_path):
    before = found(kind)
    before.save(tmp_path / "c.safetensors")
    assert os.listdir(tmp_path) == ["c.safetensors"]
    after = Curvature.load(tmp_path / "c.safetensors")
    assert list(after) == list(before)
    for name in ("kind", "terms", "damping", "source", "in_loss_units"):
        assert getattr(after, name) == getattr(before, name)
    assert repr(after) == repr(before)
    for name, factors in before.items():
        assert after[name].shape == factors.shape
        assert after[name].damping == factors.damping
    for mine, theirs in zip(sides(before), sides(after), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.equal(mine.values, theirs.values)
            assert mine.rounding == theirs.rounding
            assert (mine.vectors is None) == (theirs.vectors is None)
            if mine.vectors is not None:
                # Rows or columns as they lay: products then round alike.
                assert mine.vectors.stride() == theirs.vectors.stride()
                assert torch.equal(mine.vectors, theirs.vectors)
    whitenings: Any = before.whitenings()
    for name, pair in after.whitenings().items():
        for mine, theirs in zip(pair, whitenings[name], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    if kind in ("input", "kfac"):
        assert before["q"].right is before["v"].right
        assert after["q"].right is after["v"].right
    if kind == "ekfac":
        bases: Any = after["q"].right, after["v"].right
        assert bases[0].vectors is bases[1].vectors


def test_what_is_shared_is_stored_once_and_the_size_is_as_stated(tmp_path):
    curvature = found()
    curvature.save(tmp_path / "c")
    tensors = load_file(tmp_path / "c")  # by safetensors itself
    # A: 9 of the table, 6 x 6 once, 8 x 8; B: of all four.
    numbers = 9 + (36 + 6) + (64 + 8) + sum(d * d + d for d in (6, 5, 3, 4))
    assert sum(t.numel() for t in tensors.values()) == numbers
    assert all(t.dtype == torch.float64 for t in tensors.values())
    half = tmp_path / "half"
    curvature.save(half, dtype="float32")
    header = [len(path.read_bytes()) for path in (tmp_path / "c", half)]
    assert header[0] - header[1] == pytest.approx(4 * numbers, abs=64)


def test_float32_in_the_file_is_float64_in_memory_and_as_accurate_as_stated(tmp_path):
    curvature = found()
    curvature.save(tmp_path / "c", dtype="float32")
    after = Curvature.load(tmp_path / "c")
    for name, factors in curvature.items():
        torch.manual_seed(2)
        gradient = torch.randn(factors.shape)
        pair: Any = factors.whitening()
        norms = [float(s.max() if s.ndim == 1 else torch.linalg.matrix_norm(s, 2)) for s in pair]
        scale = norms[0] * norms[1] * float(gradient.norm())
        whitened = after[name].whiten(gradient)
        assert whitened.dtype == torch.float64
        error = float((whitened - factors.whiten(gradient)).norm()) / scale
        assert 0 < error < 3e-7
    with pytest.raises(ValueError, match="dtype: expected 'float64' or 'float32', got 'float16'"):
        curvature.save(tmp_path / "c", dtype="float16")  # pyright: ignore[reportArgumentType]


def test_a_loaded_curvature_gives_the_same_spectra(tmp_path):
    curvature = found("ekfac")
    curvature.save(tmp_path / "c")
    model = Attention()
    spectra = [
        curvature_spectra(model, [ids()], losses, curvature=each, targets=TARGETS)
        for each in (curvature, Curvature.load(tmp_path / "c", device="cpu"))
    ]
    for name in TARGETS:
        assert (spectra[0][name] == spectra[1][name]).all()


def test_a_failure_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "c"
    found("diagonal").save(path)
    before = path.read_bytes()
    written = itertools.count()

    def fail(tensor, real=curvature_files._bytes):
        if next(written) == 3:
            raise KeyboardInterrupt
        return real(tensor)

    monkeypatch.setattr(curvature_files, "_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        found().save(path)
    assert os.listdir(tmp_path) == ["c"]
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(FileNotFoundError):
        Curvature.load(path)
    storage.write(path, "spectra", 1, {}, {})
    with pytest.raises(ValueError, match=r"c: expected a curvature file of lorambo-alloc"):
        Curvature.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="expected a curvature file of lorambo-alloc"):
        Curvature.load(path)
    for junk in (b"", b"\x00" * 7, b"\x00" * 400, os.urandom(400), b"[" * 5000):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="expected a curvature file of lorambo-alloc"):
            Curvature.load(path)


def edited(path, change):
    """The file with another metadata entry of ours, or another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["lorambo_alloc"])
    change(ours, header)
    header["__metadata__"]["lorambo_alloc"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_damaged_and_newer_files_are_refused(tmp_path):
    path = tmp_path / "c"
    curvature = found()
    curvature.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged|expected a curvature file"):
            Curvature.load(path)
    path.write_bytes(whole + b"\x00")
    with pytest.raises(ValueError, match="the file is damaged: expected"):
        Curvature.load(path)

    def shape(ours, header):
        header["tensor.1"]["shape"] = [3, 3]

    def negative(ours, header):
        square = next(i for i in header if len(header[i].get("shape", ())) == 2)
        header[square]["shape"] = [-n for n in header[square]["shape"]]

    def kind(ours, header):
        ours["kind"] = "spectra"

    def version(ours, header):
        ours["version"] = 2

    def side(ours, header):
        ours["layers"][1][2] = 0

    def index(ours, header):
        ours["factors"][0]["values"] = 99

    def missing(ours, header):
        del ours["terms"]

    def dtype(ours, header):
        header["tensor.0"]["dtype"] = "BF16"

    for change, match in (
        (shape, "the file is damaged: ValueError"),
        (negative, "the file is damaged"),
        (kind, "expected a file of kind 'curvature', got 'spectra'"),
        (version, "expected curvature version 1 or older, got 2: a newer lorambo-alloc"),
        (side, "the file is damaged: .*layer 'q': a factor of 9, not 6"),
        (index, "the file is damaged: IndexError"),
        (missing, "the file is damaged: KeyError"),
        (dtype, "the file is damaged: KeyError"),
    ):
        path.write_bytes(whole)
        edited(path, change)
        with pytest.raises(ValueError, match=match):
            Curvature.load(path)
    path.write_bytes(whole[:-8] + b"\xff" * 8)
    with pytest.raises(ValueError, match="the file is damaged: got NaN or infinity"):
        Curvature.load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_a_gpu_and_onto_one(tmp_path):
    here = found()
    run: Any = curvature_factors
    there = run(Attention().cuda(), [ids().cuda()], losses, targets=TARGETS, damping=0.01)
    there.save(tmp_path / "c")
    back = Curvature.load(tmp_path / "c", device="cuda")
    for mine, theirs in zip(sides(there), sides(back), strict=True):
        assert theirs.values.device.type == "cuda"
        assert torch.equal(mine.values, theirs.values)
    assert list(Curvature.load(tmp_path / "c")) == list(here)
