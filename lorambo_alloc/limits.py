"""Which ranks a layer may take: bounds, multiples, explicit lists and ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import IntArray

Limit: TypeAlias = int | Mapping[str, int] | None
AllowedRanks: TypeAlias = Sequence[int] | Mapping[str, Sequence[int]] | None

_HUGE = 1 << 53  # limits above every rank


@dataclass(frozen=True)
class Limits:
    """The allowed ranks of every layer.

    Attributes:
        names: the layers' names.
        lower: the least allowed rank, int64 by layer.
        upper: the greatest allowed rank, int64 by layer.
        multiple_of: ranks are multiples of this.
        lists: explicit lists of ranks, ascending, by layer index (those of layers that have one).
        groups: groups of layer indices that share one rank.
    """

    names: tuple[str, ...]
    lower: IntArray
    upper: IntArray
    multiple_of: int
    lists: dict[int, IntArray]
    groups: tuple[tuple[int, ...], ...]

    @property
    def variables(self) -> list[tuple[int, ...]]:
        """The layers of each free choice: the tied groups, and every other layer alone."""
        tied = {i for group in self.groups for i in group}
        alone = ((i,) for i in range(len(self.names)) if i not in tied)
        return sorted([*self.groups, *alone])

    def allowed_ranks(self, i: int) -> IntArray:
        """The ranks that layer i may take, ascending (ties with other layers included)."""
        listed = self.lists.get(i)
        if listed is not None:
            return listed
        first, last = int(self.lower[i]), int(self.upper[i])
        return np.arange(first, last + 1, self.multiple_of, dtype=np.int64)

    def check(self, ranks: IntArray) -> None:
        """Raise ValueError unless every rank is allowed and tied layers agree."""
        outside = (ranks < self.lower) | (ranks > self.upper) | (ranks % self.multiple_of != 0)
        for i, listed in self.lists.items():
            outside[i] |= int(ranks[i]) not in listed
        for i in np.flatnonzero(outside)[:1].tolist():
            raise ValueError(f"layer {self.names[i]!r}: rank {ranks[i]} is not allowed")
        for group in self.groups:
            if len(set(ranks[list(group)].tolist())) > 1:
                raise ValueError(f"tied layers {self.names[group[0]]!r}, ... differ in rank")


def parse_limits(
    names: tuple[str, ...],
    lengths: IntArray,
    min_rank: Limit,
    max_rank: Limit,
    multiple_of: int,
    allowed_ranks: AllowedRanks,
    tied: Iterable[Sequence[str]],
) -> Limits:
    """Check the limits of a problem and bring them together.

    Args:
        names: the layers' names.
        lengths: how many ranks each layer's curve has.
        min_rank: as `Problem` takes it, and so on.
        max_rank: as `Problem` takes it.
        multiple_of: as `Problem` takes it.
        allowed_ranks: as `Problem` takes it.
        tied: as `Problem` takes it.

    Raises:
        ValueError: a limit is not of its form, names an unknown layer, or no rank of a layer
            satisfies all of them.
    """
    index = {name: i for i, name in enumerate(names)}
    step = min(whole_number(multiple_of, "multiple_of", least=1), _HUGE)
    groups = _parse_tied(tied, index)
    lower, upper = _parse_bounds(min_rank, max_rank, index, lengths)
    lists = _parse_lists(allowed_ranks, index)
    lower, upper = -(-lower // step) * step, upper // step * step
    for group in groups:
        members = list(group)
        lower[members], upper[members] = lower[members].max(), upper[members].min()
        own = [lists[i] for i in members if i in lists]
        if own:
            common = own[0]
            for other in own[1:]:
                common = np.intersect1d(common, other)
            lists.update(dict.fromkeys(members, common))
    for i, listed in lists.items():
        listed = listed[(listed >= lower[i]) & (listed <= upper[i]) & (listed % step == 0)]
        lists[i] = listed
        lower[i], upper[i] = (listed[0], listed[-1]) if len(listed) else (1, 0)
    for i in np.flatnonzero(lower > upper)[:1].tolist():
        raise ValueError(
            f"layer {names[i]!r}: no rank satisfies min_rank, max_rank, multiple_of, "
            "allowed_ranks and tied together"
        )
    return Limits(names, lower, upper, step, lists, groups)


def _parse_tied(
    tied: Iterable[Sequence[str]], index: dict[str, int]
) -> tuple[tuple[int, ...], ...]:
    seen: set[str] = set()
    groups: list[tuple[int, ...]] = []
    for group in _listed(tied):
        members = _listed(group)
        for name in members:
            if not isinstance(name, str) or name not in index:
                raise ValueError(f"tied: layer {name!r} is not among the spectra")
            if name in seen:
                raise ValueError(f"tied: layer {name!r} appears twice")
            seen.add(name)
        if len(members) > 1:
            groups.append(tuple(index[name] for name in members))
    return tuple(groups)


def _listed(values: object) -> list[Any]:
    """Any iterable but a string, as a list."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"tied: expected groups of layer names, got {values!r}")
    return list(cast(Iterable[Any], values))


def _parse_bounds(
    min_rank: Limit, max_rank: Limit, index: dict[str, int], lengths: IntArray
) -> tuple[IntArray, IntArray]:
    names = tuple(index)
    lower = _parse_bound(min_rank, "min_rank", index, 0 * lengths)
    upper = _parse_bound(max_rank, "max_rank", index, lengths)
    for i in np.flatnonzero(lower > lengths)[:1].tolist():
        raise ValueError(
            f"min_rank: layer {names[i]!r}: expected at most {lengths[i]}, the ranks its curve "
            f"has, got {lower[i]}"
        )
    upper = np.minimum(upper, lengths)
    for i in np.flatnonzero(lower > upper)[:1].tolist():
        raise ValueError(f"layer {names[i]!r}: min_rank {lower[i]} is above max_rank {upper[i]}")
    return lower, upper


def _parse_bound(limit: Limit, what: str, index: dict[str, int], default: IntArray) -> IntArray:
    if limit is None:
        return default.copy()
    if not isinstance(limit, Mapping):
        return np.full_like(default, min(whole_number(limit, what, least=0), _HUGE))
    result = default.copy()
    for name, value in limit.items():
        if name not in index:
            raise ValueError(f"{what}: layer {name!r} is not among the spectra")
        number = whole_number(value, f"{what}: layer {name!r}", least=0)
        result[index[name]] = min(number, _HUGE)
    return result


def _parse_lists(allowed: AllowedRanks, index: dict[str, int]) -> dict[int, IntArray]:
    if allowed is None:
        return {}
    named = allowed if isinstance(allowed, Mapping) else dict.fromkeys(index, allowed)
    result: dict[int, IntArray] = {}
    for name, listed in named.items():
        if name not in index:
            raise ValueError(f"allowed_ranks: layer {name!r} is not among the spectra")
        where = f"allowed_ranks: layer {name!r}"
        try:
            numbers = {min(whole_number(rank, where, least=0), _HUGE) for rank in listed}
        except TypeError:
            raise ValueError(f"{where}: expected a list of ranks, got {listed!r}") from None
        result[index[name]] = np.array(sorted(numbers), dtype=np.int64)
    return result
