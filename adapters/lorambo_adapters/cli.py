"""The `lorambo` command: a door that keeps every error to one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lorambo` and return its exit code.

    Args:
        arguments: What follows the command's name; `sys.argv[1:]` by default.

    Returns:
        0 for an answer, 2 for anything the user can put right (one line on stderr says what),
        130 when interrupted. A traceback means a defect in the library.
    """
    try:
        import typer

        from lorambo_adapters.commands import app
        from lorambo_adapters.refusals import Refusal
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        return _refuse(f"the command line needs {missing.name}: pip install 'lorambo-alloc[cli]'")

    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="lorambo", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:  # wrong options
        return _refuse(f"{error.format_message()} Try 'lorambo --help'.")
    except Refusal as error:
        return _refuse(str(error))
    except BrokenPipeError:
        # The reader (`| head`) has left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def _refuse(reason: str) -> int:
    print("lorambo:", " ".join(reason.split()), file=sys.stderr)
    return USER_ERROR
