"""Ranks: several processes that share one run, started by `torchrun --nproc-per-node N -m roundwise …`.

Calibration batches are split over the ranks and their sums are all-reduced. Each rank solves its share
of the rows of every weight, and all gather the whole weight. The first rank decides and writes. Ranks
exchange numbers and JSON, no pickles. A process that runs alone is the only rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from roundwise.errors import ConfigError, RunError, first_line
from roundwise.system.device import HOST, device_count
from roundwise.system.timer import timer

T = TypeVar("T")

#: Maximum time that a rank waits for the others. The longest wait is for the first rank's audit at the
#: end. A rank that dies is noticed at once.
TIMEOUT = timedelta(hours=2)


class Ranks:
    """The ranks of a run, as seen from one of them.

    Args:
        rank: number of this rank.
        count: number of ranks.
        local: number of ranks on this machine, which share its memory.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 1) -> None:
        self.rank, self.count, self.local = rank, count, local
        self.is_first = rank == 0
        """True for the rank that decides and writes."""
        self.is_single = count == 1
        """True if there is no other rank."""

    def local_device(self, device: torch.device) -> torch.device:
        """Returns this rank's device: the GPUs of a machine are assigned to its ranks in turn."""
        if device.type == "cpu" or device.index is not None or self.is_single:
            return device
        return torch.device(
            device.type, int(os.environ.get("LOCAL_RANK", "0")) % device_count(device)
        )

    def processes_sharing(self, device: torch.device) -> int:
        """Returns the number of ranks that share the memory of a device."""
        if device.type == "cpu":
            return self.local
        return -(-self.local // device_count(device))

    def shard(self, items: Sequence[T]) -> Mapping[int, T]:
        """Returns this rank's share of `items`: index in `items` -> item."""
        return {i: items[i] for i in range(self.rank, len(items), self.count)}

    def row_range(self, total: int) -> slice:
        """Returns this rank's share of `total` rows; it may be empty."""
        return self._row_range_of(self.rank, total)

    def _row_range_of(self, rank: int, total: int) -> slice:
        return slice(total * rank // self.count, total * (rank + 1) // self.count)

    def broadcast_object(self, decide: Callable[[], T]) -> T:
        """Returns, on every rank, what `decide` returns on the first rank.

        Args:
            decide: returns JSON values; called on the first rank only.
        """
        if self.is_single:
            return decide()
        text = json.dumps(decide()).encode() if self.is_first else b""
        size = self.all_reduce_sum(torch.tensor([len(text)]))
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_first:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        with _collective():
            distributed.broadcast(data, src=0)
        return json.loads(data.numpy().tobytes())  # type: ignore[no-any-return]

    def all_gather_object(self, value: T) -> list[T]:
        """Returns every rank's `value`, in the order of ranks; JSON values."""
        if self.is_single:
            return [value]
        text = json.dumps(value).encode()
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(text)
        sizes = self.all_reduce_sum(sizes)
        data = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return [
            json.loads(part[:size].numpy().tobytes())
            for part, size in zip(self._gather(data), sizes.tolist(), strict=True)
        ]

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place, and returns it; GPUs exchange via their hosts."""
        if not self.is_single:
            host = values.to(HOST)
            with _collective():
                distributed.all_reduce(host)
            values.copy_(host)
        return values

    def all_reduce_max(self, *values: int) -> list[int]:
        """Returns the maximum of each value over all ranks."""
        largest = torch.tensor(values)
        if not self.is_single:
            with _collective():
                distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return largest.tolist()

    def all_gather_rows(self, part: torch.Tensor, total: int) -> torch.Tensor:
        """Returns the whole of a tensor [total, ...] from the rows that each rank has.

        Args:
            part: this rank's rows, those of `row_range(total)`.
            total: rows of the whole tensor.
        """
        if self.is_single:
            return part
        # As bytes, because not every dtype can be sent; padded to one length, because shares differ by
        # up to one row.
        longest = -(-total // self.count)
        padded = torch.zeros(longest, *part.shape[1:], dtype=part.dtype)
        padded[: len(part)] = part
        parts = self._gather(padded.contiguous().view(torch.uint8))
        tensors = [data.view(part.dtype).view(padded.shape) for data in parts]
        spans = [self._row_range_of(rank, total) for rank in range(self.count)]
        rows = [t[: span.stop - span.start] for t, span in zip(tensors, spans, strict=True)]
        return torch.cat(rows).to(part.device)

    def _gather(self, data: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(data) for _ in range(self.count)]
        with _collective():
            distributed.all_gather(parts, data)
        return parts

    def check_identical(self, facts: dict[str, Any]) -> None:
        """Refuses ranks that would compute something else than this one.

        Args:
            facts: name -> JSON value that must be equal on all ranks.

        Raises:
            ConfigError: a rank differs; names it and the first fact that differs.
        """
        for rank, other in enumerate(self.all_gather_object(facts)):
            name = next((name for name in other if other[name] != facts[name]), None)
            if name is not None:
                raise ConfigError(
                    f"rank {rank} differs from rank {self.rank} in {name} ({other[name]}, "
                    f"{facts[name]}): all ranks need the same files, versions and kind of processor"
                )


@contextmanager
def _collective() -> Iterator[None]:
    """Context manager around an exchange between ranks: times it, and explains its failure."""
    try:
        with timer.phase("exchange"):
            yield
    except RuntimeError as error:
        raise RunError(
            f"another rank has ended or does not answer ({first_line(error)[:120]}); finished blocks "
            "are kept: run the same command again to resume, with any number of ranks"
        ) from error


def current_ranks() -> Ranks:
    """Returns the ranks of this process group; a single rank if torch.distributed is not set up."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Ranks()
    count = distributed.get_world_size()
    return Ranks(distributed.get_rank(), count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


@contextmanager
def join_process_group() -> Iterator[Ranks]:
    """Context manager: joins the other ranks if torchrun started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield current_ranks()
        return
    with _collective():
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield current_ranks()
    finally:
        distributed.destroy_process_group()
