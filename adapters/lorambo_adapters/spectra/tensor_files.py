"""The tensors of a checkpoint on disk, listed at once and read one at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.tensor_files needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

Fingerprint = list[tuple[str, int, int]]
"""File names with sizes in bytes and times of the last change in ns."""

_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts put the tensors
# Pages of a mapped file count as this process's memory until it is unmapped.
_MAPPED_BYTES = 1 << 26


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        shape: of the whole tensor.
        dtype: as PyTorch names it ("bfloat16"), or as the file does where it is not one of the four
            floating-point types of 16 bits or more ("U8", "uint8"); of a tensor without data
            "meta", and of a sparse one its layout ("sparse_coo").
        file: the name of the file that holds it; empty for tensors in memory.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str = ""

    @property
    def is_float(self) -> bool:
        """Whether the numbers are the weights themselves: floating-point, 16 bits or more."""
        return self.dtype in _DTYPES.values()


class TensorFiles(Mapping[str, TensorInfo]):
    """Key to `TensorInfo` over one or more files; `read` gets a tensor.

    Files are mapped, not loaded. One is open at a time, and it is closed and opened anew once 64 MB
    of it have been read, so that these and one tensor are the most that counts as resident.

    Args:
        path: a folder as `save_pretrained` writes it, or one file. In a folder, the first of: the
            shards that a `*.safetensors.index.json` lists, `model.safetensors`, every
            `*.safetensors`, and the same for PyTorch's `.bin`, `.pt`, `.pth` and `.ckpt`. Adapter,
            optimizer, scheduler and trainer-state files are passed over.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the folder holds no weights, a shard is missing or damaged, is not what the
            index says, or a name occurs twice. PyTorch's files are read by
            `torch.load(weights_only=True, mmap=True)`: those in the format before PyTorch 1.6, and
            those that hold other objects, are refused.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._index, self._files = _files(self.path)
        self._open: tuple[Path, _File, int] | None = None
        self._infos: dict[str, TensorInfo] = {}
        self._places: dict[str, Path] = {}
        for file in self._files:
            with _opened(file) as opened:
                for key, info in opened.infos():
                    if key in self._places:
                        raise ValueError(
                            f"{file}: tensor {key!r} is in {self._places[key].name} too"
                        )
                    self._infos[key], self._places[key] = info, file
        self._check_index()

    def __getitem__(self, key: str) -> TensorInfo:
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def label(self) -> str:
        """The last part of the path, for messages."""
        return self.path.resolve().name

    def read(self, key: str, part: int | None = None) -> torch.Tensor:
        """One tensor, or its `part`-th slice along the first axis; do not write to it.

        Raises:
            ValueError: the file cannot be read any more; the message names file and tensor.
        """
        place = self._places[key]
        if self._open is None or self._open[0] != place or self._open[2] > _MAPPED_BYTES:
            self.close()
            self._open = (place, _opened(place), 0)
        _, file, mapped = self._open
        try:
            tensor = file.read(key, part)
        except Exception as error:  # SafetensorError, RuntimeError and the like
            raise ValueError(f"{place}: tensor {key!r} cannot be read: {error}") from error
        self._open = (place, file, mapped + tensor.numel() * tensor.element_size())
        return tensor

    def close(self) -> None:
        """Unmap the file read last; tensors still in use stay valid."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def fingerprint(self) -> Fingerprint:
        """Names, sizes and times of all files, by which a changed checkpoint is noticed."""
        files = [*self._files] if self._index is None else [self._index, *self._files]
        return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]

    def _check_index(self) -> None:
        if self._index is None:
            return
        listed = _weight_map(self._index)
        wrong = [
            f"{key!r} in {name}"
            for key, name in listed.items()
            if key not in self._places or self._places[key].name != name
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"{self._index}: expected tensor {', '.join(wrong[:3])}{more}, got no such tensor"
            )


class _File:
    """An open file of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Each format's own from here on.
    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        raise NotImplementedError

    def read(self, key: str, part: int | None) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _Safetensors(_File):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            from safetensors import SafetensorError, safe_open
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                f"{path} needs safetensors: pip install 'lorambo-alloc[torch]'", name=missing.name
            ) from missing
        path.open("rb").close()  # safe_open says of a file that may not be read that it is absent
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu")
            self._file.__enter__()
        except SafetensorError as error:
            raise ValueError(f"{path}: the file is damaged: {error}") from error

    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        for key in self._file.keys():
            part = self._file.get_slice(key)
            dtype = str(part.get_dtype())
            yield (
                key,
                TensorInfo(tuple(part.get_shape()), _DTYPES.get(dtype, dtype), self.path.name),
            )

    def read(self, key: str, part: int | None) -> torch.Tensor:
        return self._file.get_tensor(key) if part is None else self._file.get_slice(key)[part]

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class _Torch(_File):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except PermissionError:
            raise
        except Exception as error:  # UnpicklingError, RuntimeError, even an OSError for damage
            # Their texts fill a screen.
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(
                f"{path}: expected a file of tensors that torch.load reads with weights_only=True "
                f"and mmap=True, got one it does not: {reason}"
            ) from error
        for wrapper in _WRAPPERS:
            if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
        if not isinstance(state, Mapping):
            raise ValueError(f"{path}: expected a dictionary of tensors, got {type(state)}")
        self._state = tensors_in(state)

    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        for key, tensor in self._state.items():
            yield key, tensor_info(tensor, self.path.name)

    def read(self, key: str, part: int | None) -> torch.Tensor:
        tensor = self._state[key].detach()
        return tensor if part is None else tensor[part]

    def close(self) -> None:
        self._state = {}


