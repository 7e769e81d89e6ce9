"""Paused forwards: batches wait in front of the first block that they call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from roundwise.calibration.windows import Batch
from roundwise.errors import RunError
from roundwise.forward.paused_forwards import PausedForwards
from roundwise.model.blocks import Block


class Seeing(nn.Module):
    """A model whose tower is called for pictures only, and twice for two."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"is_encoder_decoder": False})()
        self.dtype = torch.float32
        self.tower, self.text = nn.Linear(32, 32), nn.Linear(32, 32)
        self.embedding = nn.Embedding(8, 32)

    def forward(
        self, input_ids: torch.Tensor, pixels: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        x = self.embedding(input_ids)
        for picture in [] if pixels is None else pixels:
            x = x + self.tower(picture)
        return self.text(x)


def scheduler(batches: list[Batch], *, skip: int = 0) -> PausedForwards:
    model = Seeing()
    blocks = [
        Block("tower", model.tower, {"tower": model.tower}, is_tower=True),
        Block("text", model.text, {"text": model.text}, stack=1),
    ]
    return PausedForwards(model, blocks, batches, skip=skip)


IDS = torch.tensor([[1, 2, 3]])


def with_pictures(count: int) -> Batch:
    return Batch(IDS, None, inputs={"pixels": torch.randn(count, 3, 32)})


def test_batches_without_pictures_wait_in_front_of_the_text_blocks() -> None:
    batches = [Batch(IDS, None), with_pictures(1), Batch(IDS, None), with_pictures(1)]
    with scheduler(batches) as paused:
        paused.advance_to_block()
        assert [batch.number for batch in paused.quantized] == [1, 3]
        assert [batch.key for batch in paused.probes] == ["probe-1"]  # the one with a picture
        assert [batch.block for batch in paused.batches] == [1, 0, 1, 0, 1, 0]
        for batch in [*paused.probes, *paused.quantized]:
            batch.task.switch()  # type: ignore[union-attr]
        paused.advance_to_block()
        assert [batch.number for batch in paused.quantized] == [0, 1, 2, 3]
        assert [batch.key for batch in paused.probes] == ["probe", "probe-1"]


def test_finished_blocks_of_towers_are_run_again() -> None:
    assert scheduler([with_pictures(1)], skip=1).order == [0, 1]
    assert scheduler([with_pictures(1)], skip=0).order == [0, 1]


def test_a_tower_that_is_called_twice_is_refused() -> None:
    with scheduler([with_pictures(2)]) as paused:
        paused.advance_to_block()
        for batch in [*paused.probes, *paused.quantized]:
            batch.task.switch()  # type: ignore[union-attr]
        with pytest.raises(RunError, match="one after another, each once"):
            paused.advance_to_block()
