"""The commands `lorambo spectra ...`, which make spectra files. Torch is imported when they run."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorambo_adapters.outputs import check_output
from lorambo_adapters.refusals import Refusal, refusing
from lorambo_adapters.spectra_lora_command import add_lora
from lorambo_alloc import Spectra

if TYPE_CHECKING:
    from lorambo_adapters.spectra.distributed import Workers

group = typer.Typer(
    help="Make a spectra file from a model, from two checkpoints or from a LoRA.",
    no_args_is_help=False,
)

Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="F", help="The spectra file to write.")
]
Targets = Annotated[
    str,
    typer.Option(
        metavar="NAMES|REGEX",
        help="Layers: all-linear, names or suffixes with commas between, or a regular expression "
        "for the whole name.",
    ),
]
Exclude = Annotated[
    str | None, typer.Option(metavar="NAMES|REGEX", help="Layers to leave out, in the same form.")
]
Rank = Annotated[str, typer.Option(metavar="N|all", help="How many of the largest values to keep.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the random start of large weights.")]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where to compute, such as cuda or cpu.")
]


@group.command()
def weights(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder or file of safetensors or .bin.")
    ],
    output: Output,
    targets: Targets = "all-linear",
    exclude: Exclude = None,
    rank: Rank = "128",
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Write the spectra of a model's weights.

    A run that was stopped continues where it was, if started again in the same way. Several
    processes share the layers out: torchrun --nproc-per-node N -m lorambo_adapters spectra weights
    """
    with _making(model, output) as (workers, written):
        from lorambo_adapters.spectra.checkpoints import checkpoint_spectra

        written(
            checkpoint_spectra(
                model,
                targets=names_from(targets),
                exclude=None if exclude is None else names_from(exclude),
                rank=rank_from(rank),
                seed=seed,
                device=device_from(device),
                output=output,
                workers=workers,
            )
        )


@group.command()
def delta(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model before fine-tuning.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The model after it.")],
    output: Output,
    targets: Targets = "all-linear",
    exclude: Exclude = None,
    rank: Rank = "128",
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Write the spectra of TUNED's weights less BASE's.

    A run that was stopped continues where it was, if started again in the same way. Several
    processes share the layers out: torchrun --nproc-per-node N -m lorambo_adapters spectra delta
    """
    with _making(tuned, output) as (workers, written):
        from lorambo_adapters.spectra.checkpoints import delta_spectra

        written(
            delta_spectra(
                base,
                tuned,
                targets=names_from(targets),
                exclude=None if exclude is None else names_from(exclude),
                rank=rank_from(rank),
                seed=seed,
                device=device_from(device),
                output=output,
                workers=workers,
            )
        )


add_lora(group, refusing)


def names_from(text: str) -> str | list[str]:
    """Read targets: `all-linear`, `q_proj,v_proj`, or a regular expression.

    Text of nothing but names (letters, digits, `_`, `-` and dots) with commas between is a list, so
    a single suffix is one too; anything else is an expression for the whole name.

    Raises:
        ValueError: a name is empty.

    >>> names_from("q_proj,v_proj"), names_from("down_proj"), names_from(r".*layers[.][0-3][.].*")
    (['q_proj', 'v_proj'], ['down_proj'], '.*layers[.][0-3][.].*')
    """
    if text.lower() == "all-linear" or not re.fullmatch(r"[\w\-., ]*", text):
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"expected names with commas between, got {text!r}")
    return names


def rank_from(text: str) -> int | None:
    """Read a number of values, or `all`.

    Raises:
        ValueError: it is neither.

    >>> rank_from("64"), rank_from("all")
    (64, None)
    """
    if text == "all":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError(f"rank: expected a whole number from 1 on, or all, got {text!r}")
    return int(text)


def device_from(name: str | None):
    """Read a device's name; None stays None.

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    return device


@contextmanager
def _making(file: Path, output: Path) -> Iterator[tuple[Workers, Callable[[Spectra], None]]]:
    """Refuse what a user can put right, report what was made, and say how to go on after Ctrl-C.

    Yields:
        The processes that share the work, and the report, which worker 0 makes.
    """

    def again() -> str:
        begun = output.with_name(output.name + ".partial").exists()
        return "; start it again in the same way to continue" if begun else ""

    try:
        with refusing(file):
            check_output(output)
            from lorambo_adapters.spectra.distributed import WorkerLost, torchrun_workers

            try:
                with torchrun_workers() as workers:
                    yield workers, partial(_report, output) if workers.index == 0 else _say_nothing
            except WorkerLost as lost:
                raise Refusal(f"{lost}{again()}") from lost
    except Refusal as refusal:
        # There are two checkpoints and an output: the error knows which it was about.
        cause = refusal.__cause__
        if isinstance(cause, OSError) and cause.filename is not None:
            raise Refusal(f"{cause.filename}: {cause.strerror or cause}") from cause
        raise
    except KeyboardInterrupt:
        print(f"lorambo: interrupted{again()}", file=sys.stderr)
        raise
    except ModuleNotFoundError as missing:
        if missing.name not in ("torch", "safetensors"):
            raise
        raise Refusal(str(missing)) from missing


def _report(output: Path, spectra: Spectra) -> None:
    energy = math.fsum(math.fsum(values * values) for values in spectra.values())
    left = math.fsum(spectra.unresolved.values())
    share = f", {energy / (energy + left):.4%} of the energy" if energy else ", all zero"
    print(f"{output}: {spectra!r}{share}")


def _say_nothing(spectra: Spectra) -> None:
    pass
