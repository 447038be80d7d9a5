"""What became of the ranks during a training run: ranks, budgets, prices and estimates by step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lorambo_alloc import storage
from lorambo_alloc.costs import PerLayer, exact_dot, whole_number, whole_numbers
from lorambo_alloc.objectives import FloatArray, IntArray, real_number

Estimates: TypeAlias = Mapping[str, Sequence[float] | FloatArray]

_KIND, _VERSION = "rank history", 1
_ROWS = 12  # entries that a table shows whole; longer ones show both ends


class RankHistory:
    """Ranks, prices and estimates by step: one entry whenever somebody looked at the ranks.

    Args:
        costs: name to the cost of one rank, whole numbers >= 1, in the order of the layers.
        fixed_costs: name to a cost charged once if the layer's rank is above 0; None: nothing.

    Raises:
        ValueError: the costs are not of this form; the message names the layer.

    Attributes:
        names: the layers' names, in order.
        costs: cost of one rank, by name.
        fixed_costs: cost of a rank above 0, by name.
        events: by entry, a dict of what happened ("event"), in what state the solver left it
            ("status"), why ("reason") and what else was said ("notes", a list).
        estimates: by entry, estimated gain curves F(0), F(1), ... by layer; empty where none were
            recorded.

    Example:
        >>> history = RankHistory({"q": 16, "v": 12})
        >>> history.record(0, {"q": 1, "v": 1}, budget=44, event="start")
        >>> history.record(100, {"q": 2, "v": 1}, budget=44, price=0.02, event="moved")
        >>> history.ranks.tolist(), history.spent.tolist()
        ([[1, 1], [2, 1]], [28, 44])
        >>> history
        RankHistory: 2 entries of 2 layers
          step  event  moved  spent  budget  price
             0  start      -     28      44      -
           100  moved      1     44      44   0.02
    """

    def __init__(self, costs: Mapping[str, int], fixed_costs: PerLayer[int] | None = None) -> None:
        if not isinstance(costs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"costs: expected a mapping of layer name to cost, got {costs!r}")
        self.names = tuple(costs)
        self._costs = whole_numbers(costs, self.names, "costs", 1)
        self._fixed_costs = np.zeros_like(self._costs)
        if fixed_costs is not None:
            self._fixed_costs = whole_numbers(fixed_costs, self.names, "fixed_costs", 0)
        self._steps: list[int] = []
        self._ranks: list[IntArray] = []
        self._budgets: list[int] = []
        self._spent: list[int] = []
        self._prices: list[float] = []
        self.events: list[dict[str, Any]] = []
        self.estimates: list[dict[str, FloatArray]] = []

    def record(
        self,
        step: int,
        ranks: Mapping[str, int],
        *,
        budget: int,
        price: float | None = None,
        status: str = "",
        reason: str = "",
        notes: Iterable[str] = (),
        estimates: Estimates | None = None,
        event: str = "",
    ) -> None:
        """Add one entry: the ranks from this step on.

        Args:
            step: a whole number >= 0, not before the last entry's; of entries of one step the
                last one counts.
            ranks: the rank of every layer, by name.
            budget: what the ranks may cost at this step.
            price: gain for one more unit of the budget; None: not known.
            status: the certificate's.
            reason: why the ranks are what they are, in words.
            notes: what else there is to say.
            estimates: by layer (some or all), the estimated curve F(0), F(1), ..., F(R).
            event: "start", "kept", "moved", "failed: " and what failed, or "end" (of the run).

        Raises:
            ValueError: an argument is not of this form; the history is as it was.
        """
        step = whole_number(step, "step", least=0)
        if self._steps and step < self._steps[-1]:
            raise ValueError(
                f"step: expected at least {self._steps[-1]}, the last entry's, got {step}"
            )
        row = whole_numbers(ranks, self.names, "ranks", 0)
        budget = whole_number(budget, "budget", least=0)
        spent = exact_dot(self._costs, row)
        spent += exact_dot(self._fixed_costs, np.minimum(row, 1))
        for what, number in (("budget", budget), ("ranks: their cost", spent)):
            if number >= 1 << 62:
                raise ValueError(f"{what}: expected a number below 2^62, got {number}")
        parsed = math.nan if price is None else real_number(price)
        if price is not None and not math.isfinite(parsed):
            raise ValueError(f"price: expected a finite number or None, got {price!r}")
        curves = self._parse_estimates(estimates or {})
        texts = {"event": event, "status": status, "reason": reason, "notes": [*notes]}
        for what, text in texts.items():
            for part in text if what == "notes" else [text]:
                if not isinstance(part, str):
                    raise ValueError(f"{what}: expected text, got {part!r}")
        self._steps.append(step)
        self._ranks.append(row)
        self._budgets.append(budget)
        self._spent.append(spent)
        self._prices.append(parsed)
        self.events.append(texts)
        self.estimates.append(curves)

    def _parse_estimates(self, estimates: Estimates) -> dict[str, FloatArray]:
        """Copies; what is not finite stays, as an estimate that went wrong is worth a record."""
        known = set(self.names)
        curves: dict[str, FloatArray] = {}
        for name, curve in estimates.items():
            if name not in known:
                raise ValueError(f"estimates: layer {name!r} is not among the layers")
            try:
                curves[name] = np.array(curve, dtype=np.float64)
            except (TypeError, ValueError):
                curves[name] = np.zeros((0, 0))
            if curves[name].ndim != 1:
                raise ValueError(
                    f"estimates: layer {name!r}: expected a sequence of numbers, got {curve!r}"
                )
        return curves

    @property
    def costs(self) -> dict[str, int]:
        """Cost of one rank, by name."""
        return dict(zip(self.names, self._costs.tolist(), strict=True))

    @property
    def fixed_costs(self) -> dict[str, int]:
        """Cost of a rank above 0, by name."""
        return dict(zip(self.names, self._fixed_costs.tolist(), strict=True))

    @property
    def steps(self) -> IntArray:
        """The step of every entry, int64."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def ranks(self) -> IntArray:
        """The ranks, int64, entries x layers."""
        return np.array(self._ranks, dtype=np.int64).reshape(len(self), len(self.names))

    @property
    def budgets(self) -> IntArray:
        """The budget of every entry, int64."""
        return np.array(self._budgets, dtype=np.int64)

    @property
    def spent(self) -> IntArray:
        """What the ranks of every entry cost, int64."""
        return np.array(self._spent, dtype=np.int64)

    @property
    def prices(self) -> FloatArray:
        """The price of every entry; NaN where it is not known."""
        return np.array(self._prices, dtype=np.float64)

    def __len__(self) -> int:
        return len(self._steps)

    def to_json(self) -> dict[str, Any]:
        """All of it in what JSON has (no NaN), for `from_json`; doubles keep every bit."""
        entries: list[dict[str, Any]] = []
        for i, event in enumerate(self.events):
            entry: dict[str, Any] = {
                "step": self._steps[i],
                "ranks": self._ranks[i].tolist(),
                "budget": self._budgets[i],
                "price": None if math.isnan(self._prices[i]) else self._prices[i],
                **event,
                "notes": [*event["notes"]],
            }
            if self.estimates[i]:
                entry["estimates"] = {
                    name: [value if math.isfinite(value) else repr(value) for value in curve]
                    for name, curve in ((k, c.tolist()) for k, c in self.estimates[i].items())
                }
            entries.append(entry)
        return {
            "kind": _KIND,
            "version": _VERSION,
            "costs": self.costs,
            "fixed_costs": self.fixed_costs,
            "entries": entries,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RankHistory:
        """The history that `to_json` wrote down.

        Raises:
            ValueError: it is not a history, or a newer library's.
        """
        found = content.get("kind") if isinstance(content, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if found != _KIND:
            raise ValueError(f"expected a {_KIND}, got {found or type(content).__name__!r}")
        version = content.get("version")
        if not isinstance(version, int) or version > _VERSION:
            raise ValueError(
                f"expected a {_KIND} of version {_VERSION} or older, got {version}: "
                "a newer lorambo-alloc wrote it"
            )
        try:
            history = cls(content["costs"], content["fixed_costs"])
            for i, entry in enumerate(content["entries"]):
                values = dict(entry)
                step = values.pop("step")
                try:
                    ranks = dict(zip(history.names, values.pop("ranks"), strict=True))
                    history.record(step, ranks, **values)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"entry {i}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the {_KIND} is damaged: {error}") from error
        return history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all."""
        text = json.dumps(self.to_json(), allow_nan=False)
        with storage.replacing(path) as file:
            file.write(text.encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankHistory:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a history, is newer than this library, or is damaged.
        """
        with open(path, "rb") as file:
            data = file.read()
        try:
            return cls.from_json(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def __repr__(self) -> str:
        entries = "1 entry" if len(self) == 1 else f"{len(self)} entries"
        layers = "1 layer" if len(self.names) == 1 else f"{len(self.names)} layers"
        title = f"RankHistory: {entries} of {layers}"
        if not len(self):
            return title
        moved = ["-", *(str(int(n)) for n in np.abs(np.diff(self.ranks, axis=0)).sum(axis=1))]
        rows = [("step", "event", "moved", "spent", "budget", "price")]
        for i, (step, spent, budget, price) in enumerate(
            zip(self._steps, self._spent, self._budgets, self._prices, strict=True)
        ):
            shown = "-" if math.isnan(price) else f"{price:.4g}"
            event = self.events[i]["event"].partition(":")[0] or "-"
            rows.append((f"{step}", event, moved[i], f"{spent:,}", f"{budget:,}", shown))
        if len(rows) > _ROWS + 1:
            half = _ROWS // 2
            rows = [*rows[: half + 1], ("...",) * 6, *rows[-half:]]
        width = [max(len(row[k]) for row in rows) for k in range(6)]
        lines = ["  ".join(cell.rjust(width[k]) for k, cell in enumerate(row)) for row in rows]
        return "\n".join([title, *(f"  {line}" for line in lines)])
