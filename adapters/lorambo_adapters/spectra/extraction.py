"""Many matrices, one at a time: decomposed with progress shown, and resumed where it stopped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.extraction needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.decompose import Decomposition, arithmetic, decompose
from lorambo_adapters.spectra.partial import PartialResults
from lorambo_alloc import Spectra
from lorambo_alloc.costs import whole_number


@dataclass(frozen=True)
class MatrixReader:
    """A matrix that is read when its turn comes, and not before.

    Attributes:
        name: the layer's.
        shape: (d, k).
        read: makes the matrix, d x k or k x d; called once, and the result is dropped at once.
        files: where it is read from, for messages.
    """

    name: str
    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]
    files: str = ""


@dataclass(frozen=True)
class Options:
    """What `decompose` is told, for every matrix of an extraction."""

    rank: int | None
    exact_below: int
    tolerance: float
    seed: int

    def __post_init__(self) -> None:
        if self.rank is not None:
            whole_number(self.rank, "rank", 1)
        whole_number(self.exact_below, "exact_below", 0)
        whole_number(self.seed, "seed", 0)
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"tolerance: expected a number from 0 to below 1, got {self.tolerance!r}"
            )


def extract(
    matrices: Sequence[MatrixReader],
    options: Options,
    *,
    source: str,
    output: str | os.PathLike[str] | None = None,
    key: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Decompose every matrix in turn.

    At any time memory holds one matrix, what `decompose` needs for it, and the spectra so far.

    Args:
        matrices: in the order in which the layers are to stand in the spectra.
        options: of `decompose`.
        source: what the matrices are; how the values were computed is added to it.
        output: a file for the finished spectra. Beside it lies `<output>.partial` while the work
            lasts; it is saved every few seconds, and when an error or Ctrl-C ends the run.
        key: what identifies the matrices, as JSON can hold it. A later run with equal key, options
            and output takes over what the partial file holds; None never resumes.
        progress: see `progress_bar`.

    Returns:
        The spectra, saved to `output` if there is one.

    Raises:
        ValueError: a matrix cannot be decomposed; the message names the layer.
        OSError: the output cannot be written.
    """
    partial = None
    if output is not None:
        # Without a key nothing tells whose a partial file is: a name that no other run has.
        identity = {"key": key if key is not None else os.urandom(16).hex(), **asdict(options)}
        partial = PartialResults(output, identity)
    found: dict[str, Decomposition] = {}
    work = {m.name: arithmetic(m.shape, options.rank, options.exact_below) for m in matrices}
    try:
        with progress_bar("spectra", sum(work.values()), progress) as advance:
            for matrix in matrices:
                advance(0.0, matrix.name)
                result = partial.get(matrix.name) if partial else None
                if result is None:
                    result = _decompose(matrix, options)
                    if partial:
                        partial.add(matrix.name, result)
                found[matrix.name] = result
                advance(work[matrix.name], "")
        spectra = Spectra(
            {name: result.values for name, result in found.items()},
            shapes={matrix.name: matrix.shape for matrix in matrices},
            source=f"{source}; {_method(found.values(), options)}",
            unresolved={name: result.unresolved for name, result in found.items()},
        )
        if output is not None:
            spectra.save(output)
    except BaseException:  # Ctrl-C too
        if partial:
            partial.save()
        raise
    if partial:
        partial.remove()
    return spectra


def _decompose(matrix: MatrixReader, options: Options) -> Decomposition:
    values = matrix.read()
    try:
        return decompose(
            values,
            options.rank,
            exact_below=options.exact_below,
            tolerance=options.tolerance,
            seed=options.seed,
        )
    except ValueError as error:
        where = f" of {matrix.files}" if matrix.files else ""
        raise ValueError(f"layer {matrix.name!r}{where}: {error}") from error


def _method(found: Iterable[Decomposition], options: Options) -> str:
    results = list(found)
    kept = "all" if options.rank is None else f"at most {options.rank}"
    methods = Counter(result.method for result in results)
    counts = ", ".join(f"{count} by {method}" for method, count in sorted(methods.items()))
    text = f"{kept} singular values of {len(results)} matrices ({counts})"
    if "block_krylov" in methods:
        worst = max(result.shortfall for result in results)
        text += (
            f", energy of the {options.rank} largest short by an estimated {worst:.1e} at most, "
            f"seed {options.seed}"
        )
    return text
