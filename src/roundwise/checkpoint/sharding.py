"""Divides a checkpoint into files as transformers does: one file, or numbered shards and an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roundwise.checkpoint.reader import INDEX_FILE, SINGLE_FILE, read_header
from roundwise.checkpoint.writer import write_json

#: Bytes of tensors in a shard at most, but for a part that is larger.
SHARD_BYTES = 2 * 10**9


def divide_into_shards(sizes: Sequence[int], limit: int | None = None) -> dict[str, range]:
    """Returns the files of a checkpoint, and the numbers of the parts in each.

    Args:
        sizes: bytes of its parts, in order. None is split: one above the limit has a shard of its own.
        limit: bytes to fill a shard with; None: `SHARD_BYTES`.
    """
    limit, starts, nbytes = limit or SHARD_BYTES, [0], 0
    for index, size in enumerate(sizes):
        if index > starts[-1] and nbytes + size > limit:
            starts.append(index)
            nbytes = 0
        nbytes += size
    count = len(starts)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    ranges = map(range, starts, [*starts[1:], len(sizes)])
    return dict(zip(names if count > 1 else [SINGLE_FILE], ranges, strict=True))


def write_index(folder: Path, shards: Sequence[str]) -> None:
    """Writes the index of several shards, which are in the folder; a single file has none.

    Raises:
        CheckpointError: a shard is damaged.
        StorageError: the disk is full or failed.
    """
    if len(shards) < 2:
        return
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        header = read_header(folder / shard)
        weight_map |= dict.fromkeys(header, shard)
        total += sum(info.nbytes for info in header.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
