"""Where batches stop, whose weights they run with, and the error between two models' hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from roundwise.calibration.windows import Batch
from roundwise.errors import CheckpointError
from roundwise.forward.batch import (
    COUNTED,
    ENTER,
    EXIT,
    GATHERED,
    PausedBatch,
    WeightSwap,
    at_experts,
    at_group,
    block_output,
    depth_error,
    hidden,
)
from roundwise.system.distributed import Ranks


def paused(number: int, output: object, mask: torch.Tensor | None = None) -> PausedBatch:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    return PausedBatch(Batch(ids, mask), number, stopped_at=EXIT, output=output)


def test_stops_compare_in_the_order_in_which_a_batch_reaches_them() -> None:
    stops = [ENTER, COUNTED, at_experts(0), at_group(0), at_group(1), at_experts(2), GATHERED, EXIT]
    assert stops == sorted(stops)
    assert len(set(stops)) == len(stops)


def test_keys_name_batch_and_model() -> None:
    batch = paused(3, None)
    batch.reference = PausedBatch(batch.batch, 3, batch, is_reference=True)
    assert [batch.key, batch.reference.key, paused(-1, None).key] == [
        "quantized-3", "original-3", "probe",
    ]  # fmt: skip


def test_the_weights_of_the_model_that_runs_are_in_place() -> None:
    linear = nn.Linear(2, 2)
    original, quantized = (nn.Parameter(torch.full((2, 2), value)) for value in (1.0, 2.0))
    linear.weight = quantized
    swap = WeightSwap()
    swap.add([linear], [original])
    for is_original, weight in ((False, quantized), (True, original), (False, quantized)):
        swap.use(original=is_original)
        assert linear.weight is weight


def test_hidden_states_are_the_output_or_the_first_of_a_tuple() -> None:
    h = torch.zeros(1)
    assert hidden(h) is hidden((h, None)) is h


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_depth_error_is_the_relative_distance_over_tokens_that_count(
    as_tuple: bool, padded: bool
) -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]]) if padded else None
    outputs = torch.randn(2, 2, 2, 3, 4)  # batch, model, window, token, channel
    batches = []
    for number in range(2):
        h, original = outputs[number]
        batch = paused(number, (h,) if as_tuple else h, mask)
        batch.reference = paused(number, (original,) if as_tuple else original, mask)
        batches.append(batch)
    counting = torch.ones(2, 3, dtype=torch.bool) if mask is None else mask
    lost = sum(float((h - o)[counting].square().sum()) for h, o in outputs)
    whole = sum(float(o[counting].square().sum()) for _, o in outputs)
    assert depth_error(batches, Ranks()) == pytest.approx(lost / whole, rel=1e-5)


def test_depth_error_loads_offloaded_batches_one_after_another() -> None:
    loaded: list[str] = []

    @contextmanager
    def onloaded(key: str) -> Iterator[None]:
        loaded.append(key)
        yield

    batch = paused(0, torch.ones(2, 3, 4))
    batch.reference = PausedBatch(batch.batch, 0, batch, is_reference=True, output=batch.output)
    assert depth_error([batch], Ranks(), onloaded) == 0.0
    assert loaded == ["quantized-0", "original-0"]


def test_without_a_reference_there_is_no_depth_error() -> None:
    assert depth_error([paused(0, torch.ones(2, 3, 4))], Ranks()) is None


class TestBlockOutput:
    """What a block returns: hidden states, alone or first."""

    def test_lists_become_tuples(self) -> None:
        states, cache = torch.ones(1, 2), torch.zeros(1)
        assert block_output("b", self, states) is states
        assert block_output("b", self, (states, None)) == (states, None)
        assert block_output("b", self, [states, cache]) == (states, cache)

    @pytest.mark.parametrize("output", [None, {"x": torch.ones(1)}, [], (), [None], ("a",), 3])
    def test_anything_else_is_named(self, output: Any) -> None:
        with pytest.raises(
            CheckpointError, match=r"block h\.3 \(TestBlockOutput\) returns .*--method"
        ):
            block_output("h.3", self, output)
