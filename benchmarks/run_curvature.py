"""By how much predicted gains exceed those of the exact quadratic model, in small random Llamas.

Of each layer alone, with the mean cross entropy as the loss and labels at random: what
`curvature_spectra` predicts for the first rank, as a multiple of what the best step along that
update saves in the quadratic model with the exact true Fisher (by forward-mode differentiation and
the expectation over labels); and `coupled_directions(...).curves()` of the same curvature's
candidates, at ranks 1 and 4, as a multiple of the curve with the exact Fisher along them. Two
scales of the weights, three draws of data each, 14 layers: 84 ratios a row.

    python -m benchmarks.run_curvature

prints a markdown table and writes benchmarks/results/curvature.json.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before torch

# isort: split

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.report import RESULTS, markdown, write_json
from lorambo_adapters.layers import find_layers
from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.curvature import curvature_factors
from lorambo_adapters.spectra.directions import coupled_directions
from lorambo_adapters.spectra.factors import Kind
from lorambo_adapters.spectra.fisher import TrueFisher

TARGETS = ".*_proj"
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one a token": lambda logits: logits,
    "one a sequence, at its last token": lambda logits: logits[:, -1],
    "one a sequence, of the tokens' mean": lambda logits: logits.mean(1),
}
KINDS: list[tuple[Kind, float]] = [
    ("kfac", 1e-3),
    ("ekfac", 1e-3),
    ("diagonal", 1e-3),
    ("kfac", 0.1),
    ("ekfac", 0.1),
]


class Classifier(torch.nn.Module):
    """A Llama with a linear head, in float64."""

    def __init__(self, scale: float, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        configure: Any = transformers.LlamaConfig  # its annotations leave options out
        config = configure(
            vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            initializer_range=scale, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        self.body = transformers.LlamaModel(config)
        self.head = torch.nn.Linear(8, 3)
        self.pool = pool
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, pooled."""
        return self.pool(self.head(self.body(ids).last_hidden_state))


def curvature_along(model: torch.nn.Module, ids: Any, name: str, update: torch.Tensor) -> float:
    """<D, F D> of the true Fisher of the mean loss a term."""
    weight = model.get_submodule(name).get_parameter("weight")
    parameter = f"{name}.weight"

    def logits(value: torch.Tensor) -> Any:
        return torch.func.functional_call(model, {parameter: value}, (ids,))

    both: Any = torch.func.jvp(logits, (weight.detach(),), (update,))
    outputs, change = both
    p = torch.softmax(outputs, -1)
    return float(((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).mean())


def ratios(scale: float, seed: int, loss: str, options: Any) -> dict[str, list[float]]:
    """Predicted over exact gains of all layers, by what predicts them."""
    model = Classifier(scale, LOSSES[loss])
    torch.manual_seed(seed)
    ids = torch.randint(1, 7, (options.sequences, options.tokens))
    labels = torch.randint(3, model(ids).shape[:-1])

    def losses(model: torch.nn.Module, ids: Any) -> torch.Tensor:
        logits = model(ids).flatten(0, -2)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")

    fisher = TrueFisher(lambda model, ids: model(ids), draws=options.draws)
    exact = TrueFisher(fisher.predict, draws="all")
    layers = find_layers(model, TARGETS)
    weights = [layer.module.get_parameter("weight") for layer in layers]
    gradients = torch.autograd.grad(losses(model, ids).mean(), weights)
    found: dict[str, list[float]] = {}
    for kind, damping in KINDS:
        factors = curvature_factors(
            model, [ids], losses, kind=kind, fisher=fisher, damping=damping, targets=TARGETS
        )
        rows = found.setdefault(f"{kind}, damping {damping:g}", [])
        for layer, gradient in zip(layers, gradients, strict=True):
            own = factors[layer.name]
            update = own.best_update(gradient, 1)
            predicted = 0.5 * float(torch.linalg.svdvals(own.whiten(gradient))[0]) ** 2
            saved = float((gradient * update).sum()) ** 2
            saved /= 2 * curvature_along(model, ids, layer.name, update)
            rows.append(predicted / saved)
        if (kind, damping) != KINDS[0]:
            continue
        for what, label_seed in (("curves, other labels", 1), ("curves, the same labels", 0)):
            coupled = coupled_directions(
                model, [ids], losses, fisher=fisher, curvature=factors, per_layer=4,
                targets=TARGETS, seed=label_seed,
            )  # fmt: skip
            true = coupled_directions(model, [ids], losses, coupled.directions, fisher=exact)
            ours, theirs = coupled.curves(), true.curves()
            for rank in (1, 4):
                rows = found.setdefault(f"{what}, rank {rank}", [])
                rows += [
                    float(ours[name][rank] / theirs[name][rank])
                    for name in ours
                    if len(ours[name]) > rank
                ]
    return found


def main() -> None:
    """Measure all, print the table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "curvature.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with progress_bar("curvature", float(6 * len(LOSSES))) as advance:
        for loss in LOSSES:
            sums: dict[str, list[float]] = {}
            for scale in (0.02, 0.3):
                for seed in (1, 2, 3):
                    for what, values in ratios(scale, seed, loss, options).items():
                        sums.setdefault(what, []).extend(values)
                    advance(1.0, loss)
            for what, values in sums.items():
                least, median, high, most = np.quantile(values, [0, 0.5, 0.9, 1])
                rows.append({
                    "loss": loss, "predicted_by": what, "ratios": len(values), "least": least,
                    "median": median, "ninety_percent": high, "most": most,
                })  # fmt: skip
    table = [
        {key: f"{value:.2f}" if isinstance(value, float) else str(value)
         for key, value in row.items()}
        for row in rows
    ]  # fmt: skip
    print(markdown(table))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    write_json(options.out, rows, threads=1, **settings)


if __name__ == "__main__":
    main()
