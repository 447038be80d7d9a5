"""Spectra of trained LoRAs: exact, from the factors, with no d x k product."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.lora needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.spectra.lora_files import LoraFile
from lorambo_adapters.spectra.lora_modules import changed_bases, live_updates
from lorambo_adapters.spectra.low_rank import LowRankUpdate, Pair, low_rank_spectra
from lorambo_adapters.spectra.whitening import Factors
from lorambo_adapters.targets import unwrap
from lorambo_alloc import Spectra

Lora = str | os.PathLike[str] | torch.nn.Module | Mapping[str, torch.Tensor]
"""A folder or a file, a live model, or a state dict."""


def lora_spectra(
    lora: Lora,
    *,
    adapter: str | Sequence[str] | None = None,
    alpha: float | None = None,
    ignore_magnitude: bool = False,
    curvature: Mapping[str, Pair | Factors] | None = None,
    device: torch.device | str | None = None,
    source: str | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Compute the singular values of what a LoRA adds to each layer's weight.

    The update s B A of rank r has at most r singular values that are not zero. They are computed
    from a QR decomposition of each factor and the values of an r x r matrix, in float64, one layer
    at a time. `product_values` states accuracy and memory. Values that are rounding are not set to
    zero, and no energy is unresolved.

    What is read:

    - a folder as PEFT saves it. The scale is alpha / r or, with `use_rslora`, alpha / sqrt(r), by
      the first key of `rank_pattern` and of `alpha_pattern` that fits the name, as when PEFT loads
      it. (PEFT sorts the keys when it saves them. Where several fit, another one may have counted
      in training: a wrong rank is noticed, a wrong alpha cannot be.)
    - a file of diffusers, kohya's sd-scripts or LyCORIS (LoCon, its Tucker form too), with keys in
      lora_A / lora_B, lora.down / lora.up or lora_down / lora_up. The scale is alpha / r by a
      layer's own `.alpha`; else by the PEFT configuration in the file's metadata; else, as those
      programs do, alpha = r. (LyCORIS writes the alpha of its rs_lora such that this holds.)
    - a live model with layers of PEFT's LoRA, whose scale is the one in use.

    Names are those that PEFT's patterns see, without "base_model.model."; kohya's
    ("lora_unet_down_blocks_0_...") are kept, as no rule turns them back. Shapes (d, k) are such
    that a rank costs d + k parameters: a convolution's factors are flattened, an embedding's update
    is embedding_dim x num_embeddings, an expert of a 3-D parameter is a layer of its own. Of files,
    the layers are in the natural order of their names, of a model in that of its modules.

    Args:
        lora: see above; or a state dict with a file's keys.
        adapter: a live model's adapters by name, by default those that are active. Of a folder, the
            names of the folders in it that PEFT saved. Several are added up: the spectrum is that
            of the sum of their updates.
        alpha: for the layers of a file that has none. Of no effect elsewhere.
        ignore_magnitude: a DoRA's update, magnitude * (W + s B A) / norm - W, is not of low rank,
            and is refused. True takes s B A and leaves out the magnitudes; the source says so.
        curvature: what `curvature_factors` returns, or layer to (A, B): the second moments of the
            inputs (k x k) and of the outputs' gradients (d x d), symmetric and positive
            semidefinite, or 1-D diagonals, or None for the identity. The values are then those of
            B^1/2 D A^1/2 over sqrt(2), D being the update, so that the gains of `frobenius`, 1/2
            sigma^2, are in units of the loss: what a quadratic model with this curvature loses
            where the update is truncated, if the update leads to its minimum. Layers that the LoRA
            does not have may be there too.
        device: where to compute; by default where each layer's factors lie. It must know float64
            (Apple's MPS does not: pass "cpu" there).
        source: what to record as the spectra's origin, put before how they were computed; by
            default the name of the file, or the class of the model.
        progress: None shows a bar if stderr is a terminal, False never.

    Returns:
        Spectra with shapes; min(r, d, k) values a layer.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the LoRA is of another kind (AdaLoRA, LoHa, KaSA, ...), its configuration does
            not give the scale, or one or more layers lack a factor or have factors that are not
            finite or of shapes or ranks that do not fit; one message lists them. Also for a file
            with experts whose configuration names several parameters of one module: the file does
            not say which factors are whose (load it into its model and pass that).

    Warns:
        UserWarning: the LoRA's initialisation (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) has changed the
            base model's weights, so that s B A is the difference to those, and not what was learnt.

    References:
        PEFT 0.21.2, `utils/other.py` (`get_pattern_key`) and `tuners/lora/layer.py` (`update_layer`
        and `get_delta_weight` of each class). diffusers, `utils/state_dict_utils.py`. kohya-ss,
        sd-scripts, `networks/resize_lora.py`. LyCORIS, `modules/locon.py`.

    Example:
        >>> import torch
        >>> state = {"q.lora_down.weight": torch.eye(2, 5), "q.lora_up.weight": torch.eye(4, 2)}
        >>> spectra = lora_spectra({**state, "q.alpha": torch.tensor(6.0)})
        >>> spectra["q"].round(6), spectra.shapes
        (array([3., 3.]), {'q': (4, 5)})
    """
    if alpha is not None and not (isinstance(alpha, Real) and math.isfinite(alpha)):
        raise ValueError(f"alpha: expected a finite number, got {alpha!r}")
    adapters = [adapter] if isinstance(adapter, str) else adapter
    if adapters is not None and (not adapters or len(set(adapters)) < len(adapters)):
        raise ValueError(f"adapter: expected one or more different names, got {adapter!r}")
    updates: list[LowRankUpdate]
    if isinstance(lora, torch.nn.Module):
        updates = live_updates(lora, adapters, ignore_magnitude)
        changed = changed_bases(lora, adapters)
        origin, others = f"LoRA of {type(unwrap(lora)).__name__}", 0
    else:
        files = _files(lora, adapters)
        updates = [u for file in files for u in file.updates(alpha, ignore_magnitude)]
        bases = {config.changed_base for file in files for config in file.configs.values()}
        changed = {name for name in bases if name is not None}
        origin = " + ".join(f"LoRA {Path(file.label).name}" for file in files)
        others = sum(len(file.others) for file in files)
    origin = source or origin
    if adapters:
        origin += f", adapter {' + '.join(adapters)}"
    if ignore_magnitude:
        origin += ", magnitudes (DoRA) ignored"
    if others:
        origin += f", {others} other tensors passed over"
    if changed:
        warnings.warn(
            f"the base model's weights were changed by {', '.join(sorted(changed))}: these are "
            "spectra of the difference to the changed weights, not of what was learnt",
            stacklevel=2,
        )
        origin += f", relative to weights changed by {', '.join(sorted(changed))}"
    return low_rank_spectra(
        updates, source=origin, curvature=curvature, device=device, progress=progress
    )


def _files(
    lora: str | os.PathLike[str] | Mapping[str, torch.Tensor], adapters: Sequence[str] | None
) -> list[LoraFile]:
    if isinstance(lora, Mapping):
        if adapters is not None:
            raise ValueError(f"adapter: expected none for a state dict, got {adapters!r}")
        return [LoraFile(lora)]
    if not isinstance(lora, (str, os.PathLike)):
        raise ValueError(f"expected a path, a module or a state dict, got {type(lora).__name__}")
    path = Path(lora)
    if adapters is None:
        return [LoraFile(path)]
    if not path.is_dir():
        raise ValueError(f"adapter: expected a folder of adapters, got {path}")
    return [LoraFile(path / name) for name in adapters]
