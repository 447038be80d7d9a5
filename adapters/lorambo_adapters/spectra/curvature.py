"""Curvature of the loss in each layer, as Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.curvature needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.layers import LayerTargets, find_layers
from lorambo_adapters.spectra.batches import (
    MaskOf,
    attention_masks,
    for_passes,
    frozen,
    same_random_numbers,
    shown,
)
from lorambo_adapters.spectra.distributed import Workers
from lorambo_adapters.spectra.factors import Kind, MarginalSums, MomentSums, warn_silent
from lorambo_adapters.spectra.fisher import Fisher, FisherLoss, LossFn, Terms
from lorambo_adapters.spectra.hooks import GradientHooks, InputHooks
from lorambo_adapters.spectra.kronecker import Curvature
from lorambo_adapters.spectra.whitening import Factors
from lorambo_alloc.objectives import real_number

_KINDS = ("none", "input", "kfac", "ekfac", "diagonal")


def curvature_factors(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    kind: Kind = "kfac",
    fisher: Fisher = "empirical",
    damping: float = 1e-3,
    targets: LayerTargets = "all-linear",
    terms: Terms = None,
    mask: MaskOf | None = None,
    workers: Workers | None = None,
    seed: int = 0,
) -> Curvature:
    """Kronecker factors A (k x k) and B (d x d) of the loss's curvature in each layer.

    For L = (1/N) sum of N terms, an update D of a layer's weight changes the loss by about

        <G, D> + 1/2 tr(D^T B D A)

    where A kron B stands for the layer's Fisher information. Interaction between layers is left out
    (`coupled_directions` has it). With x a layer's inputs, g the gradients of the sum of the terms
    with respect to its outputs, T tokens and N terms:

    | kind | A | B | passes |
    |---|---|---|---|
    | "none" | I | I | 0 |
    | "input" | (1/T) sum x x^T | I | 1, forward only |
    | "kfac" | (1/T) sum x x^T | (1/N) sum g g^T | 1 |
    | "ekfac" | the same eigenvectors; eigenvalues fitted to the gradient's second moments | the same | 2 |
    | "diagonal" | diagonal, fitted to the gradient's second moments | the same | 1 |

    **What is exact.** "kfac" is the true Fisher of a linear layer that each sample passes once, if
    E[g g^T] is the same for all samples (squared error, and nothing but linear maps behind the
    layer) or there is one sample. Else it is an approximation. Sums over a sample's tokens are
    taken as if the tokens were samples of their own ("KFAC-expand", `factors`). Against the exact
    true Fisher, in 14 layers each of two small random Llamas (4 sequences of 5 tokens), the
    relative Frobenius errors were 0.4 to 1.5 (median 0.7) for "kfac", 0.3 to 0.9 (0.6) for "ekfac"
    and 0.8 to 1.0 (0.9) for "diagonal"; other tokens gave up to 8 in one layer with "kfac". What
    that does to predicted gains (3 to 10 times too high in the median): `curvature_spectra`.

    "KFAC-reduce" (a sample's mean input and summed gradient for all its tokens) was tried and left
    out. It is exact before an average over tokens with nothing but linear maps behind the layer.
    But gradients of a sample's tokens cancel in their sum, nearly all of them in the keys of an
    attention, and do not in their products with inputs: in such Llamas its predicted gains (full
    rank, damping 0.01) were 25 to 130 times the exact quadratic model's in the median, at worst
    10^5 times, where "expand" had 3 to 12.

    **"ekfac"** proper rescales each entry of the gradient in the eigenbasis by its own second
    moment S_ij. A rank does not survive that: entrywise scaling turns a matrix of rank r into one
    of any rank, and the best update of rank r is then a weighted low-rank approximation, which is
    NP-hard (Gillis, Glineur 2011). So the eigenvalues b_i a_j here are the product nearest to S
    (in Kullback-Leibler divergence: with the row and column sums of S, and its trace, that of the
    tokens' Fisher). Whitening stays two-sided, and 1/2 sigma^2 remains the gain of a rank in this
    model. The fit corrects "kfac" where |x| and |g| are correlated, not S's deviation from a
    product.

    **Damping** adds damping x (mean eigenvalue) to the eigenvalues of A and of B each: reported by
    `Factors.damping`. It lowers the predicted gains. With 0, directions without curvature have
    no gain (a pseudo-inverse).

    How many terms it takes until whitened gradients are more than noise: `curvature_spectra`.

    **Memory** beyond the model: 4 (k^2 + d^2) bytes a layer while summing (twice that for float64
    models) and 4 k^2 once, then 8 (k^2 + d^2) for the eigenvectors, layer by layer in the sums'
    place: more than the weights themselves. "diagonal" takes 16 (k + d), which "ekfac" adds. Time:
    T (k^2 + d^2) multiplications a layer and pass, and `eigh` of both factors in float64. Layers
    with one input (q, k and v) share A once it is complete.

    The model's mode is left as it is (`model.eval()` turns dropout off); all passes see the same
    random numbers. Parameters get no gradients.

    Args:
        model: any module; no parameter needs `requires_grad`.
        batches: what `loss_fn` takes. An iterator is kept as a list where there are two passes.
        loss_fn: `loss_fn(model, batch)` gives the losses of the batch's terms, one each, or their
            mean, a scalar; then `terms` says of how many. By default `model(**batch).loss` of a
            transformers model, where that is the mean cross entropy of the labels that are not
            -100. For "input" any call of the model will do; by default `model(**batch)` or
            `model(batch)`.
        kind: see above.
        fisher: "empirical" (the data's labels), "true" (labels drawn from the model's own
            output distribution), or a `TrueFisher` that says how. Not used by "none" and "input".
        damping: relative, >= 0.
        targets: which layers, as PEFT's `target_modules`, or from `find_layers`. Embedding tables have a diagonal A.
        terms: how many terms a batch has, if it is not the number of losses that `loss_fn` gives: a
            number, or a function of the batch. A language model's terms are its labelled tokens.
        mask: batch to the mask of its tokens, as in `gradient_spectra`; padding counts neither in A
            nor in T nor in B.
        workers: data-parallel processes, each with batches of its own and the same arguments
            besides: the sums are added up after each pass, and all get the factors of all batches
            (`distributed`). k^2 + d^2 numbers a layer travel.
        seed: of the drawn labels and of all random numbers in each pass.

    Returns:
        Factors by layer, with `whitenings()` for `gradient_spectra(curvature=...)`, and `save`.

    Raises:
        ValueError: there is no batch or no term, a loss is not of this form or not finite, a sum is
            not finite, an argument is out of range, or `TrueFisher.predict` counts other terms than
            loss_fn in the first batch (A and B would not be in the gradient's units).

    Warns:
        UserWarning: no gradient (or input) reached some layers; their whitening is zero.

    References:
        Martens, Grosse, ICML 2015; Eschenhagen et al., NeurIPS 2023; George et al., NeurIPS 2018
        (`factors`). Gillis, Glineur: Low-rank matrix approximation with weights or missing data is
        NP-hard. SIAM J. Matrix Anal. Appl. 32 (2011).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> loss = lambda m, x: 3 * m(x).flatten()  # one loss a sample
        >>> factors = curvature_factors(model, [x], loss, damping=0.0, targets=["0"])
        >>> [side.tolist() for side in factors.matrices()["0"]]
        [[[2.0, 0.0], [0.0, 8.0]], [[9.0]]]
    """  # noqa: E501  (a table's rows)
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    if not 0 <= real_number(damping) < math.inf:
        raise ValueError(f"damping: expected a finite number >= 0, got {damping!r}")
    workers = Workers.alone() if workers is None else workers
    layers = find_layers(model, targets)
    if kind == "none":
        identity = {layer.name: Factors(layer.name, layer.shape) for layer in layers}
        return Curvature(identity, kind=kind, terms=0, damping=0.0, source="no curvature")
    mask = attention_masks(model, layers) if mask is None else mask
    passes = 2 if kind == "ekfac" else 1
    batches = for_passes(batches, passes)
    losses = FisherLoss(loss_fn, "empirical" if kind == "input" else fisher, terms)
    reached: set[str] = set()
    factors: dict[str, Factors] = {}
    number = count = 0
    with frozen(model), shown(batches, passes, "curvature") as one_pass:
        for turn in range(1, passes + 1):
            if kind == "diagonal" or turn == 2:
                sums = MarginalSums(layers, factors or None)
            else:
                sums = MomentSums(layers, outputs=kind != "input")
            if kind == "input":
                assert isinstance(sums, MomentSums)
                hooks = InputHooks(layers, sums.receive)
            else:
                hooks = GradientHooks(layers, _noting(reached, sums), model=model)
            with same_random_numbers(model, seed + workers.index), hooks:
                count = 0
                for batch in one_pass(turn):
                    hooks.begin(mask(batch))
                    count += 1
                    if kind == "input":
                        with torch.no_grad():
                            _forward(model, batch, loss_fn)
                        continue
                    if turn == count == 1 and not losses.empirical:
                        with same_random_numbers(model, seed + workers.index):
                            losses.check_terms(model, batch)
                    add_terms(model, batch, losses, sums)
            if kind == "input":
                reached |= hooks.called
            count = workers.count_all(count)
            if not count:
                raise ValueError("batches: expected at least one batch, got none")
            workers.agree("layers of the factors", repr([(x.name, x.shape) for x in layers]))
            workers.sum(sums.accumulators())
            reached = workers.united([layer.name for layer in layers], reached)
            number = int(sums.terms)
            if not number and kind != "input":
                raise ValueError("loss_fn: expected at least one term in the batches, got none")
            factors = sums.factors(damping)
    silent = [layer.name for layer in layers if layer.name not in reached]
    warn_silent(silent, "input" if kind == "input" else "gradient", "whose whitening is zero")
    what = "" if kind == "input" else f", {losses.description} of {number} terms"
    source = f"curvature {kind!r}{what}, damping {damping:g} of the mean eigenvalue"
    return Curvature(factors, kind=kind, terms=number, damping=damping, source=source)


def add_terms(
    model: torch.nn.Module, batch: Any, losses: FisherLoss, sums: MomentSums | MarginalSums
) -> None:
    """Add a batch's terms to sums that hooks around the model fill; its inputs count once."""
    with torch.enable_grad():
        found, scalars = losses.moments(model, batch)
        sums.terms += found
        sums.counts_inputs = True
        for scalar, last in scalars:
            scalar.backward(retain_graph=not last)
            sums.counts_inputs = False


def _noting(reached: set[str], sums: MomentSums | MarginalSums) -> Callable[..., None]:
    def receive(layer: Any, inputs: Any, gradient: torch.Tensor) -> None:
        reached.add(layer.name)
        sums.receive(layer, inputs, gradient)

    return receive


def _forward(model: torch.nn.Module, batch: Any, loss_fn: LossFn | None) -> object:
    if loss_fn is not None:
        return loss_fn(model, batch)
    return model(**batch) if hasattr(batch, "keys") else model(batch)
