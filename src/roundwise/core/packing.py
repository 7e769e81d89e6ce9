"""Codes to 32-bit words and back, for every width: the bit layout of the GPTQ format.

`bits`-wide codes are one little-endian bit stream: code i takes bits i·bits … i·bits + bits - 1.

    4 bit   word 0:  code 7 ···· code 1 code 0          (bits 31-28 ···· 7-4 3-0)
    3 bit   word 0:  2 low bits of code 10 · code 9 ···· code 0
            word 1:  1 low bit of code 21 · code 20 ···· code 11 · high bit of code 10
            word 2:  code 31 ···· code 22 · 2 high bits of code 21

2, 4 and 8 bits divide a word, so they never straddle; 32 codes of 3 bits fill three words.
"""

from __future__ import annotations

import torch

from roundwise.core import native
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
    if native.usable(codes):
        return native.pack(codes.T.to(torch.uint8).contiguous(), bits)
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
