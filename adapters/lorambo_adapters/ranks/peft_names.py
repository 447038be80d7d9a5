"""Names of modules and parameters as PEFT matches them, and what would match by mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorambo_adapters.names import name_matcher

Modules = Any
"""A model, or the names of all of its modules."""

_PLAIN = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class Known:
    """What is known of the model beside the layers that have ranks.

    Attributes:
        modules: the names of all modules; None if nothing is known.
        parameters: name of each parameter to its shape; None if that is not known.
    """

    modules: frozenset[str] | None = None
    parameters: Mapping[str, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, modules: Modules | None) -> Known:
        """From a model before PEFT has changed it (nothing but its names is read), or from names.

        Raises:
            ValueError: neither, or a model that has adapters already.
        """
        if modules is None:
            return cls()
        if hasattr(modules, "named_modules"):
            names = [name for name, _ in modules.named_modules()]
            inside = [name for name in names if name.rpartition(".")[2] == "base_layer"]
            if inside or hasattr(modules, "peft_config"):
                raise ValueError(
                    "modules: expected the model before PEFT, whose names the patterns match, got "
                    "one with adapters"
                )
            named = modules.named_parameters(remove_duplicate=False)
            return cls(frozenset(names) - {""}, {name: tuple(p.shape) for name, p in named})
        if isinstance(modules, (str, bytes)) or not isinstance(modules, Iterable):
            raise ValueError(f"modules: expected a model or names, got {type(modules).__name__}")
        names = list(modules)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("modules: expected a model or names, got something else among them")
        return cls(frozenset(names) - {""})


@dataclass(frozen=True)
class Split:
    """Layers by what PEFT calls them.

    Attributes:
        modules: module to rank, for `target_modules`; rank 0 included.
        parameters: parameter to its one rank, for `target_parameters`; rank 0 included.
    """

    modules: dict[str, int]
    parameters: dict[str, int]


def split(ranks: Mapping[str, int], target_parameters: Sequence[str], known: Known) -> Split:
    """Tell modules from parameters, and find the one rank of each parameter's experts.

    Args:
        ranks: by layer; an expert is "<parameter's name>.<index>".
        target_parameters: names and suffixes of the parameters, as PEFT's argument.
        known: where the model is known, it decides.

    Raises:
        ValueError: experts of one parameter have different ranks, or some of them are missing; or
            a layer, or one of `target_parameters`, is not in the model.
    """
    if isinstance(target_parameters, str):
        raise ValueError(f"target_parameters: expected a list of names, got {target_parameters!r}")
    modules: dict[str, int] = {}
    experts: dict[str, dict[int | None, int]] = {}
    used: set[str] = set()
    for name, rank in ranks.items():
        owner, index = _parameter(name, target_parameters, known)
        if owner is None:
            modules[name] = rank
            continue
        used |= {target for target in target_parameters if ends_with(owner, target)}
        experts.setdefault(owner, {})[index] = rank
    unused = [target for target in target_parameters if target not in used]
    if unused:
        raise ValueError(f"target_parameters: expected a layer of {unused[0]!r}, got none")
    return Split(modules, {name: _one_rank(name, by, known) for name, by in experts.items()})


def ends_with(name: str, target: str) -> bool:
    """PEFT's rule for an entry of a list: the whole name, or what follows one of its dots."""
    return name == target or name.endswith(f".{target}")


