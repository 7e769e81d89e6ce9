"""The group size of a model, and what cannot be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.layer_formats import (
    LayerShape,
    fit_group_size,
    format_problems,
    layer_shapes,
    tensor_parallel_degrees,
)
from tests.helpers import windows


def shapes(*widths: int, rows: int = 64, last: str = "") -> list[LayerShape]:
    """Layers with these input channels."""
    return [LayerShape(f"blocks.{i}.{last or 'proj'}", rows, n) for i, n in enumerate(widths)]


@pytest.mark.parametrize(
    ("widths", "size"),
    [
        ((4096, 11008), 128),
        ((576, 576, 1536), 64),  # SmolLM2 135M
        ((640, 1024, 2048), 128),  # Gemma 3 270M
        ((2880, 2880, 4096), 64),  # GPT-OSS
        ((96, 64), 32),
        ((4096, 4096, 584), 128),  # no size takes the last one: the others get what they can have
    ],
)
def test_the_largest_that_all_layers_take(widths: tuple[int, ...], size: int) -> None:
    fitted, note = fit_group_size(shapes(*widths), rw.QuantizeConfig())
    assert fitted.group_size == size
    assert not fitted.chooses_group_size
    assert (note is None) == (size == 128)


def test_the_note_counts() -> None:
    note = fit_group_size(shapes(576, 576, 1536, 960), rw.QuantizeConfig())[1]
    assert note == (
        "groups of 64: 3 of 4 layers have input channels (576) that groups of 128 do not divide"
    )


def test_a_given_size_is_kept() -> None:
    config = rw.QuantizeConfig(group_size=128)
    assert fit_group_size(shapes(576), config) == (config, None)


@pytest.mark.parametrize("dynamic", [{"odd": None}, {"odd": {"group_size": 32}}])
def test_layers_with_a_size_of_their_own_do_not_count(dynamic: dict[str, Any]) -> None:
    given = [*shapes(4096, 1024), *shapes(576, last="odd")]
    config = rw.QuantizeConfig(dynamic=dynamic)
    assert fit_group_size(given, config)[0].group_size == 128
    assert not format_problems(given, fit_group_size(given, config)[0])
    # Another setting of their own leaves them the common size.
    config = rw.QuantizeConfig(dynamic={"odd": {"bits": 8}})
    assert fit_group_size(given, config)[0].group_size == 64


@pytest.mark.parametrize(
    ("given", "settings", "problem"),
    [
        (shapes(576, 576, 1536), {"group_size": 128},
         "group_size=128 does not divide the input channels of 2 of 3 layers (such as "
         "blocks.0.proj, 64 x 576): use --group-size 64"),
        (shapes(4096) + shapes(584, 584, last="odd"), {"group_size": 128},
         "group_size=128 does not divide the input channels of 2 of 3 layers (such as "
         "blocks.0.odd, 64 x 584): use --override 'odd$=group_size:-1'"),
        (shapes(64, 64, rows=40), {"bits": 3, "group_size": 32},
         "3-bit codes are stored in multiples of 32, which the channels of 2 of 2 layers (such as "
         "blocks.0.proj, 40 x 64) are not: use --skip 'proj$'"),
    ],
)  # fmt: skip
def test_one_sentence_for_all_layers(
    given: list[LayerShape], settings: dict[str, Any], problem: str
) -> None:
    assert format_problems(given, rw.QuantizeConfig(**settings)) == [problem]


def test_what_it_advises_works() -> None:
    given = shapes(4096) + shapes(584, 584, last="odd")
    config = rw.QuantizeConfig(group_size=128, dynamic={"odd$": {"group_size": -1}})
    assert format_problems(given, config) == []


def test_a_run_takes_the_size_that_fits(llama: Path, tmp_path: Path) -> None:
    assert {s.in_features for s in layer_shapes(open_streamed_model(llama).blocks)} == {64, 96}
    made = rw.quantize(
        llama, tmp_path / "out", rw.QuantizeConfig(recipe="textbook"), windows(), samples=4, seq_len=32
    )  # fmt: skip
    assert any(line.startswith("groups of 32: ") for line in made.warnings)
    layers = quantized_layers(Checkpoint(tmp_path / "out"))
    assert {len(layer.tensors["scales"].read()) for layer in layers} == {2, 3}  # 64 and 96 channels


@pytest.mark.parametrize(
    ("heads", "kv_heads", "down", "group", "degrees"),
    [
        (32, 8, 14336, 128, [1, 2, 4, 8, 16]),  # Llama 3 8B: 14336 / 32 is not a multiple of 128
        (32, 8, 14336, 64, [1, 2, 4, 8, 16, 32]),
        (32, 32, 11008, 128, [1, 2]),  # Llama 2 7B: 11008 = 86 groups of 128
        (12, 12, 14336, 128, [1, 2, 4]),
        (32, 8, 14336, -1, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_tensor_parallelism_needs_whole_groups_and_heads(
    heads: int, kv_heads: int, down: int, group: int, degrees: list[int]
) -> None:
    linears = [(4096, 4096, group), (1024, 4096, group), (down, 4096, group), (4096, down, group)]
    assert tensor_parallel_degrees(linears, hidden=4096, heads=heads, kv_heads=kv_heads) == degrees
