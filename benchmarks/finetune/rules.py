"""The rules of a cut that are compared, the one that is the default, and those that see test."""

from __future__ import annotations

from benchmarks.finetune.cutter import Rule

PLAIN = Rule("uniform", "plain")
ENERGY = Rule("plain", "plain")

UNFITTED = Rule("plain", "kfac", where=0.0, fold=True, fisher="empirical")
"""Frobenius ranks, cut in the K-FAC norm at the base with the data's labels, means folded."""

DEFAULT = Rule("plain", "kfac", where=0.0, fold=True, fisher="empirical", refit=3)
"""`UNFITTED`, its singular values then refitted: on dev it is worth more than four times the
parameters on both models that it was searched on."""

FIT_ALONE = Rule("uniform", "plain", where=0.0, fold=True, refit=3)
"""The default's control: neither ranks nor cut are chosen by anything, but the values refitted."""

_AT_BASE = tuple(
    (Rule(ranks, "kfac", where=0.0, fold=True, fisher=fisher), (1, 2))
    for fisher in ("empirical", "true")
    for ranks in ("plain", "kfac", "uniform")
)

RULES: tuple[tuple[Rule, tuple[int, ...]], ...] = (
    (PLAIN, (1, 2, 4, 8)),
    (DEFAULT, (1, 2)),
    (FIT_ALONE, (1, 2)),
    *_AT_BASE,
    (Rule("plain", "kfac", fold=True, fisher="empirical"), (1, 2)),
    (Rule("kfac", "kfac", fold=True), (1, 2)),
    (Rule("kfac", "kfac", fold=True, refit=3), (1, 2)),
    (Rule("uniform", "plain", fold=True, refit=3), (1, 2)),
    (ENERGY, (1, 2)),
    (Rule("kfac", "kfac"), (1,)),
    (Rule("shampoo", "shampoo", fold=True), (1,)),
    (Rule("shampoo", "shampoo", fold=True, refit=3), (1,)),
    (Rule("uniform", "plain", fold=True), (1,)),
    (Rule("plain", "plain", fold=True), (1,)),
    (Rule("plain", "plain", fold=True, refit=3), (1,)),
    (Rule("kfac", "plain", fold=True, refit=3), (1,)),
    (Rule("uniform", "kfac", fold=True, refit=3), (1,)),
    (Rule("uniform", "kfac", fold=True), (1,)),
    (Rule("kfac", "kfac", fold=True, fisher="empirical"), (1,)),
    (Rule("kfac", "kfac", where=1.0, fold=True), (1,)),
    (Rule("kfac", "kfac", damping=0.01, fold=True), (1,)),
    (Rule("kfac", "kfac", damping=1.0, fold=True), (1,)),
    (Rule("input", "input", fold=True), (1,)),
    (Rule("kfac_weighted", "kfac_weighted", fold=True), (1,)),
    (Rule("kfac", "plain"), (1,)),
    (Rule("uniform", "kfac"), (1,)),
    (Rule("shampoo", "shampoo"), (1,)),
    (Rule("input", "input"), (1,)),
    (Rule("input", "plain"), (1,)),
    (Rule("weighted", "weighted"), (1,)),
    (Rule("gradient", "gradient"), (1,)),
)
"""What is searched on dev, with the uniform ranks; the most telling first."""

FINAL: tuple[tuple[Rule, tuple[int, ...]], ...] = (
    (PLAIN, (1, 2, 4, 8)),
    (ENERGY, (1, 2)),
    (UNFITTED, (1, 2)),
    (DEFAULT, (1, 2)),
    (FIT_ALONE, (1, 2)),
)
"""What is measured on test, once."""
