"""Which layers a LoRA would adapt, by PEFT's own notions, and the shape of each one's matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from lorambo_alloc.costs import whole_number

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.layers needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.targets import (
    Targets,
    as_peft_reads,
    base_modules,
    is_all_linear,
    is_conv1d,
    module_matcher,
    parameter_matcher,
)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TRANSPOSED = ("conv1d", "embedding")


@dataclass(frozen=True)
class TargetLayer:
    """One matrix that a LoRA can adapt.

    Attributes:
        name: the module's, as PEFT's patterns see it (without "base_model.model."); of an expert,
            the parameter's full name and the expert's index after a dot.
        shape: (d, k), such that PEFT's adapter has exactly d + k parameters a rank.
        kind: "linear", "conv1d" (transformers' `Conv1D`), "conv2d", "embedding", "quantized"
            (bitsandbytes) or "expert" (a parameter that `target_parameters` named).
        module: what owns the weight.
        parameter: the weight's name in the module.
        expert: the index into a 3-D parameter; None for a parameter that is a matrix itself.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    module: torch.nn.Module
    parameter: str = "weight"
    expert: int | None = None

    def matrix(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The weight as a d x k tensor, detached, in its own floating-point type.

        A 4- or 8-bit weight of bitsandbytes is dequantised, a `DTensor` gathered, a transposed
        weight transposed (a view). Nothing is kept: one layer's copy at a time.

        Args:
            device: where it is wanted; by default where the weight lies.

        Returns:
            A tensor that may share the model's memory: do not write to it.

        Raises:
            ValueError: the weight has no data (meta device), is of a type that cannot be read (see
                `floating_point`), or belongs to a convolution with groups: PEFT then splits each
                adapter's ranks among the groups, so no single matrix's spectrum says what a rank
                gains.

        Note:
            For a `DTensor` (FSDP2) this is a collective call: every process of the mesh has to
            make it, for the same layers in the same order. One expert of a 3-D `DTensor` takes a
            gathering of all of them.
        """
        groups = getattr(self.module, "groups", 1) if self.kind == "conv2d" else 1
        if groups > 1:
            raise ValueError(
                f"layer {self.name!r}: expected a convolution without groups, got {groups} groups, "
                "among which PEFT splits the ranks; leave it out of the targets"
            )
        owner: Any = getattr(self.module, self.parameter)
        with torch.no_grad():
            weight = owner.data if self.expert is None else owner.data[self.expert]
            if self.kind == "quantized":
                weight = _dequantised(self.module, weight)
            weight = floating_point(self.name, weight)
            if device is not None:
                weight = weight.to(device)
            weight = weight.flatten(1) if self.kind == "conv2d" else weight
            matrix = weight.t() if stored_transposed(self) else weight
        if tuple(matrix.shape) != self.shape:
            raise ValueError(
                f"layer {self.name!r}: expected a weight of shape {self.shape}, got "
                f"{tuple(matrix.shape)}"
            )
        return matrix


LayerTargets: TypeAlias = str | Sequence[str] | Sequence[TargetLayer]
"""PEFT's `target_modules`: "all-linear", a regular expression, or names and suffixes; or layers
that `find_layers` has found."""


def find_layers(
    model: torch.nn.Module,
    targets: LayerTargets | None = "all-linear",
    *,
    target_parameters: Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    task_type: str | None = None,
) -> list[TargetLayer]:
    """Find the matrices that PEFT would adapt, given the same targets.

    One rank in a layer costs d + k parameters, which is what PEFT creates:

    | module | d | k |
    |---|---|---|
    | `Linear`, `Conv1D`, bitsandbytes' linears | out_features | in_features |
    | `Conv2d` | out_channels / groups | in_channels x kernel height x kernel width |
    | `Embedding` | embedding_dim | num_embeddings |
    | an expert of a 3-D parameter | out | in, by the module's `is_transposed` (Llama 4: True) |

    Args:
        model: any module, on the meta device too; a `PeftModel`, `torch.compile` and
            `DistributedDataParallel` are seen through.
        targets: PEFT's `target_modules`: "all-linear" (every linear layer and `Conv1D` but a
            transformers model's output embeddings), a regular expression for the whole name, or a
            list of names and of suffixes that begin after a dot; None for no module. (PEFT reads
            None as its defaults for the architecture, where it has any.) Or layers found before,
            which are returned: so what takes `targets` alone takes experts found by
            `target_parameters`.
        target_parameters: PEFT's, a list of names and suffixes of parameters. A 3-D one (experts)
            gives a layer an expert; PEFT gives all of them one rank (`expert_groups`).
        exclude: PEFT's `exclude_modules`. Name here too what `modules_to_save` trains in full
            ("(.*[.])?classifier([.].*)?") and what `layers_to_transform` leaves out.
        task_type: PEFT's. "SEQ_CLS" leaves out modules named "classifier" or "score" and what they
            contain, which PEFT then trains in full.

    Returns:
        The layers in the order of the model's modules. Of layers that share one weight the first
        alone is listed. (PEFT makes one adapter for each, unless told `ensure_weight_tying`.)

    Raises:
        ValueError: nothing matches, or a match is not of a kind listed above; it is named. PEFT
            can also adapt `Conv1d`, `Conv3d`, `MultiheadAttention` and layers of other
            quantisers: leave these out. Or a layer given is not one of this model.

    Note:
        PEFT refuses `out_proj` and `conv1d` of Mamba models, which are listed here: exclude them.

        On several families of mixture-of-experts models of transformers 5, PEFT 0.21.2 reads
        "all-linear", and the names that the experts' projections once had, as `target_parameters`,
        and doubles the rank of the fused `gate_up_proj`. If PEFT is installed, its translation is
        applied here, so that the same layers are found; the doubled rank is in PEFT's config, not
        in these shapes. If it is not, experts are found by `target_parameters` alone.

    References:
        PEFT 0.21.2, `tuners/lora/layer.py` (`update_layer` of each class) for the shapes.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 6), torch.nn.Linear(6, 4))
        >>> [(layer.name, layer.shape) for layer in find_layers(model)]
        [('1', (4, 6))]
        >>> parameter_count(find_layers(model, ["0", "1"]), rank=8)
        528
    """
    if isinstance(targets, Sequence) and any(isinstance(each, TargetLayer) for each in targets):
        return _of_model(model, targets)
    modules, parameters = as_peft_reads(
        model, cast("Targets", targets), target_parameters, exclude=exclude, task_type=task_type
    )
    wanted = module_matcher(model, modules, exclude=exclude, task_type=task_type)
    wanted_parameter = parameter_matcher(parameters)
    # "all-linear" can catch a module of another kind whose name ends like a linear layer's ("1.0"
    # beside "0"): PEFT adapts it if it can and otherwise refuses the model; here it is passed over.
    known = not is_all_linear(modules)
    layers: list[TargetLayer] = []
    seen: set[object] = set()
    for name, module in base_modules(model):
        found = [_layer(name, module)] if wanted(name) and (known or _kind(module)) else []
        for parameter, weight in module.named_parameters(recurse=False):
            if wanted_parameter(f"{name}.{parameter}"):
                found += _experts(name, module, parameter, weight)
        for layer in found:
            identity = _identity(layer)
            if identity not in seen:
                seen.add(identity)
                layers.append(layer)
    if not layers:
        given = "" if target_parameters is None else f" or target_parameters={target_parameters!r}"
        linear = [name for name, module in base_modules(model) if _kind(module) == "linear"]
        known = f" (linear layers are {', '.join(linear[:3])}, ...)" if linear else ""
        whole = isinstance(modules, str) and not is_all_linear(modules)
        hint = f"; a string has to match a whole name, [{targets!r}] a suffix" if whole else ""
        raise ValueError(
            f"expected at least one linear layer or other module that matches targets={targets!r}"
            f"{given}, got none in {type(model).__name__}{known}{hint}"
        )
    return layers


def _of_model(model: torch.nn.Module, layers: Sequence[Any]) -> list[TargetLayer]:
    owned = {id(module) for module in model.modules()}
    for layer in layers:
        if not isinstance(layer, TargetLayer) or id(layer.module) not in owned:
            name = layer.name if isinstance(layer, TargetLayer) else layer
            raise ValueError(f"targets: expected layers of this model alone, got {name!r}")
    return list(layers)


def parameter_count(layers: Iterable[TargetLayer], rank: int) -> int:
    """How many parameters LoRAs of this rank beside every layer have.

    Args:
        layers: from `find_layers`.
        rank: of each, >= 0.

    Raises:
        ValueError: the rank is not a whole number >= 0.
    """
    return whole_number(rank, "rank", 0) * sum(sum(layer.shape) for layer in layers)


def expert_groups(layers: Iterable[TargetLayer]) -> list[list[str]]:
    """The names of layers that PEFT gives one rank: the experts of each 3-D parameter.

    For `allocate(spectra, budget, tied=expert_groups(layers))`.

    Args:
        layers: from `find_layers`; those of which there are spectra.

    Returns:
        A list of names for each parameter of several experts, in the order of the layers. Other
        layers are in none.

    Example:
        >>> import torch
        >>> block = torch.nn.Module()
        >>> block.up = torch.nn.Parameter(torch.zeros(2, 4, 3))
        >>> model = torch.nn.ModuleDict({"experts": block})
        >>> expert_groups(find_layers(model, None, target_parameters=["up"]))
        [['experts.up.0', 'experts.up.1']]
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for layer in layers if isinstance(layers, Iterable) else [layers]:
        if not isinstance(layer, TargetLayer):
            raise ValueError(f"layers: expected those of find_layers, got {type(layer).__name__}")
        if layer.expert is not None:
            groups.setdefault((id(layer.module), layer.parameter), []).append(layer.name)
    return [names for names in groups.values() if len(names) > 1]


