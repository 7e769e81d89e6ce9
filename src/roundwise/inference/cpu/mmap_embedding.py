"""Letting go of mapped files: what was read from them and is not needed any more, or not now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from roundwise.system.madvise import DONTNEED, is_unmodified, madvise

#: Tokens that are looked up before the pages of a table go, and bytes from which on a table is worth it.
LOOKUPS, LARGE = 32, 16 << 20


class MappedFiles:
    """The safetensors files that this process has mapped, as they are when it is made."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        try:
            text = Path("/proc/self/maps").read_text(encoding="utf-8")
        except OSError:  # no Linux: nothing is let go of
            return
        for line in text.splitlines():
            if line.endswith(".safetensors"):
                start, end = line.split(" ", 1)[0].split("-")
                self.ranges.append((int(start, 16), int(end, 16)))

    def release(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """Drops the whole pages of these tensors from memory, if they are a file's.

        Transformers maps checkpoints, so a tensor that was read stays resident until its file's last
        tensor goes. Nothing is lost: who looks at such a page again has it read from the file again.
        """
        for tensor in tensors:
            if tensor is not None and self.holds(tensor):
                madvise(tensor.data_ptr(), tensor.nbytes, DONTNEED)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a part of one of the files."""
        if tensor.device.type != "cpu":
            return False
        start = tensor.data_ptr()
        return any(low <= start and start + tensor.nbytes <= high for low, high in self.ranges)


class MappedEmbedding(nn.Embedding):
    """A table that stays in its file: rows that were looked up do not pile up in memory.

    The system brings the neighbours of a row along, 64 KB in all or more, so that after a few thousand
    tokens all of a table is in memory. Its pages go every now and then; when they are needed again, they
    come from what the system keeps of the file. Weights that were changed in memory stay, for good.
    """

    place: int = 0
    """Where the weight is in memory while it is in its file; 0: no more."""
    looked_up: int = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., embedding_dim]."""
        found = super().forward(input)
        if self.place and not torch.compiler.is_compiling():
            self.looked_up += input.numel()
            if self.looked_up >= LOOKUPS:
                self.looked_up = 0
                self._release()
        return found

    def _release(self) -> None:
        weight = self.weight
        if weight.data_ptr() != self.place or not is_unmodified(self.place, weight.nbytes):
            self.place = 0
        else:
            madvise(self.place, weight.nbytes, DONTNEED)


def keep_embeddings_on_disk(model: nn.Module, files: MappedFiles) -> None:
    """Makes MappedEmbedding layers, in place, of the large tables that nothing else uses.

    A head that is tied to a table reads all of it for every token.
    """
    users = Counter(w.data_ptr() for _, w in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.nbytes >= LARGE:
            place = module.weight.data_ptr()
            if users[place] == 1 and files.holds(module.weight):
                module.__class__ = MappedEmbedding
                vars(module)["place"] = place
