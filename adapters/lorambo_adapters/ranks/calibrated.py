"""A tuned model less its base, as a LoRA that is fitted to examples: cut by curvature, refitted."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.ranks.calibrated needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.progress import progress_bar
from lorambo_adapters.ranks.adapted_base import AdaptedBase
from lorambo_adapters.ranks.adapter_config import extracted_entries
from lorambo_adapters.ranks.adapter_writer import adapter_tensors, write_adapter
from lorambo_adapters.ranks.budgets import Budget, parsed
from lorambo_adapters.ranks.calibrated_checks import check_numbers, fisher_loss, warn_few
from lorambo_adapters.ranks.calibrated_cuts import changed_biases, cut_layers
from lorambo_adapters.ranks.calibrated_result import CalibratedLora
from lorambo_adapters.ranks.extract_ranks import captured_share, solved_ranks
from lorambo_adapters.ranks.extract_targets import other_differences
from lorambo_adapters.ranks.live_pairs import (
    LayerPair,
    bare,
    pairs_of,
    saved_modules,
    saved_tensors,
)
from lorambo_adapters.ranks.new_folder import check_new
from lorambo_adapters.ranks.predictions import (
    Wanted,
    check_alike,
    log_probabilities,
    own_predictions,
)
from lorambo_adapters.ranks.refit import CutModel, passes, refitted
from lorambo_adapters.spectra.batches import (
    MaskOf,
    as_it_was,
    attention_masks,
    for_passes,
)
from lorambo_adapters.spectra.decompose import is_exact
from lorambo_adapters.spectra.extraction import Options, extract
from lorambo_adapters.spectra.factors import warn_silent
from lorambo_adapters.spectra.fisher import Fisher, LossFn, Predict, Terms
from lorambo_adapters.spectra.leading import residual
from lorambo_alloc.costs import whole_number


def extract_calibrated(
    base: torch.nn.Module,
    tuned: torch.nn.Module,
    batches: Iterable[Any],
    budget: Budget,
    output: str | os.PathLike[str] | None = None,
    loss_fn: LossFn | None = None,
    *,
    predict: Predict | None = None,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    fisher: Fisher = "empirical",
    terms: Terms = None,
    mask: MaskOf | None = None,
    damping: float = 0.1,
    fold: bool = True,
    refit: int = 3,
    largest_change: float | None = None,
    min_rank: int = 0,
    max_rank: int = 128,
    multiple_of: int = 1,
    time_limit: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    exact_below: int = 1024,
    tolerance: float = 3e-5,
    seed: int = 0,
    progress: bool | None = None,
) -> CalibratedLora:
    """Turn what fine-tuning changed into a LoRA that predicts as the tuned model does.

    `extract_lora` needs two checkpoints and no data, and keeps the most energy. This takes both
    models in memory and calibration examples besides, of the kind that the model is for:

    1. Ranks keep the most energy of the differences D within the budget (`allocate`, exact).
    2. Each D is cut in the norm |B^1/2 D A^1/2|_F: with x a layer's inputs and g the gradients of
       its outputs, A = E[x x^T] (k x k) and B = E[g g^T] (d x d), both damped. They are measured at
       the base's weights, with the biases and the head that the adapter holds, the tuned model's,
       in the place of its own. Of all matrices of the layer's rank the cut is the nearest in this
       norm (Eckart and Young's theorem after a change of variables, `WeightedCut`).
    3. What a cut C leaves out at the inputs' mean m goes into the layer's bias, if it has one:
       (D - C) m. At the inputs of step 2 its mean output is then that with the whole D. There A is
       the moment about the mean.
    4. The kept singular values are refitted by Newton steps on the divergence from the tuned
       model's predictions, each as large as lowers it on the calibration examples (`refitted`):
       what the cuts of all layers lose together is seen there alone.

    On test an adapter of rank 1 made so, loaded onto the base, had a lower held-out loss than plain
    truncation at rank 4: MiniLM 0.527 against 0.548, Gemma 3 270M 3.980 against 3.987; and a lower
    KL from the tuned model, 0.134 against 0.169 and 0.164 against 0.177 (one fine-tune each,
    `python -m benchmarks.finetune extraction test`). On MPNet, on development examples, the loss was
    lower (0.227, 0.244) and the KL higher (0.037, 0.009). On MiniLM the refit alone, of a plain cut
    at uniform ranks, did nearly as well (0.529). Where MiniLM has all other tensors of the tuned
    model, rank 1 is behind plain rank 4.

    **Few examples**: the refit lowers KL on these very examples, and the divergences that are
    returned are of them; on others expect more. With fewer than three predictions (labelled
    tokens, or samples) for each singular value it warns: see then whether `refit=0` or a
    `largest_change` does better on examples kept apart.

    **The adapter** holds the factors of the layers that have a rank; biases of the targets, those
    of layers without a rank too; and `modules_to_save`, whole. These are not in the budget. Biases
    make it PEFT's `bias="lora_only"`, or "all" where a layer without a rank has its own: PEFT then
    takes them from the file. Programs that take factors alone (vLLM) do not. PEFT writes them into
    the base that it loads the adapter onto: `disable_adapter()` does not give that base back. A
    bias is stored where it differs from the base's. Norms, embeddings and other tensors stay the
    base's, and are listed in `others` if they differ.

    **Neither model is changed**: parameters, buffers, modes and `requires_grad` are afterwards as
    they were, after an error too. Both run in evaluation mode, the base with hooks that add the
    update and with the adapter's biases and saved modules in the place of its own.

    **Memory** beyond the two models: 4 (k^2 + d^2) bytes a layer that gets a rank or a folded bias,
    for its moments (twice that for float64 models); about 24 (d k + d^2 + k^2) for one layer while
    it is cut; the factors, in float64; 8 M^2 for M ranks in all, while refitting; and the tuned
    model's predictions on the calibration examples, up to a GiB (more is computed anew each time).
    Weights have to be plain: no DTensors. Only models on the CPU have been tried.

    **Time**: one pass forward and backward at the base, and for each step of the refit one with 1 +
    draws backward passes (`refitted`) and four forward; a Cholesky and an eigendecomposition in
    float64 a layer. On one core, shared with other work, that was 104 s for MiniLM (192 snippets,
    33 ranks in all) and 27 minutes for Gemma 3 270M (64 windows of 64 tokens, 126 ranks).

    Args:
        base: the model that the adapter will be loaded onto.
        tuned: one of the same architecture.
        batches: calibration examples: mappings of the model's arguments, on the models' device.
            A hundred or so short texts are what was tried. Kept as a list.
        budget: parameters, or bytes, or energy, as for `extract_lora`.
        output: a new folder, for PEFT. None: tensors are returned instead.
        loss_fn: as in `curvature_factors`; by default the model's own `.loss`, for which batches
            need labels, of texts two tokens at least. Not used with the true Fisher.
        predict: `predict(model, batch)` gives the logits that are to be as the tuned model's, or a
            pair of them and of which count, as in `TrueFisher`. By default the `.logits` of a model
            that chooses one of several classes: those with a label where its loss is the mean cross
            entropy of the labels, else those that `attention_mask` keeps (of a decoder beside an
            encoder, `decoder_attention_mask`).
        targets: linear layers and `Conv1D`, as PEFT's `target_modules`; of one name each, and with
            biases of their own.
        exclude: names that are no target.
        modules_to_save: as PEFT's: modules that the adapter holds whole, as the tuned model has
            them; they are no targets. None: those whose names end with "classifier", "score" or
            "qa_outputs", if they differ. An empty list: none, and the base's head stays.
        fisher: whose labels the gradients are of: "empirical", the data's; "true", drawn from the
            base's predictions, so that no labels are needed; or a `TrueFisher`.
        terms: as in `curvature_factors`.
        mask: batch to the mask of the tokens that the moments are of; by default
            `attention_mask`.
        damping: added to A and to B, relative to the mean eigenvalue of each, >= 0. What the sums'
            rounding may take away is added at least.
        fold: whether biases take up what a cut leaves out, where a layer has one.
        refit: Newton steps, at most; 0 measures no divergence.
        largest_change: the most that a step changes a singular value by, relative to it, > 0; None
            for any. Values that hardly matter on the examples can grow many times over.
        min_rank: the least rank of every layer.
        max_rank: the greatest rank of any layer.
        multiple_of: ranks are multiples of this.
        time_limit: seconds after which the allocation stops with a certified gap.
        scale: of every layer: B A is the update over it, and alpha = scale x rank.
        dtype: of the factors; by default that of the tuned weight. The refit sees them rounded.
        exact_below: see `decompose`.
        tolerance: see `decompose`.
        seed: of drawn labels, and see `decompose`.
        progress: see `progress_bar`.

    Returns:
        The ranks by layer, with sizes, energy, certificate, divergences and what was left out.

    Raises:
        FileExistsError: the output is something else already.
        FileNotFoundError: there is no folder for the output.
        ValueError: the models differ in a layer, a saved module or the number of classes, or have
            adapters or prompts; a target is not linear, or has several names; there is no batch, or
            its labels, loss or predictions are not what they should be; an argument is not of its
            form; or the budget buys no rank.
        InfeasibleError: the least ranks cost more than the budget (a `ValueError`).

    Warns:
        UserWarning: no gradient reached some layers; they are cut plainly. Or the refit has fewer
            than three predictions for each singular value.

    References:
        Eckart, Young, Psychometrika 1, 1936 (the cut: `WeightedCut`). Martens, Grosse, ICML 2015 (A
        and B). Amari 1998 (the refit: `refitted`). Hsu et al.: Language model compression with
        weighted low-rank factorization. ICLR 2022, and Wang et al.: SVD-LLM. ICLR 2025 (truncation
        in norms of gradients and of inputs).

    Example:
        >>> import torch
        >>> from copy import deepcopy
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> tuned = deepcopy(base)
        >>> with torch.no_grad():
        ...     tuned[0].weight += torch.outer(torch.ones(4), torch.arange(4.0))
        >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        >>> lora = extract_calibrated(
        ...     base, tuned, [{"x": x}], 8, predict=lambda m, b: m(b["x"]), fisher="true",
        ...     targets=["0", "2"],
        ... )
        >>> dict(lora), lora.divergences[-1] < 1e-6
        ({'0': 1, '2': 0}, True)
    """  # noqa: E501  (a line of the example)
    wanted = parsed(budget)
    check_numbers(damping, scale, largest_change, dtype)
    refit = whole_number(refit, "refit", 0)
    max_rank = whole_number(max_rank, "max_rank", 1)
    options = Options(max_rank, exact_below, tolerance, seed)
    path = None if output is None else Path(output)
    if path is not None:
        check_new(path)
    if base is tuned:
        raise ValueError("expected two models, got one twice")
    base, tuned = bare(base, "base"), bare(tuned, "tuned")
    batches = list(for_passes(batches, 2))
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    given, predict = predict, own_predictions(loss_fn) if predict is None else predict
    losses = fisher_loss(fisher, loss_fn, predict, terms, refit)
    saved = saved_modules(base, tuned, modules_to_save)
    pairs = pairs_of(base, tuned, targets, exclude, saved)
    heads = saved_tensors(tuned, saved)
    if modules_to_save is None and _equal(heads, base.state_dict()):
        saved, heads = [], {}
    limits: dict[str, Any] = {
        "objective": "frobenius",
        "weights": None,
        "min_rank": min_rank,
        "max_rank": max_rank,
        "multiple_of": multiple_of,
        "time_limit": time_limit,
    }
    types = {pair.before.name: dtype or pair.after_dtype for pair in pairs}
    shapes = {pair.before.name: pair.before.shape for pair in pairs}

    with as_it_was(base), as_it_was(tuned):
        base.eval()
        tuned.eval()
        if refit:
            check_alike(base, tuned, batches[0], given)
        spectra = extract(
            [pair.reader(is_exact(pair.before.shape, max_rank, exact_below)) for pair in pairs],
            options,
            source="tuned less base",
            progress=progress,
        )
        energy = {n: float(v @ v) + spectra.unresolved[n] for n, v in spectra.items()}
        if not any(energy.values()):
            raise ValueError("tuned: expected a target that differs from the base's, got none")
        allocation, certificate = solved_ranks(spectra, wanted, types, limits)
        ranks = {name: rank for name, rank in allocation.items() if rank}
        if not ranks:
            raise ValueError(
                f"budget {budget!r}: expected at least one rank to fit and to gain something, got "
                f"none; the cheapest costs {int(allocation.problem.costs.min()):,}"
            )
        folded = {
            pair.before.name: fold and pair.bias is not None and energy[pair.before.name] > 0
            for pair in pairs
        }
        biases = changed_biases(pairs, folded)
        others = {**heads, **{f"{name}.bias": bias for name, bias in biases.items()}}
        layers = [pair.before for pair in pairs if pair.before.name in ranks]
        config = extracted_entries(
            allocation,
            scale,
            base=getattr(getattr(base, "config", None), "name_or_path", None) or None,
            flipped=any(layer.kind == "conv1d" for layer in layers),
            bias="none" if not biases else "lora_only" if biases.keys() <= ranks.keys() else "all",
            modules_to_save=saved,
            modules=base,
        )
        mask = attention_masks(base, [pair.before for pair in pairs]) if mask is None else mask
        turns = 1 + (passes(refit) if refit else 0)
        with progress_bar("calibration", float(len(batches) * turns), progress) as advance:
            cuts = cut_layers(
                base, pairs, ranks, others, batches, losses, folded=folded, mask=mask,
                damping=damping, seed=seed, advance=advance,
            )  # fmt: skip
            warn_silent(cuts.silent, "gradient", "which are cut plainly")
            factors, divergences, predictions = cuts.factors, list[float](), 0
            with AdaptedBase(base, layers, others, cuts.folds, types, scale) as adapted:
                if refit:
                    subject = CutModel(
                        base,
                        layers,
                        adapted.cut,
                        lambda batch: log_probabilities(predict, base, batch),
                        Wanted(predict, tuned, batches),
                        {name: each.mean for name, each in cuts.folds.items()},
                    )
                    factors, divergences, predictions = refitted(
                        subject, factors, batches, steps=refit, largest_change=largest_change,
                        seed=seed, advance=advance,
                    )  # fmt: skip
                    warn_few(predictions, sum(u.shape[1] for u, _ in factors.values()))
                adapted.cut(factors)
        biases |= {name: bias.to(biases[name]) for name, bias in adapted.biases().items()}
        lost = [
            _distance(pair, adapted.stored[pair.before.name], scale)
            if pair.before.name in ranks
            else energy[pair.before.name]
            for pair in pairs
        ]

    tensors = adapter_tensors(adapted.stored, biases, heads)
    captured = captured_share(spectra, allocation, energy)
    if path is not None:
        about = {"budget": str(budget), "captured": captured, "status": certificate.status}
        write_adapter(path, tensors, config, {**about, "divergences": divergences})
    sizes = [
        (math.prod(shape), ranks.get(name, 0) * sum(shape), types[name].itemsize)
        for name, shape in shapes.items()
    ]
    return CalibratedLora(
        allocation,
        certificate,
        {name: min(shape) for name, shape in shapes.items()},
        (sum(whole for whole, _, _ in sizes), sum(small for _, small, _ in sizes)),
        (sum(whole * b for whole, _, b in sizes), sum(small * b for _, small, b in sizes)),
        captured,
        math.fsum(lost) / math.fsum(energy.values()),
        path,
        tensors if path is None else {},
        config,
        other_differences(
            base.state_dict(),
            tuned.state_dict(),
            {f"{name}.weight" for name in shapes} | others.keys(),
        ),
        divergences,
        predictions,
        sum(tensor.numel() for tensor in (*biases.values(), *heads.values())),
    )


def _equal(some: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor.to(state[key]), state[key]) for key, tensor in some.items())


def _distance(pair: LayerPair, stored: tuple[torch.Tensor, torch.Tensor], scale: float) -> float:
    difference = pair.difference(torch.float32)
    right, left = stored
    work = torch.promote_types(difference.dtype, left.dtype)
    return residual(difference, left.to(difference.device, work) * scale, right)
