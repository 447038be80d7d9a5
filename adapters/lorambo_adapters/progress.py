"""A progress bar for work of known size: on a terminal, on stderr, where rich is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

Advance = Callable[[float, str], None]
"""Report that so much work is done, and what comes next (an empty text at the end)."""


@contextmanager
def progress_bar(title: str, total: float, shown: bool | None = None) -> Generator[Advance]:
    """Show how much of some work is done, and how long the rest may take.

    Args:
        title: what is done.
        total: the work's size, in any unit that time is about proportional to.
        shown: None shows it if stderr is a terminal and rich is installed; False never; True
            wherever rich is installed.

    Yields:
        A function of the work done since its last call and the name of what is next.

    Example:
        >>> with progress_bar("spectra", 2.0, shown=False) as advance:
        ...     advance(1.0, "layers.1.mlp")
        ...     advance(1.0, "")
    """
    if shown is None:
        shown = sys.stderr.isatty()
    if shown:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        except ModuleNotFoundError:
            shown = False
        else:
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                # As text: a layer's name may look like rich's markup.
                TextColumn("{task.fields[next]}", markup=False),
                console=Console(stderr=True),
            )
            with bar:
                task = bar.add_task(title, total=total, next="")
                yield lambda done, name: bar.update(task, advance=done, next=name)
            return
    yield lambda done, name: None
