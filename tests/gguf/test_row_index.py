"""Rows are found by their values, and of several equal ones the right one."""

import pytest
import torch

from roundwise.gguf.row_index import RowIndex, hash_rows


def index_of(**matrices: torch.Tensor) -> RowIndex:
    return RowIndex({name: hash_rows(matrix) for name, matrix in matrices.items()})


def no_preference(name: str) -> int:
    return 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [1, 3, 6, 64])
def test_hashes_differ_where_any_value_differs(dtype, columns):
    row = torch.randn(columns).to(dtype)
    changed = row.repeat(columns + 1, 1)
    for column in range(columns):
        changed[column + 1, column] += 1
    hashes = hash_rows(changed)
    assert len(hashes.unique()) == columns + 1
    assert torch.equal(hash_rows(row[None]), hashes[:1])


def test_rows_of_several_matrices_are_found():
    a, b = torch.randn(5, 8), torch.randn(7, 8)
    found = index_of(a=a, b=b).find(hash_rows(torch.cat([b.flip(0), a[2:]])), no_preference)
    assert found.names == ("a", "b")
    assert found.source.tolist() == [1] * 7 + [0] * 3
    assert found.row.tolist() == [*range(6, -1, -1), 2, 3, 4]


def test_a_row_that_is_nowhere_finds_nothing():
    a = torch.randn(5, 8)
    other = torch.cat([a[:3], a[3:4] + 1e-3])
    assert index_of(a=a).find(hash_rows(other), no_preference) is None
    assert RowIndex({}).find(hash_rows(a), no_preference) is None


def test_of_two_equal_matrices_the_preferred_one_is_taken():
    a = torch.randn(4, 8)
    index = index_of(first=a, second=a.clone())
    for name in ("first", "second"):
        for rows in (a, a.flip(0)):
            found = index.find(hash_rows(rows), lambda each, name=name: each == name)
            assert found.names == (name,)


def test_equal_rows_are_taken_in_order_from_the_matrix_with_the_other_rows():
    zero = torch.zeros(1, 8)
    a = torch.cat([torch.randn(2, 8), zero, torch.randn(1, 8), zero])
    b = torch.cat([zero, torch.randn(3, 8), zero])
    found = index_of(b=b, a=a).find(hash_rows(a[[4, 1, 0, 2, 3]]), no_preference)
    assert found.names == ("a",)
    assert found.row.tolist() == [2, 1, 0, 4, 3]
