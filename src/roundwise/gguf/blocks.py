"""Codes of quantized layers as GGUF blocks: 32 neighbouring weights of a row and their scale.

A weight of ours is scale · (code - zero). A block holds one float16 scale d and either centred codes, so
that a weight is d · q, or codes from zero on and a float16 minimum m, so that it is d · q + m:

    type   bytes   weight   q                 exact for
    Q4_0   18      d · q    -8 … 7            2, 3 bits; 4 bits, symmetric
    Q4_1   20      d · q+m  0 … 15            4 bits, asymmetric, but for m = -d · zero as float16
    Q5_0   22      d · q    -16 … 15          5 bits, symmetric
    Q5_1   24      d · q+m  0 … 31            5 bits, asymmetric, but for m
    Q8_0   34      d · q    -128 … 127        6, 7 bits; 8 bits, symmetric

It knows tensors, but no files and no names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundwise.core.quantized_weight import QuantizedWeight

#: Weights of a block.
BLOCK = 32
#: Rows packed at a time.
ROWS = 1024


@dataclass(frozen=True)
class BlockType:
    """One way to store a block."""

    name: str
    """Name in GGUF."""
    nbytes: int
    """Bytes of a block."""
    bits: int
    """Bits of a code."""
    has_minimum: bool = False
    """True: codes begin at zero and a minimum is added; False: codes are centred."""

    @property
    def middle(self) -> int:
        """The stored code that means zero, if codes are centred."""
        return 0 if self.has_minimum else 2 ** (self.bits - 1)

    def holds(self, offsets: CodeRange) -> bool:
        """Tells whether it stores every weight of some layers without rounding a code."""
        if self.has_minimum:
            return offsets.bits <= self.bits
        return -self.middle <= offsets.low and offsets.high < self.middle


#: Smallest first.
BLOCK_TYPES = (
    BlockType("Q4_0", 18, 4), BlockType("Q4_1", 20, 4, has_minimum=True),
    BlockType("Q5_0", 22, 5), BlockType("Q5_1", 24, 5, has_minimum=True), BlockType("Q8_0", 34, 8),
)  # fmt: skip


@dataclass(frozen=True)
class CodeRange:
    """Range of the codes of some layers: what decides the type of their blocks."""

    bits: int
    low: int
    """Lowest code - zero that can be."""
    high: int

    @classmethod
    def of(cls, q: QuantizedWeight) -> CodeRange:
        """Returns the range of all codes that a layer with this width and zero points can have."""
        return cls(q.bits, -int(q.zeros.max()), 2**q.bits - 1 - int(q.zeros.min()))

    def join(self, other: CodeRange) -> CodeRange:
        """Returns the range of this and another layer's codes."""
        return CodeRange(
            max(self.bits, other.bits), min(self.low, other.low), max(self.high, other.high)
        )


def block_type(offsets: CodeRange) -> BlockType | None:
    """Returns the smallest type that stores the codes of some layers exactly; None: there is none."""
    return next((kind for kind in BLOCK_TYPES if kind.holds(offsets)), None)


@dataclass(frozen=True)
class BlockedCodes:
    """Codes of a weight with a scale and a zero point for each block of 32 columns."""

    codes: torch.Tensor
    """uint8 [rows, columns]."""
    scales: torch.Tensor
    """float16 [rows, blocks]."""
    zeros: torch.Tensor
    """int32 [rows, blocks]."""


def blocked_codes(q: QuantizedWeight, columns: torch.Tensor | None = None) -> BlockedCodes | str:
    """Returns a layer's codes with a scale per block, or why they cannot be stored in blocks.

    Args:
        q: the layer's weight.
        columns: the column of `q` that each column of the result is; None: all in order.
    """
    groups = q.g_idx.long() if columns is None else q.g_idx.long()[columns]
    if len(groups) % BLOCK:
        return f"it has {len(groups)} input channels, which are not blocks of {BLOCK}"
    of_blocks = groups.reshape(-1, BLOCK)
    if not bool((of_blocks == of_blocks[:, :1]).all()):
        return f"{BLOCK} neighbouring input channels are not in one group"
    scales = q.scales.to(torch.float16)
    if not bool((torch.isfinite(scales) & ((scales != 0) | (q.scales == 0))).all()):
        return "float16 cannot hold its scales"
    first = of_blocks[:, 0]
    codes = q.codes if columns is None else q.codes[:, columns]
    return BlockedCodes(codes, scales[:, first], q.zeros[:, first])


def pack_blocks(weight: BlockedCodes, kind: BlockType) -> torch.Tensor:
    """Returns the bytes of all blocks, uint8 [rows, blocks · kind.nbytes].

    Args:
        weight: the codes; `kind` must hold them.
        kind: type of the blocks.
    """
    rows, columns = weight.codes.shape
    blocks = columns // BLOCK
    packed = torch.empty(rows, blocks, kind.nbytes, dtype=torch.uint8)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        zeros = weight.zeros[part].to(torch.int16)
        q = weight.codes[part].to(torch.int16).reshape(-1, blocks, BLOCK)
        if not kind.has_minimum:
            q = q - zeros[..., None] + kind.middle
        fields = [weight.scales[part][..., None].contiguous().view(torch.uint8)]
        if kind.has_minimum:
            minimum = -weight.scales[part].to(torch.float32) * zeros.to(torch.float32)
            fields.append(minimum.to(torch.float16)[..., None].contiguous().view(torch.uint8))
        packed[part] = torch.cat([*fields, *_code_bytes(q, kind)], dim=-1)
    return packed.reshape(rows, -1)


def _code_bytes(q: torch.Tensor, kind: BlockType) -> list[torch.Tensor]:
    """Returns the bytes of stored codes q [rows, blocks, 32], in the order of the block.

    Byte i has the low four bits of code i and of code i + 16; a fifth bit of code i is bit i of a word
    in front of them. Codes of 8 bits are signed bytes.
    """
    if kind.bits == 8:
        return [(q - kind.middle).to(torch.int8).view(torch.uint8)]
    low, high = (q & 15)[..., : BLOCK // 2], (q & 15)[..., BLOCK // 2 :]
    nibbles = (low | high << 4).to(torch.uint8)
    if kind.bits == 4:
        return [nibbles]
    fifth = (q >> 4).reshape(*q.shape[:-1], 4, 8) << torch.arange(8, dtype=q.dtype)
    return [fifth.sum(-1).to(torch.uint8), nibbles]
