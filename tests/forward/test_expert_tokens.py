"""Calibration tokens of experts: the model computes the same, and each expert gets its own tokens."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from roundwise.calibration.dataset import load_calibration
from roundwise.calibration.windows import Batch
from roundwise.config import CalibrationConfig
from roundwise.core.drift import Drift
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.input_groups import InputGroup
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.streamed import StreamedModel, open_streamed_model
from tests.helpers import batches, hidden, inputs, run_blocks, windows
from tests.mixtures import MIXTURES

MODES = pytest.mark.parametrize("sequential", [True, False], ids=["true_sequential", "block"])
POLICIES = pytest.mark.parametrize(
    "policy",
    [ExpertCalibration("routed"), ExpertCalibration("routed", 1000), ExpertCalibration("all")],
    ids=["routed", "few", "all"],
)
NAMES = pytest.mark.parametrize("name", MIXTURES)


def loaded_model(folder: Path) -> StreamedModel:
    """The model with experts as linears, completely loaded."""
    streamed = open_streamed_model(folder)
    streamed.load(streamed.model, "")
    return streamed


@torch.no_grad()
def inputs_of(folder: Path, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The inputs [tokens, in] of each linear of the blocks, in the plain model."""
    streamed, seen = loaded_model(folder), defaultdict(list)

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))

    for block in streamed.blocks:
        for name, linear in block.linears.items():
            linear.register_forward_pre_hook(hook(name))
    for row in rows:
        streamed.model(input_ids=torch.tensor([row]), use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def groups_of_run(
    folder: Path, calibration: list[Batch], policy: ExpertCalibration, **options: Any
) -> list[InputGroup]:
    """All groups with their Hessians; weights are not replaced."""
    groups: list[InputGroup] = []

    def keep(group: InputGroup) -> None:
        groups.append(InputGroup(group.names, group.hessian, fallback=group.fallback))

    for _ in run_blocks(open_streamed_model(folder), calibration, keep, policy=policy, **options):
        pass
    return groups


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "with reference"])
@MODES
@POLICIES
@NAMES
def test_hidden_states_equal_those_of_the_plain_model(
    name: str,
    policy: ExpertCalibration,
    sequential: bool,
    reference: bool,
    folder_of: Callable[[str], Path],
) -> None:
    streamed, calibration = loaded_model(folder_of(name)), batches(windows())
    expected = defaultdict(list)
    for block in streamed.blocks:
        block.module.register_forward_hook(
            lambda _m, _a, out, key=block.name: expected[key].append(hidden(out))
        )
    with torch.no_grad():
        for batch in calibration:
            streamed.model(**inputs(batch), use_cache=False)
    fresh = open_streamed_model(folder_of(name))
    runs = run_blocks(fresh, calibration, policy=policy, sequential=sequential, reference=reference)
    for block, (_, scheduler) in zip(fresh.blocks, runs, strict=False):
        for batch in [*scheduler.quantized, *scheduler.references]:
            torch.testing.assert_close(
                hidden(batch.output), expected[block.name][batch.number], rtol=1e-4, atol=1e-5
            )


