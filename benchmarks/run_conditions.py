"""What side conditions take: caps, the convex relaxation, and the cheapest budget.

    python -m benchmarks.run_conditions

prints a markdown table and writes benchmarks/results/conditions.json. Caps are those of 32 pipeline
stages (and of four devices round them, or of attention and MLP across them) on the shape of Llama
70B; HiGHS gets the same problem as a mixed-integer program, with a time limit. Times include
validation. Exits with status 1 if the 32 stages take 10 seconds or leave a relative gap of 1e-6, if
the relaxation takes 10 seconds or its bound differs from that of the water-filling price by more
than 1e-9, or if a cheapest budget is not proved.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before numpy

# isort: split

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_alloc import allocate, solve
from lorambo_alloc.minimize_budget import minimize_budget
from lorambo_alloc.solvers.relaxation import relax
from lorambo_alloc.testing import Instance, power_law

LIMIT = 10.0  # seconds
GAP = 1e-6
AGREEMENT = 1e-9

Caps = dict[str, tuple[list[str], int]]


def stages(instance: Instance, count: int, share: float, name: str = "stage") -> Caps:
    """Caps on so many runs of consecutive blocks, each a share of an equal part of the budget."""
    block = {layer: int(layer.split(".")[1]) for layer in instance.spectra}
    blocks = max(block.values()) + 1
    return {
        f"{name} {k}": (
            [layer for layer, b in block.items() if b * count // blocks == k],
            int(instance.budget / count * share),
        )
        for k in range(count)
    }


def kinds(instance: Instance) -> Caps:
    """Caps on attention and on the MLP, across all blocks."""
    return {
        kind: ([layer for layer in instance.spectra if kind in layer], int(instance.budget * share))
        for kind, share in (("attn", 0.3), ("mlp", 0.65))
    }


def time_caps(name: str, instance: Instance, caps: Caps, highs_limit: float) -> dict[str, Any]:
    """Ours, and HiGHS on the same problem."""
    start = time.perf_counter()
    allocation = allocate(instance.spectra, instance.budget, **instance.keywords, caps=caps)
    took = time.perf_counter() - start
    problem, certificate = allocation.problem, allocation.certificate
    row = {
        "question": "caps",
        "instance": f"{name}, {instance.name}",
        "caps": len(caps),
        "seconds": took,
        "value": certificate.value,
        "upper_bound": certificate.upper_bound,
        "relative_gap": certificate.relative_gap,
        "status": certificate.status,
        "proof": certificate.verify(problem, allocation.ranks).proof,
    }
    if highs_limit:
        start = time.perf_counter()
        peer = solve(problem, "milp", time_limit=highs_limit)
        row["highs_seconds"] = time.perf_counter() - start
        row["highs_value"] = peer.value
        row["highs_relative_difference"] = peer.value / certificate.value - 1
    return row


def time_relaxation(instance: Instance, constraints: Callable[..., Any] | None) -> dict[str, Any]:
    """Compile, solve and bound; and the distance to the bound of the water-filling price."""
    problem = instance.problem()
    start = time.perf_counter()
    relaxed = relax(problem, constraints)
    took = time.perf_counter() - start
    row = {
        "question": "relaxation",
        "instance": instance.name + (", 80 norms" if constraints else ""),
        "seconds": took,
        "upper_bound": relaxed.upper_bound,
        "solver": relaxed.solver,
        "solver_value_relative": relaxed.objective / relaxed.upper_bound - 1,
        "status": "bound",
    }
    if constraints is None:
        exact = solve(problem)
        bound = exact.certificate.verify(problem, exact.ranks, effort=0).price_bound
        row["relative_difference_to_price_bound"] = abs(relaxed.upper_bound / float(bound) - 1)
        return row
    start = time.perf_counter()
    rounded = solve(problem, "relaxation", constraints=constraints)
    row["rounded_seconds"] = time.perf_counter() - start
    row["value"] = rounded.value
    row["relative_gap"] = rounded.certificate.relative_gap
    return row


def norms(instance: Instance) -> Callable[..., Any]:
    """For each block, a limit on the Euclidean norm of its attention ranks."""
    blocks: dict[str, list[str]] = {}
    for layer in instance.spectra:
        if "attn" in layer:
            blocks.setdefault(layer.split(".")[1], []).append(layer)

    def constraints(rank: Any) -> list[Any]:
        import cvxpy as cp

        return [cp.norm(cp.hstack([rank[n] for n in layers])) <= 30 for layers in blocks.values()]

    return constraints


def time_cheapest(instance: Instance, share: float) -> dict[str, Any]:
    """The cheapest ranks for a share of the gain."""
    start = time.perf_counter()
    cheapest = minimize_budget(instance.spectra, share, **instance.keywords)
    took = time.perf_counter() - start
    return {
        "question": "minimize_budget",
        "instance": f"{100 * share:g} % of {instance.name}",
        "seconds": took,
        "cost": cheapest.cost,
        "lower_bound": cheapest.certificate.lower_bound,
        "value": cheapest.value,
        "status": cheapest.certificate.status,
        "proof": cheapest.verify().proof,
    }


def main() -> int:
    """Time every question; the exit status says whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--highs", type=float, default=60.0, help="seconds for HiGHS; 0: without")
    parser.add_argument("--output", type=Path, default=RESULTS / "conditions.json")
    options = parser.parse_args()

    llama = power_law("c")
    thirty_two = stages(llama, 32, 1.1)
    devices = stages(llama, 4, 1.03, "device")
    plan: list[tuple[str, Caps]] = [
        ("32 full stages", stages(llama, 32, 1.0)),
        ("32 stages", thirty_two),
        ("32 stages in 4 devices", thirty_two | devices),
        ("32 stages, attention and MLP", thirty_two | kinds(llama)),
    ]
    rows = [time_caps(name, llama, caps, options.highs) for name, caps in plan]
    rows.append(time_relaxation(llama, None))
    rows.append(time_relaxation(llama, norms(llama)))
    rows += [time_cheapest(power_law(shape), share) for shape in "abcd" for share in (0.5, 0.95)]

    failures: list[str] = []
    for row in rows[:2]:
        if row["seconds"] >= LIMIT or row["relative_gap"] >= GAP:
            failures.append(f"{row['instance']}: {row['seconds']:.2f} s, {row['relative_gap']:.1e}")
    relaxation = rows[len(plan)]
    if (
        relaxation["seconds"] >= LIMIT
        or relaxation["relative_difference_to_price_bound"] > AGREEMENT
    ):
        failures.append(f"relaxation: {relaxation['seconds']:.2f} s, or another bound")
    failures += [
        f"{row['instance']}: {row['status']}"
        for row in rows
        if row["question"] == "minimize_budget" and row["status"] != "optimal_exact"
    ]
    print(markdown([_formatted(row) for row in rows]))
    write_json(options.output, rows, highs_time_limit=options.highs)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _formatted(row: dict[str, Any]) -> dict[str, str]:
    answer = row["status"].replace("_", " ")
    if row["question"] == "caps":
        if row["relative_gap"]:
            answer += f", relative gap {row['relative_gap']:.1e}"
        if "highs_seconds" in row:
            answer += (
                f"; HiGHS: value {row['highs_relative_difference']:+.1e} relative after "
                f"{seconds(row['highs_seconds'])}"
            )
    elif row["question"] == "relaxation":
        answer = f"{row['solver']}, its own value {row['solver_value_relative']:+.1e} relative"
        if "relative_difference_to_price_bound" in row:
            difference = row["relative_difference_to_price_bound"]
            answer += f"; bound {difference:.1e} from water-filling's"
        else:
            answer += (
                f"; rounded in {seconds(row['rounded_seconds'])}, gap {row['relative_gap']:.1e}"
            )
    return {
        "question": row["question"],
        "instance": row["instance"],
        "time": seconds(row["seconds"]),
        "answer": answer,
    }


if __name__ == "__main__":
    sys.exit(main())
