"""Costs and budgets: exact integers in the units of the caller."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from lorambo_alloc.curves import check_names
from lorambo_alloc.objectives import IntArray, real_number

T = TypeVar("T")

PerLayer: TypeAlias = Mapping[str, T] | Sequence[T]
"""One value a layer: by name, or in layer order."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Optimizer to its states a parameter; those of `adamw_8bit` take one byte and a share of a scale.
_STATES = {"adamw": 2, "adamw_8bit": 2, "sgd": 0, "sgd_momentum": 1}

_BLOCK = 256  # entries of an 8-bit state that share one float32 scale


@dataclass(frozen=True)
class UniformRank:
    """A budget: what giving every layer the rank `rank` costs. Made by `uniform_rank`."""

    rank: int

    def cost(self, costs: IntArray, fixed_costs: IntArray) -> int:
        """The budget in the units of the costs."""
        if self.rank == 0:
            return 0
        return self.rank * exact_dot(costs, np.ones_like(costs)) + exact_dot(
            fixed_costs, np.ones_like(costs)
        )


def uniform_rank(rank: int) -> UniformRank:
    """The budget that uniform rank `rank` would cost, the usual baseline.

    Args:
        rank: a whole number >= 0; layers whose spectrum is shorter are charged it all the same,
            as an adapter of that rank would be.

    Raises:
        ValueError: the rank is not a whole number >= 0.

    Example:
        >>> from lorambo_alloc import allocate
        >>> allocate({"q": [3.0, 2.0], "v": [1.0]}, uniform_rank(1)).ranks
        array([2, 0])
    """
    return UniformRank(whole_number(rank, "uniform_rank", least=0))


