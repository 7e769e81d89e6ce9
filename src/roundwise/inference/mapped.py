"""Letting go of mapped files: tensors that were read from them and are not needed any more."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import torch


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
            if tensor is None or tensor.device.type != "cpu":
                continue
            start, page = tensor.data_ptr(), mmap.PAGESIZE
            end = start + tensor.numel() * tensor.element_size()
            if any(low <= start and end <= high for low, high in self.ranges):
                start, end = -(-start // page) * page, end // page * page
                if start < end:
                    advise = ctypes.CDLL(None).madvise
                    advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
