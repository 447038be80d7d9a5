"""The text of YAML and TOML files, for the few kinds of entries that the formats have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# What YAML takes for a line break, or does not take, and TOML does not take; below 0x20, JSON does.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def yaml_text(entries: Mapping[str, Any]) -> str:
    r"""Strings, numbers, booleans, lists and mappings of these as YAML.

    Args:
        entries: by name; a mapping inside holds scalars.

    Returns:
        The text, to be appended to a configuration. Strings are in double quotes, escaped as JSON
        escapes them, which YAML 1.2 and PyYAML read.

    Example:
        >>> print(yaml_text({"lora_r": 4, "lora_rank_pattern": {"^a\\.b": 2}}), end="")
        lora_r: 4
        lora_rank_pattern:
          "^a\\.b": 2
    """
    lines: list[str] = []
    for key, value in entries.items():
        if isinstance(value, Mapping):
            lines.append(f"{key}:" if value else f"{key}: {{}}")
            lines += [f"  {_scalar(k)}: {_scalar(v)}" for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            lines.append(f"{key}:" if value else f"{key}: []")
            lines += [f"  - {_scalar(v)}" for v in value]
        else:
            lines.append(f"{key}: {_scalar(value)}")
    return "".join(f"{line}\n" for line in lines)


def toml_text(entries: Mapping[str, Any]) -> str:
    """A preset as TOML: scalars and lists first, then a table for each mapping.

    Args:
        entries: by name; a mapping inside holds scalars, lists and mappings, which are written
            inline. (The `toml` package, with which LyCORIS reads presets, takes table headers apart
            at a bracket, and does not unescape keys.)

    Returns:
        The text of a file.

    Example:
        >>> print(toml_text({"use_fnmatch": False, "name_algo_map": {"a$": {"dim": 2}}}), end="")
        use_fnmatch = false
        [name_algo_map]
        "a$" = {dim = 2}
    """
    lines = [
        f"{_key(key)} = {_toml(value)}"
        for key, value in entries.items()
        if not isinstance(value, Mapping)
    ]
    for key, value in entries.items():
        if isinstance(value, Mapping):
            lines.append(f"[{_key(key)}]")
            lines += [f"{_key(inner)} = {_toml(v)}" for inner, v in value.items()]
    return "".join(f"{line}\n" for line in lines)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return _scalar(value)


def _key(key: str) -> str:
    plain = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if plain else _scalar(key)


def _scalar(value: str | int | float | bool) -> str:
    """JSON's form, which both YAML's double quotes and TOML's basic strings are a superset of."""
    if isinstance(value, float):
        # YAML 1.1 (PyYAML) reads "1e-05" as a string: it wants a dot before the exponent.
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    text = json.dumps(value, ensure_ascii=False)  # its escapes of what is beyond 16 bits are JSON's
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
