"""One file a result: written whole or not at all, read without pickle."""

import json
import os
import pickle
import stat
import zipfile

import numpy as np
import pytest

from lorambo_alloc import Allocation, Spectra, allocate, storage

HEADER = {"words": "dess ☃", "numbers": [1, 2.5], "nothing": None}
ARRAYS = {"values": np.array([2.0, 1.0]), "offsets": np.array([0, 2])}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.npz"
    storage.write(path, "thing", 2, HEADER, ARRAYS)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_round_trip(file, version):
    for path in (file, str(file)):
        header, arrays = storage.read(path, "thing", version)
        assert header == {**HEADER, "kind": "thing", "version": 2}
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert arrays[name].tolist() == array.tolist()
            assert arrays[name].dtype == array.dtype


def test_any_ending_is_kept(tmp_path):
    storage.write(tmp_path / "file.ranks", "thing", 1, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file.ranks"]
    assert storage.read(tmp_path / "file.ranks", "thing", 1)[1] == {}


def test_the_file_is_as_readable_as_any_other(file, tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.read(tmp_path / "none.npz", "thing", 1)


@pytest.mark.parametrize("fault", ["in the middle", "at the end", "interrupted"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(file, monkeypatch, fault):
    before = file.read_bytes()
    error: type[BaseException] = OSError
    if fault == "in the middle":

        def break_off(stream, **arrays):
            stream.write(b"half of it")
            raise OSError("disk full")

        monkeypatch.setattr(np, "savez_compressed", break_off)
    elif fault == "at the end":

        def refuse(*places):
            raise OSError("no rename")

        monkeypatch.setattr(os, "replace", refuse)
    else:
        error = KeyboardInterrupt

        def interrupt(stream):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(error):
        storage.write(file, "thing", 2, {}, {"values": np.zeros(9)})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["file.npz"]


def test_a_header_that_is_no_json_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        storage.write(tmp_path / "file.npz", "thing", 1, {"odd": object()}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.write(tmp_path / "none" / "file.npz", "thing", 1, {}, {})


def test_a_link_stays_and_what_it_leads_to_is_replaced(file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.npz"
    link.symlink_to(file)
    storage.write(link, "thing", 3, {}, {})
    assert link.is_symlink()
    assert storage.read(file, "thing", 3)[0]["version"] == 3
    assert [path.name for path in link.parent.iterdir()] == ["link.npz"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    # As /dev/null is none, which a process with the rights for it would take from all others.
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        storage.write(tmp_path / "pipe", "thing", 1, {}, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_data_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    storage.write(tmp_path / "file.npz", "thing", 1, {}, ARRAYS)
    assert done == ["fsync", "replace"]


def test_the_wrong_kind(file):
    with pytest.raises(ValueError, match=r"file.npz: expected a file of kind 'other', got 'thing'"):
        storage.read(file, "other", 2)


def test_a_newer_version(file):
    expected = "file.npz: expected thing version 1 or older, got 2: a newer lorambo-alloc wrote it"
    with pytest.raises(ValueError, match=expected):
        storage.read(file, "thing", 1)


def test_truncated_anywhere(file):
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"file.npz: (expected an npz|the file is damaged)"):
            storage.read(file, "thing", 2)


def test_a_flipped_byte_is_an_error_or_changes_nothing(file):
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            header, arrays = storage.read(file, "thing", 2)
        except ValueError:
            continue
        # Some bytes of a zip file (dates, attributes) say nothing about its content.
        assert header["words"] == HEADER["words"]
        assert all(array.tolist() == ARRAYS[name].tolist() for name, array in arrays.items())


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"PK\x03\x04 but no more", pickle.dumps({"kind": "thing"}), b"\x93NUMPY"],
)
def test_what_is_no_npz_file(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"file.npz: expected an npz file of lorambo-alloc"):
        storage.read(file, "thing", 2)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises((IsADirectoryError, PermissionError)):
        storage.read(tmp_path, "thing", 1)


@pytest.mark.parametrize(
    "header",
    [
        "no json",
        json.dumps([1, 2]),
        json.dumps("thing"),
        json.dumps({"kind": "thing"}),
        json.dumps({"version": 1}),
        json.dumps({"kind": "thing", "version": "one"}),
        json.dumps({"kind": "thing", "version": None}),
    ],
)
def test_an_npz_file_of_someone_else(tmp_path, header):
    np.savez(tmp_path / "file.npz", header=np.array(header))
    with pytest.raises(ValueError, match="expected a file of lorambo-alloc, got another npz file"):
        storage.read(tmp_path / "file.npz", "thing", 1)
    np.savez(tmp_path / "file.npz", values=np.zeros(3))
    with pytest.raises(ValueError, match="expected a file of lorambo-alloc, got another npz file"):
        storage.read(tmp_path / "file.npz", "thing", 1)


class Pickled:
    """Marks a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("member", ["header", "values"])
def test_a_pickle_inside_is_refused_and_not_run(file, tmp_path, member):
    marker = tmp_path / "unpickled"
    with np.load(file) as data:
        arrays = {name: data[name] for name in data.files}
    arrays[member] = np.array([Pickled(marker)], dtype=object)
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=r"file.npz: the file is damaged: .*allow_pickle=False"):
        storage.read(file, "thing", 2)
    assert not marker.exists()


def test_what_is_written_holds_no_pickle(file):
    with zipfile.ZipFile(file) as members:
        assert {name: members.read(name)[:6] for name in members.namelist()} == {
            f"{name}.npy": b"\x93NUMPY" for name in ("header", *ARRAYS)
        }


def test_spectra_and_allocations_are_not_mixed_up(tmp_path):
    spectra = Spectra({"a": [2.0, 1.0]})
    spectra.save(tmp_path / "spectra.npz")
    allocate(spectra, 1).save(tmp_path / "ranks.npz")
    with pytest.raises(ValueError, match="expected a file of kind 'spectra', got 'allocation'"):
        Spectra.load(tmp_path / "ranks.npz")
    with pytest.raises(ValueError, match="expected a file of kind 'allocation', got 'spectra'"):
        Allocation.load(tmp_path / "spectra.npz")
