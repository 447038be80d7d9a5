"""Blocks and module types, read off the names of layers; rows and columns of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

Row: TypeAlias = tuple[str, str, int]
"""Label of the group, label in it, index of the layer."""

Depth: TypeAlias = tuple[str, int]
"""What stands before a block's number, and the number; -1 where a name has none."""


def split(names: Sequence[str]) -> tuple[list[str], list[str], list[Depth]]:
    """Of each name the block, the module in it, and a key that sorts blocks by depth.

    The block is the first number in the name, with what stands before it where that differs.

    Example:
        >>> split(["model.layers.3.self_attn.q_proj", "lm_head"])
        (['block 3', ''], ['self_attn.q_proj', 'lm_head'], [('model.layers', 3), ('', -1)])
    """
    found = [_first_number(name) for name in names]
    depths = [depth for depth, _ in found]
    several = len({stack for stack, number in depths if number >= 0}) > 1
    blocks: list[str] = []
    for stack, number in depths:
        place = f"{stack}.{number}" if several and stack else f"block {number}"
        blocks.append(place if number >= 0 else "")
    return blocks, [module for _, module in found], depths


def _first_number(name: str) -> tuple[Depth, str]:
    """The block of one name, and the module in it."""
    parts = name.split(".")
    for k, part in enumerate(parts):
        if _is_number(part):
            return (".".join(parts[:k]), int(part)), ".".join(parts[k + 1 :])
    return ("", -1), name


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def rows(names: Sequence[str], group: str | Callable[[str], str]) -> list[Row]:
    """The rows of a picture from top to bottom.

    Args:
        names: of the layers.
        group: "block" (by block, then by module), "module" (by module, then by block), or a
            function from a layer's name to that of its group.

    Raises:
        ValueError: `group` is not of this form.
    """
    blocks, modules, depths = split(names)
    order_of = {module: k for k, module in enumerate(dict.fromkeys(modules))}
    places = [order_of[module] for module in modules]
    layers = range(len(names))
    if group == "block":
        ordered = sorted(layers, key=lambda i: (depths[i], places[i]))
        return [(blocks[i], modules[i], i) for i in ordered]
    if group == "module":
        ordered = sorted(layers, key=lambda i: (places[i], depths[i]))
        return [(modules[i], blocks[i], i) for i in ordered]
    if not callable(group):
        raise ValueError(f"group: expected 'block', 'module' or a function, got {group!r}")
    groups = [str(group(name)) for name in names]
    first = {key: k for k, key in enumerate(dict.fromkeys(groups))}
    ordered = sorted(layers, key=lambda i: first[groups[i]])
    return [(groups[i], f"{blocks[i]} {modules[i]}".strip(), i) for i in ordered]


def module_type(module: str) -> str:
    """A module's name with a star for every number in it, which experts differ in.

    Example:
        >>> module_type("mlp.experts.17.up_proj")
        'mlp.experts.*.up_proj'
    """
    return ".".join("*" if _is_number(part) else part for part in module.split("."))


def numbers_in(module: str) -> tuple[int, ...]:
    """The numbers in a module's name, which sort experts."""
    return tuple(int(part) for part in module.split(".") if _is_number(part))


def shortest(modules: Iterable[str]) -> dict[str, str]:
    """Of each module the shortest end of its name that no other one ends with.

    Example:
        >>> shortest(["self_attn.q_proj", "mlp.fc.proj", "attn.proj"])
        {'self_attn.q_proj': 'q_proj', 'mlp.fc.proj': 'fc.proj', 'attn.proj': 'attn.proj'}
    """
    ends: dict[str, int] = {}
    parts_of = {module: module.split(".") for module in modules}
    for parts in parts_of.values():
        for k in range(len(parts)):
            end = ".".join(parts[k:])
            ends[end] = ends.get(end, 0) + 1
    short: dict[str, str] = {}
    for module, parts in parts_of.items():
        candidates = (".".join(parts[k:]) for k in reversed(range(len(parts))))
        alone = (end for end in candidates if ends[end] == 1 and end[:1] != "*")
        short[module] = next(alone, module)
    return short
