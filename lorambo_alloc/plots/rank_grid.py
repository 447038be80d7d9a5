"""Where each layer lies in a grid of blocks and module types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorambo_alloc.plots.layer_names import Depth, module_type, numbers_in, shortest, split


@dataclass(frozen=True)
class Column:
    """A module type: one column of cells, or as many as a block has layers of it (experts).

    Attributes:
        label: the shortest name that tells it from the others.
        count: the number of cells side by side.
    """

    label: str
    count: int


@dataclass(frozen=True)
class RankGrid:
    """A grid for some layers.

    Attributes:
        blocks: what the rows are, from top to bottom.
        columns: module types, in the order in which the layers have them.
        places: name of a layer to its row, its column and its cell in the column.
        alone: layers whose names have no number, which lie in no row.
    """

    blocks: tuple[Depth, ...]
    columns: tuple[Column, ...]
    places: dict[str, tuple[int, int, int]]
    alone: tuple[str, ...]

    @property
    def row_labels(self) -> list[str]:
        """Numbers of blocks, with the stack's name at the first of each where there are several."""
        stacks = [stack for stack, _ in self.blocks]
        if len(set(stacks)) < 2:
            return [str(number) for _, number in self.blocks]
        first = {stack: stacks.index(stack) for stack in stacks}
        return [
            f"{stack}.{number}".lstrip(".") if first[stack] == k else str(number)
            for k, (stack, number) in enumerate(self.blocks)
        ]


def grid_of(names: Sequence[str]) -> RankGrid:
    """The grid of layers by their names.

    Layers of one block whose names differ only in numbers, such as experts, lie side by side in
    one column, in the order of their numbers.

    Example:
        >>> grid = grid_of(["layers.0.attn.q", "layers.0.mlp.0.up", "layers.0.mlp.1.up", "head"])
        >>> grid.columns, grid.alone
        ((Column(label='q', count=1), Column(label='up', count=2)), ('head',))
        >>> grid.places["layers.0.mlp.1.up"]
        (0, 1, 1)
    """
    _, modules, depths = split(names)
    inside = [i for i, (_, number) in enumerate(depths) if number >= 0]
    stacks = list(dict.fromkeys(depths[i][0] for i in inside))
    blocks = sorted({depths[i] for i in inside}, key=lambda d: (stacks.index(d[0]), d[1]))
    members: dict[str, dict[str, None]] = {}
    seen: set[tuple[Depth, str]] = set()
    several: set[str] = set()
    for i in inside:
        kind = module_type(modules[i])
        members.setdefault(kind, {})[modules[i]] = None
        if (depths[i], kind) in seen:
            several.add(kind)
        seen.add((depths[i], kind))
    cells: dict[str, int] = {}
    for kind, found in members.items():
        ordered = sorted(found, key=numbers_in)
        cells |= {module: k if kind in several else 0 for k, module in enumerate(ordered)}
    short = shortest(members)
    columns = tuple(
        Column(short[kind] or "layer", len(found) if kind in several else 1)
        for kind, found in members.items()
    )
    column_of = {kind: k for k, kind in enumerate(members)}
    row_of = {block: k for k, block in enumerate(blocks)}
    places = {
        names[i]: (row_of[depths[i]], column_of[module_type(modules[i])], cells[modules[i]])
        for i in inside
    }
    alone = tuple(name for name in names if name not in places)
    return RankGrid(tuple(blocks), columns, places, alone)
