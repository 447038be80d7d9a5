"""What the packages import, and what must not lie in the repository. Structure, not seconds."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorambo_alloc

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "cvxpy", "matplotlib", "scipy.optimize")
CORE = sorted(
    module.name for module in pkgutil.walk_packages(lorambo_alloc.__path__, "lorambo_alloc.")
)


def imported_by(*modules: str) -> set[str]:
    """Return the names in `sys.modules` after a new interpreter imported `modules`."""
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_adapters_folder_is_no_package():
    # An __init__.py would shadow AdapterHub's `adapters` for everyone who runs from the root.
    assert not (ROOT / "adapters" / "__init__.py").exists()


def test_both_packages_ship_their_types():
    assert (ROOT / "lorambo_alloc" / "py.typed").exists()
    assert (ROOT / "adapters" / "lorambo_adapters" / "py.typed").exists()


def test_the_front_door_leaves_heavy_modules_unimported():
    loaded = imported_by("lorambo_alloc")
    assert loaded.isdisjoint(HEAVY)
    assert "lorambo_adapters" not in loaded


def test_every_core_module_leaves_heavy_modules_unimported():
    assert "lorambo_alloc.solvers.exact" in CORE  # the walk goes into subpackages
    loaded = imported_by(*CORE)
    assert loaded.issuperset(CORE)
    assert loaded.isdisjoint(HEAVY)
    assert "lorambo_adapters" not in loaded


def test_the_command_line_needs_no_torch():
    pytest.importorskip("typer", reason="typer is absent: pip install 'lorambo-alloc[cli]'")
    pytest.importorskip("rich", reason="rich is absent: pip install 'lorambo-alloc[cli]'")
    loaded = imported_by("lorambo_adapters.cli", "lorambo_adapters.commands")
    assert loaded.isdisjoint(HEAVY)
