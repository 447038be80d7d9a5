"""Instances of the size of real models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lorambo_alloc.curves import GainCurves
from lorambo_alloc.objectives import FloatArray
from lorambo_alloc.problem import Problem

if TYPE_CHECKING:
    from lorambo_alloc.allocation import Allocation


@dataclass(frozen=True)
class Instance:
    """One allocation problem, as a caller would hand it to `allocate`.

    Attributes:
        name: what the instance is, for tables and test ids.
        spectra: the first argument of `allocate`.
        budget: the second argument of `allocate`, in the units of the costs.
        keywords: the keyword arguments of `Problem` (`costs`, `shapes`, `objective`, limits).

    Example:
        >>> instance = Instance("two layers", {"a": [3.0, 1.0], "b": [2.0]}, 2)
        >>> instance.allocate().value
        13.0
    """

    name: str
    spectra: Any
    budget: int
    keywords: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def problem(self) -> Problem:
        """The validated problem."""
        return Problem(self.spectra, self.budget, **self.keywords)

    def allocate(self, **options: Any) -> Allocation:
        """`allocate` on this instance; `options` are its `method` and `time_limit`."""
        from lorambo_alloc.allocate import allocate

        return allocate(self.spectra, self.budget, **self.keywords, **options)


# (out, in) of the matrices of one block, and the number of blocks, ranks and the uniform rank whose
# cost is the budget. a: RoBERTa, b: Llama 8B, c: Llama 70B.
_BLOCKS: dict[str, tuple[dict[str, tuple[int, int]], int, int, int]] = {
    "a": (
        {
            "attention.query": (768, 768),
            "attention.key": (768, 768),
            "attention.value": (768, 768),
            "attention.output": (768, 768),
            "intermediate": (3072, 768),
            "output": (768, 3072),
        },
        16,
        64,
        8,
    ),
    "b": (
        {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
        },
        32,
        128,
        16,
    ),
    "c": (
        {
            "self_attn.q_proj": (8192, 8192),
            "self_attn.k_proj": (1024, 8192),
            "self_attn.v_proj": (1024, 8192),
            "self_attn.o_proj": (8192, 8192),
            "mlp.gate_proj": (28672, 8192),
            "mlp.up_proj": (28672, 8192),
            "mlp.down_proj": (8192, 28672),
        },
        80,
        256,
        16,
    ),
}


def _spectra(rng: np.random.Generator, layers: int, ranks: int, chunk: int = 256) -> FloatArray:
    """Noisy power laws s j^-e exp(0.1 z), descending in each row, made in chunks of rows."""
    values = np.empty((layers, ranks))
    log_rank = np.log(np.arange(1, ranks + 1))
    for start in range(0, layers, chunk):
        rows = values[start : start + chunk]
        rng.standard_normal(out=rows)
        rows *= 0.1
        rows -= rng.uniform(0.3, 1.2, (len(rows), 1)) * log_rank
        rows += rng.normal(0.0, 0.7, (len(rows), 1))
        np.exp(rows, out=rows)
        # Sorting the negatives ascending leaves the rows descending without a reversed copy.
        np.negative(rows, out=rows)
        rows.sort(axis=1)
        np.negative(rows, out=rows)
    return values


def power_law(shape: str, seed: int = 0) -> Instance:
    """Noisy power-law spectra in the shape of a real model.

    Args:
        shape: "a" (96 layers x 64 ranks, the costs of RoBERTa), "b" (224 x 128, Llama 8B), "c"
            (560 x 256, Llama 70B) or "d" (2,000 x 512, random costs from 1,000 to 60,000).
        seed: of the scales, the exponents and the noise.

    Returns:
        The instance; its budget is what uniform rank 8 ("a") or 16 (the others) costs.

    Raises:
        ValueError: `shape` is none of these.

    Example:
        >>> instance = power_law("a")
        >>> len(instance.spectra), instance.budget
        (96, 1769472)
    """
    rng = np.random.default_rng(seed)
    if shape == "d":
        values = _spectra(rng, 2000, 512)
        names = [f"layers.{i}" for i in range(2000)]
        costs = rng.integers(1000, 60_001, 2000).tolist()
        return Instance(
            "power law d (2,000 x 512)",
            dict(zip(names, values, strict=True)),
            16 * sum(costs),
            {"costs": dict(zip(names, costs, strict=True))},
        )
    if shape not in _BLOCKS:
        raise ValueError(f"shape: expected one of 'a', 'b', 'c', 'd', got {shape!r}")
    block, blocks, ranks, uniform = _BLOCKS[shape]
    shapes = {f"layers.{i}.{name}": dk for i in range(blocks) for name, dk in block.items()}
    values = _spectra(rng, len(shapes), ranks)
    return Instance(
        f"power law {shape} ({len(shapes)} x {ranks})",
        dict(zip(shapes, values, strict=True)),
        uniform * sum(d + k for d, k in shapes.values()),
        {"shapes": shapes},
    )


def large(layers: int = 5000, ranks: int = 16_384, seed: int = 0) -> Instance:
    """Complete spectra of a very large model as one 2-D array, with three distinct costs.

    The default holds 8.2e7 values (655 MB) and takes some seconds to make. The budget is what
    uniform rank 64 costs (or a quarter of the ranks, where that is less).

    Example:
        >>> large(10, 32).spectra.shape
        (10, 32)
    """
    rng = np.random.default_rng(seed)
    values = _spectra(rng, layers, ranks, chunk=64)
    costs = np.array([32_768, 20_480, 69_632])[np.arange(layers) % 3]
    names = [str(i) for i in range(layers)]
    return Instance(
        f"large ({layers:,} x {ranks:,})",
        values,
        min(64, max(1, ranks // 4)) * int(costs.sum()),
        {"costs": dict(zip(names, costs.tolist(), strict=True))},
    )


def mixture_of_experts(
    blocks: int = 61, experts: int = 256, ranks: int = 256, seed: int = 0
) -> Instance:
    """A mixture of experts in the shape of DeepSeek-V3 (671B): 45,032 layers x 256 ranks.

    Hidden size 7,168; in each block the five matrices of multi-head latent attention; three dense
    blocks (intermediate size 18,432), then `experts` routed experts and one shared expert of
    intermediate size 2,048 in every other block. Seven distinct costs; the budget is what uniform
    rank 16 costs.

    Example:
        >>> len(mixture_of_experts(blocks=4, experts=8, ranks=16).spectra)
        56
    """
    attention = {
        "self_attn.q_a_proj": (1536, 7168),
        "self_attn.q_b_proj": (24_576, 1536),
        "self_attn.kv_a_proj_with_mqa": (576, 7168),
        "self_attn.kv_b_proj": (32_768, 512),
        "self_attn.o_proj": (7168, 16_384),
    }
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(blocks):
        shapes.update({f"model.layers.{i}.{name}": dk for name, dk in attention.items()})
        mlp = f"model.layers.{i}.mlp"
        dense = i < 3
        prefixes = [mlp]
        if not dense:
            prefixes = [f"{mlp}.experts.{e}" for e in range(experts)] + [f"{mlp}.shared_experts"]
        width = 18_432 if dense else 2048
        for prefix in prefixes:
            shapes[f"{prefix}.gate_proj"] = shapes[f"{prefix}.up_proj"] = (width, 7168)
            shapes[f"{prefix}.down_proj"] = (7168, width)
    values = _spectra(np.random.default_rng(seed), len(shapes), ranks)
    return Instance(
        f"mixture of experts ({len(shapes):,} x {ranks})",
        dict(zip(shapes, values, strict=True)),
        min(16, max(1, ranks // 4)) * sum(d + k for d, k in shapes.values()),
        {"shapes": shapes},
    )


def non_concave(layers: int = 224, ranks: int = 64, seed: int = 0) -> Instance:
    """Estimated gain curves: concave in truth, with an error of about 1 % on every point.

    So they are neither concave nor monotone. The costs are those of Llama 8B, and the budget is
    what uniform rank 8 costs.

    Example:
        >>> curve = non_concave(7, 16).spectra["layers.0"]
        >>> bool(curve[0] == 0.0), bool((np.diff(curve, 2) > 0).any())
        (True, True)
    """
    rng = np.random.default_rng(seed)
    curves = np.zeros((layers, ranks + 1))
    np.cumsum(_spectra(rng, layers, ranks) ** 2, axis=1, out=curves[:, 1:])
    curves[:, 1:] += 0.01 * curves[:, -1:] * rng.standard_normal((layers, ranks))
    names = [f"layers.{i}" for i in range(layers)]
    block = [d + k for d, k in _BLOCKS["b"][0].values()]
    costs = {name: block[i % len(block)] for i, name in enumerate(names)}
    return Instance(
        f"non-concave ({layers} x {ranks})",
        GainCurves(dict(zip(names, curves, strict=True))),
        min(8, max(1, ranks // 4)) * sum(costs.values()),
        {"costs": costs},
    )


def multiples_of_8(seed: int = 0) -> Instance:
    """`power_law("b")` where every rank must be a multiple of 8, as hardware likes it."""
    base = power_law("b", seed)
    return Instance(
        "multiples of 8 (224 x 128)",
        base.spectra,
        base.budget,
        {**base.keywords, "multiple_of": 8},
    )
