"""The 64 largest singular values of a 4096 x 4096 difference: `decompose` against all of them.

    python -m benchmarks.run_decompose

prints a markdown table and writes benchmarks/results/decompose.json. The differences are those of
two float32 matrices, a Gaussian one and the same plus a matrix whose singular values fall off as
j^-0.5, j^-0.75 or j^-1; of the j^-1 pair after both were rounded to bfloat16, whose rounding errors
are a flat spectrum beside it; and a Gaussian matrix, flat throughout, the worst case of any method
that looks for leading directions. Beside ours stand `torch.linalg.svdvals` in float64 (the exact
way, and the reference) and in the matrix's own float32, and `torch.svd_lowrank` with q = 80 and
niter = 2. Times are the best of some rounds, on one thread, and again on as many as PyTorch takes
by itself. Exits with status 1 if a power law takes more than a twentieth of the time of svdvals in
float64, or if anything captures 0.1 % less energy than the 64 largest values have.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_adapters.spectra.decompose import decompose

T = TypeVar("T")

SPEEDUP, SHORTFALL = 20.0, 1e-3
EXPONENTS = (0.5, 0.75, 1.0)
SCALE = 0.3  # the difference's largest value; the base's is 0.04 sqrt(size)


def differences(size: int) -> Iterator[tuple[str, bool, torch.Tensor]]:
    """Name, whether the targets are for it, and the difference."""
    generator = torch.Generator().manual_seed(0)
    left, right, base = (torch.randn(size, size, generator=generator) for _ in range(3))
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    base *= 0.02
    tuned = base
    for exponent in EXPONENTS:
        values = SCALE * torch.arange(1, size + 1) ** -exponent
        tuned = base + (left * values) @ right.T
        yield f"power law, j^-{exponent:g}", True, tuned - base
    rounded = tuned.bfloat16().float() - base.bfloat16().float()
    yield f"the same, j^-{EXPONENTS[-1]:g}, both rounded to bfloat16", False, rounded
    yield "Gaussian noise", False, base


def timed(call: Callable[[], T], repeats: int) -> tuple[float, T]:
    """The least of the seconds of each call, and what the first one returned."""
    results: list[T] = []
    took: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        results[1:] = [call()]
        took.append(time.perf_counter() - start)
    return min(took), results[0]


def measure(
    name: str, target: bool, matrix: torch.Tensor, rank: int, threads: int, repeats: int
) -> dict[str, Any]:
    """One difference on so many threads."""
    torch.set_num_threads(threads)
    ours, found = timed(lambda: decompose(matrix, rank), repeats)
    lowrank, peer = timed(lambda: torch.svd_lowrank(matrix, q=rank + 16, niter=2)[1], repeats)
    double, true = timed(lambda: torch.linalg.svdvals(matrix.double()).numpy(), 1)
    # In turn, lest one of them have the quiet minutes for itself.
    ours = min(ours, timed(lambda: decompose(matrix, rank), repeats)[0])
    single, _ = timed(lambda: torch.linalg.svdvals(matrix), 2)
    double = min(double, timed(lambda: torch.linalg.svdvals(matrix.double()), 1)[0])
    ours = min(ours, timed(lambda: decompose(matrix, rank), repeats)[0])
    largest, tail = true[:rank], true[rank:]
    energy = float(largest @ largest)
    peer = peer[:rank].double().numpy()
    return {
        "difference": name,
        "target": target,
        "threads": threads,
        "method": found.method,
        "seconds": ours,
        "svdvals_float32_seconds": single,
        "svdvals_float64_seconds": double,
        "times_faster_than_float32": single / ours,
        "times_faster_than_float64": double / ours,
        "captured_energy": float(found.values @ found.values),
        "shortfall": 1 - float(found.values @ found.values) / energy,
        "estimated_shortfall": found.shortfall,
        "largest_relative_error": float(np.max(np.abs(found.values - largest) / largest)),
        "unresolved_relative_error": found.unresolved / float(tail @ tail) - 1,
        "svd_lowrank_seconds": lowrank,
        "svd_lowrank_shortfall": 1 - float(peer @ peer) / energy,
    }


def main() -> int:
    """Run all cases; the exit status says whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--repeats", type=int, default=5, help="three times so many, of which the best"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "decompose.json")
    options = parser.parse_args()

    counts = sorted({1, torch.get_num_threads()})
    rows = [
        measure(name, target, matrix, options.rank, threads, options.repeats)
        for name, target, matrix in differences(options.size)
        for threads in counts
    ]
    failures: list[str] = []
    for row in rows:
        where = f"{row['difference']}, {row['threads']} threads"
        if row["target"] and row["times_faster_than_float64"] < SPEEDUP:
            failures.append(f"{where}: {row['times_faster_than_float64']:.1f} times faster")
        if row["shortfall"] > SHORTFALL:
            failures.append(f"{where}: captured energy {row['shortfall']:.1e} short")

    print(markdown([_formatted(row) for row in rows]))
    write_json(
        options.output,
        rows,
        size=options.size,
        rank=options.rank,
        repeats=options.repeats,
        threads="as each row says",
    )
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _formatted(row: dict[str, Any]) -> dict[str, str]:
    return {
        "difference": row["difference"],
        "threads": str(row["threads"]),
        "decompose": seconds(row["seconds"]),
        "svdvals, float32": f"{seconds(row['svdvals_float32_seconds'])} "
        f"({row['times_faster_than_float32']:.1f}x)",
        "svdvals, float64": f"{seconds(row['svdvals_float64_seconds'])} "
        f"({row['times_faster_than_float64']:.1f}x)",
        "energy short by": f"{row['shortfall']:.1e}",
        "estimated": f"{row['estimated_shortfall']:.1e}",
        "worst value short by": f"{row['largest_relative_error']:.1e}",
        "svd_lowrank": f"{seconds(row['svd_lowrank_seconds'])}, "
        f"short by {row['svd_lowrank_shortfall']:.1e}",
    }


if __name__ == "__main__":
    sys.exit(main())
