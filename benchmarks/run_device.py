"""Spectra on a GPU, at the layer sizes of a 70B model: seconds, and memory beyond the weights.

    python -m benchmarks.run_device

prints a markdown table and writes benchmarks/results/device.json with the card's name. The layers
are those of Llama 70B (80 blocks of q, k, v, o, gate, up and down, 8,192 wide, in bfloat16 with
random weights), as many blocks as fit on the card. Rows:

- delta: `decompose` of the 64 largest values of a difference of power-law spectrum, layer by layer;
- gradient: forward and backward passes of frozen layers with sketches of width 64 (one pass, and
  the first of several), as a multiple of what the arithmetic demands, (d + k) s / (d k) of the same
  passes without sketches; memory against the formula in `GradientSketcher`;
- activations: forward passes with sums for 64 values, against forward passes without;
- curvature: sums of Kronecker factors over one block, against the passes without.

Without a CUDA device it says so and measures nothing. `--device cpu --width 256 --blocks 2 --tokens
128` tries it out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, markdown, seconds, write_json
from lorambo_adapters.layers import find_layers
from lorambo_adapters.spectra.activations import activation_spectra
from lorambo_adapters.spectra.curvature import curvature_factors
from lorambo_adapters.spectra.decompose import decompose
from lorambo_adapters.spectra.sketcher import GradientSketcher

WIDTH, SKETCH = 8192, 64


class Block(torch.nn.Module):
    """One block's linear layers, each with an input of its own shape; no attention between."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        inner, narrow = 7 * width // 2, width // 8
        like: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.bfloat16}
        self.q = torch.nn.Linear(width, width, **like)
        self.k = torch.nn.Linear(width, narrow, **like)
        self.v = torch.nn.Linear(width, narrow, **like)
        self.o = torch.nn.Linear(width, width, **like)
        self.gate = torch.nn.Linear(width, inner, **like)
        self.up = torch.nn.Linear(width, inner, **like)
        self.down = torch.nn.Linear(inner, width, **like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every layer once; the narrow outputs join where the widths allow it."""
        narrow = (self.k(x) + self.v(x)).repeat(1, x.shape[1] // self.k.out_features)
        x = self.o(self.q(x) + narrow)
        return self.down(self.gate(x) + self.up(x))


def spent(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    """The median of the seconds of some calls, the device waited for."""
    times: list[float] = []
    for _ in range(repeats + 1):  # the first one warms up
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def wait(device: torch.device) -> None:
    """Until all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the device; 0 on a CPU, where torch does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device, call: Callable[[], object]) -> int:
    """Most bytes beyond those allocated before; 0 on a CPU."""
    if device.type != "cuda":
        call()
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_delta(model: torch.nn.Module, device: torch.device, blocks: int) -> dict[str, Any]:
    """One decomposition of each shape in a block; all layers' seconds from their counts."""
    total, most = 0.0, 0
    for layer in find_layers(model, r"0\..*"):
        d, k = layer.shape
        rank = min(512, d, k)
        left, right = (torch.randn(side, rank, device=device) for side in (d, k))
        falling = torch.arange(1, rank + 1, device=device) ** -0.75
        difference = ((left * falling) @ right.T).bfloat16().float()
        most = max(most, peak(device, lambda m=difference: decompose(m, SKETCH)))
        total += spent(device, lambda m=difference: decompose(m, SKETCH), 3)
        del difference
    return {"source": "delta, 64 values", "seconds": total * blocks, "peak_bytes": most}


def passes_of(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A forward and a backward pass through frozen layers."""

    def run() -> None:
        x.grad = None
        model(x).sum().backward()

    return run


def measure_gradient(
    model: torch.nn.Module, x: torch.Tensor, passes: int, repeats: int
) -> dict[str, Any]:
    """Forward and backward with sketches against without."""
    plain = passes_of(model, x)
    before = allocated(x.device)
    sketcher = GradientSketcher(model, rank=SKETCH, passes=passes)
    kept = allocated(x.device) - before
    layers = sketcher.layers

    def sketched() -> None:
        with sketcher:
            sketcher.begin()
            plain()

    without, beside = (spent(x.device, call, repeats) for call in (plain, sketched))
    multiplied = sum(d * k for d, k in (layer.shape for layer in layers))
    demanded = without * sum(sum(layer.shape) for layer in layers) * SKETCH / multiplied
    formula = 4 * SKETCH * (1 if passes == 1 else 2) * sum(sum(layer.shape) for layer in layers)
    return {
        "source": f"gradient, {'one pass' if passes == 1 else 'the first of several passes'}",
        "seconds": beside,
        "seconds_without": without,
        "added_over_demanded": (beside - without) / demanded,
        "kept_bytes": kept,
        "formula_bytes": formula,
        "peak_bytes": peak(x.device, sketched) - peak(x.device, plain),
    }


def measure_others(model: torch.nn.Module, x: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Activations over all blocks, and Kronecker factors over the first one."""
    inputs = x.detach()
    without = spent(x.device, lambda: model(inputs), repeats)

    def activations() -> None:
        activation_spectra(model, [inputs], SKETCH, passes=1)

    block = torch.nn.Sequential(model.get_submodule("0"))
    plain = spent(x.device, passes_of(block, x), repeats)

    def factors() -> None:
        curvature_factors(block, [inputs], lambda m, x: m(x).float().square().sum(1))

    return [
        {
            "source": "activations, 64 values, decomposed",
            "seconds": spent(x.device, activations, 1),
            "seconds_without": without,
            "peak_bytes": peak(x.device, activations),
        },
        {
            "source": "kfac, one block, with its eigenvectors",
            "seconds": spent(x.device, factors, 1),
            "seconds_without": plain,
            "peak_bytes": peak(x.device, factors),
        },
    ]


def main() -> int:
    """Run it; status 0 also where there is no device, which it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--blocks", type=int, default=80, help="fewer where they do not fit")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "device.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    blocks = options.blocks
    if device.type == "cuda":
        weights = 2 * sum(
            p.numel() for p in Block(options.width, torch.device("meta")).parameters()
        )
        # Two thirds of the card for the weights: the rest is for inputs, sketches and factors.
        fit = int(torch.cuda.mem_get_info(device)[1] * 2 / 3 / weights)
        blocks = max(1, min(blocks, fit))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(options.width, device) for _ in range(blocks)))
    model.requires_grad_(False)
    x = torch.randn(options.tokens, options.width, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    rows = [
        measure_delta(model, device, blocks),
        *(measure_gradient(model, x, passes, options.repeats) for passes in (1, 2)),
        *measure_others(model, x, options.repeats),
    ]
    table = [
        {
            "spectra of": row["source"],
            "time": seconds(row["seconds"]),
            "without": seconds(row["seconds_without"]) if "seconds_without" in row else "",
            "added, of what is demanded": f"{row['added_over_demanded']:.2f}"
            if "added_over_demanded" in row
            else "",
            "peak beyond": f"{row['peak_bytes'] / 2**30:.2f} GiB",
        }
        for row in rows
    ]
    print(f"{name}: {blocks} blocks, {options.tokens} tokens")
    print(markdown(table))
    write_json(
        options.output,
        rows,
        threads=torch.get_num_threads(),
        device=name,
        blocks=blocks,
        width=options.width,
        tokens=options.tokens,
        repeats=options.repeats,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