def stored_transposed(layer: TargetLayer) -> bool:
    """Whether a layer's weight is kept as k x d."""
    return layer.kind in _TRANSPOSED or (
        layer.expert is not None and experts_transposed(layer.module)
    )


def floating_point(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered if it is a `DTensor`, once it is known to hold real numbers.

    Raises:
        ValueError: it has no data, or is not of a floating-point type of 16 bits or more (the
            scales of 8-bit floats lie elsewhere); the message names the layer.
    """
    kind = weight.dtype if weight.layout is torch.strided else weight.layout
    if weight.is_meta or kind not in _FLOATS:
        what = "a weight without data (meta device)" if weight.is_meta else str(kind)
        raise ValueError(
            f"layer {name!r}: expected a floating-point weight of 16 bits or more, got {what}"
        )
    gather = getattr(weight, "full_tensor", None)
    # A copy, lest one expert keep all of the gathered parameter alive.
    return weight if gather is None else gather().clone()


def is_packed(weight: Any) -> bool:
    """Whether a weight of bitsandbytes holds codes and not, as before it is quantised, numbers."""
    if type(weight).__name__ == "Params4bit":
        return weight.quant_state is not None  # for FSDP the codes may be stored as floats
    return not weight.is_floating_point()


def _kind(module: torch.nn.Module) -> str | None:
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Conv2d):
        return "conv2d"
    if isinstance(module, torch.nn.Linear):
        packed = type(module.weight).__name__ in ("Params4bit", "Int8Params")
        return "quantized" if packed else "linear"
    return "conv1d" if is_conv1d(module) else None


def _layer(name: str, module: Any) -> TargetLayer:
    kind = _kind(module)
    match kind:
        case "embedding":
            shape = module.embedding_dim, module.num_embeddings
        case "conv2d":
            # Of PEFT's two convolutions only the second one has groups.
            height, width = module.kernel_size
            shape = module.out_channels // module.groups, module.in_channels * height * width
        case "linear" | "quantized":
            shape = module.out_features, module.in_features
        case "conv1d":
            shape = int(module.weight.shape[1]), int(module.weight.shape[0])
        case _:
            raise ValueError(
                f"layer {name!r}: expected a Linear, Conv1D, Conv2d, Embedding or bitsandbytes "
                f"linear layer, got {type(module).__name__}"
            )
    return TargetLayer(name, shape, kind, module)


def _experts(
    name: str, module: torch.nn.Module, parameter: str, weight: torch.Tensor
) -> Iterator[TargetLayer]:
    full = f"{name}.{parameter}"
    if not name:
        raise ValueError(
            f"parameter {parameter!r}: expected one of a module inside the model, got one of the "
            "model itself, which PEFT cannot adapt"
        )
    sides = [int(side) for side in weight.shape]
    if len(sides) == 2:
        yield TargetLayer(full, (sides[0], sides[1]), "expert", module, parameter)
        return
    if len(sides) != 3:
        raise ValueError(
            f"parameter {full!r}: expected 2 or 3 dimensions, got shape {tuple(sides)}"
        )
    d, k = sides[1:]
    if experts_transposed(module):
        d, k = k, d
    for expert in range(sides[0]):
        yield TargetLayer(f"{full}.{expert}", (d, k), "expert", module, parameter, expert)


def experts_transposed(module: torch.nn.Module) -> bool:
    """Whether the module keeps its experts as k x d."""
    # transformers' Llama 4 does, but without saying so, and PEFT takes its d for k.
    return getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")


def _identity(layer: TargetLayer) -> object:
    """Equal for layers that share one weight."""
    # Not getattr: a parametrised weight is computed anew at each access, and is shared by no one.
    weight = layer.module._parameters.get(layer.parameter)
    if weight is None:
        return id(layer.module)
    strided = type(weight) is torch.nn.Parameter and weight.layout is torch.strided
    if strided and not weight.is_meta and weight.data_ptr():
        # Two parameters may also be two views of the same numbers.
        return weight.device, weight.data_ptr(), weight.shape, weight.stride(), layer.expert
    return id(weight), layer.expert


def _dequantised(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a weight of bitsandbytes stands for; one not yet quantised as it is."""
    if not is_packed(module.weight):
        return weight
    # Optional: whoever has such a module has it installed; the type checker may not.
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    owner = module.weight
    if type(owner).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight, owner.quant_state)
    # The scales move from the parameter to the layer's state at the first forward pass.
    scales = owner.SCB if getattr(owner, "SCB", None) is not None else module.state.SCB
    return functional.int8_vectorwise_dequant(weight, scales.to(weight.device))
