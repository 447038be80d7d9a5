"""The command `lorambo plan`. Torch is imported when it runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from lorambo_adapters.refusals import Refusal, refusing
from lorambo_adapters.spectra_commands import Device, Exclude, Targets, names_from, rank_from


def add_plan(app: typer.Typer) -> None:
    """Add `plan` to the commands.

    Args:
        app: of all commands.
    """

    @app.command()
    def plan(
        source: Annotated[
            Path,
            typer.Argument(
                metavar="MODEL",
                help="A folder or file of weights (headers alone are read), or a config.json.",
            ),
        ],
        targets: Targets = "all-linear",
        exclude: Exclude = None,
        rank: Annotated[
            int, typer.Option(metavar="R", min=1, help="Of the LoRA whose size is told.")
        ] = 8,
        values: Annotated[
            str, typer.Option(metavar="N|all", help="Singular values to keep of each weight.")
        ] = "128",
        tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens a batch.")] = 2048,
        batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches of data.")] = 16,
        passes: Annotated[
            int, typer.Option(metavar="N", min=1, help="Passes over them, for gradients.")
        ] = 3,
        width: Annotated[
            int, typer.Option(metavar="N", min=4, help="Width of the gradients' sketches.")
        ] = 64,
        workers: Annotated[
            int, typer.Option(metavar="N", min=1, help="Processes of torchrun that share the work.")
        ] = 1,
        device: Device = None,
    ) -> None:
        """Tell how long an extraction would take, and how much memory, before it is run.

        No weight is read. This machine's speed is measured, which takes about two seconds.
        """
        with refusing(source), warnings.catch_warnings():
            # What a model warns of when it is built without weights is of no use here.
            warnings.simplefilter("ignore")
            try:
                from lorambo_adapters.plan import plan_extraction
                from lorambo_adapters.spectra_commands import device_from

                found = plan_extraction(
                    source,
                    targets=names_from(targets),
                    exclude=None if exclude is None else names_from(exclude),
                    rank=rank,
                    values=rank_from(values),
                    tokens=tokens,
                    batches=batches,
                    passes=passes,
                    width=width,
                    workers=workers,
                    device=device_from(device),
                )
            except ModuleNotFoundError as missing:
                if missing.name not in ("torch", "safetensors", "transformers"):
                    raise
                raise Refusal(str(missing)) from missing
        print(repr(found))
