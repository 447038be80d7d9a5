"""Every hard family: proven, or stopped in time with a certified gap?

    python -m benchmarks.run_hard

prints a markdown table and writes benchmarks/results/hard.json. Beside the hard families stand the
mixture of experts, non-concave curves and multiples of 8, and HiGHS on the strongly correlated
linear family. Exits with status 1 if a certificate does not verify, if a run overstays its time
limit, or if the mixture of experts is not proven in less than a second.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before numpy

# isort: split

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import Items, highs
from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_alloc.testing import (
    HARD_FAMILIES,
    Instance,
    mixture_of_experts,
    multiples_of_8,
    non_concave,
)

SIZES = ((200, 32), (500, 64), (2000, 256))
# Validation and the certificate lie outside the time limit of the search.
GRACE = 1.0


def instances(
    sizes: tuple[tuple[int, int], ...], seeds: int
) -> Iterator[tuple[str, int, Instance]]:
    """Family, seed and instance of every run."""
    for family, make in HARD_FAMILIES.items():
        for layers, ranks in sizes:
            for seed in range(seeds):
                yield family, seed, make(layers, ranks, seed)
    for seed in range(seeds):
        yield "non_concave", seed, non_concave(seed=seed)
        yield "multiples_of_8", seed, multiples_of_8(seed=seed)
    yield "mixture_of_experts", 0, mixture_of_experts()


def main() -> int:
    """Run every family; the exit status says whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds for ours")
    parser.add_argument("--peer-time-limit", type=float, default=60.0, help="seconds for HiGHS")
    parser.add_argument("--no-peer", action="store_true", help="leave HiGHS out")
    parser.add_argument("--seeds", type=int, default=1, help="instances of each family and size")
    parser.add_argument("--families", default="", help="only families whose name holds this")
    parser.add_argument("--output", type=Path, default=RESULTS / "hard.json")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for family, seed, instance in instances(SIZES, options.seeds):
        if options.families not in family:
            continue
        start = time.perf_counter()
        allocation = instance.allocate(time_limit=options.time_limit)
        took = time.perf_counter() - start
        certificate = allocation.certificate
        certificate.verify(allocation.problem, allocation.ranks)
        row: dict[str, Any] = {
            "family": family,
            "instance": instance.name,
            "seed": seed,
            "seconds": took,
            "status": certificate.status,
            "value": float(certificate.value),
            "relative_gap": float(certificate.relative_gap),
            "method": certificate.method,
            "peer_seconds": None,
            "peer_proven": None,
            "peer_value": None,
        }
        if family == "strongly_correlated_linear" and not options.no_peer:
            peer = highs(Items.of(instance), options.peer_time_limit)
            row["peer_seconds"], row["peer_proven"] = peer.seconds, peer.proven
            if peer.ranks is not None:
                value = allocation.problem.value_of(peer.ranks)
                row["peer_value"] = float(value)
                if value > allocation.problem.value_of(allocation.ranks):
                    failures.append(f"{instance.name}: HiGHS has a better value")
        if took > options.time_limit + GRACE:
            failures.append(f"{instance.name}: {took:.1f} s, limit {options.time_limit:g} s")
        if family == "mixture_of_experts" and (
            took >= 1.0 or certificate.status == "gap_certified"
        ):
            failures.append(f"{instance.name}: {certificate.status} in {took:.2f} s")
        rows.append(row)
        print(f"{instance.name}, seed {seed}: {certificate.status}, {took:.3f} s", file=sys.stderr)

    print(markdown([_formatted(row) for row in rows]))
    write_json(options.output, rows, time_limit=options.time_limit, seeds=options.seeds)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _formatted(row: dict[str, Any]) -> dict[str, str]:
    peer = "-"
    if row["peer_seconds"] is not None:
        peer = f"{seconds(row['peer_seconds'])}, {'proven' if row['peer_proven'] else 'unproven'}"
    return {
        "instance": row["instance"],
        "seed": str(row["seed"]),
        "time": seconds(row["seconds"]),
        "status": row["status"],
        "relative gap": f"{row['relative_gap']:.1e}",
        "HiGHS": peer,
    }


if __name__ == "__main__":
    sys.exit(main())