@MODES
@NAMES
def test_an_experts_hessian_sums_the_tokens_routed_to_it(
    name: str, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    rows = windows()
    seen = inputs_of(folder_of(name), rows)
    groups = groups_of_run(
        folder_of(name), batches(rows), ExpertCalibration(), sequential=sequential
    )
    experts = [group for group in groups if ".experts." in group.names[0]]
    gated = "w1" if name == "mixtral" else "gate_proj"
    for group in experts:
        X = seen[group.names[0]].double()
        assert len(X) < 4 * 32
        assert group.hessian is not None
        assert group.hessian.tokens == len(X)
        torch.testing.assert_close(
            group.hessian.mean().double(), X.T @ X / len(X), rtol=1e-3, atol=1e-5
        )
        assert group.fallback is None
        # Gate and up of one expert share their Hessian.
        assert len(group.names) == (2 if group.names[0].endswith(gated) else 1)
    layers = sum(len(block.experts) for block in open_streamed_model(folder_of(name)).blocks)
    assert len(experts) == layers * 4 * 2


@MODES
@NAMES
def test_with_all_tokens_experts_share_one_hessian(
    name: str, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    groups = groups_of_run(
        folder_of(name), batches(windows()), ExpertCalibration("all"), sequential=sequential
    )
    experts = [group for group in groups if any(".experts." in n for n in group.names)]
    assert {group.hessian.tokens for group in experts if group.hessian} == {4 * 32}
    layers = sum(len(block.experts) for block in open_streamed_model(folder_of(name)).blocks)
    assert len(experts) == layers * (1 + 4)  # one for all gates and ups, and one for each down
    assert not any(group.fallback for group in experts)


@MODES
def test_an_expert_with_too_few_tokens_gets_all_and_is_reported(
    sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    path = folder_of("qwen3_moe")
    checked = set()
    tokens = [
        len(inputs_of(path, windows())[f"model.layers.0.mlp.experts.{e}.up_proj"]) for e in range(4)
    ]
    least = sorted(tokens)[1]  # one expert has fewer
    groups = groups_of_run(
        path, batches(windows()), ExpertCalibration("routed", least), sequential=sequential
    )
    for group in groups:
        if group.names[0].startswith("model.layers.0.mlp.experts."):
            expert = int(group.names[0].split(".")[5])
            checked.add(expert)
            assert group.hessian is not None
            few = tokens[expert] < least
            assert group.hessian.tokens == (4 * 32 if few else tokens[expert])
            assert (group.fallback is not None) == few
            if few:
                assert f"{tokens[expert]} of 128 calibration tokens" in str(group.fallback)
    assert len(checked) == 4


@MODES
@POLICIES
def test_padding_does_not_count(
    policy: ExpertCalibration, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    rows = [row[:length] for row, length in zip(windows(), (32, 21, 30, 9), strict=True)]

    def with_batches_of(size: int) -> list[InputGroup]:
        calibration = load_calibration(
            rows, None, CalibrationConfig(samples=4, seq_len=32, batch_size=size, seed=0)
        )
        return groups_of_run(
            folder_of("mixtral"), calibration.batches, policy, sequential=sequential
        )

    together, alone = with_batches_of(4), with_batches_of(1)
    assert [group.names for group in together] == [group.names for group in alone]
    for padded, exact in zip(together, alone, strict=True):
        assert padded.hessian and exact.hessian
        assert padded.hessian.tokens == exact.hessian.tokens
        torch.testing.assert_close(
            padded.hessian.mean(), exact.hessian.mean(), rtol=1e-3, atol=1e-4
        )


@MODES
@POLICIES
def test_drift_compares_the_same_tokens_of_both_models(
    policy: ExpertCalibration, sequential: bool, folder_of: Callable[[str], Path]
) -> None:
    # A larger output of the attention makes the routers of both models choose different experts.
    streamed, calibration = open_streamed_model(folder_of("mixtral")), batches(windows())
    block, path = streamed.blocks[0], MIXTURES["mixtral"].experts
    calls: dict[tuple[bool, int], tuple[torch.Tensor, torch.Tensor]] = {}
    drifts: dict[int, tuple[int, Drift]] = {}

    def solve(group: InputGroup) -> None:
        if group.names == [f"{block.name}.self_attn.o_proj"]:
            linear = block.linears[group.names[0]]
            linear.weight = torch.nn.Parameter(4 * linear.weight, requires_grad=False)
        gates = [name for name in group.names if name.startswith(path) and name.endswith("w1")]
        if gates:
            assert group.hessian is not None
            moments = copy.deepcopy(group).take_moments()
            assert moments is not None
            measured = moments.tokens, moments.drift
            drifts.update({int(name.split(".")[5]): measured for name in gates})

    streamed.load_outside_blocks()
    with ForwardScheduler(
        streamed.model, streamed.blocks, calibration, reference=True, policy=policy
    ) as scheduler:
        scheduler.advance_to_block()
        streamed.load(block.module, block.name)
        groups = scheduler.discover_groups(block)

        def note(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            batch = scheduler.hooks._current()
            calls.setdefault((batch.is_reference, batch.number), (args[0], args[1]))

        block.experts[path].register_forward_pre_hook(note)
        scheduler.run_block(block, groups, solve, sequential=sequential)
    differ = False
    for expert, (tokens, drift) in drifts.items():
        total, count = torch.zeros(64, 64, dtype=torch.float64), 0
        for number in range(len(calibration)):
            (x, chosen), (original, other) = calls[False, number], calls[True, number]
            differ |= not torch.equal(chosen, other)
            rows = (chosen == expert).any(-1)
            if policy.gather == "all" or policy.minimum:
                rows = torch.ones_like(rows)
            total += (original - x)[rows].double().T @ x[rows].double()
            count += int(rows.sum())
        assert tokens == count
        assert drift.input is not None
        torch.testing.assert_close(drift.input.double(), total / count, rtol=1e-3, atol=1e-5)
    assert len(drifts) == 4
    assert differ == sequential  # in block mode both models have the same weights while summing
