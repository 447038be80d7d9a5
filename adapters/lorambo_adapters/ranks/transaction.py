"""Changes that are made all together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.transaction needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.sharded import like_sharded

_ABSENT = object()


class Transaction:
    """Assignments that are noted first and made later, and taken back if one of them fails.

    What can fail is to be done before it is noted, so that an exception comes while nothing has
    been changed; taking back is for what comes from outside, such as Ctrl-C.

    Example:
        >>> values = {"a": 1}
        >>> changes = Transaction()
        >>> changes.item(values, "a", 2)
        >>> values["a"]
        1
        >>> changes.commit()
        >>> values["a"]
        2
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[[], object], Callable[[], object]]] = []

    def do(self, step: Callable[[], object], undo: Callable[[], object]) -> None:
        """Note any change, with what takes it back; `undo` may run where `step` did not."""
        self._steps.append((step, undo))

    def item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Note `mapping[key] = value`."""
        old = mapping[key] if key in mapping else _ABSENT

        def undo() -> None:
            if old is _ABSENT:
                mapping.pop(key, None)
            else:
                mapping[key] = old

        self.do(lambda: mapping.__setitem__(key, value), undo)

    def element(self, items: list[Any], index: int, value: Any) -> None:
        """Note `items[index] = value`."""
        old = items[index]
        self.do(lambda: items.__setitem__(index, value), lambda: items.__setitem__(index, old))

    def write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Note `tensor.copy_(value)`; a sharded tensor takes its part of the whole value."""
        tensor = tensor.detach()
        placed = like_sharded(value, tensor)
        old = tensor.clone()
        self.do(lambda: tensor.copy_(placed), lambda: tensor.copy_(old))

    def append(self, items: list[Any], value: Any) -> None:
        """Note `items.append(value)`."""
        old = list(items)
        self.do(lambda: items.append(value), lambda: items.__setitem__(slice(None), old))

    def remove(self, mapping: MutableMapping[Any, Any], key: Any) -> None:
        """Note `del mapping[key]`, of a key that is there; taken back, it has its place again."""
        old = dict(mapping.items())

        def undo() -> None:
            mapping.clear()
            mapping.update(old)

        self.do(lambda: mapping.__delitem__(key), undo)

    def attribute(self, owner: object, name: str, value: object) -> None:
        """Note `owner.name = value`, of an attribute that is there."""
        old = getattr(owner, name)
        self.do(lambda: setattr(owner, name, value), lambda: setattr(owner, name, old))

    def commit(self) -> None:
        """Make the changes in the order in which they were noted.

        Raises:
            BaseException: what a step raised; the changes have then been taken back.
        """
        done = 0
        try:
            for step, _ in self._steps:
                done += 1
                step()
        except BaseException:
            for _, undo in reversed(self._steps[:done]):
                undo()
            raise
