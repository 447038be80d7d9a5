"""The commands `lorambo compress` and `lorambo extract`. Torch is imported when they run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorambo_adapters.arguments import objective_from
from lorambo_adapters.refusals import Refusal, refusing
from lorambo_adapters.spectra_commands import device_from, names_from
from lorambo_alloc.storage import replacing

if TYPE_CHECKING:
    from lorambo_adapters.ranks.lora_result import LoraResult

Objective = Annotated[
    str, typer.Option(metavar="NAME", help="frobenius, nuclear, operator, schatten:P or log:NOISE.")
]
MultipleOf = Annotated[int, typer.Option(metavar="N", help="Every rank is a multiple of N.")]
MinRank = Annotated[int, typer.Option(metavar="N", help="No layer gets less.")]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where to compute, such as cuda or cpu.")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="OUT", help="Also write ranks and sizes as JSON.")
]
_DTYPES = ("float32", "bfloat16", "float16")


def add_compress(app: typer.Typer) -> None:
    """Add `compress` to the commands."""

    @app.command()
    def compress(
        lora: Annotated[
            Path,
            typer.Argument(
                metavar="LORA", help="A folder that PEFT saved, or a file of diffusers or kohya."
            ),
        ],
        budget: Annotated[
            str,
            typer.Option(
                metavar="50%|1.5M|10MB|uniform:R|energy:95%",
                help="A share of its parameters, parameters, bytes, what rank R everywhere would "
                "cost, or the share of the energy to keep.",
            ),
        ],
        output: Annotated[
            Path,
            typer.Option(
                "--output", "-o", metavar="OUT", help="A new folder for PEFT's, else a file."
            ),
        ],
        objective: Objective = "frobenius",
        multiple_of: MultipleOf = 1,
        min_rank: MinRank = 0,
        max_rank: Annotated[
            int | None, typer.Option(metavar="N", help="No layer gets more.")
        ] = None,
        fold_scale: Annotated[
            bool, typer.Option(help="Make every scale 1 (alpha = rank); B takes it up.")
        ] = False,
        keep_magnitude: Annotated[
            bool, typer.Option(help="Truncate the B A of a DoRA, and keep its magnitudes.")
        ] = False,
        device: Device = None,
        json_file: Json = None,
    ) -> None:
        """Make a trained LoRA smaller, with the least loss for all layers together."""
        with _writing(output):
            from lorambo_adapters.ranks.compress import compress as run

            result = run(
                lora,
                budget,
                output,
                objective=objective_from(objective),
                multiple_of=multiple_of,
                min_rank=min_rank,
                max_rank=max_rank,
                fold_scale=fold_scale,
                keep_magnitude=keep_magnitude,
                device=device_from(device),
            )
        _report(result, json_file)


def add_extract(app: typer.Typer) -> None:
    """Add `extract` to the commands."""

    @app.command()
    def extract(
        base: Annotated[Path, typer.Argument(metavar="BASE", help="The model before fine-tuning.")],
        tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The model after it.")],
        budget: Annotated[
            str,
            typer.Option(
                metavar="uniform:R|1.5M|10MB|1%|energy:95%",
                help="What rank R everywhere would cost, parameters, bytes, a share of the "
                "layers' weights, or the share of the energy to keep.",
            ),
        ],
        output: Annotated[
            Path,
            typer.Option("--output", "-o", metavar="DIR", help="A new folder, which PEFT loads."),
        ],
        targets: Annotated[
            str,
            typer.Option(
                metavar="NAMES|REGEX",
                help="Layers: all-linear, names or suffixes with commas between, or a regular "
                "expression for the whole name.",
            ),
        ] = "all-linear",
        exclude: Annotated[
            str | None,
            typer.Option(metavar="NAMES|REGEX", help="Layers to leave out, in the same form."),
        ] = None,
        objective: Objective = "frobenius",
        multiple_of: MultipleOf = 1,
        min_rank: MinRank = 0,
        max_rank: Annotated[int, typer.Option(metavar="N", help="No layer gets more.")] = 128,
        dtype: Annotated[
            str | None,
            typer.Option(metavar="NAME", help="Of the factors: float32, bfloat16 or float16."),
        ] = None,
        seed: Annotated[
            int, typer.Option(metavar="N", help="Of the random start of large weights.")
        ] = 0,
        device: Device = None,
        json_file: Json = None,
    ) -> None:
        """Write what fine-tuning changed as a LoRA.

        A run that was stopped continues where it was, if started again in the same way.
        """
        with _writing(output):
            # First, as its error names the extra where torch is absent.
            from lorambo_adapters.ranks.extract import extract_lora

            if dtype is not None and dtype not in _DTYPES:
                raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
            import torch

            result = extract_lora(
                base,
                tuned,
                budget,
                output,
                targets=names_from(targets),
                exclude=None if exclude is None else names_from(exclude),
                objective=objective_from(objective),
                multiple_of=multiple_of,
                min_rank=min_rank,
                max_rank=max_rank,
                dtype=None if dtype is None else getattr(torch, dtype),
                seed=seed,
                device=device_from(device),
            )
        _report(result, json_file)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Refuse what a user can put right, and say how to go on after Ctrl-C."""
    try:
        with refusing(output):  # an error without a file's name is one of writing: a full disk
            yield
    except Refusal as refusal:
        # There are several files: the error knows which it was about.
        cause = refusal.__cause__
        if isinstance(cause, OSError) and cause.filename is not None:
            raise Refusal(f"{cause.filename}: {cause.strerror or cause}") from cause
        raise
    except KeyboardInterrupt:
        begun = output.with_name(output.name + ".partial").exists()
        again = "; start it again in the same way to continue" if begun else ""
        print(f"lorambo: interrupted{again}", file=sys.stderr)
        raise
    except ModuleNotFoundError as missing:
        if missing.name not in ("torch", "safetensors"):
            raise
        raise Refusal(str(missing)) from missing


def _report(result: LoraResult, json_file: Path | None) -> None:
    if json_file is not None:
        document = {
            "output": str(result.path),
            "ranks": dict(result),
            "before": dict(result.before),
            "parameters": list(result.parameters),
            "bytes": list(result.nbytes),
            "captured": result.captured,
            "error": result.error if math.isfinite(result.error) else None,
            "status": result.certificate.status,
            "left_out": list(result.others),
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        with refusing(json_file), replacing(json_file) as out:
            out.write(text.encode())
    print(repr(result))
    print(f"written     {result.path}")
