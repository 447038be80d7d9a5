"""Whether a file can be written, and whether it may be."""

import os

import pytest

from lorambo_adapters.outputs import check_output


def test_new_files_and_older_spectra(tmp_path):
    for name in ("new.npz", "new.safetensors", "новый"):
        check_output(tmp_path / name)
    (tmp_path / "old.npz").write_bytes(b"older")
    (tmp_path / "link.npz").symlink_to("old.npz")
    for name in ("old.npz", "link.npz"):
        check_output(str(tmp_path / name))
    assert (tmp_path / "old.npz").read_bytes() == b"older"


def test_folders(tmp_path):
    with pytest.raises(IsADirectoryError):
        check_output(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_output(tmp_path / "none" / "s.npz")


@pytest.mark.parametrize("name", ["model.safetensors", "model.BIN", "m.index.json", "a.pt"])
def test_files_of_models_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "link.npz").symlink_to(name)
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / f"linked_{name}").symlink_to("blob")  # as in a cache of the hub
    for file in (name, "link.npz", f"linked_{name}"):
        with pytest.raises(ValueError, match=f"{file}: expected a file to write spectra to"):
            check_output(tmp_path / file)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a file to write to, got a device"):
        check_output(tmp_path / "pipe")
