"""Memory-mapped tensors: drops pages from memory that are unused, or not used now.

transformers memory-maps safetensors files. A tensor that was read stays in memory until the last tensor
of its file is freed; here its pages are dropped earlier, and the system reads them again when needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from roundwise.system.madvise import DONTNEED, is_unmodified, madvise

#: Tokens looked up between two drops of a table's pages.
LOOKUPS = 32
#: Smallest table, in bytes, whose pages are dropped.
LARGE = 16 << 20


class MappedFiles:
    """The address ranges of all safetensors files that this process has mapped at this moment."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        try:
            text = Path("/proc/self/maps").read_text(encoding="utf-8")
        except OSError:  # not Linux: no tensor counts as mapped, and nothing is dropped
            return
        for line in text.splitlines():
            if line.endswith(".safetensors"):
                start, end = line.split(" ", 1)[0].split("-")
                self.ranges.append((int(start, 16), int(end, 16)))

    def release(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """Drops the pages of mapped tensors from memory; others are skipped.

        No data is lost: the system reads a page from its file again when it is accessed.

        Args:
            tensors: tensors that have not been modified since they were mapped.
        """
        for tensor in tensors:
            if tensor is not None and self.contains(tensor):
                madvise(tensor.data_ptr(), tensor.nbytes, DONTNEED)

    def contains(self, tensor: torch.Tensor) -> bool:
        """Tells whether a tensor's memory is part of one of the files."""
        if tensor.device.type != "cpu":
            return False
        start = tensor.data_ptr()
        return any(low <= start and start + tensor.nbytes <= high for low, high in self.ranges)


class MappedEmbedding(nn.Embedding):
    """Embedding whose table stays in its memory-mapped file: its pages are dropped from time to time.

    The system reads at least 64 KB around each row, so that after a few thousand tokens the whole table
    would be in memory. Pages that are needed again come from the system's file cache. If the weight is
    modified or replaced, its pages are not dropped any more.
    """

    mapped_address: int = 0
    """Address of the table while it is unmodified in its file; 0: pages are not dropped any more."""
    looked_up: int = 0
    """Tokens looked up since the last drop."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Looks up token ids [...]; returns [..., embedding_dim]."""
        rows = super().forward(input)
        if self.mapped_address and not torch.compiler.is_compiling():
            self.looked_up += input.numel()
            if self.looked_up >= LOOKUPS:
                self.looked_up = 0
                self._drop_pages()
        return rows

    def _drop_pages(self) -> None:
        address, nbytes = self.mapped_address, self.weight.nbytes
        if self.weight.data_ptr() != address or not is_unmodified(address, nbytes):
            self.mapped_address = 0
        else:
            madvise(address, nbytes, DONTNEED)


def use_mmap_embeddings(model: nn.Module, files: MappedFiles) -> None:
    """Turns large memory-mapped embeddings of a model into `MappedEmbedding` layers, in place.

    Tables that another layer shares are skipped: a head that is tied to a table reads all of it for
    every token.

    Args:
        model: any model.
        files: the files that its weights may be mapped from.
    """
    users = Counter(w.data_ptr() for _, w in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.nbytes >= LARGE:
            address = module.weight.data_ptr()
            if users[address] == 1 and files.contains(module.weight):
                module.__class__ = MappedEmbedding
                vars(module)["mapped_address"] = address
