"""Where there is no CUDA device, Triton programs run in Triton's interpreter."""

from __future__ import annotations

import os

import torch

# Before anything imports triton, as transformers does: its programs are made for one of the two.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
