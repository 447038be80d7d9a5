"""What an interrupted extraction had finished, in a file beside its output (one a worker)."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorambo_adapters.outputs import check_output
from lorambo_adapters.spectra.decompose import Decomposition
from lorambo_alloc import storage

_KIND, _VERSION = "partial spectra", 1
# Saving is to take no more than a twentieth of the time, and not to wear a disk out.
_SHARE, _LEAST_SECONDS = 20.0, 2.0


class PartialResults:
    """Decompositions by layer, saved from time to time beside the output.

    In `<output>.partial`, and where several workers share the layers out, in `<output>.partial.1`
    and so on for the others. Whoever begins takes over what all files that it can see hold, so that
    a run may be continued by fewer or more workers.

    Args:
        output: the file that the finished spectra will take.
        key: all that the results depend on (the source's files, the options), as JSON can hold it.
            A partial file with another key is of another run: nothing is taken from it, and it is
            overwritten.
        worker: the place of the worker whose file this is.

    Raises:
        OSError: the output cannot be written (`check_output`): found out now, and not after hours
            of work.
        ValueError: it would take the place of a model's file.
    """

    def __init__(
        self, output: str | os.PathLike[str], key: Mapping[str, Any], worker: int = 0
    ) -> None:
        check_output(output)
        output = Path(output)
        self._first = output.with_name(output.name + ".partial")
        self._worker = worker
        self.path = self._first.with_name(f"{self._first.name}.{worker}") if worker else self._first
        self._key = json.loads(json.dumps(key))  # as it will come back: lists, not tuples
        self.found: dict[str, Decomposition] = {}
        for path in self._files():
            self.found |= self._read(path)
        self.resumed = len(self.found)
        self._saved = time.monotonic()
        self._took = 0.0
        self.save()

    def add(self, name: str, result: Decomposition) -> None:
        """Keep a layer's result, and save all if the last time was long enough ago."""
        self.found[name] = result
        if time.monotonic() - self._saved > max(_LEAST_SECONDS, _SHARE * self._took):
            self.save()

    def save(self) -> None:
        """Replace the file by one with all results so far, whole or not at all."""
        start = time.monotonic()
        header, values = packed(self.found)
        storage.write(self.path, _KIND, _VERSION, {"key": self._key, **header}, {"values": values})
        self._saved = time.monotonic()
        self._took = self._saved - start

    def remove(self) -> None:
        """Delete the file: the output is there. Worker 0 deletes all of them."""
        for path in [self.path] if self._worker else self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        others = re.compile(re.escape(self._first.name) + r"\.[0-9]+")
        siblings = [p for p in self._first.parent.iterdir() if others.fullmatch(p.name)]
        return [self._first, *sorted(siblings)]

    def _read(self, path: Path) -> dict[str, Decomposition]:
        try:
            header, arrays = storage.read(path, _KIND, _VERSION)
            return unpacked(header, arrays["values"]) if header["key"] == self._key else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}  # none, or not one of ours any more: the work is done again


def packed(
    results: Mapping[str, Decomposition],
) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """Results as a header that JSON can hold, and their values in one array."""
    found = list(results.values())
    header = {
        "names": list(results),
        "lengths": [len(result.values) for result in found],
        "unresolved": [result.unresolved for result in found],
        "methods": [result.method for result in found],
        "shortfalls": [result.shortfall for result in found],
    }
    return header, np.concatenate([result.values for result in found] or [np.empty(0)])


def unpacked(
    header: Mapping[str, Any], values: npt.NDArray[np.float64]
) -> dict[str, Decomposition]:
    """What `packed` was given.

    Raises:
        ValueError: (or KeyError, TypeError) it is not of that form.
    """
    rows = np.split(values, np.cumsum(header["lengths"])[:-1])
    columns = (header[name] for name in ("names", "unresolved", "methods", "shortfalls"))
    return {
        name: Decomposition(row, unresolved, method, shortfall)
        for row, name, unresolved, method, shortfall in zip(
            rows if header["names"] else [], *columns, strict=True
        )
    }
