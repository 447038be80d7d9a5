"""Planted problems for ranks that adapt: every layer's true curve is known, round by round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorambo_alloc import Allocation, GainCurves, allocate

Array = npt.NDArray[np.float64]

RANKS = 24  # of the longest curve
UNIFORM = 4  # the budget is what this rank costs everywhere


@dataclass(frozen=True)
class Scenario:
    """What is observed of the true curves, and whether they drift.

    Attributes:
        name: for the table.
        relative: standard deviation of a layer's common factor, and of each gain's own.
        absolute: of what is added to each gain, in units of the median gain at the uniform rank.
        ahead: ranks beyond its present one that a layer shows; None: all.
        share: of the layers, observed in each round at random (all in the first).
        seen_at_0: whether a layer of rank 0 shows anything.
        drift: whether layers exchange their importance, steadily over all rounds.
        discount: of the estimates that the other rules look at.
    """

    name: str
    relative: float = 0.3
    absolute: float = 0.0
    ahead: int | None = 4
    share: float = 1.0
    seen_at_0: bool = True
    drift: bool = False
    discount: float = 1.0


SCENARIOS = [
    Scenario("relative noise, whole curves", ahead=None),
    Scenario("relative noise"),
    Scenario("relative and absolute noise", absolute=0.5),
    Scenario("a third of the layers a round", absolute=0.5, share=1 / 3),
    Scenario("rank 0 shows nothing", absolute=0.5, seen_at_0=False),
    Scenario("drift", absolute=0.5, drift=True, discount=0.9),
]


class Planted:
    """Layers of 2 to 4 distinct costs, a third of them with flat curves, of different scales.

    Layer i's j-th rank gains a_i j^-p_i, with log a_i normal (standard deviation 0.7), p_i from 0.6
    to 1.6, or 0 to 0.3 for the flat ones. With drift log a_i goes in a straight line to the value
    of another layer, drawn at random.

    Args:
        scenario: noise, what is observed, drift.
        seed: of the problem and its noise; seeds go through 24, 48, 72 and 96 layers.
        rounds: how many there are.
    """

    def __init__(self, scenario: Scenario, seed: int, rounds: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self.scenario, self.seed, self.rounds = scenario, seed, rounds
        layers = (24, 48, 72, 96)[seed % 4]
        self.names = [f"layers.{i}" for i in range(layers)]
        kinds = rng.choice([768, 960, 1920, 2304], size=2 + seed % 3, replace=False)
        self.costs = rng.permutation(np.resize(kinds, layers)).astype(np.int64)
        self.budget = UNIFORM * int(self.costs.sum())
        self._before = 0.7 * rng.normal(size=layers)
        self._after = self._before
        if scenario.drift:
            self._after = rng.permutation(self._before)
        flat = rng.permutation(layers) < layers // 3
        powers = np.where(flat, rng.uniform(0, 0.3, layers), rng.uniform(0.6, 1.6, layers))
        self._shapes: Array = np.arange(1.0, RANKS + 1) ** -powers[:, None]
        self._unit = float(np.median(self.gains(0)[:, UNIFORM - 1]))

    def gains(self, round_: int) -> Array:
        """True gains of single ranks, layers x ranks."""
        done = round_ / max(self.rounds - 1, 1)
        scales: Array = np.exp((1 - done) * self._before + done * self._after)
        return scales[:, None] * self._shapes

    def value(self, round_: int, ranks: npt.NDArray[np.int64]) -> float:
        """The true total gain of some ranks in a round."""
        return float(self.gains(round_)[np.arange(RANKS) < ranks[:, None]].sum())

    def best(self, first: int, last: int) -> Allocation:
        """The best fixed ranks, to optimality, for the mean of the curves of some rounds."""
        mean = np.mean([self.gains(round_) for round_ in range(first, last)], axis=0)
        return allocate(self._curves(mean), self.budget, costs=self.costs.tolist())

    def observed(self, round_: int, ranks: npt.NDArray[np.int64]) -> dict[str, Array]:
        """F(0), F(1), ... as a round shows them, with noise that depends on the round alone."""
        rng = np.random.default_rng([self.seed, 2, round_])
        scenario, gains = self.scenario, self.gains(round_)
        factors = 1 + scenario.relative * rng.normal(size=(len(gains), 1))
        factors = factors + scenario.relative * rng.normal(size=gains.shape)
        noisy = gains * factors
        noisy += scenario.absolute * self._unit * rng.normal(size=gains.shape)
        shown = rng.random(len(gains)) < (scenario.share if round_ else 1.0)
        curves: dict[str, Array] = {}
        for i, (name, rank) in enumerate(zip(self.names, ranks.tolist(), strict=True)):
            reach = RANKS if scenario.ahead is None else min(RANKS, rank + scenario.ahead)
            if shown[i] and (rank > 0 or scenario.seen_at_0):
                curves[name] = np.concatenate([[0.0], np.cumsum(noisy[i, :reach])])
        return curves

    def _curves(self, gains: Array) -> GainCurves:
        return GainCurves.from_increments(dict(zip(self.names, gains, strict=True)))
