"""QuantizedWeight: what a linear layer's weight becomes.

Codes to 32-bit words and back, for every width: the bit layout of the GPTQ format.

`bits`-wide codes are one little-endian bit stream: code i takes bits i·bits … i·bits + bits - 1.

    4 bit   word 0:  code 7 ···· code 1 code 0          (bits 31-28 ···· 7-4 3-0)
    3 bit   word 0:  2 low bits of code 10 · code 9 ···· code 0
            word 1:  1 low bit of code 21 · code 20 ···· code 11 · high bit of code 10
            word 2:  code 31 ···· code 22 · 2 high bits of code 21

2, 4 and 8 bits divide a word, so they never straddle; 32 codes of 3 bits fill three words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundwise.core.backends import cpp
from roundwise.errors import ConfigError

WIDTHS = (2, 3, 4, 8)


def codes_per_block(bits: int) -> int:
    """Fewest codes that fill whole words: the divisor that a packed axis must have."""
    if bits not in WIDTHS:
        raise ConfigError(f"bits={bits} is not supported: use one of {WIDTHS}")
    return 32 if bits == 3 else 32 // bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs `codes` [n, m] along the first axis into int32 words [n·bits/32, m].

    Args:
        codes: integer tensor with values 0 … 2^bits - 1.
        bits: 2, 3, 4 or 8.

    Raises:
        ConfigError: n is not a multiple of `codes_per_block(bits)`, or a code is out of range.
    """
    per_block = codes_per_block(bits)
    n, m = codes.shape
    if n % per_block:
        raise ConfigError(f"{bits}-bit codes pack in multiples of {per_block}, not {n}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ConfigError(f"codes outside 0 … {2**bits - 1} cannot be packed in {bits} bits")
    if cpp.usable(codes):
        return cpp.pack(codes.T.to(torch.uint8).contiguous(), bits)
    words = per_block * bits // 32
    blocks = codes.reshape(n // per_block, per_block, m)
    packed = torch.zeros(n // per_block, words, m, dtype=torch.int64, device=codes.device)
    for i in range(per_block):
        word, shift = divmod(i * bits, 32)
        code = blocks[:, i].to(torch.int64)
        packed[:, word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            packed[:, word + 1] |= code >> (32 - shift)
    # The top bit of a word is a sign bit to int32: subtract 2^32 where it is set.
    packed -= (packed >> 31) << 32
    return packed.to(torch.int32).reshape(-1, m)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: int32 [w, m] -> uint8 codes [w·32/bits, m]."""
    per_block = codes_per_block(bits)
    per_words = per_block * bits // 32
    w, m = words.shape
    if w % per_words:
        raise ConfigError(f"{bits}-bit codes come in blocks of {per_words} words, not {w}")
    blocks = words.reshape(w // per_words, per_words, m)
    codes = torch.empty(w // per_words, per_block, m, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for i in range(per_block):
        word, shift = divmod(i * bits, 32)
        # >> on int32 drags the sign along; the mask removes it, straddling codes included.
        code = blocks[:, word] >> shift
        if shift + bits > 32:
            kept = 32 - shift
            code = (code & (2**kept - 1)) | (blocks[:, word + 1] << kept)
        codes[:, i] = (code & mask).to(torch.uint8)
    return codes.reshape(-1, m)


#: Rows dequantized at a time: the float32 temporaries stay small.
ROWS = 512


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes, scales and zero points of one weight [out, in], and how well they stand for it."""

    codes: torch.Tensor
    """uint8 [out, in], original channel order."""
    scales: torch.Tensor
    """float16 [out, groups], finite and not zero; negative ones turn a range around."""
    zeros: torch.Tensor
    """int32 [out, groups], 0 … 2^bits - 1."""
    g_idx: torch.Tensor
    """int32 [in]: the group of each input channel."""
    bits: int
    relative_error: float | None = None
    """||(W - Q)X||² / ||WX||² on the calibration inputs; None when no Hessian was given."""
    weight_error: float = 0.0
    """||W - Q||² / ||W||²: what can be checked later without calibration inputs."""
    energy: float = 0.0
    """||WX||² that `relative_error` is relative to, per token."""
    weight_energy: float = 0.0
    """||W||² that `weight_error` is relative to."""
    damp_percent: float | None = None
    """Damping that was used in the end."""
    damp_tried: tuple[float, ...] = ()
    """Every damping tried, in order; more than one means that H was indefinite at the first."""
    fallback: str | None = None
    """Why this weight was rounded to nearest instead of solved; None when it was solved."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q [out, in] = scales · (codes - zeros), computed in float32, returned as `dtype`."""
        groups = self.g_idx.long()
        Q = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for start in range(0, len(Q), ROWS):
            rows = slice(start, start + ROWS)
            part = self.codes[rows].to(torch.float32)
            part -= self.zeros[rows].to(torch.float32)[:, groups]
            part *= self.scales[rows].to(torch.float32)[:, groups]
            Q[rows] = part
        return Q
