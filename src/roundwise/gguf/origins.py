"""Finds out how each tensor of a GGUF file is made from the tensors of the original model.

No rule of any architecture is used: every row of a tensor is looked up among the rows of the original,
by its values after the rounding of the file. So one search finds tensors that are the same, whose rows
are permuted (q and k of Llama), that are parts of others, or that are joined from several (q, k and v,
stacked experts). The rest is looked for with 1 added (norms of Gemma), transposed (GPT-2), and with
permuted columns. An origin counts only if the tensor that it makes equals the file's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from roundwise.checkpoint.reader import TensorInfo
from roundwise.gguf.row_index import RowIndex, hash_rows
from roundwise.model.blocks import HEADS
from roundwise.system.activity import announce

#: Numbers rounded at a time.
CHUNK_NUMEL = 1 << 22
FLOATS = ("F64", "F32", "F16", "BF16")
#: Tensor of the output head in a GGUF file.
HEAD = "output.weight"
#: How the original's tensors are seen while rows are looked up: as they are; with 1 added; transposed.
View = Literal["plain", "plus 1", "transposed"]
VIEWS: tuple[View, ...] = ("plain", "plus 1", "transposed")


@dataclass(frozen=True, eq=False)
class Origin:
    """The way a tensor is made: each of its rows is a row of a tensor of the original."""

    sources: tuple[str, ...]
    """Names of the original's tensors."""
    source: torch.Tensor
    """int64 [rows]: the source of each row, as an index into `sources`."""
    row: torch.Tensor
    """int64 [rows]: its row there."""
    view: View = "plain"
    columns: torch.Tensor | None = None
    """int64 [columns]: the column there of each column; None: all in order."""

    def kind(self) -> str:
        """Returns the way in words, for results."""
        words = [
            word
            for word, is_so in (
                (self.view, self.view != "plain"),
                ("joined", len(self.sources) > 1),
                ("rows permuted", bool(self._jumps().any())),
                ("columns permuted", self.columns is not None),
            )
            if is_so
        ]
        return ", ".join(words) or "the same rows"

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a source's tensor as the matrix that rows are taken from."""
        matrix = as_matrix(tensor, self.view)
        return matrix if self.columns is None else matrix[:, self.columns]

    def assemble(self, matrix: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Returns the tensor as a matrix [rows, columns].

        Args:
            matrix: returns the matrix of a source; called once for each.
        """
        result = torch.empty(0)
        for index, name in enumerate(self.sources):
            values = matrix(name)
            if not index:
                result = torch.empty(len(self.row), values.shape[1], dtype=values.dtype)
            here = self.source == index
            result[here] = values[self.row[here]]
        return result

    def is_certain(self, target: torch.Tensor, make: Callable[[], torch.Tensor]) -> bool:
        """Tells whether the order of rows is known for other values than those it was found with.

        Rows of a source that are equal in the target may be exchanged; that must make no difference.

        Args:
            target: the tensor that the origin was found for, as a matrix.
            make: returns what is assembled from other values, [rows, anything].
        """
        if not bool(self._jumps().any()):
            return True
        rows = torch.stack([self.source, hash_rows(target)])
        distinct = torch.unique(rows, dim=1).shape[1]
        if distinct == rows.shape[1]:
            return True
        made = torch.cat([rows, hash_rows(make())[None]])
        return bool(torch.unique(made, dim=1).shape[1] == distinct)

    def _jumps(self) -> torch.Tensor:
        """Returns for each row but the first: it does not follow the one before it in their source."""
        return (self.row[1:] != self.row[:-1] + 1) & (self.source[1:] == self.source[:-1])


def placed_rows(origins: Iterable[Origin]) -> dict[str, int]:
    """Returns for each tensor of the original how many of its rows have a place."""
    rows: dict[str, list[torch.Tensor]] = {}
    for origin in origins:
        for index, name in enumerate(origin.sources):
            rows.setdefault(name, []).append(origin.row[origin.source == index])
    return {name: len(torch.unique(torch.cat(parts))) for name, parts in rows.items()}


def as_matrix(tensor: torch.Tensor, view: View = "plain") -> torch.Tensor:
    """Returns a tensor of any shape as a matrix whose columns are its last axis; a vector is one row.

    Args:
        tensor: the tensor.
        view: how it is seen.
    """
    if view == "transposed":
        tensor = tensor.transpose(-1, -2)
    elif view == "plus 1":  # llama.cpp's converter computes in float16 or float32
        tensor = (tensor if tensor.dtype == torch.float16 else tensor.to(torch.float32)) + 1
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)


def rounded(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a matrix rounded from float32, as llama.cpp's converter rounds; few rows at a time."""
    if matrix.dtype == dtype:
        return matrix
    result = torch.empty(matrix.shape, dtype=dtype)
    step = max(1, CHUNK_NUMEL // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        result[rows] = matrix[rows].to(torch.float32).to(dtype)
    return result


def find_origins(
    targets: Mapping[str, torch.Tensor], originals: Mapping[str, TensorInfo]
) -> dict[str, Origin]:
    """Returns the proven origin of each tensor that has one.

    Args:
        targets: tensors of the GGUF file by name, in float32, float16 or bfloat16.
        originals: tensors of the original model by name, dequantized.
    """
    search = _Search(originals)
    origins: dict[str, Origin] = {}
    ways: list[Callable[[str, torch.Tensor], Origin | None]] = [
        *(partial(search.find_rows, view=view) for view in VIEWS),
        search.find_columns,
    ]
    for way in ways:
        left = [name for name in targets if name not in origins]
        search.used = {source for origin in origins.values() for source in origin.sources}
        for index, name in enumerate(left):
            announce("finding the original of each tensor", index, len(left))
            origin = way(name, targets[name])
            if origin is not None and search.makes(origin, as_matrix(targets[name])):
                origins[name] = origin
    return origins


class _Search:
    """Finds origins among the tensors of a model.

    Args:
        originals: tensors of the original by name.
    """

    def __init__(self, originals: Mapping[str, TensorInfo]) -> None:
        self.infos = {
            name: info
            for name, info in originals.items()
            if info.dtype in FLOATS and info.nbytes and info.shape
        }
        #: Tensors that have a place already: only plain rows are looked for in them again.
        self.used: set[str] = set()
        self._indexes: dict[tuple[View, torch.dtype], RowIndex] = {}
        self._columns: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def find_rows(self, name: str, target: torch.Tensor, view: View) -> Origin | None:
        """Looks for the rows of a tensor among all rows, seen in some way; the result is not proven.

        Args:
            name: name of the tensor in the GGUF file.
            target: the tensor.
            view: how the original's tensors are seen.
        """
        if not _is_seen(view, target.ndim):
            return None
        key = view, target.dtype
        if key not in self._indexes:
            self._indexes[key] = self._index(*key)
        rows = self._indexes[key].find(hash_rows(as_matrix(target)), partial(_preference, name))
        return None if rows is None else Origin(rows.names, rows.source, rows.row, view)

    def find_columns(self, name: str, target: torch.Tensor) -> Origin | None:
        """Looks for a tensor whose columns are those of a tensor; the result is not proven."""
        matrix = as_matrix(target)
        columns = hash_rows(matrix.T)
        ordered, order = columns.sort(stable=True)
        if target.ndim > 1 and len(torch.unique(ordered)) < len(ordered):
            return None  # equal columns: their order cannot be known
        names = [n for n, info in self.infos.items() if info.shape == tuple(target.shape)]
        for source in sorted({*names} - self.used, key=partial(_preference, name), reverse=True):
            ordered_there, order_there = self._column_hashes(source, target.dtype).sort(stable=True)
            if torch.equal(ordered, ordered_there):
                permutation = torch.empty_like(order)
                permutation[order] = order_there
                rows = torch.arange(len(matrix))
                return Origin((source,), torch.zeros_like(rows), rows, columns=permutation)
        return None

    def makes(self, origin: Origin, target: torch.Tensor) -> bool:
        """Tells whether an origin makes exactly the values of a matrix."""
        made = origin.assemble(
            lambda name: rounded(origin.read(self.infos[name].read()), target.dtype)
        )
        return torch.equal(made, target)

    def _index(self, view: View, dtype: torch.dtype) -> RowIndex:
        """Returns the index of all rows that tensors may be made of."""
        return RowIndex(
            {
                name: hash_rows(rounded(as_matrix(info.read(), view), dtype))
                for name, info in self.infos.items()
                if _is_seen(view, len(info.shape)) and (view == "plain" or name not in self.used)
            }
        )

    def _column_hashes(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Returns the hashes of the columns of a tensor after rounding."""
        key = name, dtype
        if key not in self._columns:
            matrix = rounded(as_matrix(self.infos[name].read()), dtype)
            self._columns[key] = hash_rows(matrix.T)
        return self._columns[key]


def _is_seen(view: View, dimensions: int) -> bool:
    """Tells whether tensors with some number of axes are seen in a way: 1 is added to vectors only."""
    return view == "plain" or (dimensions < 2) == (view == "plus 1")


def _preference(name: str, source: str) -> tuple[bool, bool]:
    """Returns how likely a source is the right one of several with equal values; higher is likelier.

    Both names have the number of the block, whatever else is in them.

    Args:
        name: name of the tensor in the GGUF file.
        source: name of the original's tensor.
    """
    blocks = [re.findall(r"(?<=\.)\d+(?=\.)", each)[:1] for each in (name, source)]
    is_head = source.rpartition(".")[0].rpartition(".")[2] in HEADS
    return blocks[0] == blocks[1], is_head == (name == HEAD)
