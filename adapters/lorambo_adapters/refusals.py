"""What the commands say of bad input: one line, and no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Refusal(Exception):
    """Bad input: the message is all that its user needs."""


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Turn what a user can put right into `Refusal`; anything else is a defect, and stays one.

    Args:
        file: what to name in an error of the operating system.
    """
    try:
        yield
    except ValueError as error:  # how the library reports bad input
        raise Refusal(str(error)) from error
    except OSError as error:
        raise Refusal(f"{file}: {error.strerror or error}") from error
