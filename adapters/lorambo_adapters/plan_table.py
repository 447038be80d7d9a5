"""A plan as text: aligned columns, with times and sizes as a person says them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def time_text(seconds: float) -> str:
    """A time with two digits or three.

    >>> [time_text(s) for s in (0.0123, 8.76, 95.0, 9000.0, 4e5)]
    ['0.012 s', '8.8 s', '1.6 min', '2.5 h', '4.6 days']
    """
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s"


def bytes_text(count: float) -> str:
    """A size in bytes.

    >>> bytes_text(300), bytes_text(1 << 20), bytes_text(15 << 30)
    ('300 B', '1.0 MiB', '15 GiB')
    """
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def _digits(number: float) -> str:
    if number >= 10:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def kind_of(name: str) -> str:
    """A layer's name with its numbers left open.

    >>> kind_of("model.layers.3.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return _NUMBER.sub("*", name)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns, the first one to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
