"""What an interrupted extraction had finished, in a file beside its output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorambo_adapters.spectra.decompose import Decomposition
from lorambo_alloc import storage

_KIND, _VERSION = "partial spectra", 1
# Saving is to take no more than a twentieth of the time, and not to wear a disk out.
_SHARE, _LEAST_SECONDS = 20.0, 2.0


class PartialResults:
    """Decompositions by layer, saved from time to time to `<output>.partial`.

    Args:
        output: the file that the finished spectra will take.
        key: all that the results depend on (the source's files, the options), as JSON can hold it.
            A partial file with another key is of another run: nothing is taken from it, and it is
            overwritten.

    Raises:
        OSError: the output's folder does not exist or cannot be written to, or the output is a
            folder: found out now, and not after hours of work.
    """

    def __init__(self, output: str | os.PathLike[str], key: Mapping[str, Any]) -> None:
        output = Path(output)
        if output.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(output))
        if not output.parent.is_dir():
            raise FileNotFoundError(2, "No such file or directory", str(output))
        self.path = output.with_name(output.name + ".partial")
        self._key = json.loads(json.dumps(key))  # as it will come back: lists, not tuples
        self._found = self._read()
        self.resumed = len(self._found)
        self._saved = time.monotonic()
        self._took = 0.0
        self.save()

    def get(self, name: str) -> Decomposition | None:
        """The layer's result, if this run or the one before had it."""
        return self._found.get(name)

    def add(self, name: str, result: Decomposition) -> None:
        """Keep a layer's result, and save all if the last time was long enough ago."""
        self._found[name] = result
        if time.monotonic() - self._saved > max(_LEAST_SECONDS, _SHARE * self._took):
            self.save()

    def save(self) -> None:
        """Replace the file by one with all results so far, whole or not at all."""
        start = time.monotonic()
        results = list(self._found.values())
        header = {
            "key": self._key,
            "names": list(self._found),
            "lengths": [len(result.values) for result in results],
            "unresolved": [result.unresolved for result in results],
            "methods": [result.method for result in results],
            "shortfalls": [result.shortfall for result in results],
        }
        values = np.concatenate([result.values for result in results] or [np.empty(0)])
        storage.write(self.path, _KIND, _VERSION, header, {"values": values})
        self._saved = time.monotonic()
        self._took = self._saved - start

    def remove(self) -> None:
        """Delete the file: the output is there."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Decomposition]:
        try:
            header, arrays = storage.read(self.path, _KIND, _VERSION)
            if header["key"] != self._key:
                return {}
            rows = np.split(arrays["values"], np.cumsum(header["lengths"])[:-1])
            columns = (header[name] for name in ("names", "unresolved", "methods", "shortfalls"))
            return {
                name: Decomposition(row, unresolved, method, shortfall)
                for row, name, unresolved, method, shortfall in zip(
                    rows if header["names"] else [], *columns, strict=True
                )
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}  # none, or not one of ours any more: the work is done again
