"""The result: ranks by layer, with the certificate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lorambo_alloc import storage
from lorambo_alloc.caps import Cap
from lorambo_alloc.certificate import Certificate
from lorambo_alloc.curves import GainCurves, Spectra
from lorambo_alloc.objectives import IntArray, Objective
from lorambo_alloc.options import attainable_gain
from lorambo_alloc.problem import Problem

_ROWS = 48  # layers that a table shows whole; longer ones show both ends
_CAPS = 8  # caps that it shows, the fullest first


class Allocation(Mapping[str, int]):
    """The rank of every layer, and the proof of how good that is.

    Attributes:
        problem: what was solved.
        ranks: int64 by layer, in the order of the layers.
        certificate: value, bound, price and status.
    """

    def __init__(self, problem: Problem, ranks: IntArray, certificate: Certificate) -> None:
        self.problem = problem
        self.ranks = ranks.astype(np.int64)
        self.ranks.flags.writeable = False
        self.certificate = certificate
        self._index: dict[str, int] | None = None
        self._captured: float | None = None

    def __getitem__(self, name: str) -> int:
        if self._index is None:
            self._index = {layer: i for i, layer in enumerate(self.problem.names)}
        return int(self.ranks[self._index[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self.problem.names)

    def __len__(self) -> int:
        return len(self.problem.names)

    @property
    def cost(self) -> int:
        """What the ranks cost, in the units of the budget."""
        return self.problem.cost_of(self.ranks)

    @property
    def budget(self) -> int:
        """The problem's budget."""
        return self.problem.budget

    @property
    def cap_prices(self) -> dict[str, float]:
        """By cap, about what one more unit of it is worth; 0 where it does not bind."""
        caps = self.problem.caps
        prices = self.certificate.cap_prices or (0.0,) * len(caps)
        return {row.name: price for row, price in zip(caps, prices, strict=True)}

    @property
    def cap_costs(self) -> dict[str, int]:
        """By cap, what the ranks cost in its units."""
        return {row.name: row.cost_of(self.ranks) for row in self.problem.caps}

    @property
    def value(self) -> float:
        """The certificate's value: the sum of the gains, rounded down."""
        return self.certificate.value

    @property
    def captured(self) -> float:
        """The value as a share of what the limits allow at any budget; 1.0 if that is nothing.

        For `operator`: the share of the way from the largest value discarded at rank 0 to the
        least that the limits allow. Energy that a truncated spectrum leaves unresolved is not
        attainable and not counted.
        """
        if self._captured is None:
            attainable = attainable_gain(self.problem)
            gained = self.value
            if self.problem.objective.kind == "operator":
                start = self.problem.tails(np.zeros_like(self.ranks))
                gained += float(np.max(start, initial=0.0))
            self._captured = min(gained / attainable, 1.0) if attainable > 0 else 1.0
        return self._captured

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ranks, certificate and problem to one npz file, whole or not at all."""
        problem = self.problem
        curves = problem.curves
        form, layers = "spectra" if isinstance(curves, Spectra) else "gains", curves.layers
        if isinstance(curves, GainCurves) and curves.increments is not None:
            form, layers = "increments", curves.increments
        lists = problem.limits.lists
        allowed = {problem.names[i]: listed.tolist() for i, listed in lists.items()}
        header: dict[str, Any] = {
            "names": problem.names,
            "curves": form,
            "source": curves.source if isinstance(curves, Spectra) else "",
            "objective": [problem.objective.kind, problem.objective.parameter],
            "budget": problem.budget,
            "multiple_of": problem.limits.multiple_of,
            "tied": problem.tied,
            "allowed_ranks": allowed,
            "caps": [[row.name, row.budget] for row in problem.caps],
            "certificate": vars(self.certificate),
        }
        if isinstance(curves, Spectra):
            header["shapes"] = None if curves.shapes is None else list(curves.shapes.values())
            header["unresolved"] = list(curves.unresolved.values())
        arrays: dict[str, npt.NDArray[Any]] = {
            "values": layers.flat,
            "offsets": layers.offsets,
            "costs": problem.costs,
            "fixed_costs": problem.fixed_costs,
            "lower": problem.lower,
            "upper": problem.upper,
            "ranks": self.ranks,
            "cap_costs": np.array([row.costs for row in problem.caps], dtype=np.int64),
            "cap_fixed_costs": np.array([row.fixed_costs for row in problem.caps], dtype=np.int64),
        }
        if problem.weights is not None:
            arrays["weights"] = problem.weights
        storage.write(path, "allocation", 1, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Allocation:
        """Read a file that `save` wrote. The certificate is not verified; call `verify` for that.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not an allocation file, is newer than this library, or is damaged.
        """
        header, arrays = storage.read(path, "allocation", 1)
        try:
            names: list[str] = header["names"]
            if len(set(names)) < len(names):
                raise ValueError("a layer name appears twice")
            rows = np.split(arrays["values"], arrays["offsets"][1:-1]) if names else []
            values = dict(zip(names, rows, strict=True))
            curves: Spectra | GainCurves
            if header["curves"] == "spectra":
                shapes: list[tuple[int, int]] | None = header["shapes"]
                curves = Spectra(
                    values,
                    source=header["source"],
                    shapes=None if shapes is None else dict(zip(names, shapes, strict=True)),
                    unresolved=dict(zip(names, header["unresolved"], strict=True)),
                )
            elif header["curves"] == "increments":
                curves = GainCurves.from_increments(values)
            else:
                curves = GainCurves(values)
            weights = arrays.get("weights")
            problem = Problem(
                curves,
                header["budget"],
                costs=arrays["costs"].tolist(),
                fixed_costs=arrays["fixed_costs"].tolist(),
                objective=Objective(*header["objective"]),
                weights=None if weights is None else weights.tolist(),
                min_rank=dict(zip(names, arrays["lower"].tolist(), strict=True)),
                max_rank=dict(zip(names, arrays["upper"].tolist(), strict=True)),
                multiple_of=header["multiple_of"],
                allowed_ranks=header["allowed_ranks"] or None,
                tied=header["tied"],
                caps=_caps(names, header["caps"], arrays),
            )
            ranks = arrays["ranks"]
            problem.check(ranks)
            certificate = {key: _tupled(value) for key, value in header["certificate"].items()}
            return cls(problem, ranks, Certificate(**certificate))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: the file is damaged: {error}") from error

    def __repr__(self) -> str:
        return _table(self)


def _caps(
    names: list[str], header: list[tuple[str, int]], arrays: dict[str, npt.NDArray[Any]]
) -> dict[str, Cap]:
    """The caps of a file."""
    caps: dict[str, Cap] = {}
    rows = zip(header, arrays["cap_costs"], arrays["cap_fixed_costs"], strict=True)
    for (name, budget), costs, fixed in rows:
        if name in caps:
            raise ValueError("the name of a cap appears twice")
        if not costs.shape == fixed.shape == (len(names),):
            raise ValueError(f"cap {name!r}: expected one cost a layer")
        members = np.flatnonzero(costs)
        layers = [names[i] for i in members.tolist()]
        caps[name] = Cap(layers, budget, costs[members].tolist(), fixed[members].tolist())
    return caps


def _tupled(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_tupled, cast(list[Any], value))) if isinstance(value, list) else value


def _table(allocation: Allocation) -> str:
    """Layers, ranks and costs in aligned columns, then the totals and the proof."""
    problem, certificate = allocation.problem, allocation.certificate
    shown = list(range(len(allocation)))
    if len(shown) > _ROWS:
        shown = [*shown[: _ROWS // 2], -1, *shown[-(_ROWS // 2) :]]
    rows = [("layer", "rank", "of", "captured", "cost")]
    for i in shown:
        if i < 0:
            rows.append((f"... {len(allocation) - _ROWS} more", "", "", "", ""))
            continue
        rank = int(allocation.ranks[i])
        rows.append(
            (
                problem.names[i],
                f"{rank}",
                f"{int(problem.max_lengths[i])}",
                _share(problem, i, rank),
                f"{problem.cost_at([i], rank):,}",
            )
        )
    widths = [max(len(row[n]) for row in rows) for n in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in range(1, 5))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(lines[1])
    share = f"{100 * allocation.cost / problem.budget:.2f}%" if problem.budget else "all"
    proof = certificate.status.replace("_", " ")
    if certificate.status == "ratio_certified":
        proof += f", at least {certificate.ratio:.4g} of the optimum ({certificate.theorem})"
    if certificate.gap:
        proof += f", relative gap at most {certificate.relative_gap:.1e}"
    captured = f"{100 * allocation.captured:.2f}% of the attainable gain"
    lines += [
        f"layers    {len(allocation)}, ranks {_range(allocation.ranks)}",
        f"objective {problem.objective}, value {certificate.value:.6g}",
        f"cost      {allocation.cost:,} of {problem.budget:,} ({share})",
        *_cap_lines(allocation),
        f"captured  {captured}",
        f"price     {certificate.price:.4g} gain per unit of cost",
        f"status    {proof} ({certificate.method})",
    ]
    return "\n".join(lines)


def _cap_lines(allocation: Allocation) -> list[str]:
    """The fullest caps, for the table."""
    problem, costs = allocation.problem, allocation.cap_costs
    if not costs:
        return []
    use = sorted(
        ((costs[r.name] / r.budget if r.budget else 1.0, r) for r in problem.caps),
        key=lambda pair: -pair[0],
    )
    lines = [
        f"cap       {row.name}: {costs[row.name]:,} of {row.budget:,} ({100 * share:.2f}%)"
        for share, row in use[:_CAPS]
    ]
    return lines + [f"          ... {len(use) - _CAPS} more"] * (len(use) > _CAPS)


def _share(problem: Problem, i: int, rank: int) -> str:
    """What the rank keeps of the layer's own curve."""
    if problem.objective.kind == "operator":
        return "-"
    curve = problem.curve(i)
    best = float(curve.max())
    return f"{100 * float(curve[rank]) / best:.1f}%" if best > 0 else "-"


def _range(ranks: IntArray) -> str:
    if not len(ranks):
        return "none"
    return f"{int(ranks.min())} to {int(ranks.max())}, {int(ranks.sum())} in all"
