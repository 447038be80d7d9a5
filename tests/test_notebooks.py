"""Each notebook runs, its assertions hold, and its outputs are those of its code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="needs nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytest.importorskip("peft", reason="needs peft")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def check(folder, name):
    # In a process of its own: what Jupyter's libraries warn of is not ours.
    command = [sys.executable, str(folder / "refresh.py"), "--check", name]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_those_of_the_code(name):
    done = check(FOLDER, name)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_to_files(name):
    cells = json.loads((FOLDER / name).read_text("utf-8"))["cells"]
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    quoted = [part for part in prose.split("`")[1::2] if part.endswith(".ipynb")]
    assert quoted
    assert [name for name in quoted if not (FOLDER / name).exists()] == []
    pages = [part for part in prose.split("`")[1::2] if part.endswith(".md")]
    assert [page for page in pages if not (FOLDER.parent / page).exists()] == []


@pytest.fixture
def checked(tmp_path):
    """Check a notebook of one cell, in a copy of the folder."""
    (tmp_path / "refresh.py").write_text((FOLDER / "refresh.py").read_text("utf-8"), "utf-8")

    def run(source, shown, **metadata):
        from nbformat import v4, writes

        cell = v4.new_code_cell(source, execution_count=1, id="cell-0", metadata=metadata)
        cell.outputs = [v4.new_output("stream", name="stdout", text=shown)]
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        named = {"kernelspec": kernel, "language_info": {"name": "python"}}
        notebook = v4.new_notebook(cells=[cell], metadata=named)
        (tmp_path / "small.ipynb").write_text(writes(notebook) + "\n", "utf-8")
        return check(tmp_path, "small.ipynb")

    return run


def test_what_is_not_as_shown_is_found(checked):
    assert checked("assert True\nprint(1)", "1\n").returncode == 0
    other = checked("assert True\nprint(1)", "2\n")
    assert other.returncode == 1
    assert "-2" in other.stdout.splitlines()
    assert "+1" in other.stdout.splitlines()


def test_an_assertion_that_fails_is_found(checked):
    failed = checked("assert 1 == 2\nprint(1)", "1\n")
    assert failed.returncode == 1
    assert "AssertionError" in failed.stderr


def test_a_notebook_without_assertions_is_refused(checked):
    silent = checked("print(1)", "1\n")
    assert silent.returncode == 1
    assert "asserts nothing" in silent.stdout


def test_stderr_is_refused(checked):
    noisy = checked("import sys\nassert print(1, file=sys.stderr) is None", "1\n")
    assert noisy.returncode == 1
    assert "it prints to stderr" in noisy.stdout


def test_what_a_machine_leaves_behind_is_refused(checked):
    timed = checked("assert True\nprint(1)", "1\n", execution={"iopub.status.busy": "2026"})
    assert timed.returncode == 1
    assert "times" in timed.stdout
