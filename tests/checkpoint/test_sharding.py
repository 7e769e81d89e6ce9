"""Shards are filled in order up to a limit; several have an index, a single one has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.sharding import divide_into_shards, write_index
from roundwise.checkpoint.writer import write_safetensors


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], [range(0)]),
        ([10], [range(1)]),
        ([5, 5], [range(2)]),
        ([5, 6], [range(1), range(1, 2)]),
        ([11, 1], [range(1), range(1, 2)]),  # larger than a shard
        ([1, 11, 1], [range(1), range(1, 2), range(2, 3)]),
        ([4, 4, 4, 4, 2], [range(2), range(2, 5)]),
        ([0, 10, 0, 1], [range(3), range(3, 4)]),
    ],
)
def test_parts_of_shards(sizes: list[int], expected: list[range]) -> None:
    assert [*divide_into_shards(sizes, 10).values()] == expected


@given(st.lists(st.integers(0, 30)), st.integers(1, 20))
def test_each_part_is_in_one_shard_and_no_shard_could_take_the_next_part(
    sizes: list[int], limit: int
) -> None:
    shards = [*divide_into_shards(sizes, limit).values()]
    assert [part for shard in shards for part in shard] == [*range(len(sizes))]
    filled = [sum(sizes[part] for part in shard) for shard in shards]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(filled, shards, strict=True))
    assert all(
        size + sizes[later.start] > limit
        for size, later in zip(filled[:-1], shards[1:], strict=True)
    )


def test_names_are_those_of_transformers() -> None:
    assert [*divide_into_shards([1, 1])] == ["model.safetensors"]
    assert [*divide_into_shards([7, 7, 7], 7)] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_the_limit_is_two_gigabytes() -> None:
    assert len(divide_into_shards([10**9, 10**9])) == 1
    assert len(divide_into_shards([10**9, 10**9, 1])) == 2


def test_the_index_names_the_shard_of_each_tensor(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3), "y": torch.ones(2)})
    write_safetensors(tmp_path / "b.safetensors", {"z": torch.ones(1, dtype=torch.float16)})
    write_index(tmp_path, ["a.safetensors", "b.safetensors"])
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 22},
        "weight_map": {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"},
    }
    (tmp_path / "config.json").write_text("{}")
    assert [*Checkpoint(tmp_path).tensors] == ["x", "y", "z"]


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"x": torch.ones(3)})
    write_index(tmp_path, ["model.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_layout_is_that_of_the_hub() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 50, (100,), generator=generator).tolist()
    tensors = {f"{number:03d}": torch.zeros(size) for number, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=400
    )
    ours = divide_into_shards([4 * size for size in sizes], 400)
    assert len(ours) > 20
    names = {file: [f"{part:03d}" for part in parts] for file, parts in ours.items()}
    assert names == theirs.filename_to_tensors
