"""What the questions round an allocation take: the frontier, and how sure the ranks are.

    python -m benchmarks.run_questions

prints a markdown table and writes benchmarks/results/questions.json. The frontier is timed in the
shapes of Llama 70B and of 2,000 x 512 ranks, beside one `np.sort` of all gains; `stability` on 200
noisy samples in the shape of Llama 8B. Times include validation. Exits with status 1 if the
frontier is not what a certificate's price proves at the instance's budget, if a sample is not
solved to optimality, or if `stability` takes 5 seconds or more.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before numpy

# isort: split

import argparse
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_alloc.frontier import frontier
from lorambo_alloc.stability import Stability, stability
from lorambo_alloc.testing import Instance, power_law

LIMIT = 5.0  # seconds for `stability`


def noisy_samples(instance: Instance, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Spectra with a noise of 30 % on each layer and of 10 % on each value."""
    rng = np.random.default_rng(seed)
    base = np.array(list(instance.spectra.values()))
    samples: list[dict[str, np.ndarray]] = []
    for _ in range(count):
        noise = 0.1 * rng.standard_normal(base.shape) + 0.3 * rng.standard_normal((len(base), 1))
        values = -np.sort(-base * np.exp(noise), axis=1)
        samples.append(dict(zip(instance.spectra, values, strict=True)))
    return samples


def time_frontier(shape: str, rounds: int) -> dict[str, Any]:
    """The best of some rounds, beside one sort of all gains."""
    instance = power_law(shape)
    gains = np.concatenate(list(instance.spectra.values())) ** 2
    took: list[float] = []
    sorting: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        curve = frontier(instance.spectra, **instance.keywords)
        took.append(time.perf_counter() - start)
        start = time.perf_counter()
        np.sort(gains)
        sorting.append(time.perf_counter() - start)
    tracemalloc.start()
    curve = frontier(instance.spectra, **instance.keywords)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    start = time.perf_counter()
    allocation = curve.allocation(instance.budget)
    solving = time.perf_counter() - start
    verified = allocation.certificate.verify(allocation.problem, allocation.ranks, effort=0)
    return {
        "question": "frontier",
        "instance": instance.name,
        "seconds": min(took),
        "sort_seconds": min(sorting),
        "ratio_to_sort": min(took) / min(sorting),
        "bytes_per_rank_at_peak": peak / len(gains),
        "breakpoints": len(curve),
        "relative_rounding": curve.rounding / float(curve.values[-1]),
        "budget": instance.budget,
        "value": curve.at(instance.budget),
        "relative_difference_to_price_bound": abs(
            curve.at(instance.budget) / float(verified.price_bound) - 1
        ),
        "allocation_seconds": solving,
        "allocation_value": allocation.value,
        "status": allocation.certificate.status,
        "knee": curve.knee(),
    }


def time_stability(count: int, rounds: int, iterations: int) -> dict[str, Any]:
    """The best of some rounds on noisy samples of Llama 8B's shape."""
    instance = power_law("b")
    samples = noisy_samples(instance, count)
    took: list[float] = []
    answers: list[Stability] = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = stability(samples, instance.budget, **instance.keywords, iterations=iterations)
        took.append(time.perf_counter() - start)
        answers.append(found)
    found = answers[-1]
    return {
        "question": "stability",
        "instance": f"{count} samples of {instance.name}",
        "seconds": min(took),
        "iterations": iterations,
        "budget": instance.budget,
        "status": dict(Counter(certificate.status for certificate in found.certificates)),
        "value": found.average.value,
        "expected_loss": found.expected_loss,
        "expected_relative_loss": found.expected_relative_loss,
        "worst_loss_of_average": float(found.losses.max()),
        "worst_regret": found.worst_regret,
        "worst_regret_bound": found.worst_regret_bound,
    }


def main() -> int:
    """Time every question; the exit status says whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS / "questions.json")
    options = parser.parse_args()

    rows = [time_frontier(shape, options.rounds) for shape in "cd"]
    rows.append(time_stability(options.samples, options.rounds, options.iterations))
    failures: list[str] = []
    for row in rows[:-1]:
        if row["relative_difference_to_price_bound"] > 1e-9:
            failures.append(f"{row['instance']}: the hull is not the bound at the price")
    if "gap_certified" in rows[-1]["status"]:
        failures.append(f"{rows[-1]['instance']}: {rows[-1]['status']}")
    if rows[-1]["seconds"] >= LIMIT:
        failures.append(f"{rows[-1]['instance']}: {rows[-1]['seconds']:.2f} s")

    print(markdown([_formatted(row) for row in rows]))
    write_json(options.output, rows, rounds=options.rounds, iterations=options.iterations)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _formatted(row: dict[str, Any]) -> dict[str, str]:
    if row["question"] == "frontier":
        answer = (
            f"{row['breakpoints']:,} breakpoints; {row['ratio_to_sort']:.3g} times np.sort; "
            f"allocation in {seconds(row['allocation_seconds'])}, {row['status']}"
        )
    else:
        statuses = ", ".join(f"{count} {status}" for status, count in row["status"].items())
        answer = (
            f"{statuses}; worst regret {row['worst_regret']:.4g}, at least "
            f"{row['worst_regret_bound']:.4g} (average's: {row['worst_loss_of_average']:.4g})"
        )
    return {
        "question": row["question"],
        "instance": row["instance"],
        "time": seconds(row["seconds"]),
        "answer": answer,
    }


if __name__ == "__main__":
    sys.exit(main())
