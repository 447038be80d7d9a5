"""What sketching gradients adds to the forward and backward passes of frozen layers.

The arithmetic of a sketch of width s is (d + k) s / (d k) of a frozen layer's forward and backward:
2 (d + k) s multiplications a token against 2 d k. Measured is the time that it really adds, as a
multiple of that share of the time without it, interleaved in one run; the bare matrix products of
the sketch (the floor) as the same multiple; and the memory against (d + k) s numbers a layer.

Twelve layers in a row without anything between them keep no input in a frozen model; with the
sketches each keeps its input until its backward pass. glibc gives that memory back to the system
after each round and faults it in again in the next, which can cost as much as a third of the
sketching itself, so rows are measured with glibc as it comes, and with one that keeps its pages
(for both sides), which says more of processes that hold activations anyway.

    python -m benchmarks.run_gradients

prints a markdown table and writes benchmarks/results/gradients.json. Exits with status 1 if one
pass in float32, where pages are kept, adds more than 1.5 times what the arithmetic demands, or if
what the sketcher keeps takes more than 1.2 times the formula.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before torch

# isort: split

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, markdown, seconds, write_json
from benchmarks.run_large import reset_resident_peak, resident_peak
from lorambo_adapters.spectra.sketch import two_sided_widths
from lorambo_adapters.spectra.sketcher import GradientSketcher

TIME, MEMORY = 1.5, 1.2


def interleaved(calls: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each call, one after the other in every round."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, spent in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return times


def live_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(call: Callable[[], object]) -> int | None:
    """How far the resident size rises during a call (Linux)."""
    reset_resident_peak()
    before = resident_peak()
    call()
    after = resident_peak()
    return None if before is None or after is None else after - before


def keep_pages() -> bool:
    """Tell glibc not to give freed memory back; whether there is one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 256 << 20)
    return True


def measure(width: int, dtype: torch.dtype, passes: int, options: Any) -> dict[str, Any]:
    """One row: `layers` frozen square layers, `tokens` tokens."""
    torch.manual_seed(0)
    tokens, s = options.tokens, options.sketch
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(options.layers)]
    model = torch.nn.Sequential(*layers).to(dtype).requires_grad_(False)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, width, dtype=dtype)

    def plain() -> None:
        x.grad = None
        model(x).backward(g)

    plain()
    before = live_bytes()
    sketcher = GradientSketcher(model, rank=s, targets=r"\d+", passes=passes, seed=0)

    def sketched() -> None:
        with sketcher:
            sketcher.begin()
            plain()

    # The products of one layer's sketch in the precision of the tokens, and nothing else.
    narrow, wide = two_sided_widths(s) if passes == 1 else (2 * s, 0)
    bare = x.detach()
    omega, psi = torch.randn(width, narrow).to(dtype), torch.randn(width, wide).to(dtype)
    y, z = torch.zeros(width, narrow).to(dtype), torch.zeros(wide, width).to(dtype)

    def floor() -> None:
        for _ in range(options.layers):
            y.addmm_(g.T, bare @ omega)
            if wide:
                z.addmm_((g @ psi).T, bare)

    sketched()
    times = interleaved([plain, sketched, floor], options.repeats)
    without, products = statistics.median(times[0]), statistics.median(times[2])
    # Of neighbours in time, so that what else the machine does meanwhile cancels.
    added = statistics.median(b - a for a, b in zip(times[0], times[1], strict=True))
    quickest = [min(t) for t in times]
    demanded = 2 * width * s / (width * width)
    # Only what the sketcher keeps counts here, not the tensors of the floor.
    kept = live_bytes() - before
    kept -= sum(t.untyped_storage().nbytes() for t in (omega, psi, y, z))
    formula = options.layers * 2 * width * s * 4 * (1 if passes == 1 else 2)
    peak_plain, peak_sketched = peak_of(plain), peak_of(sketched)
    return {
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "passes": passes,
        "plain_seconds": without,
        "added_seconds": added,
        "demanded_seconds": demanded * without,
        "added_over_demanded": added / (demanded * without),
        "added_over_demanded_quickest": (quickest[1] - quickest[0]) / (demanded * quickest[0]),
        "floor_over_demanded": products / (demanded * without),
        "kept_bytes": kept,
        "formula_bytes": formula,
        "kept_over_formula": kept / formula,
        "peak_bytes_beyond_plain": None
        if peak_plain is None or peak_sketched is None
        else peak_sketched - peak_plain,
        "inputs_bytes": options.layers * tokens * width * x.element_size(),
    }


def main() -> int:
    """Run the measurement; the exit status says whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sketch", type=int, default=64, help="the width s")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "gradients.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows: list[dict[str, Any]] = []
    for allocator in ("as it comes", "keeps pages"):
        if allocator == "keeps pages" and not keep_pages():
            break
        for width in (384, 1024):
            for dtype, passes in ((torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)):
                row = measure(width, dtype, passes, options)
                rows.append({"allocator": allocator, **row})
    table = [
        {
            "allocator": row["allocator"],
            "width": str(row["width"]),
            "weights": row["dtype"],
            "passes": str(row["passes"]),
            "forward + backward": seconds(row["plain_seconds"]),
            "added": seconds(row["added_seconds"]),
            "of what is demanded": f"{row['added_over_demanded']:.2f}",
            "quickest": f"{row['added_over_demanded_quickest']:.2f}",
            "bare products": f"{row['floor_over_demanded']:.2f}",
            "kept, of the formula": f"{row['kept_over_formula']:.2f}",
        }
        for row in rows
    ]
    print(markdown(table))
    write_json(
        options.output,
        rows,
        tokens=options.tokens,
        sketch=options.sketch,
        layers=options.layers,
        repeats=options.repeats,
        threads=options.threads,
        torch=torch.__version__,
    )
    failures: list[str] = []
    for row in rows:
        if row["kept_over_formula"] > MEMORY:
            failures.append(f"width {row['width']}: {row['kept_over_formula']:.2f} in memory")
        if (row["allocator"], row["dtype"], row["passes"]) != ("keeps pages", "float32", 1):
            continue
        if row["added_over_demanded"] > TIME:
            failures.append(f"width {row['width']}: {row['added_over_demanded']:.2f} in time")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
