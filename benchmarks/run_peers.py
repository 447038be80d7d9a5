"""Ours against OR-Tools, HiGHS and SCIP on shapes a to d: time, proof and value.

    python -m benchmarks.run_peers

prints a markdown table and writes benchmarks/results/peers.json. Ours is the whole of `allocate` on
a plain dict of arrays: validation, solution and certificate. A peer's time is its solver call
alone. Exits with status 1 if any peer has a better value, or if a target is missed.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before numpy

# isort: split

import argparse
import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, Items, PeerResult
from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_alloc import Allocation
from lorambo_alloc.testing import Instance, power_law

# How many times faster than OR-Tools `allocate` must be; on d it must prove in less than the
# seconds given, where OR-Tools proves nothing within the time limit.
RATIOS = {"a": 15.0, "b": 100.0, "c": 1000.0}
SECONDS_ON_D = 0.2


def time_ours(instance: Instance, repeats: int) -> tuple[Allocation, float]:
    """The answer, and the median time of `repeats` whole calls after one to warm up."""
    allocation = instance.allocate()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        allocation = instance.allocate()
        times.append(time.perf_counter() - start)
    return allocation, statistics.median(times)


def peer_row(
    shape: str, allocation: Allocation, ours: float, peer: PeerResult
) -> tuple[dict[str, Any], bool]:
    """A row of the results, and whether the peer's value is better than ours."""
    problem = allocation.problem
    best = problem.value_of(allocation.ranks)
    value: Fraction | None = None
    if peer.ranks is not None:
        problem.check(peer.ranks)
        value = problem.value_of(peer.ranks)
    row = {
        "shape": shape,
        "solver": peer.peer,
        "seconds": peer.seconds,
        "build_seconds": peer.build_seconds,
        "proven": peer.proven,
        "value": None if value is None else float(value),
        "below_ours": None if value is None else float((best - value) / best),
        "times_ours": peer.seconds / ours if peer.seconds else None,
        "note": peer.note,
    }
    return row, value is not None and value > best


def main() -> int:
    """Run the comparison; the exit status says whether every target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="abcd", help="which of a, b, c, d (default: all)")
    parser.add_argument("--peers", default="ortools,highs,scip", help="which peers")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds per peer and shape")
    parser.add_argument("--repeats", type=int, default=15, help="calls of ours to take a median of")
    parser.add_argument("--seed", type=int, default=0, help="of the spectra")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.json")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for shape in options.shapes:
        instance = power_law(shape, options.seed)
        allocation, ours = time_ours(instance, options.repeats)
        certificate = allocation.certificate
        certificate.verify(allocation.problem, allocation.ranks)
        proven = certificate.status != "gap_certified"
        rows.append(
            {
                "shape": shape,
                "solver": "lorambo-alloc",
                "seconds": ours,
                "build_seconds": 0.0,
                "proven": proven,
                "value": float(certificate.value),
                "below_ours": 0.0,
                "times_ours": 1.0,
                "note": certificate.status,
            }
        )
        if not proven:
            failures.append(f"{shape}: not proven optimal")
        if shape == "d" and ours >= SECONDS_ON_D:
            failures.append(f"d: {ours:.3f} s, target {SECONDS_ON_D} s")
        items = Items.of(instance)
        for name in options.peers.split(","):
            peer = PEERS[name](items, options.time_limit)
            row, better = peer_row(shape, allocation, ours, peer)
            rows.append(row)
            if better:
                failures.append(f"{shape}: {peer.peer} has a better value")
            if name == "ortools" and shape in RATIOS and row["times_ours"] < RATIOS[shape]:
                target = RATIOS[shape]
                failures.append(f"{shape}: {row['times_ours']:.1f}x OR-Tools, target {target:g}x")
            print(f"{shape}: {peer.peer} done", file=sys.stderr)

    print(markdown([_formatted(row) for row in rows]))
    write_json(options.output, rows, time_limit=options.time_limit, seed=options.seed)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _formatted(row: dict[str, Any]) -> dict[str, str]:
    ran = row["times_ours"] is not None
    return {
        "shape": row["shape"],
        "solver": row["solver"],
        "time": seconds(row["seconds"]) if ran else "-",
        "times ours": f"{row['times_ours']:,.0f}x" if ran else "-",
        "proven": "yes" if row["proven"] else "no",
        "value": "-" if row["value"] is None else f"{row['value']:.12g}",
        "below ours": "-" if row["below_ours"] is None else f"{row['below_ours']:.1e}",
        "note": row["note"],
    }


if __name__ == "__main__":
    sys.exit(main())
