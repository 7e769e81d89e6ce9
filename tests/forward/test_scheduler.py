"""The paused forward is the model's own forward: same bits, whatever the architecture and the mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from roundwise.calibration.dataset import load_calibration
from roundwise.config import CalibrationConfig
from roundwise.errors import NumericalError, RunError
from roundwise.forward.input_groups import InputGroup
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.streamed import open_streamed_model
from roundwise.system.half_matmul import cpu_half_matmul
from tests.helpers import ARCHITECTURES, batches, conduct, hidden, inputs, windows

MODES = pytest.mark.parametrize("sequential", [True, False], ids=["true_sequential", "block"])
NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


def block_outputs(folder: Path, blocks: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states behind each block of the plain model, as transformers loads and runs it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    seen: list[torch.Tensor] = []
    for block in model.get_submodule(blocks):
        block.register_forward_hook(lambda _m, _a, output: seen.append(hidden(output)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    return seen


def collected(
    folder: Path, rows: list[list[int]], size: int, *, sequential: bool
) -> list[InputGroup]:
    """All groups with their Hessians, nothing replaced. The rows may differ in length."""
    calibration = load_calibration(
        rows, None, CalibrationConfig(samples=len(rows), seq_len=32, batch_size=size, seed=0
    ))  # fmt: skip
    found: list[InputGroup] = []

    def keep(group: InputGroup) -> None:
        found.append(InputGroup(group.names, group.hessian))

    for _ in conduct(open_streamed_model(folder), calibration.batches, keep, sequential=sequential):
        pass
    return found


@pytest.mark.parametrize("reference", [False, True], ids=["alone", "with reference"])
@MODES
@NAMES
def test_hidden_states_are_those_of_the_plain_model_bit_for_bit(
    name: str, sequential: bool, reference: bool, folder_of: Callable[[str], Path]
) -> None:
    folder, played = folder_of(name), batches(windows())
    expected = [block_outputs(folder, ARCHITECTURES[name].blocks, inputs(b)) for b in played]
    streamed = open_streamed_model(folder)
    behind = conduct(streamed, played, sequential=sequential, reference=reference)
    for index, (_, scheduler) in enumerate(behind):
        assert len(scheduler.references) == (len(played) if reference else 0)
        for player in [*scheduler.quantized, *scheduler.references]:
            assert torch.equal(hidden(player.output), expected[player.number][index])
    assert index == len(streamed.blocks) - 1


def test_hidden_states_of_the_trained_model_in_bfloat16(tiny: Path) -> None:
    played = batches(windows(length=200), size=4)
    with (
        cpu_half_matmul()
    ):  # as a run does where the processor has no bfloat16: equal to the last bit
        expected = block_outputs(tiny, "model.layers", inputs(played[0]))
    assert expected[0].dtype == torch.bfloat16
    for index, (_, scheduler) in enumerate(conduct(open_streamed_model(tiny), played)):
        assert torch.equal(hidden(scheduler.quantized[0].output), expected[index])


@MODES
@NAMES
def test_the_reference_stays_the_original_whatever_is_replaced(
    name: str, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    folder, played = folder_of(name), batches(windows())
    expected = [block_outputs(folder, ARCHITECTURES[name].blocks, inputs(b)) for b in played]
    streamed = open_streamed_model(folder)

    def double(group: InputGroup) -> None:
        for block in streamed.blocks:
            for linear in [block.linears[n] for n in group.names if n in block.linears]:
                linear.weight = torch.nn.Parameter(2 * linear.weight, requires_grad=False)

    behind = conduct(streamed, played, double, sequential=sequential, reference=True)
    for index, (_, scheduler) in enumerate(behind):
        for player in scheduler.references:
            assert torch.equal(hidden(player.output), expected[player.number][index])
        for player in scheduler.quantized:
            assert not torch.equal(hidden(player.output), expected[player.number][index])


@NAMES
def test_linears_that_read_the_same_input_form_a_group(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    architecture = ARCHITECTURES[name]
    behind = conduct(open_streamed_model(folder_of(name)), batches(windows()))
    for index, (groups, _) in enumerate(behind):
        prefix = f"{architecture.blocks}.{index}."
        found = [tuple(n.removeprefix(prefix) for n in group.names) for group in groups]
        assert found == architecture.groups


@MODES
@NAMES
def test_the_hessian_is_that_of_the_inputs(
    name: str, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    folder, rows = folder_of(name), windows()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for group in collected(folder, rows, 2, sequential=sequential):
        seen: list[torch.Tensor] = []
        hooks = [
            model.get_submodule(n).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            for n in group.names
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor(rows), use_cache=False)
        for hook in hooks:
            hook.remove()
        X = seen[0].reshape(-1, seen[0].shape[-1]).double()
        assert all(torch.equal(seen[0], other) for other in seen)
        assert group.hessian is not None
        assert group.hessian.tokens == len(X) == 4 * 32
        torch.testing.assert_close(
            group.hessian.mean().double(), X.T @ X / len(X), rtol=1e-4, atol=1e-5
        )


@MODES
@NAMES
def test_padding_does_not_count(
    name: str, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    rows = [row[:length] for row, length in zip(windows(), (32, 21, 30, 9), strict=True)]
    together = collected(folder_of(name), rows, 4, sequential=sequential)
    alone = collected(folder_of(name), rows, 1, sequential=sequential)
    for padded, exact in zip(together, alone, strict=True):
        assert padded.names == exact.names
        assert padded.hessian and exact.hessian
        assert padded.hessian.tokens == exact.hessian.tokens == 32 + 21 + 30 + 9
        torch.testing.assert_close(
            padded.hessian.mean(), exact.hessian.mean(), rtol=1e-3, atol=1e-4
        )


def test_a_group_is_solved_before_the_next_one_is_reached_in_sequence_only(llama: Path) -> None:
    # Doubling v doubles what o reads, in true_sequential mode; block mode reads before it solves.
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

        for _ in conduct(streamed, batches(windows()), double, sequential=sequential):
            break
    assert traces[True, "q_proj"] == traces[False, "q_proj"]
    assert traces[True, "o_proj"] == pytest.approx(4 * traces[False, "o_proj"], rel=1e-5)


@MODES
def test_every_batch_sees_the_replaced_weights(llama: Path, sequential: bool) -> None:
    # With all linears of block 0 at zero, the block returns its input plus the biases.
    streamed = open_streamed_model(llama)

    def clear(group: InputGroup) -> None:
        for name in group.names:
            if name in streamed.blocks[0].linears:
                for parameter in streamed.blocks[0].linears[name].parameters():
                    parameter.zero_()

    played = batches(windows())
    behind = conduct(streamed, played, clear, sequential=sequential)
    _, scheduler = next(behind)
    embedding = streamed.model.get_input_embeddings()
    for player in scheduler.quantized:
        assert torch.equal(hidden(player.output), embedding(player.batch.input_ids))
    behind.close()


def test_the_model_is_left_as_it_was(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    before = {name: type(module).forward for name, module in streamed.model.named_modules()}
    for _ in conduct(streamed, batches(windows())):
        break
    for name, module in streamed.model.named_modules():
        assert "forward" not in vars(module)
        assert type(module).forward is before[name]
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("blocks", [1, 2], ids=["broken off", "to the end"])
def test_grad_mode_is_left_as_it_was(enabled: bool, blocks: int, llama: Path) -> None:
    # It belongs to the thread, which all players share: each leaving its own would mix them up.
    with torch.set_grad_enabled(enabled):
        behind = conduct(open_streamed_model(llama), batches(windows(6)))
        for _ in range(blocks):
            _, scheduler = next(behind)
            assert not hidden(scheduler.quantized[0].output).requires_grad
        for _ in behind if blocks == 2 else ():
            pass
        behind.close()
        assert torch.is_grad_enabled() == enabled


def test_infinite_activations_name_the_layer_and_the_batch(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    played = batches(windows(6))
    streamed.load_outside_blocks()
    with torch.no_grad():
        streamed.model.get_input_embeddings().weight[2] = torch.inf
    played[1].input_ids[0, 3] = 2
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj, calibration batch 1:"):
        list(conduct(streamed, played))


def test_a_linear_that_is_called_twice_is_refused_by_name(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    mlp = streamed.blocks[0].module.mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + plain(x)
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.gate_proj is called more than once"):
        list(conduct(streamed, batches(windows())))


def test_blocks_that_are_not_called_in_their_order_are_refused(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    streamed.model.model.layers[0].forward = lambda x, **_: x
    streamed.blocks.append(streamed.blocks[0])
    streamed.load_outside_blocks()
    with ForwardScheduler(streamed.model, streamed.blocks[:2], batches(windows())) as scheduler:
        scheduler.advance_to_block()
        with pytest.raises(RunError, match="one after another"):
            for _ in range(3):
                scheduler.advance_to_block()
