"""Whether a file can be written: asked before the work, and not after hours of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# What spectra are made from always ends like this, and spectra have no reason to.
_INPUTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json"}


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, or that would take the place of a model's.

    An older file of another ending is no obstacle: it is replaced.

    Raises:
        OSError: its folder does not exist, or it is a folder.
        ValueError: it is a device or the like, or a file of weights or their configuration.

    Example:
        >>> check_output("spectra.npz")
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        number = errno.EISDIR if path.is_dir() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file to write to, got a device or the like")
    endings = {path.suffix.lower(), path.resolve().suffix.lower()}  # a link's, and its target's
    if path.exists() and endings & _INPUTS:
        raise ValueError(
            f"{path}: expected a file to write spectra to, got one of a model's kind that is there"
        )
