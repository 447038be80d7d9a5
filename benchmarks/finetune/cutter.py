"""Rules of a cut: how ranks are chosen and layers cut, and their application to a subject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.finetune.cuts import NORMS, Factored, best_ranks
from benchmarks.finetune.moments import Moments, layer_moments
from benchmarks.finetune.refit import refitted
from benchmarks.finetune.subject import Subject


@dataclass(frozen=True)
class Rule:
    """One way to cut.

    Attributes:
        ranks: "uniform", or the norm that they are best in.
        cut: the norm of the cut.
        where: the share of the difference at which the moments are measured: 0 base, 1 tuned.
        damping: of the moments, relative to their mean eigenvalue.
        fold: whether biases take up what the rest of a difference makes of the mean input. The
            inputs' moment is then the one about their mean, where a layer has a bias.
        refit: Newton steps on the singular values.
        fisher: whose labels the gradients' moments are of, one of `moments.FISHERS`.
    """

    ranks: str
    cut: str
    where: float = 0.5
    damping: float = 0.1
    fold: bool = False
    refit: int = 0
    fisher: str = "true"

    @property
    def label(self) -> str:
        """Short and unambiguous."""
        moments = f" @{self.where:g} damping {self.damping:g}"
        moments += "" if self.fisher == "true" else f" {self.fisher}"
        plain = {self.ranks, self.cut} <= {"uniform", "plain"} and not self.fold
        refit = f" refit {self.refit}" if self.refit else ""
        fold = " folded" if self.fold else ""
        return f"{self.ranks}/{self.cut}{'' if plain else moments}{fold}{refit}"


class Cutter:
    """Cuts of one subject; moments and decompositions are kept.

    Args:
        subject: what is cut.
        calibration: examples of train.
        seed: of their choice and of drawn labels.
    """

    def __init__(self, subject: Subject, calibration: int, seed: int = 0) -> None:
        self.subject, self._seed = subject, seed
        self._batches = subject.calibration(calibration, seed)
        self._moments: dict[tuple[float, str, bool], dict[str, Moments]] = {}
        self._factored: dict[tuple[object, ...], dict[str, Factored]] = {}

    def ranks(self, rule: Rule, rank: int) -> dict[str, int]:
        """The rule's ranks at the cost of a uniform one, exactly."""
        costs = self.subject.costs
        if rule.ranks == "uniform":
            return dict.fromkeys(costs, rank)
        return best_ranks(self._in_norm(rule.ranks, rule), costs, rank * sum(costs.values()))

    def apply(self, rule: Rule, ranks: Mapping[str, int]) -> None:
        """Leave the subject cut to these ranks by the rule.

        Raises:
            AssertionError: the factors have other numbers of parameters than the ranks say.
        """
        factored = self._in_norm(rule.cut, rule)
        factors = {name: factored[name].factors(rank) for name, rank in ranks.items() if rank}
        numbers = sum(u.numel() + v.numel() for u, v in factors.values())
        wanted = sum(self.subject.costs[name] * rank for name, rank in ranks.items())
        if numbers != wanted:
            raise AssertionError(f"expected {wanted:,} parameters, got {numbers:,}")
        means = None
        if rule.fold:
            means = {n: m.mean for n, m in self.moments(rule.where, rule.fisher).items()}
        if rule.refit:
            refitted(
                self.subject, factors, self._batches, means=means, steps=rule.refit, seed=self._seed
            )
        else:
            self.subject.cut({name: u @ v.T for name, (u, v) in factors.items()}, means)

    def _in_norm(self, name: str, rule: Rule) -> dict[str, Factored]:
        norm = replace(NORMS[name], damping=rule.damping)
        curved = norm.right is not None or norm.left is not None
        key = (name, rule.where, rule.damping, rule.fold, rule.fisher) if curved else (name,)
        if key not in self._factored:
            every = {norm.right, norm.left} - {None, "inputs", "gradients"}
            moments = self.moments(rule.where, rule.fisher, bool(every)) if curved else {}
            self._factored[key] = {
                layer: Factored(
                    difference,
                    norm.centred if rule.fold and self.subject.has_bias(layer) else norm,
                    moments.get(layer),
                )
                for layer, difference in self.subject.differences.items()
            }
        return self._factored[key]

    def moments(
        self, where: float, fisher: str = "true", every: bool = False
    ) -> dict[str, Moments]:
        """Of all layers, at base + where x difference; those of K-FAC, or every one."""
        if (where, fisher, True) in self._moments:
            return self._moments[where, fisher, True]
        if (where, fisher, every) not in self._moments:
            self.subject.between(where)
            self._moments[where, fisher, every] = layer_moments(
                self.subject.model,
                self.subject.layers,
                self._batches,
                every=every,
                fisher=fisher,
                seed=self._seed,
            )
        return self._moments[where, fisher, every]