def suffixes(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    while name:
        yield name
        name = name.partition(".")[2]


def containers(name: str) -> Iterator[str]:
    """The modules that a module lies in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def caught_by_a_list(kept: Iterable[str], others: Iterable[str]) -> tuple[str, str] | None:
    """A name that a list of targets would catch beside them, and the target; None if there is none.

    Args:
        kept: the targets.
        others: other names of the model. Those that are targets themselves do not count.
    """
    targets = set(kept)
    for other in sorted(set(others) - targets):
        for suffix in suffixes(other):
            if suffix in targets:
                return other, suffix
    return None


def configured(entries: Mapping[str, Any]) -> Callable[[str], bool]:
    """A test of whether PEFT would adapt the module of a name, by a configuration's entries.

    As `check_target_module_exists` in PEFT 0.21.2, `tuners/tuners_utils.py`.

    Raises:
        ValueError: an entry is not of its form, or the configuration makes modules of its own.
    """
    if entries.get("layer_replication"):
        raise ValueError(
            "layer_replication: expected a configuration for the modules that there are, got one "
            "that copies layers; make the adapters, and read them"
        )
    targets = entries.get("target_modules")
    wanted = name_matcher(targets, "target_modules")
    unwanted = name_matcher(entries.get("exclude_modules"), "exclude_modules")
    saved = [re.compile(rf"(^|.*\.){m}($|\..*)") for m in entries.get("modules_to_save") or ()]
    which = entries.get("layers_to_transform")
    indices = {which} if isinstance(which, int) else set(which or ())
    patterns = entries.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The first number of the name counts, and an expression or a full name as target needs none.
    places = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    free = isinstance(targets, str) or not indices
    listed = frozenset[str]() if isinstance(targets, str) else frozenset(targets or ())

    def adapts(name: str) -> bool:
        if not wanted(name) or unwanted(name) or any(part.match(name) for part in saved):
            return False
        if free or name in listed:
            return True
        found = next((m for place in places if (m := re.match(place, name))), None)
        return found is not None and int(found[1]) in indices

    return adapts


def exact_key(name: str) -> str:
    """A key of `rank_pattern` that matches this name and no other one."""
    return f"^{re.escape(name)}"


def check_suffix_keys(ranks: Mapping[str, int]) -> None:
    """Make sure that plain names as keys give each layer its own rank, in whichever order.

    PEFT reads a key as a regular expression for the whole name or what follows a dot of it, so
    that a dot in it matches any character.

    Raises:
        ValueError: a name is not plain, or a key matches another layer of a different rank.
    """
    for name in ranks:
        if not _PLAIN.fullmatch(name):
            raise ValueError(
                f"layer {name!r}: expected a name of letters, digits, '_', '-' and '.', because a "
                "suffix key is a regular expression as it stands; use keys='exact'"
            )
    by_length: dict[int, list[tuple[str, re.Pattern[str]]]] = {}
    for name in ranks:
        by_length.setdefault(len(name), []).append((name, re.compile(name)))
    for name, rank in ranks.items():
        for suffix in suffixes(name):
            for key, pattern in by_length.get(len(suffix), ()):
                if ranks[key] != rank and pattern.fullmatch(suffix):
                    raise ValueError(
                        f"layer {name!r}: expected rank {rank}, but the key {key!r} without its "
                        f"'^' catches it too and has rank {ranks[key]}; use keys='exact'"
                    )


def _parameter(
    name: str, target_parameters: Sequence[str], known: Known
) -> tuple[str | None, int | None]:
    """The parameter that a layer is, and the index of the expert; (None, None) for a module."""
    stem, _, last = name.rpartition(".")
    index = int(last) if stem and last.isdecimal() else None
    if known.parameters is not None and known.modules is not None:
        if name in known.modules:
            return None, None
        if name in known.parameters:
            return name, None
        if index is not None and stem in known.parameters:
            return stem, index
        raise ValueError(f"layer {name!r}: expected a module or a parameter of the model")
    for target in target_parameters:
        if ends_with(name, target):
            return name, None
        if index is not None and ends_with(stem, target):
            return stem, index
    if known.modules is not None and name not in known.modules:
        raise ValueError(
            f"layer {name!r}: expected a name in modules; name a parameter in target_parameters"
        )
    return None, None


def _one_rank(name: str, by_expert: Mapping[int | None, int], known: Known) -> int:
    """The rank that all experts of a parameter have."""
    if len(set(by_expert.values())) > 1:
        low, high = min(by_expert.values()), max(by_expert.values())
        raise ValueError(
            f"parameter {name!r}: expected one rank for all of its experts, which share an adapter "
            f"in PEFT, got {low} to {high}; allocate with tied=[...] for these layers"
        )
    if None not in by_expert:
        count = len(by_expert)
        if known.parameters is not None:
            count = known.parameters[name][0]
        missing = sorted(set(range(count)) - set(by_expert))
        if missing or len(by_expert) != count:
            what = f"no expert {missing[0]}" if missing else f"{len(by_expert)} experts"
            raise ValueError(f"parameter {name!r}: expected experts 0 to {count - 1}, got {what}")
    return next(iter(by_expert.values()))
