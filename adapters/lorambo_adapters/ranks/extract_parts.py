"""What an interrupted extraction of a LoRA had finished, in a folder beside its output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.extract_parts needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.tensor_writer import Planned, tensor_writer
from lorambo_alloc import Spectra
from lorambo_alloc.storage import replacing

_KIND = "partial extraction of a LoRA"


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer as they will be stored.

    Attributes:
        left: B, d x r.
        right: A, r x k.
        distance: |D - scale B A|_F^2, measured.
    """

    left: torch.Tensor
    right: torch.Tensor
    distance: float


class FactorParts:
    """The spectra and the finished factors of a run, in `<output>.partial`.

    The folder is made when the work begins, and is removed by `finish`; where an error or Ctrl-C
    ends the run it stays, if the run can be told from others.

    Args:
        output: the folder that the adapter will take; None keeps nothing.
        names: of all layers, in an order that the key decides.
        key: all that spectra and factors depend on but the ranks, as JSON can hold it; None: a run
            that is not resumed.

    Raises:
        FileExistsError: there is a folder or file of that name that is not of an extraction.
    """

    def __init__(
        self, output: Path | None, names: Iterable[str], key: Mapping[str, Any] | None
    ) -> None:
        self._folder = None if output is None else output.with_name(output.name + ".partial")
        self._resumable = key is not None
        # Names may be longer than a file's may be, and hold what it may not.
        self._numbers = {name: i for i, name in enumerate(names)}
        if self._folder is None:
            return
        identity = {"kind": _KIND, "version": 1, "key": key}
        identity = json.loads(json.dumps(identity))
        file = self._folder / "extraction.json"
        if self._folder.exists():
            found = _read(file)
            if not isinstance(found, dict) or found.get("kind") != _KIND:
                raise FileExistsError(
                    17, "File exists, and is not a partial extraction", str(self._folder)
                )
            if found != identity or key is None:
                shutil.rmtree(self._folder)
        self._folder.mkdir(exist_ok=True)
        with replacing(file) as out:
            out.write(json.dumps(identity).encode())

    def spectra(self, make: Callable[[Path | None], Spectra]) -> Spectra:
        """The spectra: those that an earlier run left, or new ones, saved to the file given."""
        if self._folder is None:
            return make(None)
        file = self._folder / "spectra.npz"
        try:
            return Spectra.load(file)
        except (FileNotFoundError, ValueError):
            return make(file)

    def of(self, name: str, rank: int, make: Callable[[], LayerFactors]) -> LayerFactors:
        """A layer's factors: those that an earlier run left, or new ones, which are kept."""
        if self._folder is None:
            return make()
        try:
            return self.stored(name, rank)
        except (FileNotFoundError, ValueError, KeyError):
            pass  # none, or not one of ours any more: the work is done again
        made = make()
        tensors = {"left": made.left, "right": made.right}
        plan = {key: Planned(tuple(t.shape), t.dtype) for key, t in tensors.items()}
        metadata = {"name": name, "rank": str(rank), "distance": made.distance.hex()}
        with tensor_writer(self._path(name, rank), plan, metadata) as writer:
            for key, tensor in tensors.items():
                writer.add(key, tensor)
        return made

    def stored(self, name: str, rank: int) -> LayerFactors:
        """A layer's factors as they were kept.

        Raises:
            FileNotFoundError: there are none.
            ValueError: (or KeyError) the file is damaged or another layer's.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(name, rank)
        if not path.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata()
                if (metadata["name"], metadata["rank"]) != (name, str(rank)):
                    raise ValueError(f"{path}: expected layer {name!r}, got {metadata['name']!r}")
                distance = float.fromhex(metadata["distance"])
                return LayerFactors(file.get_tensor("left"), file.get_tensor("right"), distance)
        except SafetensorError as error:
            raise ValueError(f"{path}: the file is damaged: {error}") from error

    def finish(self) -> None:
        """Remove the folder: the adapter is there."""
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def __enter__(self) -> FactorParts:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._folder is not None and not self._resumable:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._numbers[name]}.{rank}.safetensors"


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
