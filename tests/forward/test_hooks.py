"""Sums of inputs are those of the plain model; padding does not count; hooks are removed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from roundwise.calibration.dataset import load_calibration
from roundwise.config import CalibrationConfig
from roundwise.errors import NumericalError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, batches, run_blocks, windows

MODES = pytest.mark.parametrize("sequential", [True, False], ids=["true_sequential", "block"])
NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


def groups_of_run(
    folder: Path, rows: list[list[int]], size: int, *, sequential: bool
) -> list[InputGroup]:
    """All groups with their Hessians; weights are not replaced. The rows may differ in length."""
    calibration = load_calibration(
        rows, None, CalibrationConfig(samples=len(rows), seq_len=32, batch_size=size, seed=0
    ))  # fmt: skip
    groups: list[InputGroup] = []

    def keep(group: InputGroup) -> None:
        groups.append(InputGroup(group.names, group.hessian))

    streamed = open_streamed_model(folder)
    for _ in run_blocks(streamed, calibration.batches, keep, sequential=sequential):
        pass
    return groups


@MODES
@NAMES
def test_hessians_equal_those_of_the_plain_models_inputs(
    name: str, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    folder, rows = folder_of(name), windows()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for group in groups_of_run(folder, rows, 2, sequential=sequential):
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
    together = groups_of_run(folder_of(name), rows, 4, sequential=sequential)
    alone = groups_of_run(folder_of(name), rows, 1, sequential=sequential)
    for padded, exact in zip(together, alone, strict=True):
        assert padded.names == exact.names
        assert padded.hessian and exact.hessian
        assert padded.hessian.tokens == exact.hessian.tokens == 32 + 21 + 30 + 9
        torch.testing.assert_close(
            padded.hessian.mean(), exact.hessian.mean(), rtol=1e-3, atol=1e-4
        )


def test_hooks_and_wrapped_forwards_are_removed(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    before = {name: type(module).forward for name, module in streamed.model.named_modules()}
    for _ in run_blocks(streamed, batches(windows())):
        break
    for name, module in streamed.model.named_modules():
        assert "forward" not in vars(module)
        assert type(module).forward is before[name]
        assert not module._forward_pre_hooks


def test_infinite_activations_name_the_layer_and_the_batch(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    calibration = batches(windows(6))
    streamed.load_outside_blocks()
    with torch.no_grad():
        streamed.model.get_input_embeddings().weight[2] = torch.inf
    calibration[1].input_ids[0, 3] = 2
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj, calibration batch 1:"):
        list(run_blocks(streamed, calibration))


def test_a_layer_that_sees_other_tokens_than_the_batch_is_refused_with_padding(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    mlp = streamed.blocks[0].module.mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x[:, 1:]).sum() + x  # one token fewer than the mask
    rows = [row[:length] for row, length in zip(windows(2), (32, 21), strict=True)]
    config = CalibrationConfig(samples=2, seq_len=32, batch_size=2)
    calibration = load_calibration(rows, None, config).batches
    with pytest.raises(NumericalError, match="the layer sees only some of the tokens"):
        list(run_blocks(streamed, calibration))
