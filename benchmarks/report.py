"""What the benchmark scripts share: the machine, and results as a table and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

_PACKAGES = (
    *("numpy", "scipy", "cvxpy", "clarabel", "ortools", "highspy", "pyscipopt"),
    *("torch", "peft", "transformers"),
)


def machine(threads: int | str = 1) -> dict[str, Any]:
    """The processor, the threads used and the versions, and nothing that names the machine."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": threads,
        "versions": versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows with equal keys as an aligned markdown table."""
    if not rows:
        return ""
    columns = list(rows[0])
    width = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = ["| " + " | ".join(c.ljust(width[c]) for c in columns) + " |"]
    lines.append("|" + "|".join("-" * (width[c] + 2) for c in columns) + "|")
    lines += ["| " + " | ".join(row[c].ljust(width[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_json(
    path: Path, rows: Sequence[dict[str, Any]], *, threads: int | str = 1, **settings: Any
) -> None:
    """Write settings, machine and rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "machine": machine(threads), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def seconds(value: float) -> str:
    """Three significant digits, with the unit that fits."""
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value:.3g} s"
