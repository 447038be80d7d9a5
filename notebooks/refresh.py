"""Run the notebooks again: write what they show now, or check that it is what they show.

    python notebooks/refresh.py [NAME ...]          # run, and write what is shown, without noise
    python notebooks/refresh.py --check [NAME ...]  # run, compare the text, write nothing

NAME is a file in this folder; without any, all of them. A notebook that is written anew keeps no
times, paths or versions, so that a diff shows what changed. Compared are the texts of all outputs;
of pictures only that they are there, as their bytes depend on matplotlib's version. Needs nbclient
and ipykernel.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from lorambo_alloc.storage import replacing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MOST_SECONDS = 300  # a cell
MOST_BYTES = 400_000  # a notebook with its pictures


def names() -> list[str]:
    """The notebooks of this folder."""
    return sorted(path.name for path in HERE.glob("*.ipynb"))


def executed(path: Path) -> Any:
    """The notebook as it is after a run in a new kernel, against this checkout, on one thread.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; an assertion that no longer holds too.
    """
    notebook = nbformat.read(path, as_version=4)
    here = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    client = NotebookClient(
        notebook,
        timeout=MOST_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # else it depends on the moment how output is cut up
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(HERE)}},
    )
    # Warnings of others, about what they will drop, and threads of a tokenizer would be noise.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore:IProgress not found,ignore:`is_gradient_checkpointing`",
        "TOKENIZERS_PARALLELISM": "false",
    }
    client.execute(env=environment)
    return notebook


def without_noise(notebook: Any) -> Any:
    """Leave out, in place, what differs from run to run or from machine to machine."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({})
        cell["id"] = f"cell-{number}"
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            # A picture's text is its size in pixels, which says nothing to a reader.
            if "image/png" in output.get("data", {}):
                output.data.pop("text/html", None)
                output.data["text/plain"] = "(a picture)"
    return notebook


def texts(notebook: Any) -> Iterator[str]:
    """What a reader sees of the outputs, line by line, each cell under a line of its number."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            kind = output.get("name", output.output_type)
            shown = output.get("text") or output.get("data", {}).get("text/plain", "")
            yield f"[cell {number}, {kind}]"
            yield from shown.splitlines()


def faults(path: Path, notebook: Any) -> list[str]:
    """What is wrong with the stored notebook, given the same one after a run; empty if nothing."""
    stored = nbformat.read(path, as_version=4)
    found: list[str] = []
    shown, again = list(texts(stored)), list(texts(without_noise(notebook)))
    if shown != again:
        found += ["its outputs are not those of its code:"]
        found += unified_diff(shown, again, "stored", "run again", lineterm="", n=1)
    found += [f"it prints to stderr: {line}" for line in again if line.endswith(", stderr]")]
    if path.read_text("utf-8") != text_of(without_noise(stored)):
        found.append("it holds times, paths or versions of a machine")
    found += [f"it shows a path: {line}" for line in shown if str(ROOT) in line]
    if (size := path.stat().st_size) > MOST_BYTES:
        found.append(f"expected at most {MOST_BYTES:,} bytes, got {size:,}")
    if not any("assert " in cell.source for cell in stored.cells if cell.cell_type == "code"):
        found.append("it asserts nothing of what it shows")
    return found


def text_of(notebook: Any) -> str:
    """The notebook as a file has it."""
    return nbformat.writes(notebook) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and write or check; the exit status is 1 if a notebook shows something else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="files in this folder (default: all)")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(arguments)
    status = 0
    for name in options.names or names():
        path = HERE / Path(name).name
        notebook = executed(path)
        if not options.check:
            with replacing(path) as file:
                file.write(text_of(without_noise(notebook)).encode())
        problems = faults(path, notebook)
        status = status or int(bool(problems))
        print("\n".join([f"{path.name}: {'as shown' if not problems else 'FAILED'}", *problems]))
    return status


if __name__ == "__main__":
    sys.exit(main())
