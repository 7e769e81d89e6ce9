"""Several processes that share one run: `torchrun --nproc-per-node N -m roundwise quantize …`.

Calibration batches are dealt out; what is summed up over them is summed up over all ranks; each rank
solves its share of every weight's rows, and all get the whole weight. The first rank decides and writes.
What goes from rank to rank is numbers and JSON, no pickles. One process alone is the only rank.
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

from roundwise.errors import ConfigError, RunError
from roundwise.system.device import HOST, device_count
from roundwise.system.timer import timer

T = TypeVar("T")

#: How long a rank waits for the others. The longest wait is that for the first one's audit, at the end.
#: A rank that dies is noticed at once.
TIMEOUT = timedelta(hours=2)


class Ranks:
    """The processes of a run, seen from one of them.

    Args:
        rank: number of this one.
        count: of all.
        local: of those on this machine, which share its memory.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 1) -> None:
        self.rank, self.count, self.local = rank, count, local

    @property
    def is_first(self) -> bool:
        """This one decides and writes."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """There is no other."""
        return self.count == 1

    def local_device(self, device: torch.device) -> torch.device:
        """This rank's own device: of several GPUs in a machine each rank has one, in turn."""
        if device.type == "cpu" or device.index is not None or self.is_single:
            return device
        return torch.device(
            device.type, int(os.environ.get("LOCAL_RANK", "0")) % device_count(device)
        )

    def processes_sharing(self, device: torch.device) -> int:
        """How many ranks share the memory of a device."""
        if device.type == "cpu":
            return self.local
        return -(-self.local // device_count(device))

    def shard(self, items: Sequence[T]) -> Mapping[int, T]:
        """This rank's part of what is dealt out, by its number among all."""
        return {i: items[i] for i in range(self.rank, len(items), self.count)}

    def row_range(self, total: int) -> slice:
        """This rank's part of so many rows."""
        return self._rows(self.rank, total)

    def _rows(self, rank: int, total: int) -> slice:
        return slice(total * rank // self.count, total * (rank + 1) // self.count)

    def broadcast_object(self, decide: Callable[[], T]) -> T:
        """What the first rank decides, for all; JSON values. The others do not call `decide`."""
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
        """What each rank has, for all, in their order; JSON values."""
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
        """Adds up tensors of one shape over all ranks, in place; those of a GPU on their hosts."""
        if not self.is_single:
            host = values.to(HOST)
            with _collective():
                distributed.all_reduce(host)
            values.copy_(host)
        return values

    def all_reduce_max(self, *values: int) -> list[int]:
        """The largest of each number over all ranks."""
        found = torch.tensor(values)
        if not self.is_single:
            with _collective():
                distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return found.tolist()

    def all_gather_rows(self, part: torch.Tensor, total: int) -> torch.Tensor:
        """The whole of a tensor [total, ...] of which each rank has its `rows`."""
        if self.is_single:
            return part
        # In bytes: not every type can be sent. Parts differ by a row, so all are made as long.
        most = -(-total // self.count)
        padded = torch.zeros(most, *part.shape[1:], dtype=part.dtype)
        padded[: len(part)] = part
        parts = self._gather(padded.contiguous().view(torch.uint8))
        whole = [each.view(part.dtype).view(padded.shape) for each in parts]
        spans = [self._rows(rank, total) for rank in range(self.count)]
        join_process_group = torch.cat(
            [w[: s.stop - s.start] for w, s in zip(whole, spans, strict=True)]
        )
        return join_process_group.to(part.device)

    def _gather(self, data: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(data) for _ in range(self.count)]
        with _collective():
            distributed.all_gather(parts, data)
        return parts

    def check_identical(self, found: dict[str, Any]) -> None:
        """Refuses ranks that would compute otherwise than the first.

        Raises:
            ConfigError: naming one and what differs.
        """
        for rank, other in enumerate(self.all_gather_object(found)):
            wrong = [key for key in other if other[key] != found[key]]
            if wrong:
                key = wrong[0]
                raise ConfigError(
                    f"rank {rank} differs from rank {self.rank} in {key} ({other[key]}, "
                    f"{found[key]}): all must have the same files, versions and kind of processor"
                )


@contextmanager
def _collective() -> Iterator[None]:
    """An exchange; one that fails means that another rank has ended, or cannot be reached."""
    try:
        with timer.phase("exchange"):
            yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise RunError(
            f"another rank has ended or does not answer ({reason}); finished blocks are kept: run the "
            "same command again to go on, with as many ranks as you like"
        ) from error


def current_ranks() -> Ranks:
    """The ranks that this process is one of: itself, unless torch.distributed was set up."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Ranks()
    count = distributed.get_world_size()
    return Ranks(distributed.get_rank(), count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


@contextmanager
def join_process_group() -> Iterator[Ranks]:
    """Joins the other ranks while the block runs, where torchrun started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield current_ranks()
        return
    with _collective():
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield current_ranks()
    finally:
        distributed.destroy_process_group()
