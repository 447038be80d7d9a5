"""One file a result: versioned npz, no pickle, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Header = dict[str, Any]


def write(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    header: Header,
    arrays: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write arrays and a JSON header to `path`; a failure leaves an older file as it was."""
    text = json.dumps({"kind": kind, "version": version, **header})
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, header=np.array(text), **arrays)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[BinaryIO]:
    """A file to write into that takes the place of `path` at the end, if all went well.

    A link stays, and what it leads to is replaced.

    Raises:
        OSError: the file cannot be written, or `path` is a device or the like, which a file would
            take the place of for everybody.
    """
    import tempfile  # here, as it takes a while to import and most programs write no file

    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(
    path: str | os.PathLike[str], kind: str, version: int
) -> tuple[Header, dict[str, npt.NDArray[Any]]]:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of this library's, of another kind, newer, or damaged.
    """
    import zipfile

    place = os.fspath(path)
    # Opened here, because np.load leaves its own file open when a zip file is cut short.
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{place}: expected an npz file of lorambo-alloc, got something else")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
        except Exception as error:  # zlib.error, BadZipFile and the like, from damaged members
            raise ValueError(f"{place}: the file is damaged: {error}") from error
    try:
        header = json.loads(str(arrays.pop("header")))
        found, found_version = header["kind"], int(header["version"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: expected a file of lorambo-alloc, got another npz file"
        ) from error
    if found != kind:
        raise ValueError(f"{place}: expected a file of kind {kind!r}, got {found!r}")
    if found_version > version:
        raise ValueError(
            f"{place}: expected {kind} version {version} or older, got {found_version}: "
            "a newer lorambo-alloc wrote it"
        )
    return header, arrays
