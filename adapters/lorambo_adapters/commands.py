"""The commands of `lorambo`: `allocate`, `info`, `plan`, `spectra`, `compress` and `extract`.

Needs typer and rich; torch is imported by those that need it, when they run.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorambo_adapters.arguments import budget_from, objective_from
from lorambo_adapters.plan_command import add_plan
from lorambo_adapters.rank_commands import add_compress, add_extract
from lorambo_adapters.refusals import refusing
from lorambo_adapters.spectra_commands import group
from lorambo_alloc import Allocation, Problem, Spectra, solve
from lorambo_alloc.storage import replacing

app = typer.Typer(
    help="Optimal LoRA ranks within a parameter budget, with a proof.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(group, name="spectra")
add_plan(app)
add_compress(app)
add_extract(app)

SpectraFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A spectra file, as Spectra.save writes it.")
]


@app.command()
def allocate(
    file: SpectraFile,
    budget: Annotated[
        str,
        typer.Option(
            metavar="N|1.5M|uniform:R",
            help="Parameters to spend: a number, or what rank R in every layer would cost.",
        ),
    ],
    objective: Annotated[
        str,
        typer.Option(metavar="NAME", help="frobenius, nuclear, operator, schatten:P or log:NOISE."),
    ] = "frobenius",
    multiple_of: Annotated[
        int, typer.Option(metavar="N", help="Every rank is a multiple of N.")
    ] = 1,
    min_rank: Annotated[int, typer.Option(metavar="N", help="No layer gets less.")] = 0,
    max_rank: Annotated[int | None, typer.Option(metavar="N", help="No layer gets more.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT", help="Also write ranks and certificate as JSON."),
    ] = None,
) -> None:
    """Find the best rank of every layer within a budget."""
    with refusing(file):
        problem = Problem(
            Spectra.load(file),
            budget_from(budget),
            objective=objective_from(objective),
            min_rank=min_rank,
            max_rank=max_rank,
            multiple_of=multiple_of,
        )
    allocation = solve(problem)
    if json_file is not None:
        document = {"spectra": str(file), "objective": objective, **_as_json(allocation)}
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        with refusing(json_file), replacing(json_file) as out:
            out.write(text.encode())
    print(repr(allocation))


@app.command()
def info(file: SpectraFile) -> None:
    """Show the layers of a spectra file."""
    with refusing(file):
        spectra = Spectra.load(file)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("shape", "values", "largest", "energy", "unresolved"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = 0.0
    for name, values in spectra.items():
        energy = math.fsum(values * values)
        total += energy
        shape = spectra.shapes[name] if spectra.shapes else None
        table.add_row(
            Text(name),
            f"{shape[0]} x {shape[1]}" if shape else "-",
            str(len(values)),
            f"{values[0]:.6g}" if len(values) else "-",
            f"{energy:.6g}",
            f"{spectra.unresolved[name]:.6g}",
        )
    # A pipe has no width; the default of 80 columns would break names that a script greps for.
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    print(f"{len(spectra)} layers, energy (sum of squared values) {total:.6g}")
    print(f"source: {spectra.source or 'not recorded'}")


def _as_json(allocation: Allocation) -> dict[str, Any]:
    certificate = allocation.certificate
    relative_gap = certificate.relative_gap
    return {
        "ranks": dict(allocation),
        "cost": allocation.cost,
        "budget": allocation.budget,
        "value": allocation.value,
        "captured": allocation.captured,
        "certificate": {
            "status": certificate.status,
            "method": certificate.method,
            "value": certificate.value,
            "upper_bound": certificate.upper_bound,
            "gap": certificate.gap,
            # Infinite beside a value of 0, and JSON knows no infinity.
            "relative_gap": relative_gap if math.isfinite(relative_gap) else None,
            "price": certificate.price,
            "cut": certificate.cut,
        },
    }
