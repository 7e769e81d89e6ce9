"""Both formats of layers: their sizes are those of their tensors, and their configs name all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.checkpoint.formats import (
    GPTQ,
    PACK_QUANTIZED,
    encoder,
    layout_of,
    packed_bytes,
    quantization_config,
    shape_problem,
)
from roundwise.core.quantized_weight import WIDTHS
from roundwise.core.solver import round_to_nearest

FORMATS = ["gptq", "gptq_v2", "compressed-tensors"]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"group_size": -1}])
def test_the_size_is_that_of_the_tensors(
    file_format: str, bits: int, options: dict[str, Any]
) -> None:
    config = rw.QuantizeConfig(**{"group_size": 32, "bits": bits, "format": file_format, **options})
    tensors = encoder(file_format)(round_to_nearest(torch.randn(64, 96), config), config)
    assert packed_bytes(64, 96, config) == sum(t.nbytes for t in tensors.values())
    layout = layout_of(file_format)
    assert {*layout.required} <= {*tensors} <= {*layout.types}


def test_compressed_tensors_takes_shapes_that_fill_no_words() -> None:
    odd = {"bits": 3, "group_size": 8}
    assert "multiples of 32" in (shape_problem(7, 40, rw.QuantizeConfig(**odd)) or "")
    packed = rw.QuantizeConfig(**odd, format="compressed-tensors")
    assert shape_problem(7, 40, packed) is None
    assert "does not divide" in (shape_problem(7, 41, packed) or "")
    assert layout_of("gptq_v2") is GPTQ and layout_of("compressed-tensors") is PACK_QUANTIZED


def test_layers_have_their_names_in_the_model_and_in_the_files() -> None:
    config = rw.QuantizeConfig(
        format="compressed-tensors", dynamic={"b.up": {"bits": 8}, "skipped": None}
    )
    names = {"a.up": "x.a.up", "b.up": "b.up", "a.skipped": "a.skipped"}
    settings = quantization_config(
        config, true_sequential=True, linears=names, skipped=["a.odd"],
        outside=["head", "mtp.fc"], ignored=["mtp"], head=None,
    )  # fmt: skip
    groups = {
        group["weights"]["num_bits"]: group["targets"]
        for group in settings["config_groups"].values()
    }
    assert groups == {4: ["a.up", "x.a.up"], 8: ["b.up"]}
    assert settings["ignore"] == ["a.odd", "a.skipped", "head", "re:.*mtp.*"]
