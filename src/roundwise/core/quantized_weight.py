"""QuantizedWeight, the result of the solver; and packing: the bit layout of the GPTQ format.

Codes are packed into 32-bit words as one little-endian bit stream: code i takes bits
i·bits … i·bits + bits - 1.

    4 bit   word 0:  code 7 ···· code 1 code 0          (bits 31-28 ···· 7-4 3-0)
    3 bit   word 0:  2 low bits of code 10 · code 9 ···· code 0
            word 1:  1 low bit of code 21 · code 20 ···· code 11 · high bit of code 10
            word 2:  code 31 ···· code 22 · 2 high bits of code 21

2, 4 and 8 bits divide a word, so they never straddle. 32 codes of 3, 5 or 7 bits fill as many words, and
16 codes of 6 bits fill three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from roundwise.core.backends import cpp
from roundwise.errors import ConfigError

#: Bits of a code that are supported.
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
#: Rows dequantized at a time: the float32 temporaries stay small.
ROWS = 512


def codes_per_block(bits: int) -> int:
    """Returns the fewest codes that fill whole words: a packed axis must be a multiple of it.

    Raises:
        ConfigError: `bits` is not supported.
    """
    if bits not in WIDTHS:
        raise ConfigError(f"bits={bits} is not supported: use one of {WIDTHS}")
    return 32 // math.gcd(32, bits)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes along the first axis into int32 words [n·bits/32, m].

    Args:
        codes: [n, m], integers 0 … 2^bits - 1.
        bits: 2 to 8.

    Raises:
        ConfigError: n is not a multiple of `codes_per_block(bits)`, or a code is out of range.
    """
    per_block = codes_per_block(bits)
    n, m = codes.shape
    if n % per_block:
        raise ConfigError(f"{bits}-bit codes pack in multiples of {per_block}, not {n}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ConfigError(f"codes outside 0 … {2**bits - 1} cannot be packed in {bits} bits")
    if codes.device.type == "cpu" and cpp.available():
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
    """Unpacks int32 words [w, m] into uint8 codes [w·32/bits, m]: the inverse of `pack`.

    Raises:
        ConfigError: w is not a multiple of the words that `codes_per_block(bits)` codes fill.
    """
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
        # >> on int32 copies the sign bit; the mask removes it, for straddling codes too.
        code = blocks[:, word] >> shift
        if shift + bits > 32:
            kept = 32 - shift
            code = (code & (2**kept - 1)) | (blocks[:, word + 1] << kept)
        codes[:, i] = (code & mask).to(torch.uint8)
    return codes.reshape(-1, m)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes, scales and zero points of one weight [out, in], and its errors."""

    codes: torch.Tensor
    """uint8 [out, in], original channel order."""
    scales: torch.Tensor
    """float16 [out, groups], finite and not zero; a negative one flips the range of its group."""
    zeros: torch.Tensor
    """int32 [out, groups], 0 … 2^bits - 1."""
    g_idx: torch.Tensor
    """int32 [in]: the group of each input channel."""
    bits: int
    """Width of a code: 2 to 8."""
    relative_error: float | None = None
    """||(W - Q)X||² / ||WX||² on the calibration inputs; None if there was no Hessian."""
    weight_error: float = 0.0
    """||W - Q||² / ||W||²: can be checked later without calibration inputs."""
    energy: float = 0.0
    """||WX||² per token, the denominator of `relative_error`."""
    weight_energy: float = 0.0
    """||W||², the denominator of `weight_error`."""
    damp_percent: float | None = None
    """Damping used."""
    damp_tried: tuple[float, ...] = ()
    """Every damping tried, in order; more than one: H was indefinite with the first."""
    fallback: str | None = None
    """Reason why this weight was rounded to nearest instead of solved; None if it was solved."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns Q [out, in] = scales · (codes - zeros), computed in float32, as `dtype`."""
        groups = self.g_idx.long()
        Q = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for start in range(0, len(Q), ROWS):
            rows = slice(start, start + ROWS)
            part = self.codes[rows].to(torch.float32)
            part -= self.zeros[rows].to(torch.float32)[:, groups]
            part *= self.scales[rows].to(torch.float32)[:, groups]
            Q[rows] = part
        return Q
