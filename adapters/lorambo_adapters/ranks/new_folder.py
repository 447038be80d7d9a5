"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def check_new(path: Path) -> None:
    """Refuse a folder that cannot be made.

    Raises:
        FileExistsError: there is a file of that name, or a folder that is not empty.
        FileNotFoundError: the folder that it is to be in does not exist.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(17, "File exists, and is not an empty folder", str(path))
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(2, "No such file or directory", str(path.absolute().parent))


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder to write into that takes the name `path` at the end, if all went well.

    Raises:
        OSError: as `check_new`, or the folder cannot be made.
    """
    check_new(path)
    target = path.absolute()
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        os.replace(folder, target)  # takes the place of an empty folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
