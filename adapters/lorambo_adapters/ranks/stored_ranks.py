"""Ranks and scales out of a LoRA: of PEFT, kohya's sd-scripts, LyCORIS or Diffusers, or live."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorambo_adapters.lora_keys import METADATA, OTHER_METHODS, PREFIX, Parts, by_layer
from lorambo_adapters.lora_keys import module_name as name_of
from lorambo_adapters.names import natural
from lorambo_adapters.ranks.peft_format import check_reading
from lorambo_adapters.ranks.peft_names import Known, Modules, configured, ends_with
from lorambo_adapters.ranks.safetensors_header import Header
from lorambo_adapters.ranks.scaling import adapted, rank_factor
from lorambo_adapters.spectra.peft_config import PeftConfig, by_component

_SHOWN = 5  # layers that a message lists


@dataclass(frozen=True, eq=False)
class StoredRanks(Mapping[str, int]):
    """Layer to rank, with what else is known of the adapters; it compares as a mapping.

    Attributes:
        ranks: by layer; of experts of a 3-D parameter, "<parameter's full name>.<index>".
        scales: by layer, the factor before B A.
        rslora: whether a scale is alpha / sqrt(rank) rather than alpha / rank.
        shapes: by layer, (d, k); empty where only a configuration was read.
    """

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    rslora: bool
    shapes: Mapping[str, tuple[int, int]]

    def __getitem__(self, name: str) -> int:
        return self.ranks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def alphas(self) -> dict[str, float]:
        """By layer, the alpha that goes with its rank and scale."""
        return {
            name: self.scales[name] * rank_factor(rank, self.rslora)
            for name, rank in self.ranks.items()
        }

    @property
    def parameters(self) -> int:
        """How many parameters the factors have; 0 where the shapes are not known."""
        return sum(self.ranks[name] * sum(shape) for name, shape in self.shapes.items())

    def check(self, ranks: Mapping[str, int], scale: float | None = None) -> None:
        """Make sure that a tool has made what was wanted of it.

        Args:
            ranks: what was wanted; layers of rank 0 have no adapter.
            scale: of every layer; by default it only has to be the same in all, to 1 part in 10^6
                (a file may round alphas to its type).

        Raises:
            ValueError: a layer has no adapter, one that was not asked for, another rank or another
                scale. One message lists the layers.
        """
        wanted = adapted(ranks)
        problems: list[str] = []
        expected = scale if scale is not None else next(iter(self.scales.values()), 1.0)
        for name in sorted({*wanted, *self.ranks}, key=natural):
            if self.ranks.get(name, 0) != wanted.get(name, 0):
                problems.append(
                    f"layer {name!r}: expected rank {wanted.get(name, 0)}, got "
                    f"{self.ranks.get(name, 0)}"
                )
            elif not math.isclose(self.scales[name], expected, rel_tol=1e-6):
                problems.append(
                    f"layer {name!r}: expected scale {expected:g}, got {self.scales[name]:g}"
                )
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise ValueError("; ".join(problems[:_SHOWN]) + more)


def ranks_of(
    lora: Any, *, modules: Modules | None = None, adapter: str | None = None
) -> StoredRanks:
    """Read ranks and scales. Of a file the header alone is read, and the alphas; torch is not used.

    Args:
        lora: one of

            - a folder as PEFT saves it, with adapter_model.safetensors;
            - a .safetensors file of kohya's sd-scripts, LyCORIS (LoCon) or Diffusers. The scale is
              alpha / rank by a layer's own alpha, else by the PEFT configuration that Diffusers
              puts there, else 1;
            - an adapter_config.json, its entries, or a `LoraConfig`, with `modules`;
            - a live model with layers of PEFT's LoRA: what they have, whatever the configuration
              says; `ranks_of(model).check(ranks)` finds what a tool has made of them otherwise.
        modules: for a configuration: the model before PEFT, or the names of all its modules. (Names
            do not show parameters: where there are `target_parameters`, pass the model.)
        adapter: of a live model; the active one by default.

    Returns:
        The layers that have an adapter, those of a file in the natural order of their names.

    Raises:
        FileNotFoundError: there is no such file, or no adapter in the folder.
        ValueError: the LoRA is of another kind (AdaLoRA, LoHa, ...), factors lack a partner or do
            not fit, or a configuration comes without modules. A DoRA's magnitudes are passed over.
            Also where several parameters of one module have adapters: PEFT's file does not say
            which factors are whose; read the configuration, with the model as `modules`.

    Example:
        >>> config = {"r": 8, "lora_alpha": 16, "target_modules": ["q"], "rank_pattern": {"1.q": 2}}
        >>> found = ranks_of(config, modules=["0.q", "1.q", "1.v"])
        >>> dict(found), found.scales
        ({'0.q': 8, '1.q': 2}, {'0.q': 2.0, '1.q': 8.0})
    """
    if hasattr(lora, "named_modules"):
        return _of_model(lora, adapter)
    if adapter is not None:
        raise ValueError(f"adapter: expected none but for a live model, got {adapter!r}")
    if hasattr(lora, "to_dict"):
        lora = lora.to_dict()
    if isinstance(lora, Mapping):
        return _of_config(PeftConfig.checked(lora, "the configuration"), modules)
    if not isinstance(lora, (str, os.PathLike)):
        raise ValueError(f"expected a path, a configuration or a model, got {type(lora).__name__}")
    path = Path(lora)
    if path.name == "adapter_config.json":
        return _of_config(PeftConfig.read(path), modules)
    return _of_file(path)


def _of_model(model: Any, adapter: str | None) -> StoredRanks:
    # Whoever has a model has torch.
    from lorambo_adapters.spectra.lora_modules import live_updates

    updates = live_updates(model, None if adapter is None else [adapter], ignore_magnitude=True)
    ranks = {update.name: update.rank for update in updates}
    if len(ranks) < len(updates):
        raise ValueError("adapter: expected a name, because several adapters are active")
    return StoredRanks(
        ranks,
        {update.name: update.scale for update in updates},
        False,
        {update.name: update.shape for update in updates},
    )


def _of_config(config: PeftConfig, modules: Modules | None) -> StoredRanks:
    _refuse(config)
    if modules is None:
        raise ValueError(
            f"{config.label}: expected modules, the model or the names of its modules, because "
            "targets and patterns are rules for names"
        )
    known = Known.of(modules)
    _refuse_all_linear(config.entries.get("target_modules"))
    if config.entries.get("target_modules") is not None:
        check_reading(modules, config.entries)
    adapts = configured(config.entries)
    layers = {name: name for name in known.modules or () if adapts(name)}
    targets = config.entries.get("target_parameters") or ()
    if targets and known.parameters is None:
        raise ValueError(f"{config.label}: expected a model for target_parameters, got names")
    for name, shape in (known.parameters or {}).items():
        if any(ends_with(name, target) for target in targets):
            experts = range(shape[0]) if len(shape) == 3 else None
            layers |= {name: name} if experts is None else {f"{name}.{i}": name for i in experts}
    if not layers:
        raise ValueError(f"{config.label}: expected targets among the modules, got none")
    ordered = sorted(layers, key=natural)
    return StoredRanks(
        {name: config.rank(layers[name]) for name in ordered},
        {name: config.scale(layers[name]) for name in ordered},
        bool(config.entries.get("use_rslora")),
        {},
    )


def _of_file(path: Path) -> StoredRanks:
    file = _weights(path) if path.is_dir() else path
    header = Header.read(file)
    configs = _configs(file, header)
    for config in configs.values():
        _refuse(config)
    layers, others = by_layer(header.shapes)
    odd = [key for key in others if OTHER_METHODS.fullmatch(key)]
    if odd or not layers:
        got = repr(odd[0]) if odd else "no factor of one"
        raise ValueError(f"{path}: expected a LoRA, got {got}")
    if not configs and any(key.startswith(PREFIX) for key in header.shapes):
        raise ValueError(f"{path}: expected adapter_config.json beside it, which has the alphas")
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for raw in sorted(layers, key=natural):
        name = name_of(raw, layers)
        try:
            rank, shape = _rank_and_shape(layers[raw], header)
            found = list(_scaled(name, rank, layers[raw], header, configs))
        except ValueError as error:
            raise ValueError(f"{path}: layer {name!r}: {error}") from error
        for layer, each, scale in found:
            ranks[layer], scales[layer], shapes[layer] = each, scale, shape
    rslora = any(config.entries.get("use_rslora") for config in configs.values())
    return StoredRanks(ranks, scales, rslora, shapes)


def _refuse(config: PeftConfig) -> None:
    problems = config.problems()
    if problems:
        raise ValueError(f"{config.label}: {problems[0]}")


def _refuse_all_linear(targets: Any) -> None:
    """Refuse what needs the classes of modules, which names do not tell.

    Raises:
        ValueError: the targets are "all-linear".
    """
    if isinstance(targets, str) and targets.lower() == "all-linear":
        raise ValueError("target_modules: expected names or an expression, got 'all-linear'")


def _weights(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return file
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    raise FileNotFoundError(2, "expected an adapter in the folder", str(file))


def _configs(file: Path, header: Header) -> dict[str, PeftConfig]:
    """PEFT's configuration by the component that it is of ("" where names have no prefix)."""
    beside = file.with_name("adapter_config.json")
    if file.stem == "adapter_model" and beside.is_file():
        return {"": PeftConfig.read(beside)}
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        entries: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected JSON in its metadata {METADATA!r}") from error
    return by_component(entries, f"{file}: {METADATA}")