def training_bytes(
    shapes: Mapping[str, tuple[int, int]],
    *,
    dtype: str = "float32",
    optimizer: str = "adamw",
    tokens: int | Mapping[str, int] = 0,
    activation_dtype: str | None = None,
    master_weights: bool = False,
) -> dict[str, int]:
    """Bytes of training memory for each unit of rank: costs for a budget in bytes.

    For one rank of a d x k layer

        (d + k) (weight + gradient + states + master + cast) + tokens x activation

    where, in bytes a number:

    - weight and gradient: `dtype` each (PyTorch keeps a gradient in its parameter's dtype);
    - states: 2 for `adamw`, 1 for `sgd_momentum`, 0 for `sgd`, in `dtype`, or in float32 beside
      master weights. `adamw_8bit`: 2 states of 1 byte, and for each a float32 scale a block of 256
      numbers, blocks rounded up in every rank, so that the sum is never less than what is stored;
    - master: 4 for a float32 copy of half-precision weights (`master_weights`), else 0;
    - cast: `activation_dtype` where it is not `dtype`: autocast keeps both factors in it until
      the backward pass, else 0;
    - activation: `activation_dtype`. Of `lora_B(lora_A(dropout(x))) * scaling` autograd saves one
      number a token that depends on the rank: the input A x of lora_B.

    Not counted, as it does not grow with the rank: the base model and its activations, x itself,
    dropout's mask and output, DoRA's magnitudes, AdamW's step counter and the 8-bit maps of an
    optimizer. Not counted either, as it is short-lived or depends on the allocator: gradients of
    activations, an optimizer's temporaries, float32 copies of gradients beside master weights, a
    gradient bucket of data-parallel training, rounding of allocations to 512 bytes or more. Nothing
    here shards memory over devices.

    Args:
        shapes: name to (d, k), as `Spectra.shapes`; for a convolution d output channels and k
            input channels times the kernel's size.
        dtype: of the adapter's weights: "float32", "bfloat16" or "float16".
        optimizer: "adamw", "adamw_8bit" (bitsandbytes), "sgd" or "sgd_momentum".
        tokens: how many tokens' activations are kept at a time, for all layers or by name: batch
            size times sequence length. 0 where activations are recomputed (gradient
            checkpointing); for a convolution count output positions.
        activation_dtype: of A x. None: `dtype`. Another one: autocast.
        master_weights: whether the optimizer holds float32 copies of half-precision weights.

    Returns:
        Name to whole bytes, for the `costs` of `allocate`; the budget is then in bytes.

    Raises:
        ValueError: an argument is not of this form; the message names it, and the layer.

    Note:
        bitsandbytes keeps the states of tensors below 4096 numbers in 32 bits. What costs in
        proportion to the rank cannot say that: such a tensor (a small k or d times a small rank)
        takes up to 6 bytes a number more than is counted, at most 24,570 bytes.

    References:
        PyTorch, `torch.optim.AdamW` and `SGD` (their states are like the parameter), and the notes
        on autograd's saved tensors and automatic mixed precision. Dettmers et al., 8-bit
        optimizers via block-wise quantization, ICLR 2022; bitsandbytes 0.50.2,
        `optim/optimizer.py`, `Optimizer2State.init_state` (block size, least size).

    Example:
        >>> training_bytes({"q": (4096, 4096)})["q"]  # 16 bytes a parameter
        131072
        >>> training_bytes({"q": (4096, 4096)}, dtype="bfloat16", tokens=8192)["q"]
        81920
    """
    if not isinstance(shapes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"shapes: expected a mapping of layer name to (d, k), got {shapes!r}")
    number = _choice(dtype, _BYTES, "dtype")
    states = _choice(optimizer, _STATES, "optimizer")
    activation = number
    if activation_dtype is not None:
        activation = _choice(activation_dtype, _BYTES, "activation_dtype")
    if master_weights and dtype == "float32":
        raise ValueError(
            "master_weights: expected weights in half precision beside them, got dtype 'float32'"
        )
    names = tuple(shapes)
    kept: Mapping[str, Any] = (
        tokens if isinstance(tokens, Mapping) else dict.fromkeys(names, tokens)
    )
    counts = per_layer(kept, names, "tokens", lambda value, where: whole_number(value, where, 0))

    each = 2 * number
    if optimizer != "adamw_8bit":
        each += states * (4 if master_weights else number)
    if master_weights:
        each += 4
    if activation_dtype not in (None, dtype):
        each += activation
    costs: dict[str, int] = {}
    for name, count in zip(names, counts, strict=True):
        sides = _sides(shapes[name], f"shapes: layer {name!r}")
        costs[name] = sum(sides) * each + count * activation
        if optimizer == "adamw_8bit":
            costs[name] += sum(states * (side + 4 * -(-side // _BLOCK)) for side in sides)
    return costs


def _choice(value: str, known: Mapping[str, int], where: str) -> int:
    if not isinstance(value, str) or value not in known:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return known[value]


def _sides(shape: Any, where: str) -> tuple[int, int]:
    try:
        d, k = shape
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected (d, k), got {shape!r}") from None
    return whole_number(d, where, 1), whole_number(k, where, 1)


def whole_number(value: object, where: str, least: int) -> int:
    """An int from a whole number of any numeric type.

    Raises:
        ValueError: it is not a finite whole number, or is below `least`.
    """
    number: int | None = None
    if not isinstance(value, (bool, np.bool_)):
        try:
            # `value` may be anything; what has no index raises the TypeError below.
            number = operator.index(value)  # pyright: ignore[reportArgumentType]
        except TypeError:
            if real_number(value).is_integer():
                number = int(real_number(value))
    if number is None or number < least:
        raise ValueError(f"{where}: expected a whole number >= {least}, got {value!r}")
    return number


def per_layer(
    values: PerLayer[Any], names: tuple[str, ...], what: str, parse: Callable[[Any, str], T]
) -> list[T]:
    """One parsed value a layer, in layer order, from a mapping or a sequence.

    Raises:
        ValueError: a name is missing or unknown, the length is wrong, or `parse` refuses.
    """
    if isinstance(values, Mapping):
        check_names(values, names, what)
        ordered = [values[name] for name in names]
    else:
        if isinstance(values, str) or not isinstance(values, (Sequence, np.ndarray)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"{what}: expected one value per layer, by name or in order, got {values!r}"
            )
        ordered = list(values)
        if len(ordered) != len(names):
            raise ValueError(f"{what}: expected {len(names)} values, got {len(ordered)}")
    return [
        parse(value, f"{what}: layer {name!r}") for name, value in zip(names, ordered, strict=True)
    ]


def whole_numbers(values: PerLayer[Any], names: tuple[str, ...], what: str, least: int) -> IntArray:
    """Whole numbers up to 2^53, one a layer."""
    if isinstance(values, Mapping) and len(values) == len(names):
        plain = [values.get(name) for name in names]
        if all(type(value) is int and least <= value <= 1 << 53 for value in plain):
            return np.array(plain, dtype=np.int64)

    def parse(value: Any, where: str) -> int:
        number = whole_number(value, where, least)
        if number > 1 << 53:
            raise ValueError(f"{where}: expected at most 2^53, got {number}")
        return number

    return np.array(per_layer(values, names, what, parse), dtype=np.int64)


def exact_dot(a: IntArray, b: IntArray) -> int:
    """Sum of products of integers >= 0, without overflow."""
    if float(np.multiply(a, b, dtype=np.float64).sum()) < 2.0**62:
        return int((a * b).sum())
    return sum(map(operator.mul, a.tolist(), b.tolist()))
