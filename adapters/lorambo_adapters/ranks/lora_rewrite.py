"""The tensors of a LoRA file at lower ranks, made one layer at a time."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.lora_rewrite needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.ranks.tensor_writer import Planned, planned_as
from lorambo_adapters.ranks.truncate import squared_distance, truncated
from lorambo_adapters.spectra.lora_files import LoraFile, Parts
from lorambo_adapters.spectra.low_rank import LowRankUpdate, Pair, pair_of, refuse
from lorambo_adapters.spectra.whitening import Factors

Weights = Mapping[str, Pair | Factors]


@dataclass(frozen=True)
class FileLayer:
    """A layer of a LoRA file.

    Attributes:
        raw: its name in the file.
        keys: of its tensors, by what they are.
        updates: one, or one an expert.
        component: which configuration it has, if any.
        pattern_name: what this configuration's patterns see.
        is_parameter: whether that is a parameter's name.
    """

    raw: str
    keys: Parts
    updates: tuple[LowRankUpdate, ...]
    component: str | None
    pattern_name: str
    is_parameter: bool

    @property
    def rank(self) -> int:
        """The rank that it has."""
        return self.updates[0].rank

    @property
    def limit(self) -> int:
        """The greatest rank that makes sense: no more than it has, nor than either side."""
        return min(self.rank, *self.updates[0].shape)

    @property
    def names(self) -> list[str]:
        """Of the updates."""
        return [update.name for update in self.updates]

    @property
    def must_stay(self) -> bool:
        """Whether more than B A would be lost with the layer: magnitudes, a bias."""
        return "magnitude" in self.keys or "bias" in self.keys


def file_layers(file: LoraFile, keep_magnitude: bool) -> list[FileLayer]:
    """The layers of a file that can be truncated, in the natural order of their names.

    Raises:
        ValueError: as `LoraFile.updates`; or factors are in LyCORIS's Tucker form.
    """
    order = {update.name: i for i, update in enumerate(file.updates(None, keep_magnitude))}
    layers = [
        FileLayer(raw, keys, tuple(file.updates_of(raw)), *file.pattern_name(raw))
        for raw, keys in file.layers.items()
    ]
    refuse(
        [
            f"layer {layer.updates[0].name!r}: expected a product of two factors, got LyCORIS's "
            "Tucker form with a third (lora_mid)"
            for layer in layers
            if "middle" in layer.keys
        ],
        file.label,
    )
    return sorted(layers, key=lambda layer: order[layer.updates[0].name])


def _unwrapped(key: str, left_out: Container[str]) -> str:
    """The key of a module's own tensor once the module has no adapter.

    PEFT keeps the module of an adapted layer in "base_layer", and so are the names of what is
    stored of it: a bias that was trained, an embedding table.
    """
    name, inner, tensor = key.rpartition(".base_layer.")
    return f"{name}.{tensor}" if inner and name in left_out else key


class Rewrite:
    """A LoRA file's tensors at new ranks.

    A layer that keeps its rank keeps its tensors to the bit (unless scales are folded in).

    Args:
        file: the LoRA.
        layers: its layers.
        ranks: layer name to rank; experts of one parameter have one.
        curvature: of all layers, or None.
        fold_scale: whether scales become 1, and B takes them up.
        device: where to compute.

    Attributes:
        planned: key to shape and type of every tensor.
        scales: name of a layer in the file to its scale; layers without rank have none.
        distance: |D - D'|_F^2 summed over the layers made so far.
        energy: |D|_F^2 likewise.
    """

    def __init__(
        self,
        file: LoraFile,
        layers: list[FileLayer],
        ranks: Mapping[str, int],
        *,
        curvature: Weights | None,
        fold_scale: bool,
        device: torch.device | str | None,
    ) -> None:
        self._file, self._curvature, self._device = file, curvature, device
        self.planned: dict[str, Planned] = {}
        self.scales: dict[str, float] = {}
        self.distance = self.energy = 0.0
        self._seen: set[str] = set()
        self._last: tuple[str, dict[str, torch.Tensor]] = "", {}
        self._of: dict[str, tuple[FileLayer, int]] = {}  # what has to be made, by key
        self._alphas: dict[str, torch.Tensor] = {}
        self._biases: dict[str, float] = {}  # factors by which biases are stored otherwise
        left_out = {layer.raw for layer in layers if ranks[layer.names[0]] == 0}
        self._others = {_unwrapped(key, left_out): key for key in file.others}
        kept = {key: planned_as(file.infos[old]) for key, old in self._others.items()}
        for layer in layers:
            rank = ranks[layer.names[0]]
            if rank == 0:
                for update in layer.updates:
                    self._count(update, None)
                continue
            old = layer.updates[0].scale
            scale = 1.0 if fold_scale else old
            if (rank, scale) == (layer.rank, old):
                self.scales[layer.raw] = old
                for key in layer.keys.values():
                    self.planned[key] = planned_as(file.infos[key])
                for update in layer.updates:
                    self._count(update, update)
                continue
            for part, key in layer.keys.items():
                plan = planned_as(file.infos[key])
                count = rank * len(layer.updates)
                if part == "alpha":
                    # As rounded to its type: B takes up the difference.
                    alpha = torch.full(plan.shape, scale * rank, dtype=plan.dtype)
                    self._alphas[key] = alpha
                    scale = float(alpha) / rank
                elif part in ("A", "B"):
                    before, after = plan.shape[:1], plan.shape[2:]
                    shape = (*before, count, *after) if part == "B" else (count, *plan.shape[1:])
                    plan = Planned(shape, plan.dtype)
                    self._of[key] = layer, rank
                self.planned[key] = plan
            self.scales[layer.raw] = scale
            if "bias" in layer.keys:  # PEFT scales it with B A
                self._biases[layer.keys["bias"]] = old / scale
        self.planned |= kept

    def make(self, key: str) -> torch.Tensor:
        """One of the planned tensors. Those of one layer, one after the other, are made once.

        Raises:
            ValueError: factors or curvature cannot be used; the message names the layer.
        """
        if key in self._alphas:
            return self._alphas[key]
        if key in self._biases:
            bias = self._file.read(key)
            return (bias.to(torch.float64) * self._biases[key]).to(bias)
        if key not in self._of:
            return self._file.read(self._others.get(key, key))
        layer, rank = self._of[key]
        if self._last[0] != layer.raw:
            self._last = layer.raw, self._factors(layer, rank)
        return self._last[1][key]

    def _factors(self, layer: FileLayer, rank: int) -> dict[str, torch.Tensor]:
        """The new factors of a layer, by key."""
        keys, count = layer.keys, len(layer.updates)
        new_b = torch.zeros(self.planned[keys["B"]].shape, dtype=self.planned[keys["B"]].dtype)
        new_a = torch.zeros(self.planned[keys["A"]].shape, dtype=self.planned[keys["A"]].dtype)
        rows_b, rows_a = new_b.view(len(new_b), -1), new_a.view(len(new_a), -1)
        first = layer.raw not in self._seen
        self._seen.add(layer.raw)
        for i, update in enumerate(layer.updates):
            left, right = update.read()
            device = self._device or left.device
            left, right = left.to(device), right.to(device)
            pair = (
                (None, None) if self._curvature is None else pair_of(self._curvature[update.name])
            )
            try:
                b, a = truncated(left, right, rank, pair)
            except ValueError as error:
                raise ValueError(f"layer {update.name!r}: {error}") from error
            b = b * (update.scale / self.scales[layer.raw])
            # As `LoraFile` reads them: an expert's rows of A together, its columns of B apart.
            rows_b[:, i::count] = b.to(rows_b)
            rows_a[i * rank : (i + 1) * rank] = a.to(rows_a)
            for part, rows in (("A", rows_a), ("B", rows_b)):
                if not bool(torch.isfinite(rows).all()):
                    raise ValueError(
                        f"layer {update.name!r}: expected a factor {part} in the range of "
                        f"{rows.dtype}, got an overflow; leave the scale out of it"
                    )
            if first:
                stored = rows_b[:, i::count].to(torch.float64) * self.scales[layer.raw]
                a = rows_a[i * rank : (i + 1) * rank].to(torch.float64)
                left = left.to(torch.float64) * update.scale
                distance, energy = squared_distance(
                    (left, right), (stored.to(device), a.to(device))
                )
                self.distance += distance
                self.energy += energy
        return {keys["B"]: new_b, keys["A"]: new_a}

    def _count(self, update: LowRankUpdate, after: LowRankUpdate | None) -> None:
        """Count a layer that is left out, or left as it is."""
        left, right = (factor.to(torch.float64) for factor in update.read())
        energy = float(((left.T @ left) * (right @ right.T)).sum()) * update.scale**2
        self.energy += energy
        self.distance += energy if after is None else 0.0
