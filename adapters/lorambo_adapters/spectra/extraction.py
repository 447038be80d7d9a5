"""Many matrices, one at a time: decomposed with progress shown, and resumed where it stopped."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.extraction needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

from lorambo_adapters.progress import progress_bar
from lorambo_adapters.spectra.decompose import Decomposition, arithmetic, decompose
from lorambo_adapters.spectra.distributed import Workers, balanced_shares
from lorambo_adapters.spectra.partial import PartialResults, packed, unpacked
from lorambo_alloc import Spectra
from lorambo_alloc.costs import whole_number
from lorambo_alloc.objectives import real_number


@dataclass(frozen=True)
class MatrixReader:
    """A matrix that is read when its turn comes, and not before.

    Attributes:
        name: the layer's.
        shape: (d, k).
        read: makes the matrix, d x k or k x d; called once, and the result is dropped at once.
        files: where it is read from, for messages.
        collective: whether reading it takes all workers at once (a `DTensor` is gathered).
    """

    name: str
    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]
    files: str = ""
    collective: bool = False


@dataclass(frozen=True)
class Options:
    """What `decompose` is told, for every matrix of an extraction."""

    rank: int | None
    exact_below: int
    tolerance: float
    seed: int

    def __post_init__(self) -> None:
        # Plain numbers, which JSON can hold, in the place of NumPy's.
        numbers = {"exact_below": 0, "seed": 0} | ({} if self.rank is None else {"rank": 1})
        for name, least in numbers.items():
            object.__setattr__(self, name, whole_number(getattr(self, name), name, least))
        tolerance = real_number(self.tolerance)
        if not 0 <= tolerance < 1:
            raise ValueError(
                f"tolerance: expected a number from 0 to below 1, got {self.tolerance!r}"
            )
        object.__setattr__(self, "tolerance", tolerance)


def extract(
    matrices: Sequence[MatrixReader],
    options: Options,
    *,
    source: str,
    output: str | os.PathLike[str] | None = None,
    key: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
    progress: bool | None = None,
) -> Spectra:
    """Decompose every matrix in turn; several workers share them out, by `arithmetic`.

    At any time memory holds one matrix, what `decompose` needs for it, and the spectra so far.

    Args:
        matrices: in the order in which the layers are to stand in the spectra.
        options: of `decompose`.
        source: what the matrices are; how the values were computed is added to it.
        output: a file for the finished spectra, which worker 0 writes. Beside it lies
            `<output>.partial` while the work lasts (and `<output>.partial.1` and so on, of other
            workers); it is saved every few seconds, and when an error or Ctrl-C ends the run
            (removed then, if `key` is None).
        key: what identifies the matrices, as JSON can hold it. A later run with equal key, options
            and output takes over what the partial files hold; None never resumes.
        workers: who does it, each calling this with the same arguments; by default this process
            alone. All get the same spectra.
        progress: see `progress_bar`. Worker 0 shows its own share.

    Returns:
        The spectra, saved to `output` if there is one.

    Raises:
        ValueError: a matrix cannot be decomposed (the message names the layer), or the workers'
            matrices or options differ.
        OSError: the output cannot be written.
        WorkerLost: another worker has stopped; what is finished is kept for the next run.
    """
    workers = Workers.alone() if workers is None else workers
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    identity = {"key": key, **asdict(options)}
    workers.agree("layers and options", json.dumps([identity, list(shapes.items()), str(output)]))
    partial = None
    if output is not None:
        if key is None:
            # Nothing tells whose a partial file is: a name that no other run has.
            identity["key"] = os.urandom(16).hex()
        partial = PartialResults(output, identity, workers.index)
    found = partial.found if partial else {}
    try:
        left = _left(matrices, found, workers)
        work = [arithmetic(m.shape, options.rank, options.exact_below) for m in left]
        share = set(balanced_shares(work, workers.count)[workers.index])
        total = sum(work[i] for i in share)
        shown = progress if workers.index == 0 else False
        with progress_bar("spectra", total, shown) as advance:
            for i, matrix in enumerate(left):
                if i in share:
                    advance(0.0, matrix.name)
                    result = _decompose(matrix, options)
                    found[matrix.name] = result
                    if partial:
                        partial.add(matrix.name, result)
                    advance(work[i], "")
                elif matrix.collective:
                    matrix.read()
        found = _gathered(found, workers)
        spectra = Spectra(
            {name: found[name].values for name in shapes},
            shapes=shapes,
            source=f"{source}; {_method([found[name] for name in shapes], options)}",
            unresolved={name: found[name].unresolved for name in shapes},
        )
        if output is not None and workers.index == 0:
            spectra.save(output)
        workers.barrier()  # the output is there, and nobody's results are needed any more
    except BaseException:  # Ctrl-C too
        if partial and key is None:
            partial.path.unlink(missing_ok=True)  # no run could resume it
        elif partial:
            partial.save()
        raise
    if partial:
        partial.remove()
    return spectra


def _left(
    matrices: Sequence[MatrixReader], found: Mapping[str, Decomposition], workers: Workers
) -> list[MatrixReader]:
    """What no worker has finished in an earlier run."""
    done = {name for part in workers.gather("\0".join(found).encode()) for name in _names(part)}
    return [matrix for matrix in matrices if matrix.name not in done]


def _names(part: bytes) -> list[str]:
    return part.decode().split("\0")


def _gathered(found: Mapping[str, Decomposition], workers: Workers) -> dict[str, Decomposition]:
    """All workers' results; where several have one, that of the first."""
    if workers.count == 1:
        return dict(found)
    header, values = packed(found)
    text = json.dumps(header).encode()
    parts = workers.gather(len(text).to_bytes(8, "little") + text + values.tobytes())
    results: dict[str, Decomposition] = {}
    for part in reversed(parts):
        end = 8 + int.from_bytes(part[:8], "little")
        results |= unpacked(json.loads(part[8:end]), np.frombuffer(part[end:], dtype=np.float64))
    return results


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
