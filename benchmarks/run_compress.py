"""Trained LoRAs made smaller: ranks for all layers at once against each layer by its own rule.

    python -m benchmarks.run_compress

trains two LoRAs (`benchmarks/adapters_to_compress.py`, minutes), prints a markdown table and writes
benchmarks/results/compress.json. For each rule of other tools (`benchmarks/resizers.py`) its
parameter is the one whose ranks come nearest below a share of the adapter's parameters; `compress`
is then given exactly what these ranks cost. All are truncated in the same way, so that only the
ranks differ; ours is written as a folder and loaded by PEFT. Beside the energy stands the loss on
text that was not trained on. "weighted" truncates and allocates by Kronecker curvature (kfac) of
batches that were. Exits with status 1 if any rule captures more energy than `compress` at its size.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before torch

# isort: split

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.adapters_to_compress import Task, losses, mean_loss, train
from benchmarks.report import RESULTS, markdown, write_json
from benchmarks.resizers import RULES, at_most
from lorambo_adapters.ranks.compress import compress
from lorambo_adapters.ranks.truncate import truncated
from lorambo_adapters.spectra.curvature import curvature_factors
from lorambo_adapters.spectra.lora import lora_spectra


class Truncation:
    """The adapter of a live model, truncated in place to any ranks, and put back."""

    def __init__(self, model: Any) -> None:
        self._modules = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "base_layer")
        }
        self._factors = {
            name: (m.lora_B["default"].weight.data.clone(), m.lora_A["default"].weight.data.clone())
            for name, m in self._modules.items()
        }

    @torch.no_grad()
    def to(self, ranks: Mapping[str, int]) -> None:
        """Truncate every layer; what is cut is zero, so that no scale changes."""
        for name, module in self._modules.items():
            left, right = self._factors[name]
            b, a = module.lora_B["default"].weight, module.lora_A["default"].weight
            b.zero_()
            a.zero_()
            rank = ranks[name]
            if rank:
                new_b, new_a = truncated(left, right, rank)
                b[:, :rank], a[:rank] = new_b.to(b), new_a.to(a)

    @torch.no_grad()
    def undo(self) -> None:
        """The adapter as it was trained."""
        for name, module in self._modules.items():
            module.lora_B["default"].weight.copy_(self._factors[name][0])
            module.lora_A["default"].weight.copy_(self._factors[name][1])


def loss_of_folder(task: Task, folder: Path) -> float:
    """The held-out loss with an adapter that PEFT loads."""
    task.model.load_adapter(str(folder), adapter_name="small")
    task.model.set_adapter("small")
    loss = mean_loss(task.model, task.held_out)
    task.model.set_adapter("default")
    task.model.delete_adapter("small")
    return loss


def measure(task: Task, shares: list[float], folder: Path) -> list[dict[str, Any]]:
    """The rows of one adapter."""
    whole = folder / f"{task.name}-whole"
    task.model.save_pretrained(whole)
    spectra = lora_spectra(whole)
    assert spectra.shapes is not None
    costs = {name: sum(shape) for name, shape in spectra.shapes.items()}
    energy = sum(float(v @ v) for v in spectra.values())
    size = sum(costs[name] * len(spectra[name]) for name in spectra)
    with task.model.disable_adapter():
        untrained = mean_loss(task.model, task.held_out)
    trained = mean_loss(task.model, task.held_out)
    print(
        f"{task.name}: held-out loss {untrained:.4f} untrained, {trained:.4f} trained", flush=True
    )
    factors = curvature_factors(task.model, task.seen, losses, kind="kfac")
    truncation = Truncation(task.model)
    rows: list[dict[str, Any]] = []

    def ours(budget: int, name: str, **options: Any) -> tuple[float, float, Any]:
        out = folder / name
        small = compress(whole, budget, out, progress=False, **options)
        kept = sum(float(spectra[n][: small[n]] @ spectra[n][: small[n]]) for n in small)
        return kept / energy, loss_of_folder(task, out), small

    for share in shares:
        for name, rule in RULES.items():
            parameter, ranks = at_most(rule, spectra, costs, share * size)
            cost = sum(costs[n] * r for n, r in ranks.items())
            truncation.to(ranks)
            loss = mean_loss(task.model, task.held_out)
            truncation.undo()
            theirs = sum(float(spectra[n][:r] @ spectra[n][:r]) for n, r in ranks.items()) / energy
            captured, own, small = ours(cost, f"{task.name}-{share}-{name}".replace(" ", "-"))
            rows.append(
                {
                    "adapter": task.name,
                    "share": share,
                    "rule": name,
                    "parameter": parameter,
                    "cost": cost,
                    "of_parameters": cost / size,
                    "captured": theirs,
                    "compress_captured": captured,
                    "loss": loss,
                    "compress_loss": own,
                    "compress_status": small.certificate.status,
                    "trained_loss": trained,
                    "untrained_loss": untrained,
                    "same_ranks": ranks == dict(small),
                }
            )
            print(rows[-1], flush=True)
        budget = int(share * size)
        name = f"{task.name}-{share}"
        plain = ours(budget, f"{name}-plain")
        weighted = ours(budget, f"{name}-weighted", curvature=factors)
        rows.append(
            {
                "adapter": task.name,
                "share": share,
                "rule": "weighted",
                "cost": weighted[2].allocation.cost,
                "of_parameters": weighted[2].allocation.cost / size,
                "captured": None,  # of the plain energy its ranks are not those that keep most
                "compress_captured": plain[0],
                "loss": weighted[1],
                "compress_loss": plain[1],
                "compress_status": plain[2].certificate.status,
                "trained_loss": trained,
                "untrained_loss": untrained,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    """Train, shrink, compare; the exit status says whether no rule captured more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--size", type=int, default=24, help="of a batch")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--output", type=Path, default=RESULTS / "compress.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("retrieval", "origin"):
            task = train(name, steps=options.steps, rank=options.rank, size=options.size)
            rows += measure(task, options.shares, Path(folder))
    table = [
        {
            "adapter": row["adapter"],
            "rule": row["rule"],
            "parameters": f"{row['of_parameters']:.1%}",
            "energy lost": "" if row["captured"] is None else f"{1 - row['captured']:.2%}",
            "compress": f"{1 - row['compress_captured']:.2%}",
            "held-out loss": f"{row['loss']:.4f}",
            "compress ": f"{row['compress_loss']:.4f}",
            "trained": f"{row['trained_loss']:.4f}",
            "untrained": f"{row['untrained_loss']:.4f}",
        }
        for row in rows
    ]
    print(markdown(table))
    write_json(
        options.output, rows, steps=options.steps, rank=options.rank, batch_size=options.size
    )
    worse = [
        f"{row['adapter']}, {row['rule']}: {row['captured']!r} against {row['compress_captured']!r}"
        for row in rows
        if row["captured"] is not None
        and row["captured"] > np.nextafter(row["compress_captured"], 2.0) * (1 + 1e-12)
    ]
    for line in worse:
        print("FAILED", line)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