def _rank_and_shape(parts: Parts, header: Header) -> tuple[int, tuple[int, int]]:
    if not {"A", "B"} <= parts.keys():
        raise ValueError(f"{next(iter(parts.values()))!r} has no partner")
    left, right = header.shapes[parts["B"]], header.shapes[parts["A"]]
    if len(left) < 2 or len(right) != len(left):
        raise ValueError(f"expected factors, got A {right} and B {left}")
    k = math.prod(right[1:])
    if "middle" in parts:
        k = right[1] * math.prod(header.shapes[parts["middle"]][2:])
    elif right[0] != left[1]:
        raise ValueError(f"expected A and B of one rank, got A {right} and B {left}")
    return left[1], (left[0], k)


def _scaled(
    name: str, rank: int, parts: Parts, header: Header, configs: Mapping[str, PeftConfig]
) -> Iterator[tuple[str, int, float]]:
    """The layer, or the experts of a parameter, with rank and scale."""
    prefixes = [prefix for prefix in configs if name.startswith(f"{prefix}." if prefix else "")]
    if "alpha" in parts or not prefixes:
        alpha = header.number(parts["alpha"]) if "alpha" in parts else float(rank)
        yield name, rank, alpha / rank
        return
    config = configs[prefixes[0]]
    inner = name.removeprefix(f"{prefixes[0]}.") if prefixes[0] else name
    parameter = config.parameter(inner)
    suffix = "" if parameter is None else f".{parameter}"
    expected = config.rank(inner + suffix)
    experts, rest = divmod(rank, expected)
    if rest or not experts or (parameter is None and experts != 1):
        raise ValueError(f"expected rank {expected} by the configuration, got {rank}")
    scale = config.scale(inner + suffix)
    for expert in range(experts):
        yield f"{name}{suffix}" + (f".{expert}" if experts > 1 else ""), expected, scale
