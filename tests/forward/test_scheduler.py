"""The paused forward computes what the plain model computes, bit for bit, in both modes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import _get_current_function_mode

from roundwise.errors import RunError
from roundwise.forward.input_groups import InputGroup
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.streamed import open_streamed_model
from roundwise.system import half_matmul
from roundwise.system.half_matmul import CpuHalfMatmul, cpu_half_matmul
from tests.helpers import ARCHITECTURES, batches, hidden, inputs, run_blocks, windows

MODES = pytest.mark.parametrize("sequential", [True, False], ids=["true_sequential", "block"])
NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


def block_outputs(folder: Path, blocks: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states after each block of the plain model, as transformers loads and runs it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    seen: list[torch.Tensor] = []
    for block in model.get_submodule(blocks):
        block.register_forward_hook(lambda _m, _a, output: seen.append(hidden(output)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    return seen


@pytest.mark.parametrize("reference", [False, True], ids=["alone", "with reference"])
@MODES
@NAMES
def test_hidden_states_equal_those_of_the_plain_model_bit_for_bit(
    name: str, sequential: bool, reference: bool, folder_of: Callable[[str], Path]
) -> None:
    folder, calibration = folder_of(name), batches(windows())
    blocks = ARCHITECTURES[name].blocks
    expected = [block_outputs(folder, blocks, inputs(batch)) for batch in calibration]
    streamed = open_streamed_model(folder)
    runs = run_blocks(streamed, calibration, sequential=sequential, reference=reference)
    for index, (_, scheduler) in enumerate(runs):
        assert len(scheduler.references) == (len(calibration) if reference else 0)
        for batch in [*scheduler.quantized, *scheduler.references]:
            assert torch.equal(hidden(batch.output), expected[batch.number][index])
    assert index == len(streamed.blocks) - 1


def test_hidden_states_of_the_trained_model_in_bfloat16(tiny: Path) -> None:
    calibration = batches(windows(length=200), size=4)
    with cpu_half_matmul():  # as the scheduler does, so that results are equal to the last bit
        expected = block_outputs(tiny, "model.layers", inputs(calibration[0]))
    assert expected[0].dtype == torch.bfloat16
    for index, (_, scheduler) in enumerate(run_blocks(open_streamed_model(tiny), calibration)):
        assert torch.equal(hidden(scheduler.quantized[0].output), expected[index])


@MODES
@NAMES
def test_the_reference_computes_with_original_weights(
    name: str, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    folder, calibration = folder_of(name), batches(windows())
    blocks = ARCHITECTURES[name].blocks
    expected = [block_outputs(folder, blocks, inputs(batch)) for batch in calibration]
    streamed = open_streamed_model(folder)

    def double(group: InputGroup) -> None:
        for block in streamed.blocks:
            for linear in [block.linears[n] for n in group.names if n in block.linears]:
                linear.weight = torch.nn.Parameter(2 * linear.weight, requires_grad=False)

    runs = run_blocks(streamed, calibration, double, sequential=sequential, reference=True)
    for index, (_, scheduler) in enumerate(runs):
        for batch in scheduler.references:
            assert torch.equal(hidden(batch.output), expected[batch.number][index])
        for batch in scheduler.quantized:
            assert not torch.equal(hidden(batch.output), expected[batch.number][index])


def test_only_true_sequential_solves_a_group_before_the_next_one_is_reached(llama: Path) -> None:
    # Doubling v doubles the input of o in true_sequential mode; block mode sums inputs before.
    traces = {}
    for sequential in (True, False):
        streamed = open_streamed_model(llama)
        linears = streamed.blocks[0].linears

        def double(group: InputGroup, linears: Any = linears) -> None:
            assert group.hessian is not None
            key = (sequential, group.names[0].rpartition(".")[2])  # noqa: B023
            traces.setdefault(key, float(group.hessian.mean().diagonal().sum()))
            for name in group.names:
                if name.endswith("v_proj") and name in linears:
                    linears[name].weight.mul_(2)
                    linears[name].bias.mul_(2)

        for _ in run_blocks(streamed, batches(windows()), double, sequential=sequential):
            break
    assert traces[True, "q_proj"] == traces[False, "q_proj"]
    assert traces[True, "o_proj"] == pytest.approx(4 * traces[False, "o_proj"], rel=1e-5)


@MODES
def test_all_batches_run_with_the_replaced_weights(llama: Path, sequential: bool) -> None:
    # With all linears and biases of block 0 at zero, the block returns its input.
    streamed = open_streamed_model(llama)

    def clear(group: InputGroup) -> None:
        for name in group.names:
            if name in streamed.blocks[0].linears:
                for parameter in streamed.blocks[0].linears[name].parameters():
                    parameter.zero_()

    runs = run_blocks(streamed, batches(windows()), clear, sequential=sequential)
    _, scheduler = next(runs)
    embedding = streamed.model.get_input_embeddings()
    for batch in scheduler.quantized:
        assert torch.equal(hidden(batch.output), embedding(batch.batch.input_ids))
    runs.close()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("blocks", [1, 2], ids=["stopped", "to the end"])
def test_grad_mode_is_restored(enabled: bool, blocks: int, llama: Path) -> None:
    # Grad mode belongs to the thread, which all batches share.
    with torch.set_grad_enabled(enabled):
        runs = run_blocks(open_streamed_model(llama), batches(windows(6)))
        for _ in range(blocks):
            _, scheduler = next(runs)
            assert not hidden(scheduler.quantized[0].output).requires_grad
        for _ in runs if blocks == 2 else ():
            pass
        runs.close()
        assert torch.is_grad_enabled() == enabled


def test_blocks_that_are_not_called_one_after_another_are_refused(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    streamed.model.model.layers[0].forward = lambda x, **_: x
    streamed.blocks.append(streamed.blocks[0])
    streamed.load_outside_blocks()
    with ForwardScheduler(streamed.model, streamed.blocks[:2], batches(windows())) as scheduler:
        scheduler.advance_to_block()
        with pytest.raises(RunError, match="one after another"):
            for _ in range(3):
                scheduler.advance_to_block()


@pytest.mark.parametrize("sequential", [True, False])
def test_hooks_run_outside_the_matmul_mode(
    sequential: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the model's own forward passes through `cpu_half_matmul`, and only if that changes it."""
    callers: list[str] = []
    dispatch = CpuHalfMatmul.__torch_function__

    def note(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame, files = sys._getframe(1), []
        while frame is not None and len(files) < 12:
            files.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
            frame = frame.f_back
        callers.append(" ".join(files))
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(CpuHalfMatmul, "__torch_function__", note)
    for native in (True, False):  # the bundled model is in bfloat16
        monkeypatch.setattr(half_matmul, "has_native_matmul", lambda _, native=native: native)
        callers.clear()
        rows = windows(4, length=16)
        for _ in run_blocks(
            open_streamed_model(tiny), batches(rows), sequential=sequential, reference=True
        ):
            pass
        assert bool(callers) is not native
        # Innermost frames first: the model's forward comes before the scheduler that resumed it.
        first = [re.search(r"transformers/|roundwise/(core|forward)/", line) for line in callers]
        assert all(match and match[0] == "transformers/" for match in first)
        assert _get_current_function_mode() is None
