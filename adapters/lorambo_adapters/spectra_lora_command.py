"""The command `lorambo spectra lora`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from lorambo_adapters.outputs import check_output

Refusing = Callable[[Path], AbstractContextManager[None]]
"""A context that turns ValueError and OSError about a file into the command line's own error."""


def add_lora(group: typer.Typer, refusing: Refusing) -> None:
    """Add `lora` to a group of commands.

    Args:
        group: of the commands that make spectra.
        refusing: wraps all that a user can put right.
    """

    @group.command()
    def lora(
        file: Annotated[
            Path,
            typer.Argument(
                metavar="LORA", help="A folder that PEFT saved, or a file of diffusers or kohya."
            ),
        ],
        output: Annotated[
            Path, typer.Option("--output", "-o", metavar="F", help="The spectra file to write.")
        ],
        adapter: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME",
                help="A folder in LORA, for an adapter with a name of its own. May be repeated: "
                "the updates are added up.",
            ),
        ] = None,
        alpha: Annotated[
            float | None,
            typer.Option(metavar="ALPHA", help="For layers whose file has no alpha."),
        ] = None,
        ignore_magnitude: Annotated[
            bool, typer.Option(help="Take the B A of a DoRA, without its magnitudes.")
        ] = False,
    ) -> None:
        """Write the exact spectra of a trained LoRA."""
        with refusing(output):
            check_output(output)
        with refusing(file), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            spectra = _lora_spectra(file, adapter, alpha, ignore_magnitude)
        for warning in said:
            print("lorambo: warning:", warning.message, file=sys.stderr)
        with refusing(output):
            spectra.save(output)
        print(f"{output}: {spectra!r}")


def _lora_spectra(
    file: Path, adapter: list[str] | None, alpha: float | None, ignore_magnitude: bool
):
    try:
        from lorambo_adapters.spectra.lora import lora_spectra
    except ModuleNotFoundError as missing:
        if missing.name not in ("torch", "safetensors"):
            raise
        raise ValueError(str(missing)) from missing
    return lora_spectra(
        file, adapter=adapter or None, alpha=alpha, ignore_magnitude=ignore_magnitude
    )
