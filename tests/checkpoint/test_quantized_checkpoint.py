"""Quantized checkpoints of either format, read layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from roundwise.checkpoint.quantized_checkpoint import LazyTensor, copied_tensor, open_quantized
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import CheckpointError


def test_a_lazy_tensor_is_made_when_it_is_read(llama: Path) -> None:
    made = []
    lazy = LazyTensor("a", 8, lambda: made.append(1) or torch.arange(2))
    assert not made
    assert lazy.read().tolist() == [0, 1]
    name, info = next(iter(Checkpoint(llama).tensors.items()))
    copied = copied_tensor(name, info)
    assert copied.nbytes == info.nbytes
    assert torch.equal(copied.read(), info.read())


def test_both_formats_hold_the_same_numbers(quantized: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized("llama", bits=4, recipe="textbook")
    packed = convert(source, tmp_path / "packed", "compressed-tensors")
    ours, theirs = (open_quantized(Checkpoint(folder)) for folder in (source, packed))
    assert ours.layers.keys() == theirs.layers.keys()
    for name in ours.layers:
        assert ours.shape(name) == theirs.shape(name)
        a, b = ours.read(name), theirs.read(name)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
        assert torch.equal(a.zeros, b.zeros)


def test_a_layer_is_replaced_once_and_the_rest_copied(quantized: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(quantized("llama", bits=4, recipe="textbook"))
    layers = open_quantized(checkpoint)

    def make(name: str) -> Iterator[LazyTensor]:
        yield LazyTensor(f"{name}.weight", 4, lambda: torch.zeros(1))

    names = [tensor.name for tensor in layers.replace_layers(checkpoint, make)]
    assert len(names) == len(set(names))
    assert {name for name in names if name.endswith("proj.weight")} == {
        f"{name}.weight" for name in layers.layers
    }
    assert "model.embed_tokens.weight" in names
    assert not [name for name in names if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]


def test_a_dense_checkpoint_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        open_quantized(Checkpoint(llama))
