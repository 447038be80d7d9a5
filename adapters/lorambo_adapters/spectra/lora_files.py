"""LoRA files: which tensors are the factors of which layer, and by what they are scaled."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.lora_files needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.lora_keys import (
    METADATA,
    OTHER_METHODS,
    PREFIX,
    Parts,
    by_layer,
    module_name,
)
from lorambo_adapters.names import natural
from lorambo_adapters.spectra.low_rank import LowRankUpdate, refuse
from lorambo_adapters.spectra.peft_config import DORA, PeftConfig, by_component
from lorambo_adapters.spectra.tensor_files import (
    TensorFiles,
    TensorInfo,
    tensor_info,
    tensors_in,
    whole,
)

State = Mapping[str, torch.Tensor]


class LoraFile:
    """The updates in a LoRA file or state dict.

    Args:
        lora: a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), one
            file, or a state dict.

    Raises:
        FileNotFoundError: there is no such file or folder, or no adapter in the folder.
        ValueError: a file is damaged, or the configuration is not of a LoRA.
    """

    def __init__(self, lora: Path | State) -> None:
        self.configs: dict[str, PeftConfig] = {}  # by the prefix of the layers' names
        self._read: Callable[[str], torch.Tensor]
        self._infos: Mapping[str, TensorInfo]
        if isinstance(lora, Mapping):
            self.label = "the state dict"
            tensors = tensors_in(lora)
            self._infos = {key: tensor_info(tensor) for key, tensor in tensors.items()}
            self._read = lambda key: whole(tensors[key])
        else:
            path = _weights_of(lora) if lora.is_dir() else lora
            files = TensorFiles(path)
            self.label = str(lora)
            self._infos, self._read = files, files.read
            config = path.with_name("adapter_config.json")
            if path.stem == "adapter_model" and config.is_file():
                self.configs = {"": PeftConfig.read(config)}
            elif path.suffix == ".safetensors":
                self.configs = _metadata(path)
        self._layers, self.others = by_layer(self._infos)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors, by key."""
        return self._infos

    @property
    def layers(self) -> Mapping[str, Parts]:
        """The keys of each layer's tensors, by the layer's name in the file."""
        return self._layers

    def read(self, key: str) -> torch.Tensor:
        """One tensor; do not write to it."""
        return self._read(key)

    def updates_of(self, raw: str, alpha: float | None = None) -> list[LowRankUpdate]:
        """The updates of one layer by its name in the file: one, or one an expert."""
        return list(self._updates(raw, alpha))

    def pattern_name(self, raw: str) -> tuple[str | None, str, bool]:
        """How a configuration's patterns see a layer, by its name in the file.

        Returns:
            The key of its configuration in `configs` (None: it has none), the name that the
            patterns see, and whether that is a parameter's.
        """
        name = self._name(raw)
        prefix, config = self._config(name)
        if config is None:
            return None, name, False
        inner = name.removeprefix(prefix)
        parameter = config.parameter(inner)
        whole = inner if parameter is None else f"{inner}.{parameter}"
        return prefix.removesuffix("."), whole, parameter is not None

    def updates(
        self, alpha: float | None = None, ignore_magnitude: bool = False
    ) -> list[LowRankUpdate]:
        """The layers' updates, in the natural order of their names.

        Args:
            alpha: for the layers of which the file has none.
            ignore_magnitude: take B A of a DoRA, and leave out its magnitudes.

        Raises:
            ValueError: no tensor is a LoRA's, or some are without partner, of shapes that do not
                belong together, or of another method; one message lists them.
        """
        problems = [problem for config in self.configs.values() for problem in config.problems()]
        readable = not problems  # else the configuration need not have a rank
        problems += [
            f"{key!r} is not a factor of a LoRA, nor its alpha or its bias"
            for key in self.others
            if OTHER_METHODS.fullmatch(key)
        ]
        if not self._layers and not problems:
            raise ValueError(
                f"{self.label}: expected tensors of a LoRA (lora_A and lora_B, or lora_down and "
                f"lora_up), got none among {len(self._infos)}"
            )
        if (
            alpha is None
            and not self.configs
            and any(key.startswith(PREFIX) for key in self._infos)
        ):
            problems.append(
                "these are PEFT's names, and their scale is in adapter_config.json: expected it "
                "beside the file (give the folder), or an alpha"
            )
        magnitudes = [parts["magnitude"] for parts in self._layers.values() if "magnitude" in parts]
        is_dora = magnitudes or any(config.is_dora for config in self.configs.values())
        if is_dora and not ignore_magnitude:
            problems.append(DORA)
        updates: list[LowRankUpdate] = []
        for raw in sorted(self._layers, key=natural) if readable else ():
            try:
                updates += self._updates(raw, alpha)
            except ValueError as error:
                problems.append(f"layer {self._name(raw)!r}: {error}")
        counts = Counter(update.name for update in updates)
        problems += [f"layer {name!r} is there {n} times" for name, n in counts.items() if n > 1]
        refuse(problems, self.label)
        return updates

    def _updates(self, raw: str, alpha: float | None) -> Iterator[LowRankUpdate]:
        keys, name = self._layers[raw], self._name(raw)
        for part, partner in (("A", "B"), ("B", "A")):
            if partner not in keys:
                alone = keys.get(part, next(iter(keys.values())))
                raise ValueError(f"{alone!r} has no partner {partner}")
        factors = [key for part, key in keys.items() if part in ("A", "B", "middle")]
        packed = [key for key in factors if not self._infos[key].is_float]
        if packed:
            raise ValueError(
                f"{packed[0]!r}: expected floating-point numbers of 16 bits or more, got "
                f"{self._infos[packed[0]].dtype}"
            )
        read_left, read_right, shape, rank = self._factors(keys)
        place = self._infos[keys["B"]].file
        prefix, config = self._config(name)
        if config is None or "alpha" in keys:
            given = self._alpha(keys["alpha"]) if "alpha" in keys else alpha
            scale = 1.0 if given is None else given / rank
            yield LowRankUpdate(
                name, shape, rank, scale, lambda: (read_left(), read_right()), place
            )
            return
        inner = name.removeprefix(prefix)
        parameter = config.parameter(inner)
        suffix = "" if parameter is None else f".{parameter}"
        expected, scale = config.rank(inner + suffix), config.scale(inner + suffix)
        experts, rest = divmod(rank, expected)
        if rest or experts == 0 or (parameter is None and experts != 1):
            # PEFT sorts a pattern's keys when it saves them, and it is the first that counts.
            more = "" if config.has_one_rank else " (by another key of rank_pattern, perhaps)"
            raise ValueError(f"expected rank {expected} by the configuration, got {rank}{more}")

        def read_expert(expert: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
            # PEFT has an expert's rows of A together, and its columns of B `experts` apart.
            rows = slice(expert * expected, (expert + 1) * expected)
            return lambda: (read_left()[:, expert::experts], read_right()[rows])

        for expert in range(experts):
            which = f"{name}{suffix}" + (f".{expert}" if experts > 1 else "")
            yield LowRankUpdate(which, shape, expected, scale, read_expert(expert), place)

    def _config(self, name: str) -> tuple[str, PeftConfig | None]:
        """The layer's configuration, and the prefix of its name that this does not know."""
        for component, config in self.configs.items():
            prefix = f"{component}." if component else ""
            if name.startswith(prefix):
                return prefix, config
        return "", None

    def _factors(
        self, keys: Mapping[str, str]
    ) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], tuple[int, int], int]:
        left, right = self._infos[keys["B"]].shape, self._infos[keys["A"]].shape
        both = f"A {tuple(right)} and B {tuple(left)}"
        if len(left) < 2 or len(left) != len(right) or 0 in left or 0 in right:
            raise ValueError(f"expected factors r x k and d x r, got {both}")
        if any(side != 1 for side in left[2:]):
            raise ValueError(f"expected B to have a kernel of size 1, got {both}")
        kernel = math.prod(right[2:])
        k = right[1] * kernel
        if "middle" in keys:
            shape = self._infos[keys["middle"]].shape
            if kernel != 1 or len(shape) != len(right) or shape[:2] != (left[1], right[0]):
                raise ValueError(f"expected factors that multiply, got {both}, middle {shape}")
            k = right[1] * math.prod(shape[2:])
        elif left[1] != right[0]:
            groups = ", or a convolution without groups" if len(left) == 4 else ""
            raise ValueError(f"expected A and B of one rank{groups}, got {both}")

        def read_left() -> torch.Tensor:
            return self._read(keys["B"]).flatten(1)

        def read_right() -> torch.Tensor:
            right = self._read(keys["A"]).flatten(1)
            if "middle" not in keys:
                return right
            # LyCORIS's Tucker form: a 1 x 1 convolution, then one of the full kernel, then B.
            middle = self._read(keys["middle"]).to(torch.float64)
            whole = torch.einsum("ij...,jk->ik...", middle, right.to(torch.float64))
            return whole.flatten(1)

        return read_left, read_right, (left[0], k), left[1]

    def _alpha(self, key: str) -> float:
        tensor = self._read(key)
        value = float(tensor) if tensor.numel() == 1 and not tensor.is_meta else math.nan
        if not math.isfinite(value) or value == 0:  # programs read 0 in different ways
            raise ValueError(f"{key!r}: expected one number that is finite and not 0, got {tensor}")
        return value

    def _name(self, raw: str) -> str:
        return module_name(raw, self._layers)


def _weights_of(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            if not (folder / "adapter_config.json").is_file():
                raise FileNotFoundError(
                    2, "No such file or directory", str(folder / "adapter_config.json")
                )
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    inside = sorted(f.parent.name for f in folder.glob("*/adapter_config.json"))
    hint = f"; adapters in it: {', '.join(inside)}" if inside else ""
    raise ValueError(
        f"{folder}: expected adapter_model.safetensors, or one .safetensors file, got "
        f"{len(found)}{hint}"
    )


def _metadata(path: Path) -> dict[str, PeftConfig]:
    """PEFT's configurations, where diffusers has put them into the file, by component."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    try:
        entries: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON in its metadata {METADATA!r}") from error
    return by_component(entries, f"{path}: {METADATA}")
