"""Several processes that share one piece of work, such as `torchrun` starts them.

Each of them runs the same program. Work that consists of many matrices is shared out by layer;
sums over data (sketches, curvature factors) are taken by each worker over batches of its own, and
added up. All of it is `torch.distributed`; where that is not in use, a process is the only worker.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import signal
import threading
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

try:
    import torch
    import torch.distributed as dist
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "lorambo_adapters.spectra.distributed needs torch: pip install 'lorambo-alloc[torch]'",
        name=missing.name,
    ) from missing

# Workers meet after hours of work of their own; one that died is noticed by its closed connection.
_PATIENCE = timedelta(days=7)
_ENTERED: set[tuple[int, ...]] = set()  # ranks of groups that were connected before


class WorkerLost(RuntimeError):
    """Another worker has stopped, or cannot be reached: the work cannot be finished."""


class Workers:
    """The processes that share a piece of work, and this one's place among them.

    A context manager: entering connects them (all workers have to enter, in the same order as
    other collective calls), leaving disconnects. Every worker has to make the same calls.

    Args:
        group: the data-parallel group where processes also share a model (tensor or pipeline
            parallelism); by default all processes. If `torch.distributed` is not initialised, this
            process is the only worker.

    Attributes:
        index: this worker's place, 0 to `count` - 1.
        count: how many there are.

    Raises:
        WorkerLost: (from every method) another worker has stopped.

    Example:
        >>> with Workers() as workers:  # not started by torchrun
        ...     workers.index, workers.count
        (0, 1)
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._parent = group
        self._group: dist.ProcessGroup | None = None
        used = dist.is_available() and dist.is_initialized()
        self.index = dist.get_rank(group) if used else 0
        self.count = dist.get_world_size(group) if used else 1
        if self.index < 0:
            raise ValueError("group: expected a group that this process belongs to, got another")

    @classmethod
    def alone(cls) -> Workers:
        """This process as the only worker, whatever others there are."""
        workers = cls.__new__(cls)
        workers._parent = workers._group = None
        workers.index, workers.count = 0, 1
        return workers

    def __repr__(self) -> str:
        return f"Workers(index={self.index}, count={self.count})"

    @property
    def is_connected(self) -> bool:
        """Whether these were entered, and not left."""
        return self._group is not None

    def __enter__(self) -> Workers:
        if self.count > 1:
            with self._told():
                self._ranks = dist.get_process_group_ranks(self._parent or dist.group.WORLD)
                # One of our own: gloo for what lies on the CPU, and patience. Among all processes
                # its name is a number; where others do not take part, it is made of the ranks and
                # of how many groups there are. The second group of a name would be led by the
                # store to the first one's closed addresses, so there has to be one group more.
                some = len(self._ranks) < dist.get_world_size()
                if some and tuple(self._ranks) in _ENTERED:
                    dist.new_group(
                        [dist.get_rank()], backend="gloo", use_local_synchronization=True
                    )
                _ENTERED.add(tuple(self._ranks))
                group = dist.new_group(
                    self._ranks, timeout=_PATIENCE, backend="gloo", use_local_synchronization=some
                )
            assert isinstance(group, dist.ProcessGroup)  # this process belongs to it
            self._group = group
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._group is not None:
            try:
                if error is None:
                    self.barrier()  # who leaves first would take the connection along
            finally:
                group, self._group = self._group, None
                dist.destroy_process_group(group)

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the workers, in place; equal in all to the bit.

        Args:
            tensors: of the same shapes and types in all workers.
        """
        if self.count > 1:
            with self._told():
                for tensor in tensors:
                    with _contiguous(tensor) as sent:
                        dist.all_reduce(sent, group=self._for(tensor))

    def count_all(self, mine: int) -> int:
        """The sum of a number over the workers."""
        total = torch.tensor(mine)
        self.sum([total])
        return int(total)

    def united(self, names: Sequence[str], mine: Collection[str]) -> set[str]:
        """Which of the names, the same ones in all workers, some worker has."""
        has = torch.tensor([name in mine for name in names], dtype=torch.float64)
        self.sum([has])
        return {name for name, count in zip(names, has.tolist(), strict=True) if count}

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by worker 0's, in place."""
        if self.count > 1:
            with self._told():
                for tensor in tensors:
                    with _contiguous(tensor) as sent:
                        dist.broadcast(sent, self._ranks[0], group=self._for(tensor))

    def gather(self, message: bytes) -> list[bytes]:
        """Every worker's message, in their order."""
        if self.count == 1:
            return [message]
        with self._told():
            mine = torch.tensor([len(message)])
            sizes = [torch.zeros_like(mine) for _ in range(self.count)]
            dist.all_gather(sizes, mine, group=self._connected())
            lengths = [int(size) for size in sizes]
            padded = bytearray(message.ljust(max(1, *lengths), b"\0"))
            sent = torch.frombuffer(padded, dtype=torch.uint8)
            received = [torch.empty_like(sent) for _ in range(self.count)]
            dist.all_gather(received, sent, group=self._connected())
        return [
            bytes(part[:length].numpy().tobytes())
            for part, length in zip(received, lengths, strict=True)
        ]

    def barrier(self) -> None:
        """Wait until all workers are here."""
        if self.count > 1:
            with self._told():
                dist.barrier(self._connected())

    def agree(self, what: str, text: str) -> None:
        """Make sure that all workers have the same text.

        Raises:
            ValueError: (in all workers) some have another one.
        """
        digests = self.gather(hashlib.sha256(text.encode()).digest())
        others = [i for i, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise ValueError(
                f"expected the same {what} in all {self.count} workers, got others than worker 0's "
                f"in worker {', '.join(map(str, others[:8]))}"
            )

    def _connected(self) -> dist.ProcessGroup:
        if self._group is None:
            raise ValueError("workers: enter them first (with Workers() as workers: ...)")
        return self._group

    def _for(self, tensor: torch.Tensor) -> dist.ProcessGroup | None:
        group = self._connected()
        # The caller's own group where it connects devices; gloo would go by way of the CPU.
        on_device = tensor.device.type != "cpu"
        direct = on_device and f"{tensor.device.type}:gloo" not in dist.get_backend_config(
            self._parent
        )
        return self._parent if direct else group

    @contextmanager
    def _told(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise WorkerLost(
                f"worker {self.index} of {self.count}: another worker has stopped or cannot be "
                "reached, so that the work cannot be finished"
            ) from error


@contextmanager
def _contiguous(tensor: torch.Tensor) -> Generator[torch.Tensor]:
    """The tensor, or a contiguous copy that is written back."""
    dense = tensor.contiguous()
    yield dense
    if dense is not tensor:
        tensor.copy_(dense)


@contextmanager
def torchrun_workers() -> Generator[Workers]:
    """Start `torch.distributed` if this process was started by `torchrun`, and end it.

    Where it is initialised already it is used as it is, and where nobody has started several
    processes there is one worker. With CUDA, the process's device becomes that of its local rank.
    When a worker fails, torchrun ends the others by a signal (SIGTERM), which is raised here as
    `WorkerLost`, so that they can keep what they have done.

    Yields:
        The workers: `index` is this one's place, `count` how many there are.

    Example:
        >>> with torchrun_workers() as workers:  # in a program that torchrun starts, or alone
        ...     batches = ["first", "second"][workers.index :: workers.count]
        ...     # spectra = gradient_spectra(model, batches, workers=workers)
        ...     # if workers.index == 0: spectra.save(path)
        >>> batches
        ['first', 'second']
    """
    start = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    before = None
    try:
        if start and threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, _ended)
        if start:
            if torch.cuda.is_available():
                local = int(os.environ["LOCAL_RANK"])  # torchrun's
                torch.cuda.set_device(local % torch.cuda.device_count())
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        with Workers() as workers:
            yield workers
    finally:
        if start and dist.is_initialized():
            dist.destroy_process_group()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _ended(number: int, frame: object) -> None:
    raise WorkerLost("this worker was told to stop, probably because another one has failed")


def balanced_shares(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Share indices out such that the costs of all parts are about equal.

    The longest first, each to the part that has least so far: the largest part has at most 4/3 of
    what the best sharing has (Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl.
    Math. 17, 1969, Theorem 2). Equal arguments give equal shares.

    Args:
        costs: of each index, >= 0.
        parts: how many, >= 1.

    Returns:
        The indices of each part, ascending.

    Example:
        >>> balanced_shares([4.0, 1.0, 2.0, 3.0], 2)
        [[0, 1], [2, 3]]
    """
    loads = [(0.0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(loads)
        shares[part].append(index)
        heapq.heappush(loads, (load + costs[index], part))
    return [sorted(share) for share in shares]
