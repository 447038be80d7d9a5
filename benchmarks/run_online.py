"""Ranks that adapt to noisy estimates, against the best fixed ranks in hindsight.

    python -m benchmarks.run_online

On planted problems (`planted_curves`) every arm starts from the uniform rank, observes the same
noise round by round, as far as its own ranks let it see, and may change its ranks after each round.
What counts is the sum of true gains after the first rounds (`--warmup`), as a share of that of the
best fixed ranks: the exact optimum for the mean of the true curves of those rounds. Moving costs
nothing here; how much moves is told. Other rules look at running means of the same kind (`discount`
of the scenario), and fill what is left of the budget.

Prints a markdown table, writes benchmarks/results/online.json and draws online.png. Exits with
status 1 if a setting of `OnlineAllocator` that a scenario is meant for gets less than 95 % in any
run, is not above AdaLoRA's rule, EVA's and the uniform rank (by more than the 95 % interval of the
difference), or if its regret, where curves do not drift, grows like t^0.9 or faster.
"""

from __future__ import annotations

from benchmarks import one_thread  # noqa: F401  before numpy

# isort: split

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.planted_curves import SCENARIOS, Array, Planted, Scenario
from benchmarks.report import RESULTS, markdown, write_json
from lorambo_alloc import GainCurves, OnlineAllocator, Problem, uniform_rank
from lorambo_alloc.baselines import adalora, eva, one_rank_exchange
from lorambo_alloc.online.curve_estimates import CurveEstimates

Ranks = npt.NDArray[np.int64]

SETTINGS: dict[str, dict[str, Any]] = {
    "online, discount 1": {"discount": 1.0},
    "online, discount 0.9": {"discount": 0.9},
    "online, discount 0.9, switching share 0.3": {"discount": 0.9, "switching_share": 0.3},
    "online, discount 1, exploration 0.5": {"discount": 1.0, "exploration": 0.5},
}
RULES: dict[str, Callable[[Problem, Ranks], Any]] = {
    "AdaLoRA's rule": lambda problem, now: adalora(problem, fill=True),
    "EVA's rule": lambda problem, now: eva(problem, fill=True),
    "one rank at a time": one_rank_exchange,
}
UNIFORM, ORACLE = "uniform", "best of each round"
PLAIN, DISCOUNTED = "online, discount 1", "online, discount 0.9"
EXPLORING = "online, discount 1, exploration 0.5"
TO_BEAT = ("AdaLoRA's rule", "EVA's rule", UNIFORM)
SHARE, POWER = 0.95, 0.9


def meant(scenario: Scenario) -> str:
    """The setting that a scenario is meant for."""
    if not scenario.seen_at_0:
        return EXPLORING
    return DISCOUNTED if scenario.drift else PLAIN


class Online:
    """`OnlineAllocator` as an arm."""

    def __init__(self, planted: Planted, settings: dict[str, Any]) -> None:
        costs = dict(zip(planted.names, planted.costs.tolist(), strict=True))
        rank = planted.budget // int(planted.costs.sum())
        self._names = planted.names
        self._allocator = OnlineAllocator(
            costs, uniform_rank(rank), ranks=dict.fromkeys(costs, rank), **settings
        )

    def after(self, curves: dict[str, Array], now: Ranks) -> Ranks:
        """The ranks after a round."""
        self._allocator.observe(curves)
        self._allocator.accept(self._allocator.propose())
        self._allocator.step()
        ranks = self._allocator.ranks
        return np.array([ranks[name] for name in self._names])


class Rule:
    """A baseline on running means of what it saw, as an arm."""

    def __init__(self, planted: Planted, rule: Callable[[Problem, Ranks], Any]) -> None:
        self._planted, self._rule = planted, rule
        self._estimates = CurveEstimates(tuple(planted.names), planted.scenario.discount)

    def after(self, curves: dict[str, Array], now: Ranks) -> Ranks:
        """The ranks after a round."""
        self._estimates.observe(curves, stacklevel=2)
        means = GainCurves(self._estimates.means())
        problem = Problem(means, self._planted.budget, costs=self._planted.costs.tolist())
        return self._rule(problem, now).ranks


