"""The layout that the native kernel computes from, and the way back to the file's.

Codes lie in tiles of 64 output channels, [tile, word, 64]. A word holds neighbouring columns of one
channel, as in the file; only 3-bit codes, which straddle words there, come as two bits of 16 columns in
each of two words and the third bits of all 32 in a third:

    word 0   bits 2i, 2i + 1: low bits of column i            (i = 0 … 15)
    word 1   the same of column 16 + i
    word 2   third bits: of columns 0-3, 4-7, 16-19, 20-23 from bits 0, 1, 8, 9 on, every second bit,
             and of the column 8 after each, 16 bits above

A product takes pairs of columns at once: those that lie 16 bits apart in a word.

Columns are those of the file in turn, if each group is a run of them that fills whole words. Otherwise
(act-order, odd group sizes) they are sorted by group and padded; x is read in that order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from roundwise.core.packing import codes_per_block, pack, unpack
from roundwise.inference.kernels.base import PackedWeight

TILE = 64
#: Columns that share one scale of the activations, at most.
RUN = 128


class Columns(NamedTuple):
    """Which column of the file each column of the layout is."""

    source: torch.Tensor
    """int64 [columns]; `in_features` where there is none."""
    runs: torch.Tensor
    """int32 [runs, 2]: number of columns, and their group."""
    in_features: int
    in_turn: bool
    """The columns are those of the file, in turn."""


def columns_of(weight: PackedWeight) -> Columns:
    """The order in which the kernel passes through the columns."""
    unit, groups = codes_per_block(weight.bits), weight.channel_groups()
    counts = torch.bincount(groups, minlength=weight.groups)
    in_turn = bool((groups.diff() >= 0).all()) and not bool((counts % unit).any())
    source = torch.arange(weight.in_features)
    if not in_turn:
        padding = torch.full((unit,), weight.in_features)
        by_group = torch.split(torch.argsort(groups, stable=True), counts.tolist())
        source = torch.cat([torch.cat([c, padding[: -len(c) % unit]]) for c in by_group])
    runs = [
        (min(RUN, padded - start), group)
        for group, padded in enumerate((-(-counts // unit) * unit).tolist())
        for start in range(0, padded, RUN)
    ]
    return Columns(source, torch.tensor(runs, dtype=torch.int32), weight.in_features, in_turn)


def reading_order(columns: Columns, bits: int) -> torch.Tensor:
    """int32 [columns]: the activations that the halves of the pairs are multiplied with, in turn."""
    apart = 8 if bits == 3 else 16 // bits
    return columns.source.reshape(-1, 2, apart).mT.reshape(-1).to(torch.int32)


def to_tiles(weight: PackedWeight, columns: Columns) -> torch.Tensor:
    """int32 [tiles, words, 64]: the codes as the kernel reads them."""
    if columns.in_turn and weight.bits != 3:
        return tiled(weight.qweight)
    codes = unpack(weight.qweight, weight.bits)
    if not columns.in_turn:
        codes = torch.cat([codes, codes.new_zeros(1, codes.shape[1])])[columns.source]
    return tiled(_planes(codes) if weight.bits == 3 else pack(codes, weight.bits))


def from_tiles(tiles: torch.Tensor, out_features: int, columns: Columns, bits: int) -> torch.Tensor:
    """The inverse of `to_tiles`: qweight as the file has it."""
    words = flat(tiles, out_features)
    if columns.in_turn and bits != 3:
        return words
    codes = _from_planes(words) if bits == 3 else unpack(words, bits)
    if not columns.in_turn:
        real = columns.source < columns.in_features
        restored = torch.empty(columns.in_features, out_features, dtype=torch.uint8)
        restored[columns.source[real]] = codes[real]
        codes = restored
    return pack(codes, bits)


def tiled(rows: torch.Tensor) -> torch.Tensor:
    """[n, out] as [tiles, n, 64], zeros where the last tile is not full."""
    n, out_features = rows.shape
    tiles = -(-out_features // TILE)
    if tiles * TILE != out_features:
        rows = torch.nn.functional.pad(rows, (0, tiles * TILE - out_features))
    return rows.reshape(n, tiles, TILE).transpose(0, 1).contiguous()


def flat(tiles: torch.Tensor, out_features: int) -> torch.Tensor:
    """The inverse of `tiled`."""
    return tiles.transpose(0, 1).flatten(1)[:, :out_features].contiguous()


def _high_bit(column: int) -> int:
    """Where the third bit of one of 32 columns lies in the third word."""
    pair = column % 8
    return column // 16 * 8 + pair // 4 + pair % 4 * 2 + column % 16 // 8 * 16


def _planes(codes: torch.Tensor) -> torch.Tensor:
    """3-bit codes [columns, out] as words [3 · columns / 32, out]."""
    units = codes.reshape(-1, 32, codes.shape[1])
    words = torch.zeros(len(units), 3, codes.shape[1], dtype=torch.int32)
    for i in range(32):
        code = units[:, i].to(torch.int32)
        words[:, i // 16] |= (code & 3) << (2 * (i % 16))
        words[:, 2] |= (code >> 2) << _high_bit(i)
    return words.flatten(0, 1)


def _from_planes(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_planes`."""
    units = words.reshape(-1, 3, words.shape[1])
    codes = torch.empty(len(units), 32, words.shape[1], dtype=torch.uint8)
    for i in range(32):
        low = units[:, i // 16] >> (2 * (i % 16)) & 3
        high = units[:, 2] >> _high_bit(i) & 1
        codes[:, i] = (low | high << 2).to(torch.uint8)
    return codes.flatten(0, 1)
