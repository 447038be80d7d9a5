"""What PEFT's adapter_config.json says of each layer: its rank, its scale, and what it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorambo_adapters.names import name_matcher

# Ways of training a LoRA after which its update is not scale * B A. (VeLoRA, MiCA and aLoRA leave
# it that, the last for the tokens it applies to.)
_OTHER_UPDATES = ("arrow_config", "use_bdlora", "kasa_config", "use_qalora", "monteclora_config")
DORA = (
    "expected a LoRA, got a DoRA, whose update is not a matrix of low rank: ignore_magnitude takes "
    "the spectrum of its B A alone"
)
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class PeftConfig:
    """The entries of a LoRA's configuration that its update depends on.

    Attributes:
        entries: of the JSON file.
        label: where they come from, for messages.
    """

    entries: Mapping[str, Any]
    label: str

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """Read an adapter_config.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or lacks a rank or an alpha.
        """
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got something else: {error}") from error
        return cls.checked(entries, str(path))

    @classmethod
    def checked(cls, entries: Any, label: str) -> PeftConfig:
        """A configuration that has what is needed, if it is a LoRA's.

        Raises:
            ValueError: it lacks a rank or an alpha, or they are not positive whole or real numbers;
                or its targets are no names.
        """
        if not isinstance(entries, Mapping):
            raise ValueError(f"{label}: expected a mapping, got {type(entries).__name__}")
        config = cls(entries, label)
        if config.entries.get("peft_type", "LORA") == "LORA":
            ranks = [entries.get("r"), *config._pattern("rank_pattern").values()]
            if any(type(rank) is not int or rank < 1 for rank in ranks):
                raise ValueError(f"{label}: expected whole ranks >= 1, got {ranks}")
            alphas = [entries.get("lora_alpha"), *config._pattern("alpha_pattern").values()]
            if any(type(a) not in (int, float) or not math.isfinite(a) for a in alphas):
                raise ValueError(f"{label}: expected numbers for lora_alpha, got {alphas}")
            for key in ("target_modules", "target_parameters"):
                name_matcher(entries.get(key), f"{label}: {key}")
            if isinstance(entries.get("target_parameters"), str):
                raise ValueError(f"{label}: target_parameters: expected a list, got a string")
        return config

    def rank(self, name: str) -> int:
        """The rank of a layer, by `rank_pattern` and `r`."""
        return self._by_pattern("rank_pattern", name, self.entries["r"])

    def scale(self, name: str) -> float:
        """The scale of a layer: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        alpha = float(self._by_pattern("alpha_pattern", name, self.entries["lora_alpha"]))
        rank = self.rank(name)
        return alpha / (math.sqrt(rank) if self.entries.get("use_rslora") else rank)

    def parameter(self, name: str) -> str | None:
        """The parameter that a module's factors belong to, if they came by `target_parameters`.

        Raises:
            ValueError: several could be meant. The file does not say which: PEFT nests the
                wrappers in the order of the module's parameters, which the model alone knows.
        """
        wanted: Iterable[str] = self.entries.get("target_parameters") or ()
        if not wanted or name_matcher(self.entries.get("target_modules"), "target_modules")(name):
            return None
        parameters = {
            parameter
            for parent, _, parameter in (target.rpartition(".") for target in sorted(wanted))
            if not parent or f".{name}".endswith(f".{parent}")
        }
        if len(parameters) > 1:
            raise ValueError(
                f"the file does not say which of the parameters {', '.join(sorted(parameters))} "
                "it belongs to: load the adapter into its model, and pass that"
            )
        return parameters.pop() if parameters else None

    def problems(self) -> list[str]:
        """Why the updates are not scale * B A, if they are not; magnitudes (DoRA) apart."""
        kind = self.entries.get("peft_type", "LORA")
        if kind != "LORA":
            return [f"expected peft_type LORA, got {kind}"]
        return [
            f"expected a LoRA whose update is a scaled product of its factors, got one with {key}"
            for key in _OTHER_UPDATES
            if self.entries.get(key)
        ]

    @property
    def has_one_rank(self) -> bool:
        """Whether all layers have one rank."""
        return not self._pattern("rank_pattern")

    @property
    def is_dora(self) -> bool:
        """Whether the layers have magnitudes."""
        return bool(self.entries.get("use_dora"))

    @property
    def changed_base(self) -> str | None:
        """The initialisation that changed the base model's weights, if one did."""
        return changed_base(self.entries.get("init_lora_weights"))

    def _by_pattern(self, pattern: str, name: str, default: Any) -> Any:
        for key, value in self._pattern(pattern).items():
            try:
                if re.match(rf"(.*\.)?({key})$", name):
                    return value
            except re.error as error:
                raise ValueError(
                    f"{self.label}: {pattern}: expected regular expressions, got {key!r} ({error})"
                ) from error
        return default

    def _pattern(self, name: str) -> Mapping[str, Any]:
        """A pattern; as in `peft.utils.other.get_pattern_key`, its first key that fits counts."""
        pattern = self.entries.get(name) or {}
        if not isinstance(pattern, Mapping):
            raise ValueError(f"{self.label}: {name}: expected a mapping, got {pattern!r}")
        return pattern


def by_component(entries: Mapping[str, Any], label: str) -> dict[str, PeftConfig]:
    """The configurations that diffusers keeps under keys such as "unet.lora_alpha".

    Returns:
        Component (such as "unet", or "" where keys have no prefix) to its configuration.

    Raises:
        ValueError: a component lacks a rank or an alpha.
    """
    components = {key.rpartition(".")[0] for key in entries if key.rpartition(".")[2] == "r"}
    return {
        component: PeftConfig.checked(
            {
                key.removeprefix(f"{component}."): value
                for key, value in entries.items()
                if not component or key.startswith(f"{component}.")
            },
            label,
        )
        for component in sorted(components)
    }


def changed_base(initialisation: object) -> str | None:
    """PEFT's `init_lora_weights`, where it subtracts B A from the base model's weights."""
    if isinstance(initialisation, str) and initialisation.lower().startswith(_CHANGED_BASE):
        return initialisation
    return None