def run(planted: Planted, arm: Online | Rule | None) -> tuple[Array, Array]:
    """True gains of each round and ranks moved after it; no arm: the uniform rank."""
    now = np.full(len(planted.names), planted.budget // int(planted.costs.sum()))
    gains, moved = np.zeros(planted.rounds), np.zeros(planted.rounds)
    for round_ in range(planted.rounds):
        gains[round_] = planted.value(round_, now)
        if arm is not None:
            after = arm.after(planted.observed(round_, now), now)
            if int(planted.costs @ after) > planted.budget:
                raise AssertionError("an arm exceeds the budget")
            moved[round_], now = np.abs(after - now).sum(), after
    return gains, moved


def runs_of(
    scenario: Scenario, seed: int, rounds: int, warmup: int, settings: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Every arm on one problem."""
    planted = Planted(scenario, seed, rounds)
    arms: dict[str, Online | Rule | None] = {
        **{name: Online(planted, chosen) for name, chosen in settings.items()},
        **{name: Rule(planted, rule) for name, rule in RULES.items()},
        UNIFORM: None,
    }
    best = planted.best(warmup, rounds)
    hindsight = np.array([planted.value(t, best.ranks) for t in range(warmup, rounds)])
    found: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        gains, moved = run(planted, arm)
        found[name] = {
            "share": float(gains[warmup:].sum() / hindsight.sum()),
            "regret": np.cumsum(hindsight - gains[warmup:]) / hindsight.mean(),
            "moved": float(moved[warmup:].mean()),
        }
    if scenario.drift:
        every = max(1, (rounds - warmup) // 20)
        at = range(warmup, rounds, every)
        top = sum(planted.value(t, planted.best(t, t + 1).ranks) for t in at)
        found[ORACLE] = {
            "share": float(top / sum(hindsight[t - warmup] for t in at)),
            "regret": None,
            "moved": None,
        }
    return found


def interval(values: Any) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), float("inf")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * error)


def exponent(regrets: Array) -> float | None:
    """Of the power of t that fits the mean regret of the last nine tenths best, in logarithms.

    None where the regret is not above 0 there.
    """
    mean = regrets.mean(axis=0)
    rounds = np.unique(np.geomspace(max(1, len(mean) // 10), len(mean), 50).astype(int))
    mean = mean[rounds - 1]
    if np.any(mean <= 0):
        return None
    return float(np.polyfit(np.log(rounds), np.log(mean), 1)[0])


def summary(scenario: Scenario, runs: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row an arm."""
    rows: list[dict[str, Any]] = []
    reference = np.array([found[meant(scenario)]["share"] for found in runs])
    for arm in runs[0]:
        shares = np.array([found[arm]["share"] for found in runs])
        mean, half = interval(shares)
        behind, behind_half = interval(reference - shares)
        row: dict[str, Any] = {
            "scenario": scenario.name,
            "arm": arm,
            "meant": arm == meant(scenario),
            "share": mean,
            "share_half_interval": half,
            "least_share": float(shares.min()),
            "behind_meant": behind,
            "behind_meant_half_interval": behind_half,
        }
        if arm != ORACLE:
            regrets = np.array([found[arm]["regret"] for found in runs])
            at = np.unique(np.geomspace(1, regrets.shape[1], 16).astype(int))
            row["regret_rounds"] = at.tolist()
            row["regret"] = regrets.mean(axis=0)[at - 1].tolist()
            tenth = max(1, regrets.shape[1] // 10)
            late = regrets[:, -1] - (regrets[:, -1 - tenth] if regrets.shape[1] > tenth else 0)
            row["loss_in_last_tenth"], row["loss_in_last_tenth_half_interval"] = interval(
                late / tenth
            )
            row["regret_exponent"] = exponent(regrets)
            row["final_regret"], row["final_regret_half_interval"] = interval(regrets[:, -1])
            row["moved_a_round"] = float(np.mean([found[arm]["moved"] for found in runs]))
        rows.append(row)
    return rows


def failures_of(scenario: Scenario, rows: list[dict[str, Any]]) -> list[str]:
    """What is missed, in words."""
    by_arm = {row["arm"]: row for row in rows}
    own = by_arm[meant(scenario)]
    failures: list[str] = []
    if own["least_share"] < SHARE:
        failures.append(f"{own['arm']}: a run with {own['least_share']:.1%} of the hindsight")
    for arm in TO_BEAT:
        if by_arm[arm]["behind_meant"] <= by_arm[arm]["behind_meant_half_interval"]:
            failures.append(f"{own['arm']}: not clearly above {arm}")
    if not scenario.drift:
        power = own["regret_exponent"]
        if power is not None and power >= POWER:
            failures.append(f"{own['arm']}: regret grows like t^{power:.2f}")
    return [f"{scenario.name}: {failure}" for failure in failures]


def picture(path: Path, runs: dict[str, list[dict[str, dict[str, Any]]]]) -> None:
    """Regret without drift, regret with it, and shares; a PNG."""
    from matplotlib.figure import Figure

    from lorambo_alloc.plots import regret_by_round

    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    upper, lower = halves
    left, right = upper.subplots(1, 2)
    stationary, drifting = (
        next(s for s in SCENARIOS[::-1] if s.drift is drift and s.seen_at_0 and s.share == 1)
        for drift in (False, True)
    )
    arms = [PLAIN, DISCOUNTED, *RULES, UNIFORM]
    for ax, scenario in ((left, stationary), (right, drifting)):
        tables: dict[str, Array] = {}
        for arm in arms:
            table = np.array([found[arm]["regret"] for found in runs[scenario.name]])
            power = None if scenario.drift else exponent(table)
            tables[arm if power is None else f"{arm}: t$^{{{power:.2f}}}$"] = table
        regret_by_round(tables, ax=ax, log=not scenario.drift)
        ax.set_title(scenario.name if scenario.drift else f"no drift, {scenario.name}", fontsize=8)
        ax.set_xlabel("rounds after the warm-up", fontsize=8)
        ax.set_ylabel("cumulative regret (rounds of the best fixed ranks)", fontsize=8)
    below: Any = lower.subplots()
    names = [arm for arm in next(iter(runs.values()))[0] if arm != ORACLE]
    for k, found in enumerate(runs.values()):
        for j, arm in enumerate(names):
            mean, half = interval([each[arm]["share"] for each in found])
            half = half if np.isfinite(half) else 0.0
            place = k + (j - len(names) / 2 + 0.5) * 0.085
            below.errorbar(
                100 * mean, place, xerr=100 * half, marker="osD^vXP*d"[j],
                color="#0072b2" if arm.startswith("online") else "#d55e00",
                markersize=3.5, linewidth=0.8, label=arm if not k else None,
            )  # fmt: skip
    below.axvline(100, color="0.3", linewidth=0.6)
    below.axvline(100 * SHARE, color="0.3", linewidth=0.6, linestyle=":")
    below.set_yticks(range(len(runs)), list(runs))
    below.invert_yaxis()
    below.set_xlim(right=105)
    below.tick_params(labelsize=6.5)
    below.set_xlabel("sum of true gains, % of the best fixed ranks in hindsight", fontsize=8)
    below.legend(fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Run all, print the table, write the file and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=320)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--max-moves", type=int, help="one more arm, which takes long")
    parser.add_argument("--output", type=Path, default=RESULTS / "online.json")
    parser.add_argument("--no-picture", action="store_true")
    options = parser.parse_args(arguments)

    settings = dict(SETTINGS)
    if options.max_moves:
        limited = {"discount": 1.0, "max_moves": options.max_moves}
        settings[f"{PLAIN}, at most {options.max_moves} moves"] = limited
    runs: dict[str, list[dict[str, dict[str, Any]]]] = {}
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with ProcessPoolExecutor(options.workers) as pool:
        each = pool.map if options.workers > 1 else map  # one needs no process of its own
        for scenario in SCENARIOS:
            one = partial(
                runs_of,
                scenario,
                rounds=options.rounds,
                warmup=options.warmup,
                settings=settings,
            )
            runs[scenario.name] = []
            for found in each(one, range(options.seeds)):
                runs[scenario.name].append(found)
                done = f"{scenario.name}: {len(runs[scenario.name])} of {options.seeds}"
                print(done, file=sys.stderr, flush=True)
            found = summary(scenario, runs[scenario.name])
            rows += found
            failures += failures_of(scenario, found)
    print(markdown([_formatted(row) for row in rows]))
    chosen = {key: getattr(options, key) for key in ("seeds", "rounds", "warmup")}
    write_json(options.output, rows, **chosen)
    if not options.no_picture:
        picture(options.output.with_suffix(".png"), runs)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _formatted(row: dict[str, Any]) -> dict[str, str]:
    power, moved = row.get("regret_exponent"), row.get("moved_a_round")
    return {
        "scenario": row["scenario"],
        "arm": row["arm"] + (" *" if row["meant"] else ""),
        "share": f"{row['share']:.2%} ± {row['share_half_interval']:.2%}",
        "least": f"{row['least_share']:.2%}",
        "regret ~ t^": "-" if power is None else f"{power:.2f}",
        "moved a round": "-" if moved is None else f"{moved:.2f}",
    }


if __name__ == "__main__":
    sys.exit(main())
