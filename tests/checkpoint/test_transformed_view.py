"""A transformed tensor looks like any other, whole or in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.transformed_view import (
    TensorTransform,
    TransformedCheckpoint,
    TransformedInfo,
)
from roundwise.checkpoint.writer import write_safetensors
from roundwise.core.hadamard import Rotation
from roundwise.errors import CheckpointError


def saved(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    """A checkpoint with these tensors and an empty config."""
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text("{}")
    return Checkpoint(folder)


def test_a_transform_scales_and_then_rotates() -> None:
    X = torch.randn(3, 16, dtype=torch.float64)
    gain, rotation = torch.rand(16, dtype=torch.float64) + 0.5, Rotation(16, 1)
    assert torch.equal(TensorTransform(gain=gain).apply(X.float()), X.float().double() * gain)
    both = TensorTransform(gain=gain, rotation=rotation).apply(X)
    torch.testing.assert_close(both, rotation.rows(X * gain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, -1])
def test_bytes_are_those_of_the_tensor(
    axis: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    T = torch.randn(48, 48).to(dtype)
    source = saved(tmp_path, T=T).tensors["T"]
    gain = torch.rand(48, dtype=torch.float64) + 0.5
    rotation = Rotation(48, 0)
    info = TransformedInfo.from_source(source, TensorTransform(axis, gain, rotation))
    expected = rotation.rows((T.T if axis == 0 else T).double() * gain)
    expected = (expected.T if axis == 0 else expected).to(dtype)
    assert torch.equal(info.read(), expected)
    assert (info.dtype, info.shape, info.nbytes) == (source.dtype, (48, 48), source.nbytes)
    for size in (100, 512, 1 << 20):
        monkeypatch.setattr("roundwise.checkpoint.transformed_view.CHUNK", size)
        pieces = list(info.chunks())
        assert b"".join(pieces) == expected.contiguous().view(torch.uint8).numpy().tobytes()
        assert {len(piece) for piece in pieces[:-1]} <= {size}


def test_rows_are_transformed_unless_the_transform_mixes_them(tmp_path: Path) -> None:
    source = saved(tmp_path, T=torch.randn(12, 16)).tensors["T"]
    along_rows = TransformedInfo.from_source(source, TensorTransform(rotation=Rotation(16, 0)))
    assert torch.equal(along_rows.rows(5, 3).read(), along_rows.read()[5:8])
    gain = torch.rand(12, dtype=torch.float64)
    with pytest.raises(CheckpointError, match="single rows cannot be read"):
        TransformedInfo.from_source(source, TensorTransform(0, gain)).rows(0, 1)


def test_integers_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, T=torch.ones(4, dtype=torch.int8)).tensors["T"]
    with pytest.raises(
        CheckpointError, match="holds weights as I8, which cannot be scaled or rotated"
    ):
        TransformedInfo.from_source(source, TensorTransform(fill=1.0))


def test_a_view_has_transformed_added_and_unchanged_tensors(tmp_path: Path) -> None:
    a, b = torch.randn(2, 4).half(), torch.randn(3)
    source = saved(tmp_path, a=a, b=b)
    transforms = {"a": TensorTransform(fill=0.5), "c": TensorTransform(gain=torch.full((4,), 3.0))}
    added, overrides = {"c": source.tensors["a"]}, {"tie_word_embeddings": False}
    view = TransformedCheckpoint(source, transforms, added=added, overrides=overrides)
    read = {name: info.read() for name, info in view.tensors.items()}
    assert torch.equal(read["a"], torch.full((2, 4), 0.5, dtype=torch.float16))
    assert torch.equal(read["b"], b)
    assert torch.equal(read["c"], (a.double() * 3).half())
    assert view.config == view.overrides == overrides
    assert source.config == source.overrides == {}
    assert view.nbytes() == source.nbytes()  # what the folder holds
    exact = TransformedCheckpoint(source, transforms, added=added, exact=True)
    assert torch.equal(exact.tensors["c"].read(), (a.double() * 3).float())
    with pytest.raises(KeyError, match="d"):
        TransformedCheckpoint(source, {"d": TensorTransform(fill=1.0)})
