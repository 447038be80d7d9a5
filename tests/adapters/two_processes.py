"""Two processes that run one script, and neither of which ends because the other has ended."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_two(script, folder, *modes):
    """Exit statuses and errors of both; each mode has a folder of its own to write into."""
    for mode in modes:
        (folder / mode).mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    shared = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), *modes],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [process.returncode for process in processes], errors