def tensors_in(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a dictionary by name; a number (a LoRA's alpha) is one of no dimension."""
    return {
        key: value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, (torch.Tensor, int, float))
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph; a `DTensor` gathered, by all processes at once."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def tensor_info(tensor: torch.Tensor, file: str = "") -> TensorInfo:
    """What there is to know of a tensor in memory."""
    kind: object = tensor.dtype if tensor.layout is torch.strided else tensor.layout
    dtype = "meta" if tensor.is_meta else str(kind).removeprefix("torch.")
    return TensorInfo(tuple(tensor.shape), dtype, file)


def _opened(path: Path) -> _File:
    if not path.is_file():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return _Torch(path) if path.suffix in _TORCH_SUFFIXES else _Safetensors(path)


def _files(path: Path) -> tuple[Path | None, list[Path]]:
    """The index, where there is one, and the files that hold the tensors."""
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if path.is_dir():
        for suffixes in ((".safetensors",), _TORCH_SUFFIXES):
            indices = [i for suffix in suffixes for i in path.glob(f"*{suffix}.index.json")]
            if len(indices) > 1:
                names = ", ".join(sorted(index.name for index in indices))
                raise ValueError(f"{path}: expected one index, got {names}; name one of them")
            if indices:
                return _indexed(indices[0])
            found = sorted(f for suffix in suffixes for f in path.glob(f"*{suffix}") if _weights(f))
            whole = [f for f in found if f.stem in ("model", "pytorch_model")]
            if found:
                return None, whole or found
        others = sorted(f.name for f in path.glob("adapter_model.*"))
        hint = f", only {others[0]}, which is an adapter (lora_spectra reads it)" if others else ""
        raise ValueError(
            f"{path}: expected *.safetensors or *.bin files of a model, got none{hint}"
        )
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise ValueError(
            f"{path}: expected a folder, a .safetensors, .bin, .pt, .pth or .ckpt file, or an "
            ".index.json"
        )
    return None, [path]


def _weights(file: Path) -> bool:
    passed_over = r"(adapter_|optimizer|scheduler|rng_state|training_args|scaler|trainer_state).*"
    return file.is_file() and re.match(passed_over, file.name) is None


def _indexed(index: Path) -> tuple[Path, list[Path]]:
    names = sorted(set(_weight_map(index).values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ValueError(
            f"{index}: expected {len(names)} files beside it, missing {', '.join(absent[:3])}{more}"
        )
    return index, [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = dict(listed.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected an index with a 'weight_map'") from error
    for key, name in names.items():
        # A file elsewhere is none of this checkpoint's.
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: tensor {key!r}: expected a file's name, got {name!r}")
    return names
