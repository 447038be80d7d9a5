"""Names of modules: matched as PEFT matches them, and in the order that people expect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

Targets = str | Sequence[str] | None


def name_matcher(targets: Targets, what: str) -> Callable[[str], bool]:
    """A test of names against a regular expression, or a list of names and suffixes.

    Args:
        targets: an expression that has to match the whole name; or names, and suffixes that begin
            after a dot; or None, which matches nothing.
        what: what to call `targets` in an error.

    Raises:
        ValueError: not of this form, or not a regular expression.
    """
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"{what}: expected a regular expression, got {targets!r} ({error})"
            ) from error
        return lambda name: pattern.fullmatch(name) is not None
    if not isinstance(targets, Iterable | None):
        raise ValueError(f"{what}: expected a regular expression or a list, got {targets!r}")
    listed = list(targets or ())
    for name in listed:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{what}: expected names that are not empty, got {name!r}")
    names = set(listed)

    def matches(name: str) -> bool:
        while name:
            if name in names:
                return True
            name = name.partition(".")[2]
        return False

    return matches


def natural(key: str) -> list[tuple[int, str]]:
    """A sorting key that takes runs of digits by their number."""
    return [(int(part) if i % 2 else 0, part) for i, part in enumerate(re.split(r"([0-9]+)", key))]
