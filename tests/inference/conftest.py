"""Where there is no CUDA device, Triton programs run in Triton's interpreter."""

from __future__ import annotations

import os

import torch

# Before anything imports triton: what it defines is made for the one or the other.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
