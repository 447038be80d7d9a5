"""Choosing about 500 of 5,000 coupled candidates: how long, how much memory, how good?

    python -m benchmarks.run_submodular

prints a markdown table and writes benchmarks/results/submodular.json. The curvature is dense:
C = X X^T / m with random X, 200 MB of doubles, made before the clock starts. Peak memory is that of
the whole process, C included. `LogDet` and `Coverage` stand beside `CoupledQuadratic`. Exits with
status 1 if a run takes 30 s or the process 1 GB.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before numpy

# isort: split

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_alloc.submodular import (
    Cardinality,
    Constraint,
    CoupledQuadratic,
    Coverage,
    Knapsack,
    LogDet,
    PartitionMatroid,
    SetFunction,
    select,
)

SECONDS = 30.0
BYTES = 10**9
RHO = 0.1


def curvature(n: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A dense positive semidefinite matrix, from blocks of samples: nothing larger is ever held."""
    samples = n + n // 5
    matrix = np.zeros((n, n))
    for start in range(0, samples, 500):
        rows = rng.standard_normal((min(500, samples - start), n))
        for at in range(0, n, 500):
            matrix[at : at + 500] += rows[:, at : at + 500].T @ rows
    matrix /= samples
    # Blockwise sums need not be symmetric to the last bit.
    for at in range(0, n, 500):
        matrix[at : at + 500, :at] = matrix[:at, at : at + 500].T
        square = matrix[at : at + 500, at : at + 500]
        square[...] = (square + square.T) / 2
    return matrix


def cases(n: int, k: int) -> Iterator[tuple[str, str, SetFunction, Constraint]]:
    """Objective, constraint, and both made."""
    rng = np.random.default_rng(0)
    matrix = curvature(n, rng)
    slopes = rng.standard_normal(n)
    layers = [f"layers.{j % 100}" for j in range(n)]
    costs = rng.choice([4096, 8192, 18432, 28672], n).tolist()
    knapsack = Knapsack(costs, budget=k * 5800)
    coupled = CoupledQuadratic(slopes, matrix, RHO, layers=layers)
    yield "CoupledQuadratic", f"cardinality {k}", coupled, Cardinality(k)
    yield "CoupledQuadratic", "knapsack", coupled, knapsack
    matroid = PartitionMatroid(layers, max(k // 100, 1))
    yield "CoupledQuadratic", f"{max(k // 100, 1)} of each of 100 layers", coupled, matroid
    information = LogDet(matrix, RHO)
    yield "LogDet", f"cardinality {k}", information, Cardinality(k)
    yield "LogDet", "knapsack", information, knapsack
    coverage = Coverage(rng.integers(0, 4 * n, (n, 20)).tolist())
    yield "Coverage", f"cardinality {k}", coverage, Cardinality(k)
    yield "Coverage", "knapsack", coverage, knapsack


def main() -> int:
    """Run every case; the exit status says whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--elements", type=int, default=5000)
    parser.add_argument("--choose", type=int, default=500)
    parser.add_argument("--output", type=Path, default=RESULTS / "submodular.json")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for objective, constraint, function, within in cases(options.elements, options.choose):
        start = time.perf_counter()
        selection = select(function, constraint=within)
        took = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        rows.append(
            {
                "objective": objective,
                "constraint": constraint,
                "elements": function.n,
                "chosen": len(selection),
                "seconds": took,
                "peak_bytes": peak,
                "status": selection.status,
                "value": selection.value,
                "upper_bound": selection.upper_bound,
                "ratio": selection.ratio,
                "algorithm": selection.guarantee.algorithm,
                "guaranteed": selection.guarantee.ratio,
            }
        )
        if took >= SECONDS or peak >= BYTES:
            failures.append(f"{objective}, {constraint}: {took:.1f} s, {peak / 1e9:.2f} GB")
    print(markdown([_formatted(row) for row in rows]))
    write_json(options.output, rows, rho=RHO)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _formatted(row: dict[str, Any]) -> dict[str, str]:
    return {
        "objective": row["objective"],
        "constraint": row["constraint"],
        "chosen": f"{row['chosen']} of {row['elements']}",
        "algorithm": row["algorithm"],
        "time": seconds(row["seconds"]),
        "peak": f"{row['peak_bytes'] / 1e9:.2f} GB",
        "value": f"{row['value']:.4g}",
        "of the bound": f"{100 * row['ratio']:.1f}%",
        "guaranteed": f"{100 * row['guaranteed']:.1f}%",
    }


if __name__ == "__main__":
    sys.exit(main())
